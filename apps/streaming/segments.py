"""A folder of recorded segments: their names, how much they may take, what a crash left behind.

A segment is called by the UTC of its first frame and its source, ``20261125T123456.789Z_front-door.mp4``, so
that names sort by time over all sources. Only files of exactly this form are counted and deleted: whoever
wants to keep one renames it, or moves it away.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

from filelock import FileLock, Timeout

from apps.streaming.naming import plain_name
from pipeline.errors import EdgefoldError, UsageError

__all__ = ["SegmentFolder"]

_TIME = r"\d{8}T\d{6}\.\d{3}Z"
_SEGMENT = re.compile(rf"{_TIME}_[\w.-]+\.mp4")
_PARTIAL = re.compile(rf"\.{_TIME}_(?P<name>[\w.-]+)\.partial\.mp4")
_LOCK_WAIT_S = 1.0


class SegmentFolder:
    """What one source records into a folder that it may share with others.

    A lock for the source's name is held until `close`; the system gives it back when the process dies. An
    unfinished segment whose source is not locked is thus what a crash left. It is removed: an MP4 has its
    index at the end, and none can be played without.

    Args:
        path: made where it does not exist, but not its parent.
        source_id: see `apps.streaming.naming.plain_name`.
        quota_bytes: all segments in the folder together, of all sources, unfinished ones included.
        reserve_bytes: kept free on the disk, at the expense of the oldest segments.

    Raises:
        UsageError: no folder that can be written to, or another recording has this name here.
    """

    def __init__(self, path: Path, source_id: str, quota_bytes: int, reserve_bytes: int) -> None:
        self.path = path
        self._name = plain_name(source_id)
        self._quota_bytes = quota_bytes
        self._reserve_bytes = reserve_bytes
        try:
            path.mkdir(exist_ok=True)
        except OSError as error:
            raise UsageError(f"cannot record to the folder {path}: {error.strerror}") from error
        if not os.access(path, os.W_OK | os.X_OK):
            raise UsageError(f"cannot record to the folder {path}: it cannot be written to")
        self._lock = self._lock_of(self._name)
        try:
            self._lock.acquire(timeout=_LOCK_WAIT_S)
        except Timeout as error:
            raise UsageError(
                f"a source is already being recorded to {path} as {self._name!r}; give {source_id!r} another "
                "name or another folder"
            ) from error
        self.n_recovered = self._remove_left_behind()
        """Unfinished segments of a crash that were removed."""

    def close(self) -> None:
        """Gives the name back; twice is harmless."""
        self._lock.release()

    def new_segment(self, start: datetime) -> Path:
        """A free name for a segment that begins at `start` (UTC)."""
        while True:
            stamp = start.strftime("%Y%m%dT%H%M%S.%f")[:-3]
            path = self.path / f"{stamp}Z_{self._name}.mp4"
            if not path.exists():
                return path
            # The clock was set back since, and this moment is now for the second time.
            start += timedelta(milliseconds=1)

    def unfinished_bytes(self) -> int:
        """Of all sources together."""
        return sum(size for _, size in self._matching(_PARTIAL))

    def make_room(self) -> int:
        """Deletes the oldest segments until quota and reserve are kept.

        Returns:
            How many were deleted.

        Raises:
            EdgefoldError: the disk is too full even so, or is not there.
        """
        n_deleted = 0
        try:
            segments = sorted(self._matching(_SEGMENT))
            total = sum(size for _, size in segments) + self.unfinished_bytes()
            free = shutil.disk_usage(self.path).free
            for path, size in segments:
                if total <= self._quota_bytes and free >= self._reserve_bytes:
                    break
                path.unlink(missing_ok=True)  # another recorder of the folder may have been first
                n_deleted += 1
                total -= size
                free = shutil.disk_usage(self.path).free
        except OSError as error:
            raise EdgefoldError(
                f"the recordings in {self.path} cannot be managed: {error.strerror}"
            ) from error
        if free < self._reserve_bytes:
            raise EdgefoldError(
                f"{free >> 20} MiB free on the disk of {self.path}, {self._reserve_bytes >> 20} MiB are kept free, "
                "and no recording is left to delete; make room"
            )
        return n_deleted

    def _matching(self, form: re.Pattern[str]) -> Iterator[tuple[Path, int]]:
        with os.scandir(self.path) as entries:
            for entry in entries:
                if form.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                    try:
                        size = entry.stat(follow_symlinks=False).st_size
                    except FileNotFoundError:
                        continue  # finished, and renamed, since the folder was listed
                    yield Path(entry.path), size

    def _remove_left_behind(self) -> int:
        n_removed = 0
        for path, _ in list(self._matching(_PARTIAL)):
            found = _PARTIAL.fullmatch(path.name)
            assert found is not None
            if found["name"] == self._name:
                path.unlink(missing_ok=True)
                n_removed += 1
                continue
            try:
                with self._lock_of(found["name"]).acquire(timeout=0):
                    path.unlink(missing_ok=True)
                    n_removed += 1
            except Timeout:
                continue  # being written
        return n_removed

    def _lock_of(self, name: str) -> FileLock:
        return FileLock(self.path / f".{name}.lock", thread_local=False)
