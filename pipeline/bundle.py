"""A bundle on disk: written whole or not at all, opened verified or not at all.

`BundleWriter` works in a temporary sibling of the bundle and puts it in place with one rename, so
that a kill at any moment leaves the previous bundle or the new one. `open_bundle` hashes every file
before anything but the manifest is parsed. `docs/bundle-format.md` has the layout.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import shutil
import stat
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

from filelock import FileLock, Timeout

from pipeline.errors import EdgefoldError, IntegrityError, UsageError
from pipeline.manifest import FileRecord, Manifest, manifest_from_json, manifest_to_json

__all__ = ["MANIFEST_NAME", "MANIFEST_DIGEST_NAME", "Bundle", "BundleWriter", "open_bundle"]

MANIFEST_NAME = "manifest.json"
MANIFEST_DIGEST_NAME = "manifest.sha256"
"""SHA-256 of the manifest, in the format of ``sha256sum``: an edited manifest is noticed too."""

_MAX_MANIFEST_BYTES = 16 * 1024 * 1024
_CHUNK_BYTES = 1 << 20
_REMEDY = "copy the bundle again, or rebuild it with edgefold build"
_RENAME_EXCHANGE = 2  # linux/fs.h


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle whose every file had the size and SHA-256 of its manifest when it was opened."""

    path: Path
    manifest: Manifest

    def file(self, name: str) -> Path:
        """Where the file `name` lies; raises `IntegrityError` where the bundle has none."""
        self._record(name)
        return self.path / name

    def sha256(self, name: str) -> str:
        """The SHA-256 (hex) of the file `name`; raises `IntegrityError` where the bundle has none."""
        return self._record(name).sha256

    def read_bytes(self, name: str) -> bytes:
        """The content of `name`, hashed again: the bytes verified are the bytes returned."""
        record = self._record(name)
        data = (self.path / name).read_bytes()
        found = hashlib.sha256(data).hexdigest()
        if found != record.sha256:
            raise IntegrityError(_mismatch(self.path, name, f"SHA-256 {record.sha256}", found))
        return data

    def _record(self, name: str) -> FileRecord:
        record = self.manifest.files.get(name)
        if record is None:
            present = ", ".join(sorted(self.manifest.files))
            raise IntegrityError(f"bundle {str(self.path)!r} has no file {name!r}; it has {present}")
        return record


def open_bundle(path: Path | str) -> Bundle:
    """Open a bundle, verified.

    First the manifest against ``manifest.sha256``, then the manifest's own form, then the folder's
    entries, sizes and digests. Nothing else is parsed.

    Raises:
        UsageError: `path` is no bundle.
        IntegrityError: a file is missing, altered, unlisted, or leads out of the bundle.
        UnsupportedError: written by a newer edgefold.
    """
    path = Path(path)
    if not path.is_dir():
        left = _set_aside(path)
        hint = f"; an interrupted build left the previous bundle at {str(left)!r}" if left else ""
        raise UsageError(f"no bundle at {str(path)!r}{hint}: give the folder that edgefold build wrote")
    names = {entry.name for entry in path.iterdir()}
    if MANIFEST_NAME not in names and MANIFEST_DIGEST_NAME not in names:
        raise UsageError(f"{str(path)!r} is no bundle: it has no {MANIFEST_NAME}")
    digest_text = _read_regular(path, MANIFEST_DIGEST_NAME, 1024)[0]
    data, found = _read_regular(path, MANIFEST_NAME, _MAX_MANIFEST_BYTES)
    expected = digest_text.decode("ascii", "replace").split(" ")[0].strip()
    if found != expected:
        raise IntegrityError(_mismatch(path, MANIFEST_NAME, f"SHA-256 {expected!r}", found))
    manifest = manifest_from_json(data, f"{MANIFEST_NAME} of {str(path)!r}")
    unlisted = sorted(names - set(manifest.files) - {MANIFEST_NAME, MANIFEST_DIGEST_NAME})
    if unlisted:
        raise IntegrityError(
            f"bundle {str(path)!r} holds {unlisted[0]!r}, which its manifest does not list: move it away, or "
            f"{_REMEDY}"
        )
    for name, record in manifest.files.items():
        _verify(path, name, record)
    return Bundle(path, manifest)


class BundleWriter:
    """Writes a bundle in a temporary sibling folder and renames it into place.

    A context manager: leaving it without `commit` removes what was written. One writer a bundle; a
    second one is refused at once.

        with BundleWriter(out_dir, overwrite=True) as writer:
            writer.add_file("report.html", html.encode())
            export(writer.path / "model.onnx")
            bundle = writer.commit(manifest)
    """

    def __init__(self, out_dir: Path | str, overwrite: bool = False) -> None:
        self._out_dir = Path(os.path.abspath(out_dir))  # noqa: PTH100 (a symlink is kept, not resolved)
        self._overwrite = overwrite
        self._lock = FileLock(self._sibling("lock"), timeout=0)
        self._path: Path | None = None

    @property
    def path(self) -> Path:
        """The temporary folder; what lies in it at `commit` becomes the bundle."""
        if self._path is None:
            raise RuntimeError("the BundleWriter is not open: use it in a with statement, before commit")
        return self._path

    def __enter__(self) -> BundleWriter:
        parent = self._out_dir.parent
        try:
            parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except Timeout as error:
            raise EdgefoldError(
                f"another build is writing {str(self._out_dir)!r} (it holds {self._lock.lock_file!r}): wait for "
                "it, or give another --out"
            ) from error
        except OSError as error:
            raise self._write_error(error) from error
        try:
            self._clean_up_after_killed_builds()
            self._require_replaceable()
            self._path = Path(tempfile.mkdtemp(prefix=self._sibling("tmp-").name, dir=parent))
            self._path.chmod(0o755)
        except OSError as error:
            self._lock.release()
            raise self._write_error(error) from error
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if self._path is not None:
                shutil.rmtree(self._path, ignore_errors=True)
                self._path = None
        finally:
            self._lock.release()
        if isinstance(exc, OSError) and exc.errno in _WRITE_FAULTS:
            raise self._write_error(exc) from exc

    def add_file(self, name: str, content: bytes | Path) -> Path:
        """Put bytes, or a copy of a file, into the bundle as `name`; returns where it lies for now."""
        target = self.path / name
        try:
            if isinstance(content, bytes):
                target.write_bytes(content)
            else:
                shutil.copyfile(content, target)
        except OSError as error:
            raise self._write_error(error) from error
        return target

    def commit(self, manifest: Manifest) -> Bundle:
        """Write the manifest last and put the bundle in place.

        Args:
            manifest: everything but `files`, which is made from the folder.

        Raises:
            IntegrityError: a file's name or kind does not belong in a bundle.
            EdgefoldError: the disk is full or not writable; the previous bundle is untouched.
        """
        path = self.path
        try:
            records = {}
            for entry in sorted(path.iterdir()):
                _sync(entry)
                size_bytes, sha256 = _measure(path, entry.name)
                records[entry.name] = FileRecord(size_bytes, sha256)
            complete = replace(manifest, files=records)
            data = manifest_to_json(complete)
            digest = f"{hashlib.sha256(data).hexdigest()}  {MANIFEST_NAME}\n"
            _write_synced(path / MANIFEST_DIGEST_NAME, digest.encode())
            _write_synced(path / MANIFEST_NAME, data)
            _sync(path)
            self._put_in_place(path)
            _sync(self._out_dir.parent)
        except OSError as error:
            raise self._write_error(error) from error
        return Bundle(self._out_dir, complete)

    def _put_in_place(self, new: Path) -> None:
        old = self._out_dir
        if not old.exists() or not any(old.iterdir()):
            new.rename(old)  # POSIX renames over an empty folder
            self._path = None
        elif _exchange(new, old):
            pass  # `new` now holds the previous bundle; __exit__ removes it
        else:
            # Two renames where the file system cannot exchange. A kill between them leaves the
            # previous bundle aside, from where the next build takes it back.
            aside = self._sibling("old")
            old.rename(aside)
            try:
                new.rename(old)
            except BaseException:
                aside.rename(old)
                raise
            self._path = None
            shutil.rmtree(aside, ignore_errors=True)

    def _require_replaceable(self) -> None:
        """Refuse to replace anything that a build did not write."""
        out = self._out_dir
        if not out.exists() and not out.is_symlink():
            return
        if not out.is_dir() or out.is_symlink():
            raise UsageError(f"{str(out)!r} is no folder; give another --out")
        names = {entry.name for entry in out.iterdir()}
        if not names:
            return
        listed = _listed_names(out)
        if listed is None:
            raise UsageError(
                f"{str(out)!r} is not empty and no bundle; give another --out, or empty it yourself"
            )
        foreign = sorted(names - listed)
        if foreign:
            raise UsageError(
                f"{str(out)!r} holds {foreign[0]!r}, which is not of the bundle and would be lost; move it away"
            )
        if not self._overwrite:
            raise UsageError(
                f"the bundle {str(out)!r} is there already; give another --out, or allow overwriting"
            )

    def _clean_up_after_killed_builds(self) -> None:
        aside = _set_aside(self._out_dir)
        if aside is not None:
            if self._out_dir.exists():
                shutil.rmtree(aside)
            else:
                aside.rename(self._out_dir)
        for stale in self._out_dir.parent.glob(f"{self._sibling('tmp-').name}*"):
            shutil.rmtree(stale)

    def _sibling(self, suffix: str) -> Path:
        return self._out_dir.parent / f".{self._out_dir.name}.{suffix}"

    def _write_error(self, error: OSError) -> EdgefoldError:
        reason = _WRITE_FAULTS.get(error.errno or 0, "")
        return EdgefoldError(
            f"cannot write the bundle {str(self._out_dir)!r}: {error.strerror or error}{reason}; nothing was "
            "left behind, and a previous bundle is untouched"
        )


_WRITE_FAULTS = {
    errno.ENOSPC: " (free some space, or give --out on another disk)",
    errno.EDQUOT: " (free some of the quota, or give --out elsewhere)",
    errno.EFBIG: " (the file system or a limit allows no file of this size)",
    errno.EROFS: " (give --out on a writable file system)",
    errno.EACCES: " (give --out in a folder that you may write)",
    errno.EPERM: " (give --out in a folder that you may write)",
    errno.EIO: " (the disk reports a fault)",
}


def _set_aside(out_dir: Path) -> Path | None:
    """Where `_put_in_place` keeps the previous bundle between its two renames, if it is there."""
    aside = out_dir.parent / f".{out_dir.name}.old"
    return aside if aside.is_dir() else None


def _listed_names(bundle: Path) -> set[str] | None:
    """The names a bundle's manifest lists, verified or not; ``None`` where there is no manifest."""
    try:
        tree = json.loads((bundle / MANIFEST_NAME).read_bytes())
        (bundle / MANIFEST_DIGEST_NAME).stat()
        return {*tree["files"], MANIFEST_NAME, MANIFEST_DIGEST_NAME}
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _verify(bundle: Path, name: str, record: FileRecord) -> None:
    size_bytes, sha256 = _measure(bundle, name, record.size_bytes)
    if size_bytes != record.size_bytes:
        raise IntegrityError(_mismatch(bundle, name, f"{record.size_bytes} bytes", f"{size_bytes} bytes"))
    if sha256 != record.sha256:
        raise IntegrityError(_mismatch(bundle, name, f"SHA-256 {record.sha256}", sha256))


def _measure(bundle: Path, name: str, expected_bytes: int | None = None) -> tuple[int, str]:
    """Size and SHA-256; the content is not read where the size already differs."""
    digest = hashlib.sha256()
    with os.fdopen(_open_regular(bundle, name), "rb") as stream:
        size_bytes = os.fstat(stream.fileno()).st_size
        if expected_bytes in (None, size_bytes):
            while chunk := stream.read(_CHUNK_BYTES):
                digest.update(chunk)
    return size_bytes, digest.hexdigest()


def _read_regular(bundle: Path, name: str, max_bytes: int) -> tuple[bytes, str]:
    with os.fdopen(_open_regular(bundle, name), "rb") as stream:
        data = stream.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise IntegrityError(_mismatch(bundle, name, f"at most {max_bytes} bytes", "more"))
    return data, hashlib.sha256(data).hexdigest()


def _open_regular(bundle: Path, name: str) -> int:
    """Open a regular file of the bundle itself: no symbolic link, no second name elsewhere."""
    try:
        # O_NONBLOCK: a named pipe in place of the file must not hang the open.
        descriptor = os.open(bundle / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        kind = {errno.ENOENT: "no file", errno.ELOOP: "a symbolic link"}.get(
            error.errno or 0, str(error.strerror)
        )
        raise IntegrityError(_mismatch(bundle, name, "a regular file", kind)) from error
    status = os.fstat(descriptor)
    found = ""
    if not stat.S_ISREG(status.st_mode):
        found = "a folder" if stat.S_ISDIR(status.st_mode) else "a special file"
    elif status.st_nlink > 1:
        found = f"a hard link ({status.st_nlink} names share its content)"
    if found:
        os.close(descriptor)
        raise IntegrityError(_mismatch(bundle, name, "a regular file of its own", found))
    return descriptor


def _mismatch(bundle: Path, name: str, expected: str, found: str) -> str:
    return f"bundle {str(bundle)!r}: {name!r} should be {expected}, found {found}; {_REMEDY}"


def _write_synced(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two paths in one step (Linux ``renameat2``); False where this system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    at_cwd = -100
    result = renameat2(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), _RENAME_EXCHANGE)
    if result == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EXDEV):
        return False
    raise OSError(code, os.strerror(code), str(other))
