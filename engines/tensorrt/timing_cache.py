"""Kernel timings kept between builds: what makes the second build of a large network quick.

One file a library version and device, since timings of another are refused or, worse, believed. Builds
that run at the same time merge what they measured. As `engines.blob_cache` does, a digest
stands in front of the data, and whatever cannot be read costs a warning and a slow build, never the build.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout

from pipeline.whole_files import whole_file

__all__ = ["TimingCacheFile", "timing_cache_path"]

_DIGEST_BYTES = 32
_LOCK_TIMEOUT_S = 30.0
"""The lock is held while a file of some megabytes is merged; whoever holds it longer is stuck."""
_log = logging.getLogger(__name__)


def timing_cache_path(folder: Path, version: str, device: str, sm: int) -> Path:
    """The file for timings of TensorRT `version` on `device`."""
    name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{version}_{device}_sm{sm}").strip("-")
    return folder / f"{name}.timing"


class TimingCacheFile:
    """A timing cache on disk, safe against corruption and against other builds."""

    def __init__(self, path: Path) -> None:
        """Use the file at `path`, made at the first `merge`."""
        self._path = path

    def read(self) -> bytes | None:
        """What is stored, or ``None``; a damaged file is deleted."""
        try:
            entry = self._path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            _log.warning("timing cache %s cannot be read (%s); kernels are timed again", self._path, error)
            return None
        digest, timings = entry[:_DIGEST_BYTES], entry[_DIGEST_BYTES:]
        if hashlib.sha256(timings).digest() != digest:
            self.discard("it is damaged")
            return None
        return timings

    def discard(self, why: str) -> None:
        """Delete the file; `why` goes into the warning."""
        _log.warning("timing cache %s is discarded: %s; kernels are timed again", self._path, why)
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)

    def merge(self, combine: Callable[[bytes | None], bytes]) -> bool:
        """Replace the file by ``combine(what is stored now)``, in one step and under a lock.

        Returns:
            Whether it was written; if not, a warning says why.
        """
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with FileLock(self._path.with_suffix(".lock"), timeout=_LOCK_TIMEOUT_S):
                timings = combine(self.read())
                with whole_file(self._path, durable=True) as file:
                    file.write(hashlib.sha256(timings).digest())
                    file.write(timings)
        except (OSError, Timeout) as error:
            _log.warning(
                "timing cache %s cannot be written (%s); the next build times again", self._path, error
            )
            return False
        return True
