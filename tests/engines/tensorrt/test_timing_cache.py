from __future__ import annotations

import pytest
from filelock import FileLock

from engines.tensorrt import timing_cache
from engines.tensorrt.timing_cache import TimingCacheFile, timing_cache_path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache" / "10.3.0_Orin_sm87.timing"


def test_the_name_has_version_device_and_sm(tmp_path):
    path = timing_cache_path(tmp_path, "10.3.0", "NVIDIA A10 (24 GB)/x", 86)
    assert path.parent == tmp_path
    assert path.name == "10.3.0-NVIDIA-A10-24-GB-x-sm86.timing"
    others = {timing_cache_path(tmp_path, "10.4.0", "a", 86), timing_cache_path(tmp_path, "10.4.0", "a", 87)}
    assert len(others) == 2


def test_round_trip_and_merge(path):
    file = TimingCacheFile(path)
    assert file.read() is None
    assert file.merge(lambda stored: b"first")
    assert file.read() == b"first"
    assert file.merge(lambda stored: stored + b" second")
    assert TimingCacheFile(path).read() == b"first second"
    assert {entry.suffix for entry in path.parent.iterdir()} <= {".timing", ".lock"}


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b"", lambda b: b[:40] + b"x" + b[41:]])
def test_a_damaged_file_is_discarded_and_rebuilt(path, damage, caplog):
    file = TimingCacheFile(path)
    file.merge(lambda stored: b"0123456789" * 10)
    path.write_bytes(damage(path.read_bytes()))
    assert file.read() is None
    assert "damaged" in caplog.text
    assert not path.exists()
    file.merge(lambda stored: b"again" if stored is None else b"wrong")
    assert file.read() == b"again"


def test_a_failing_build_leaves_the_old_file(path):
    file = TimingCacheFile(path)
    file.merge(lambda stored: b"old")

    def fail(stored):
        raise RuntimeError("TensorRT fell")

    with pytest.raises(RuntimeError, match="TensorRT fell"):
        file.merge(fail)
    assert file.read() == b"old"


def test_a_folder_that_cannot_be_made_costs_a_warning(tmp_path, caplog):
    (tmp_path / "file").write_bytes(b"")
    file = TimingCacheFile(tmp_path / "file" / "x.timing")
    assert file.read() is None
    assert not file.merge(lambda stored: b"x")
    assert "cannot be written" in caplog.text


def test_a_lock_that_is_held_costs_a_warning(path, caplog, monkeypatch):
    monkeypatch.setattr(timing_cache, "_LOCK_TIMEOUT_S", 0.05)
    path.parent.mkdir()
    with FileLock(path.with_suffix(".lock")):
        assert not TimingCacheFile(path).merge(lambda stored: b"x")
    assert "cannot be written" in caplog.text
    assert TimingCacheFile(path).merge(lambda stored: b"x")
