"""What a writer refuses, and what it leaves when the disk, a signal or another writer comes between."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bundle_fixtures import make_manifest, write_bundle

from pipeline import bundle_files
from pipeline.bundle import Bundle, BundleWriter, open_bundle
from pipeline.errors import EdgefoldError, IntegrityError, UsageError


@pytest.fixture
def written(tmp_path: Path) -> Path:
    write_bundle(tmp_path / "out")
    return tmp_path / "out"


def leftovers(out_dir: Path) -> list[str]:
    """What lies beside the bundle, less the lock file that stays."""
    kept = {out_dir.name, f".{out_dir.name}.lock"}
    return sorted(entry.name for entry in out_dir.parent.iterdir() if entry.name not in kept)


class TestWriterRefuses:
    def test_a_folder_that_is_no_bundle(self, tmp_path: Path) -> None:
        (tmp_path / "photos").mkdir()
        (tmp_path / "photos" / "holiday.jpg").touch()
        with pytest.raises(UsageError, match="no bundle"), BundleWriter(tmp_path / "photos", overwrite=True):
            pytest.fail("entered")
        assert (tmp_path / "photos" / "holiday.jpg").exists()

    def test_a_web_application_with_a_manifest_of_its_own(self, tmp_path: Path) -> None:
        (tmp_path / "app").mkdir()
        (tmp_path / "app" / "manifest.json").write_text('{"name": "app", "files": {}}')
        with pytest.raises(UsageError, match="no bundle"), BundleWriter(tmp_path / "app", overwrite=True):
            pytest.fail("entered")

    def test_a_bundle_into_which_someone_put_a_file(self, written: Path) -> None:
        (written / "notes.txt").write_text("mine")
        with pytest.raises(UsageError, match=r"notes\.txt"), BundleWriter(written, overwrite=True):
            pytest.fail("entered")

    def test_a_bundle_unless_overwriting_is_allowed(self, written: Path) -> None:
        with pytest.raises(UsageError, match="already"), BundleWriter(written):
            pytest.fail("entered")

    @pytest.mark.parametrize("kind", ["file", "link"])
    def test_what_is_no_folder(self, written: Path, tmp_path: Path, kind: str) -> None:
        target = tmp_path / "target"
        if kind == "file":
            target.touch()
        else:
            target.symlink_to(written)
        with pytest.raises(UsageError, match="not a folder"), BundleWriter(target, overwrite=True):
            pytest.fail("entered")

    @pytest.mark.parametrize("name", ["../x", "a/b", ".hidden", "", "manifest.json", "manifest.sha256"])
    def test_names_that_no_bundle_has(self, tmp_path: Path, name: str) -> None:
        with BundleWriter(tmp_path / "out") as writer, pytest.raises(IntegrityError, match="flat"):
            writer.add_file(name, b"x")

    @pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.symlink_to("/etc/hostname")])
    def test_folders_and_links_in_its_path(self, tmp_path: Path, make: Callable[[Path], None]) -> None:
        with BundleWriter(tmp_path / "out") as writer:
            writer.add_file("model.int8.onnx", b"x")
            make(writer.path / "extra")
            with pytest.raises(IntegrityError, match="should be a regular file"):
                writer.commit(make_manifest())
        assert not (tmp_path / "out").exists()

    def test_a_second_writer_at_the_same_time(self, tmp_path: Path) -> None:
        with BundleWriter(tmp_path / "out"):
            with pytest.raises(EdgefoldError, match="another build"), BundleWriter(tmp_path / "out"):
                pytest.fail("entered")
            with BundleWriter(tmp_path / "other"):
                pass  # another bundle in the same folder is nobody's business
        assert write_bundle(tmp_path / "out")

    def test_a_second_process_at_the_same_time(self, tmp_path: Path) -> None:
        code = f"""
            from pipeline.bundle import BundleWriter
            with BundleWriter({str(tmp_path / "out")!r}):
                print("in", flush=True)
                input()
        """
        with subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as other:
            assert other.stdout is not None
            assert other.stdout.readline() == "in\n"
            with pytest.raises(EdgefoldError, match="another build"), BundleWriter(tmp_path / "out"):
                pytest.fail("entered")
            other.communicate("\n")
        assert write_bundle(tmp_path / "out")

    def test_an_uncommitted_or_finished_writer_has_no_path(self, tmp_path: Path) -> None:
        writer = BundleWriter(tmp_path / "out")
        with pytest.raises(RuntimeError, match="not open"):
            _ = writer.path
        with writer:
            writer.add_file("model.int8.onnx", b"x")
            writer.commit(make_manifest())
            with pytest.raises(RuntimeError, match="not open"):
                writer.commit(make_manifest())


class TestFaults:
    """Whatever happens, the previous bundle opens, and nothing is left beside it."""

    def fail_in_the_middle(self, written: Path, error: BaseException) -> None:
        with BundleWriter(written, overwrite=True) as writer:
            writer.add_file("model.int8.onnx", b"half")
            raise error

    @pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit(1)])
    def test_an_error_or_interrupt_passes_through(self, written: Path, error: BaseException) -> None:
        before = open_bundle(written)
        with pytest.raises(type(error)):
            self.fail_in_the_middle(written, error)
        assert open_bundle(written) == before
        assert leftovers(written) == []

    def test_leaving_without_commit_writes_nothing(self, tmp_path: Path) -> None:
        with BundleWriter(tmp_path / "out") as writer:
            writer.add_file("model.onnx", b"x")
        assert not (tmp_path / "out").exists()
        assert leftovers(tmp_path / "out") == []

    def test_a_full_disk_while_someone_writes_into_the_path(self, written: Path) -> None:
        before = open_bundle(written)
        with pytest.raises(EdgefoldError, match=r"cannot write the bundle.*No space left.*another disk"):
            self.fail_in_the_middle(written, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        assert open_bundle(written) == before
        assert leftovers(written) == []

    def test_an_input_that_may_not_be_read_is_not_called_a_fault_of_the_bundle(self, written: Path) -> None:
        with pytest.raises(PermissionError, match="photo"):
            self.fail_in_the_middle(written, PermissionError(errno.EACCES, "denied", "/data/photo.jpg"))

    @pytest.mark.parametrize("nth_sync", range(8))
    def test_a_full_disk_at_every_sync_of_the_commit(
        self, written: Path, monkeypatch: pytest.MonkeyPatch, nth_sync: int
    ) -> None:
        before = open_bundle(written)
        calls = iter(range(100))
        real = os.fsync

        def fsync(descriptor: int) -> None:
            if next(calls) == nth_sync:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(descriptor)

        monkeypatch.setattr(bundle_files.os, "fsync", fsync)
        # The last one is of the parent folder: by then the new bundle is in place.
        words = "is in place" if nth_sync == 7 else "a previous bundle is untouched"
        with pytest.raises(EdgefoldError, match=rf"No space left.*{words}|{words}.*No space left"):
            write_bundle(written, extra=b"2")
        assert (open_bundle(written) == before) == (nth_sync < 7)
        assert leftovers(written) == []

    def test_a_file_larger_than_the_system_allows(self, written: Path) -> None:
        """A real fault of write(2), in a process of its own: the limit cannot be raised again."""
        code = f"""
            import resource, sys
            from bundle_fixtures import write_bundle
            from pathlib import Path
            from pipeline.errors import EdgefoldError
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
            try:
                write_bundle(Path({str(written)!r}), extra=bytes(1_000_000))
            except EdgefoldError as error:
                sys.exit(str(error))
        """
        before = open_bundle(written)
        done = run_python(code)
        assert "cannot write the bundle" in done.stderr
        assert "File too large" in done.stderr
        assert done.returncode == 1
        assert open_bundle(written) == before
        assert leftovers(written) == []

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
    def test_a_folder_that_may_not_be_written_for_users(self, tmp_path: Path) -> None:
        (tmp_path / "ro").mkdir(mode=0o500)
        with pytest.raises(EdgefoldError, match="Permission denied"):
            write_bundle(tmp_path / "ro" / "out")

    def test_a_folder_that_may_not_be_written(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def mkdir(self: Path, *_: Any, **__: Any) -> None:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

        monkeypatch.setattr(Path, "mkdir", mkdir)
        with pytest.raises(EdgefoldError, match=r"Permission denied.*may write"):
            write_bundle(tmp_path / "out")

    def test_a_file_where_the_parent_folder_should_be(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(EdgefoldError, match="cannot write the bundle"):
            write_bundle(tmp_path / "file" / "out")


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    tests = str(Path(__file__).parents[1])
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": tests, **environment},
    )


KILLED_WRITERS = """
    import json, os, shutil, signal
    from pathlib import Path
    from bundle_fixtures import write_bundle
    from pipeline import bundle
    from pipeline.bundle import BundleWriter, open_bundle
    from pipeline.errors import UsageError

    out = Path({out!r})

    def replace_bundle(kill_at):
        steps = 0

        def dying(module, name):
            real = getattr(module, name)
            def step(*args, **kwargs):
                nonlocal steps
                if steps == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                steps += 1
                return real(*args, **kwargs)
            setattr(module, name, step)

        for module, name in [(Path, "mkdir"), (Path, "write_bytes"), (Path, "rename"), (os, "fsync"),
                             (shutil, "rmtree"), (bundle, "exchange")]:
            dying(module, name)
        if not {can_exchange}:
            bundle.exchange = lambda one, other: False
        write_bundle(out, name="new", extra=b"2")

    for kill_at in range(60):
        write_bundle(out, name="old")
        child = os.fork()
        if not child:
            replace_bundle(kill_at)
            os._exit(0)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
            break
        if out.exists():
            print(open_bundle(out).manifest.name)
            continue
        try:
            open_bundle(out)
        except UsageError as error:
            assert "previous bundle at" in str(error) and ".out.old" in str(error), error
        with BundleWriter(out, overwrite=True):
            pass  # the next build takes it back, even if it comes to nothing itself
        print("taken back", open_bundle(out).manifest.name)
    write_bundle(out)  # and removes whatever the killed ones left
"""


@pytest.mark.parametrize("can_exchange", [True, False])
def test_kill_9_before_every_step_leaves_the_old_or_the_new_bundle(
    tmp_path: Path, can_exchange: bool
) -> None:
    """Writers are killed before each change to the disk in turn, in a process that has no threads."""
    if can_exchange:
        (tmp_path / "one").mkdir()
        (tmp_path / "two").mkdir()
        if not bundle_files.exchange(tmp_path / "one", tmp_path / "two"):
            pytest.skip("this file system cannot exchange two names")
    out = tmp_path / "bundles" / "out"
    done = run_python(KILLED_WRITERS.format(out=str(out), can_exchange=can_exchange))
    assert done.returncode == 0, done.stderr
    found = done.stdout.splitlines()
    assert len(found) > 12
    assert found == sorted(found, key=["old", "taken back old", "new"].index)
    # Without an exchange there is one moment without a bundle: between the two renames.
    assert found.count("taken back old") == (0 if can_exchange else 1)
    assert {"old", "new"} <= set(found)
    assert leftovers(out) == []


def test_opening_while_bundles_are_replaced_sees_whole_ones(written: Path) -> None:
    code = f"""
        from pathlib import Path
        from bundle_fixtures import write_bundle
        for turn in range(12):
            write_bundle(Path({str(written)!r}), name=f"turn{{turn}}", extra=bytes([turn]))
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    ) as writer:
        opened: list[Bundle] = []
        refused = 0
        while writer.poll() is None:
            try:
                opened.append(open_bundle(written))
            except IntegrityError:
                refused += 1  # its folder was replaced while it was being verified: noticed, not mixed
        assert writer.returncode == 0
    assert opened
    assert open_bundle(written).manifest.name == "turn11"
