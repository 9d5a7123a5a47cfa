"""The file operations under a bundle: read only what is the bundle's own, write so that it lasts."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from pipeline.errors import IntegrityError, UsageError
from pipeline.manifest import FILE_NAME

__all__ = [
    "MANIFEST_DIGEST_NAME",
    "MANIFEST_NAME",
    "REMEDY",
    "check_name",
    "exchange",
    "measure",
    "mismatch",
    "read_regular",
    "sync",
    "write_synced",
]

MANIFEST_NAME = "manifest.json"
MANIFEST_DIGEST_NAME = "manifest.sha256"
"""SHA-256 of the manifest, in the format of ``sha256sum``: an edited manifest is noticed too."""

REMEDY = "copy the bundle again, or rebuild it with edgefold build"
_CHUNK_BYTES = 1 << 20
_RENAME_EXCHANGE = 2  # linux/fs.h
_AT_FDCWD = -100  # linux/fcntl.h: paths are relative to the working directory


def measure(bundle: Path, name: str, expected_bytes: int | None = None) -> tuple[int, str]:
    """Size and SHA-256 (hex) of `name`; the content is not read where the size already differs.

    Raises:
        IntegrityError: missing, or no regular file that is the bundle's alone.
        UsageError: it may not be read.
    """
    digest = hashlib.sha256()
    with _open_regular(bundle, name) as stream:
        size_bytes = os.fstat(stream.fileno()).st_size
        if expected_bytes in (None, size_bytes):
            while chunk := stream.read(_CHUNK_BYTES):
                digest.update(chunk)
    return size_bytes, digest.hexdigest()


def read_regular(bundle: Path, name: str, max_bytes: int) -> bytes:
    """The content of `name`, if it is no longer than `max_bytes`; raises `IntegrityError`."""
    with _open_regular(bundle, name) as stream:
        data = stream.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise IntegrityError(mismatch(bundle, name, f"at most {max_bytes} bytes", "more"))
    return data


@contextmanager
def _open_regular(bundle: Path, name: str) -> Iterator[IO[bytes]]:
    """A regular file of the bundle itself: no symbolic link, no content that has another name."""
    try:
        # O_NONBLOCK: a named pipe in place of the file must not hang the open.
        descriptor = os.open(bundle / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as stream:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                found = "a folder" if stat.S_ISDIR(status.st_mode) else "a special file"
                raise IntegrityError(mismatch(bundle, name, "a regular file", found))
            if status.st_nlink > 1:
                found = f"a hard link, one of {status.st_nlink} names of its content"
                raise IntegrityError(mismatch(bundle, name, "a file of its own", found))
            yield stream
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM):
            raise UsageError(f"bundle {str(bundle)!r}: you may not read {name!r}") from error
        found = {errno.ENOENT: "none", errno.ELOOP: "a symbolic link"}.get(
            error.errno or 0, f"a file that cannot be read ({error.strerror})"
        )
        raise IntegrityError(mismatch(bundle, name, "a regular file", found)) from error


def check_name(name: str) -> None:
    """Raise `IntegrityError` unless `name` can be listed in a manifest."""
    if not re.fullmatch(FILE_NAME, name) or name in (MANIFEST_NAME, MANIFEST_DIGEST_NAME):
        raise IntegrityError(
            f"{name!r} cannot be a file of a bundle: a bundle is flat, and its names are made of "
            "letters, digits, '.', '_' and '-'"
        )


def mismatch(bundle: Path, name: str, expected: str, found: str) -> str:
    """The words of an `IntegrityError` about one file."""
    return f"bundle {str(bundle)!r}: {name!r} should be {expected}, found {found}; {REMEDY}"


def write_synced(path: Path, data: bytes) -> None:
    """Write, and return when the disk has it."""
    path.write_bytes(data)
    sync(path)


def sync(path: Path) -> None:
    """Return when the disk has the file's content, or the folder's entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step (Linux ``renameat2``); False where this system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    result = renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    if result == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EXDEV):
        return False
    raise OSError(code, os.strerror(code), str(other))
