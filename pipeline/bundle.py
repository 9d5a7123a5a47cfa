"""A bundle on disk: written whole or not at all, opened verified or not at all.

`BundleWriter` works in a temporary sibling of the bundle and puts it in place with one rename, so
that a kill at any moment leaves the previous bundle or the new one. `open_bundle` hashes every file
before anything but the manifest is parsed. `docs/bundle-format.md` has the layout.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

from filelock import FileLock, Timeout

from pipeline.bundle_files import (
    MANIFEST_DIGEST_NAME,
    MANIFEST_NAME,
    REMEDY,
    check_name,
    exchange,
    measure,
    mismatch,
    read_regular,
    sync,
    write_synced,
)
from pipeline.errors import EdgefoldError, IntegrityError, UsageError
from pipeline.manifest import FileRecord, Manifest, manifest_from_json, manifest_to_json

__all__ = ["MANIFEST_DIGEST_NAME", "MANIFEST_NAME", "Bundle", "BundleWriter", "open_bundle"]

_MAX_MANIFEST_BYTES = 16 * 1024 * 1024


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
        data = read_regular(self.path, name, record.size_bytes)
        found = hashlib.sha256(data).hexdigest()
        if found != record.sha256:
            raise IntegrityError(mismatch(self.path, name, f"SHA-256 {record.sha256}", found))
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
    expected = read_regular(path, MANIFEST_DIGEST_NAME, 1024).decode("ascii", "replace").split(" ")[0].strip()
    data = read_regular(path, MANIFEST_NAME, _MAX_MANIFEST_BYTES)
    found = hashlib.sha256(data).hexdigest()
    if found != expected:
        raise IntegrityError(mismatch(path, MANIFEST_NAME, f"SHA-256 {expected!r}", found))
    manifest = manifest_from_json(data, f"{MANIFEST_NAME} of {str(path)!r}")
    unlisted = sorted(names - set(manifest.files) - {MANIFEST_NAME, MANIFEST_DIGEST_NAME})
    if unlisted:
        raise IntegrityError(
            f"bundle {str(path)!r} holds {unlisted[0]!r}, which its manifest does not list: move it away, or "
            f"{REMEDY}"
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
                f"another build is writing {str(self._out_dir)!r} (it holds {self._lock.lock_file!r}): wait "
                "for it, or give another --out"
            ) from error
        except OSError as error:
            raise self._write_error(error) from error
        try:
            self._clean_up_after_killed_builds()
            self._require_replaceable()
            temporary = self._sibling("tmp")
            temporary.mkdir()
            self._path = temporary
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
        temporary, self._path = self._path, None
        try:
            if temporary is not None:
                shutil.rmtree(temporary, ignore_errors=True)
        finally:
            self._lock.release()
        if isinstance(exc, OSError) and exc.errno in _WRITE_FAULTS:
            # A full disk has no file name; a refused one may be the user's data, and not this bundle.
            named = os.fsdecode(exc.filename) if isinstance(exc.filename, str | bytes) else None
            if named is None or (temporary is not None and Path(named).is_relative_to(temporary)):
                raise self._write_error(exc) from exc

    def add_file(self, name: str, content: bytes | Path) -> Path:
        """Put bytes, or a copy of a file, into the bundle as `name`; returns where it lies for now."""
        check_name(name)
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
                check_name(entry.name)
                size_bytes, sha256 = measure(path, entry.name)
                sync(entry)
                records[entry.name] = FileRecord(size_bytes, sha256)
            complete = replace(manifest, files=records)
            data = manifest_to_json(complete)
            digest = f"{hashlib.sha256(data).hexdigest()}  {MANIFEST_NAME}\n"
            write_synced(path / MANIFEST_DIGEST_NAME, digest.encode())
            write_synced(path / MANIFEST_NAME, data)
            sync(path)
            self._put_in_place(path)
        except OSError as error:
            raise self._write_error(error) from error
        try:
            sync(self._out_dir.parent)
        except OSError as error:
            raise EdgefoldError(
                f"the bundle {str(self._out_dir)!r} is in place, but the disk did not confirm it: {error.strerror}; "
                "check the disk, then open it with edgefold inspect"
            ) from error
        return Bundle(self._out_dir, complete)

    def _put_in_place(self, new: Path) -> None:
        old, aside = self._out_dir, self._sibling("old")
        replaced: Path | None = None
        if not old.exists() or not any(old.iterdir()):
            new.rename(old)  # POSIX renames over an empty folder
        elif exchange(new, old):
            replaced = new
        else:
            # Two renames where the file system cannot exchange. A kill between them leaves the
            # previous bundle aside, from where the next build takes it back.
            old.rename(aside)
            try:
                new.rename(old)
            except BaseException:
                aside.rename(old)
                raise
            replaced = aside
        self._path = None
        if replaced is not None:
            shutil.rmtree(replaced, ignore_errors=True)

    def _require_replaceable(self) -> None:
        """Refuse to replace anything that a build did not write."""
        out = self._out_dir
        if not out.exists() and not out.is_symlink():
            return
        if out.is_symlink() or not out.is_dir():
            raise UsageError(f"{str(out)!r} is a file or a link, not a folder; give another --out")
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
                f"{str(out)!r} holds {foreign[0]!r}, which is not the bundle's and would be lost: move it"
            )
        if not self._overwrite:
            raise UsageError(f"there is a bundle at {str(out)!r} already; give another --out, or remove it")

    def _clean_up_after_killed_builds(self) -> None:
        aside = _set_aside(self._out_dir)
        if aside is not None:
            if self._out_dir.exists():
                shutil.rmtree(aside)
            else:
                aside.rename(self._out_dir)
        if self._sibling("tmp").exists():
            shutil.rmtree(self._sibling("tmp"))

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
    size_bytes, sha256 = measure(bundle, name, record.size_bytes)
    if size_bytes != record.size_bytes:
        raise IntegrityError(mismatch(bundle, name, f"{record.size_bytes} bytes", f"{size_bytes} bytes"))
    if sha256 != record.sha256:
        raise IntegrityError(mismatch(bundle, name, f"SHA-256 {record.sha256}", sha256))
