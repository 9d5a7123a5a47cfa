"""A file system that is really full, where one may be mounted."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

__all__ = ["fill", "small_disk"]


@contextlib.contextmanager
def small_disk(path: Path, size_mib: int) -> Iterator[Path]:
    """A tmpfs at `path`, which is made; skips the test where mounting is not allowed."""
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size_mib}m", "none", str(path)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode != 0:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def fill(disk: Path) -> Path:
    """Another's file that takes all but the last block, at once: a recording may be writing there, too."""
    with (disk / "other").open("wb") as file:
        while True:
            free = os.statvfs(disk)
            with contextlib.suppress(OSError):  # less is free than a moment ago
                os.posix_fallocate(file.fileno(), 0, (free.f_bavail - 1) * free.f_frsize)
                return disk / "other"
