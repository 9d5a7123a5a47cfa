"""Frames of a video file as a data set without labels. Needs OpenCV."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.artifacts import Sample
from pipeline.digest import file_sha256
from pipeline.errors import DataError, UnsupportedError

__all__ = ["VIDEO_SUFFIXES", "VideoDataset"]

VIDEO_SUFFIXES = frozenset({".mp4", ".avi", ".mkv", ".mov", ".webm", ".m4v", ".mpg", ".mpeg", ".ts"})


class VideoDataset:
    """`count` frames, evenly spaced over the video, as a `pipeline.contracts.Dataset`.

    Raises:
        DataError: not a video that can be decoded.
        UnsupportedError: OpenCV is not installed.
    """

    class_names: tuple[str, ...] | None = None

    def __init__(self, path: Path, count: int) -> None:
        self.name = path.name
        self._path = path
        self._skipped: dict[str, str] = {}
        n_frames = self._count_frames()
        # The middles of `count` equal parts; fewer where the video is shorter than that.
        self._wanted = sorted({(2 * part + 1) * n_frames // (2 * count) for part in range(count)})

    @property
    def skipped(self) -> Sequence[tuple[str, str]]:
        """Frames that the passes so far could not decode."""
        return tuple(self._skipped.items())

    @cached_property
    def sha256(self) -> str:
        """Digest of the file and of which frames were chosen from it."""
        chosen = ",".join(map(str, self._wanted))
        return hashlib.sha256(f"{file_sha256(self._path)} {chosen}".encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._wanted)

    def __iter__(self) -> Iterator[Sample]:
        capture = self._open()
        try:
            position = 0
            for wanted in self._wanted:
                key = f"frame {wanted}"
                # Frame by frame: a seek lands on a key frame, and not on the same one everywhere.
                while position <= wanted and capture.grab():
                    position += 1
                ok, image = capture.retrieve() if position > wanted else (False, None)
                if ok and image is not None:
                    yield Sample(np.ascontiguousarray(image[:, :, ::-1]), None, key)
                else:
                    self._skipped[key] = "cannot be decoded, or the video ends before it"
        finally:
            capture.release()

    def _open(self) -> Any:
        capture = _opencv(self._path).VideoCapture(str(self._path))
        if not capture.isOpened():
            raise DataError(
                f"OpenCV cannot open the video {str(self._path)!r}: it is damaged, or of an unknown codec"
            )
        return capture

    def _count_frames(self) -> int:
        """As the container says; by going through it where that says nothing."""
        capture = self._open()
        try:
            n_frames = int(capture.get(_opencv(self._path).CAP_PROP_FRAME_COUNT))
            if n_frames <= 0:
                n_frames = 0
                while capture.grab():
                    n_frames += 1
        finally:
            capture.release()
        if n_frames == 0:
            raise DataError(f"the video {str(self._path)!r} has no frame that can be decoded")
        return n_frames


def _opencv(path: Path) -> Any:
    try:
        import cv2
    except ImportError as error:
        raise UnsupportedError(
            f"reading the video {str(path)!r} needs OpenCV: pip install 'edgefold[opencv]', or the system's "
            "python3-opencv"
        ) from error
    return cv2
