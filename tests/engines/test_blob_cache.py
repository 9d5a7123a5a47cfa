from __future__ import annotations

import logging
import os
import time

import numpy as np
import pytest

from engines import get_backend
from engines.blob_cache import BlobCache, blob_key
from pipeline.artifacts import EngineOptions, Fingerprint

FINGERPRINT = Fingerprint("openvino", "1", "cpu", ("avx2",))


def test_gives_back_what_was_put_in(tmp_path):
    cache = BlobCache(tmp_path / "new" / "folder")
    assert cache.get("key") is None
    cache.put("key", b"first")
    cache.put("key", b"second")
    assert cache.get("key") == b"second"
    assert (tmp_path / "new" / "folder").stat().st_mode & 0o077 == 0
    cache.discard("key")
    assert cache.get("key") is None
    cache.discard("key")


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "digest"])
def test_a_damaged_entry_is_deleted(tmp_path, damage, caplog):
    cache = BlobCache(tmp_path)
    cache.put("key", bytes(range(256)) * 10)
    (path,) = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    if damage == "truncate":
        data = data[:-1]
    elif damage == "flip":
        data[1000] ^= 1
    elif damage == "digest":
        data[0] ^= 1
    else:
        data.clear()
    path.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        assert cache.get("key") is None
    assert "damaged" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_least_recently_used_goes_first(tmp_path):
    cache = BlobCache(tmp_path, max_bytes=2 * 132)
    for index, key in enumerate("abc"):
        cache.put(key, bytes(100))
        if key == "b":
            os.utime(tmp_path / "a.blob", ns=(10**18, 10**18))
            os.utime(tmp_path / "b.blob", ns=(10**18 + index, 10**18 + index))
            assert cache.get("a") is not None  # now `b` is the oldest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.blob", "c.blob"]


def test_one_entry_larger_than_the_limit_is_kept(tmp_path):
    cache = BlobCache(tmp_path, max_bytes=10)
    cache.put("a", bytes(100))
    assert cache.get("a") == bytes(100)


def test_what_a_killed_process_left_is_cleared(tmp_path):
    for name, age_s in (("old.blob.tmp", 7200), ("new.blob.tmp", 0)):
        (tmp_path / name).write_bytes(b"half an entry")
        os.utime(tmp_path / name, (time.time() - age_s,) * 2)
    BlobCache(tmp_path).put("a", b"x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.blob", "new.blob.tmp"]


def test_an_unusable_folder_is_a_warning(tmp_path, caplog):
    (tmp_path / "file").write_bytes(b"")
    cache = BlobCache(tmp_path / "file" / "below")
    with caplog.at_level(logging.WARNING):
        cache.put("key", b"x")
        assert cache.get("key") is None
    assert "compil" in caplog.text


def test_key_changes_with_everything_it_stands_for():
    base = blob_key("model", FINGERPRINT, {"batch": 1})
    assert base == blob_key("model", FINGERPRINT, {"batch": 1})
    others = [
        blob_key("model2", FINGERPRINT, {"batch": 1}),
        blob_key("model", FINGERPRINT, {"batch": 2}),
        blob_key("model", FINGERPRINT, {"batch": 1, "threads": 1}),
        blob_key("model", Fingerprint("openvino", "2", "cpu", ("avx2",)), {"batch": 1}),
        blob_key("model", Fingerprint("openvino", "1", "other", ("avx2",)), {"batch": 1}),
        blob_key("model", Fingerprint("openvino", "1", "cpu", ()), {"batch": 1}),
    ]
    assert len({base, *others}) == 7


class TestOpenVinoUsesIt:
    @pytest.fixture
    def load(self, tiny, tmp_path, monkeypatch):
        """``load(**options)`` → (logits, number of compilations)."""
        pytest.importorskip("openvino")
        import engines.openvino as module

        backend = get_backend("openvino")
        artifact = backend.build(tiny.artifact, tmp_path, EngineOptions(threads=1))
        compiled: list[object] = []
        original = module._compile
        monkeypatch.setattr(module, "_compile", lambda *a: (compiled.append(a), original(*a))[1])
        sample = tiny.sample(1, seed=4)

        def run(**options):
            compiled.clear()
            given = EngineOptions(**{"threads": 1, "cache_dir": tmp_path / "cache", **options})
            with backend.load(artifact, given) as runner:
                assert runner.inputs[0].name == "input"
                assert runner.outputs[0].name == "logits"
                logits = runner.infer(sample)["logits"]
                assert np.array_equal(runner.submit(sample).result(timeout=30)["logits"], logits)
            return logits, len(compiled)

        return run

    def test_second_load_imports_and_computes_the_same(self, load):
        first, n_first = load()
        second, n_second = load()
        assert (n_first, n_second) == (1, 0)
        assert np.array_equal(first, second)

    def test_other_options_are_other_entries(self, load):
        for options in ({}, {"batch": 1}, {"mode": "throughput"}, {"threads": 2}):
            assert load(**options)[1] == 1
        assert load(batch=1)[1] == 0

    @pytest.mark.parametrize("keep", [0, 20, 1000])
    def test_corrupt_entry_is_compiled_again(self, load, tmp_path, keep):
        first, _ = load()
        (path,) = (tmp_path / "cache").iterdir()
        path.write_bytes(path.read_bytes()[:keep])
        again, n_compiled = load()
        assert n_compiled == 1
        assert np.array_equal(first, again)
        assert load()[1] == 0

    def test_whole_entry_that_openvino_refuses_is_compiled_again(self, load, tmp_path):
        first, _ = load()
        (path,) = (tmp_path / "cache").iterdir()
        BlobCache(tmp_path / "cache").put(path.stem, b"whole, but no blob of this build")
        again, n_compiled = load()
        assert n_compiled == 1
        assert np.array_equal(first, again)
        assert load()[1] == 0

    def test_an_unwritable_cache_costs_nothing_but_time(self, load, tmp_path):
        (tmp_path / "file").write_bytes(b"")
        for _ in range(2):
            assert load(cache_dir=tmp_path / "file")[1] == 1
