"""What is written is opened, and what was altered is refused."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bundle_fixtures import FILES, make_manifest, write_bundle

from pipeline import bundle as bundle_module
from pipeline.bundle import BundleWriter, open_bundle
from pipeline.errors import IntegrityError, UnsupportedError, UsageError


@pytest.fixture
def written(tmp_path: Path) -> Path:
    write_bundle(tmp_path / "out")
    return tmp_path / "out"


def leftovers(out_dir: Path) -> list[str]:
    """What lies beside the bundle, less the lock file that stays."""
    kept = {out_dir.name, f".{out_dir.name}.lock"}
    return sorted(entry.name for entry in out_dir.parent.iterdir() if entry.name not in kept)


def rewrite_manifest(out_dir: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Edit the manifest as someone would who also corrects its digest."""
    tree = json.loads((out_dir / "manifest.json").read_bytes())
    change(tree)
    data = json.dumps(tree).encode()
    (out_dir / "manifest.json").write_bytes(data)
    (out_dir / "manifest.sha256").write_text(f"{hashlib.sha256(data).hexdigest()}  manifest.json\n")


class TestRoundTrip:
    def test_what_is_written_is_opened(self, written: Path) -> None:
        bundle = open_bundle(written)
        assert bundle.path == written
        assert bundle.manifest.name == "net"
        assert set(bundle.manifest.files) == set(FILES)
        for name, content in FILES.items():
            assert bundle.file(name).read_bytes() == content
            assert bundle.read_bytes(name) == content
            assert bundle.sha256(name) == hashlib.sha256(content).hexdigest()
        assert leftovers(written) == []

    def test_commit_returns_the_bundle_that_open_gives(self, tmp_path: Path) -> None:
        assert write_bundle(tmp_path / "deep" / "er" / "out") == open_bundle(tmp_path / "deep" / "er" / "out")

    def test_sha256sum_can_check_the_manifest(self, written: Path) -> None:
        done = subprocess.run(
            ["sha256sum", "-c", "manifest.sha256"], cwd=written, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr

    def test_files_written_into_the_path_belong_to_it(self, tmp_path: Path) -> None:
        (tmp_path / "source.onnx").write_bytes(b"graph")
        with BundleWriter(tmp_path / "out") as writer:
            (writer.path / "model.int8.onnx").write_bytes(b"int8")
            assert writer.add_file("model.onnx", tmp_path / "source.onnx").read_bytes() == b"graph"
            writer.commit(make_manifest())
        assert set(open_bundle(tmp_path / "out").manifest.files) == {"model.onnx", "model.int8.onnx"}

    def test_a_bundle_can_be_copied_and_moved(self, written: Path, tmp_path: Path) -> None:
        shutil.copytree(written, tmp_path / "copy")
        shutil.move(written, tmp_path / "moved")
        assert open_bundle(tmp_path / "copy").manifest == open_bundle(tmp_path / "moved").manifest

    def test_a_file_it_does_not_have_is_named(self, written: Path) -> None:
        bundle = open_bundle(written)
        for ask in (bundle.file, bundle.sha256, bundle.read_bytes):
            with pytest.raises(IntegrityError, match=r"model\.plan.*it has calibration\.json"):
                ask("model.plan")


class TestOpenRefuses:
    """Every difference, with exit code 5 and the file, what was expected, what was found, the remedy."""

    @pytest.mark.parametrize("name", [*FILES, "manifest.json"])
    def test_one_flipped_bit(self, written: Path, name: str) -> None:
        content = bytearray((written / name).read_bytes())
        content[len(content) // 2] ^= 1
        (written / name).write_bytes(content)
        with pytest.raises(
            IntegrityError, match=rf"'{name}' should be SHA-256 .*, found [0-9a-f]{{64}}; .*rebuild"
        ) as e:
            open_bundle(written)
        assert e.value.exit_code == 5

    def test_a_truncated_file_by_its_size(self, written: Path) -> None:
        (written / "model.onnx").write_bytes(FILES["model.onnx"][:-1])
        with pytest.raises(IntegrityError, match=r"'model\.onnx' should be 550 bytes, found 549 bytes"):
            open_bundle(written)

    @pytest.mark.parametrize("name", [*FILES, "manifest.json", "manifest.sha256"])
    def test_a_missing_file(self, written: Path, name: str) -> None:
        (written / name).unlink()
        with pytest.raises(IntegrityError, match=rf"'{name}' should be a regular file, found none"):
            open_bundle(written)

    def test_two_swapped_files(self, written: Path) -> None:
        (written / "model.onnx").rename(written / "x")
        (written / "model.int8.onnx").rename(written / "model.onnx")
        (written / "x").rename(written / "model.int8.onnx")
        with pytest.raises(IntegrityError, match="should be"):
            open_bundle(written)

    def test_an_edited_manifest(self, written: Path) -> None:
        text = (written / "manifest.json").read_text()
        (written / "manifest.json").write_text(text.replace('"cat"', '"dog"'))
        with pytest.raises(IntegrityError, match=r"'manifest\.json' should be SHA-256"):
            open_bundle(written)

    def test_an_unlisted_file(self, written: Path) -> None:
        (written / "plugin.so").touch()
        with pytest.raises(
            IntegrityError, match=r"'plugin\.so', which its manifest does not list: move it away"
        ):
            open_bundle(written)

    @pytest.mark.parametrize("kind", ["symlink", "hard link", "folder", "pipe"])
    def test_what_is_not_a_file_of_its_own(self, written: Path, tmp_path: Path, kind: str) -> None:
        """Also where the content is right: it can be changed from outside after the check."""
        target = written / "model.onnx"
        outside = tmp_path / "outside"
        outside.write_bytes(FILES["model.onnx"])
        target.unlink()
        if kind == "symlink":
            target.symlink_to(outside)
        elif kind == "hard link":
            target.hardlink_to(outside)
        elif kind == "folder":
            target.mkdir()
        else:
            os.mkfifo(target)
        with pytest.raises(IntegrityError, match=r"'model\.onnx' should be"):
            open_bundle(written)

    @pytest.mark.parametrize("name", ["manifest.json", "manifest.sha256"])
    def test_a_manifest_that_is_a_link(self, written: Path, tmp_path: Path, name: str) -> None:
        (written / name).rename(tmp_path / name)
        (written / name).symlink_to(tmp_path / name)
        with pytest.raises(IntegrityError, match="a symbolic link"):
            open_bundle(written)

    @pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "sub/x"])
    def test_a_name_that_leads_out(self, written: Path, name: str) -> None:
        (written.parent / "outside").write_bytes(b"x")

        def change(tree: dict[str, Any]) -> None:
            tree["files"][name] = {"size_bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}

        rewrite_manifest(written, change)
        with pytest.raises(IntegrityError, match="files"):
            open_bundle(written)

    def test_a_manifest_too_large_to_read(self, written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(bundle_module, "_MAX_MANIFEST_BYTES", 1000)
        with pytest.raises(IntegrityError, match="at most 1000 bytes"):
            open_bundle(written)

    def test_nothing_is_parsed_before_the_manifest_is_verified(
        self, written: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(bundle_module, "manifest_from_json", lambda *_: pytest.fail("parsed"))
        (written / "manifest.json").write_bytes(b"{}")
        with pytest.raises(IntegrityError):
            open_bundle(written)

    def test_a_newer_bundle_by_its_version(self, written: Path) -> None:
        rewrite_manifest(written, lambda tree: tree.update(schema_version=99))
        with pytest.raises(UnsupportedError, match="99"):
            open_bundle(written)

    def test_a_file_changed_after_opening(self, written: Path) -> None:
        bundle = open_bundle(written)
        (written / "model.onnx").write_bytes(b"evil graph " * 50)
        with pytest.raises(IntegrityError, match=r"model\.onnx"):
            bundle.read_bytes("model.onnx")

    @pytest.mark.parametrize(
        "make", [lambda path: None, lambda path: path.touch(), lambda path: path.mkdir()]
    )
    def test_what_is_no_bundle_at_all_is_a_usage_error(
        self, tmp_path: Path, make: Callable[[Path], None]
    ) -> None:
        make(tmp_path / "x")
        with pytest.raises(UsageError, match="no bundle"):
            open_bundle(tmp_path / "x")
