"""Where predictions and pictures go: JSON lines, a recording, a window."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from apps.streaming import opencv
from apps.streaming.predictions import Prediction
from pipeline.artifacts import Frame
from pipeline.errors import EdgefoldError, UnsupportedError, UsageError

__all__ = ["PredictionLog", "Recorder", "Sink", "Window", "check_mp4_path", "window_obstacle"]

_FREE_RESERVE_BYTES = 16 * 1024 * 1024
_FREE_CHECK_S = 1.0
_PROBE_TIMEOUT_S = 20.0
_MAX_WINDOW_WIDTH = 1280
_APPEAR_MS = 100


class Sink(Protocol):
    """Takes every prediction, in order, in the main thread."""

    needs_picture: bool
    """Whether `write` is given the picture with the overlay."""

    def write(self, frame: Frame, prediction: Prediction, picture: NDArray[np.uint8] | None) -> None:
        """`picture` is uint8 (H, W, 3) BGR; raises `EdgefoldError` when it cannot be kept."""
        ...

    def close(self) -> None:
        """Completes what was written; raises `EdgefoldError` when it is not whole."""
        ...


class PredictionLog:
    """One JSON object a line and frame, flushed line by line, so that it can be followed.

    Raises:
        UsageError: the file cannot be created.
    """

    needs_picture = False

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = path.open("w", encoding="utf-8", buffering=1)
        except OSError as error:
            raise UsageError(f"cannot write predictions to {path}: {error.strerror}") from error

    def write(self, frame: Frame, prediction: Prediction, picture: NDArray[np.uint8] | None) -> None:
        """Appends one line; raises `EdgefoldError` when it cannot be written."""
        try:
            self._file.write(json.dumps(prediction.to_json()) + "\n")
        except OSError as error:
            raise self._failed(error) from error

    def close(self) -> None:
        """Closes the file; twice is harmless."""
        try:
            self._file.close()
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> EdgefoldError:
        with contextlib.suppress(OSError):
            self._file.close()
        return EdgefoldError(
            f"writing predictions to {self._path} failed ({error.strerror}); the last line may be cut off"
        )


class Recorder:
    """An MP4 (MPEG-4 Part 2) of the pictures, under a temporary name until it is complete.

    The video plays at `fps`. With `by_time` a frame stands where its timestamp says, so that a
    stream of uneven rate plays in real time: missing slots repeat the picture before, surplus
    pictures are left out. Otherwise every picture is one frame of the video.

    Raises:
        UsageError: not an ``.mp4``, or the folder cannot be written to.
        UnsupportedError: OpenCV is missing, or has no encoder.
    """

    needs_picture = True

    def __init__(self, path: Path, fps: float, by_time: bool) -> None:
        self._cv2 = opencv.load("recording a video")
        check_mp4_path(path)
        self._path = path
        self._partial = path.with_name(f".{path.stem}.partial.mp4")
        self._fps = fps
        self._by_time = by_time
        self._writer: Any = None
        self._size_wh = (0, 0)
        self._first_ns = 0
        self._last: NDArray[np.uint8] | None = None
        self._next_free_check_s = 0.0
        self.n_written = 0
        self.complete = False
        """Whether the video is whole and has its name; set by `close`."""
        self._check_space()

    def write(self, frame: Frame, prediction: Prediction, picture: NDArray[np.uint8] | None) -> None:
        """Puts the picture into the video; raises `EdgefoldError` when the disk is nearly full."""
        assert picture is not None
        if time.monotonic() >= self._next_free_check_s:
            self._check_space()
        if self._writer is None:
            self._open(picture, frame.timestamp_ns)
        picture = self._fit(picture)
        if not self._by_time:
            self._write(picture)
            return
        slot = round((frame.timestamp_ns - self._first_ns) / 1e9 * self._fps)
        while self.n_written < slot and self._last is not None:
            self._write(self._last)
        if self.n_written == slot:
            self._write(picture)
        self._last = picture

    def close(self) -> None:
        """Completes the file and gives it its name.

        Raises:
            EdgefoldError: the file is not whole (the disk is full); it has been removed.
        """
        if self._writer is None:
            return
        self._writer.release()  # writes the index; reports nothing
        self._writer = None
        try:
            self._check_whole()
            with self._partial.open("rb") as file:
                os.fsync(file.fileno())  # a power cut after this leaves a video, or nothing, of that name
            self._partial.replace(self._path)
            self.complete = True
        except OSError as error:
            raise EdgefoldError(f"the recording {self._path} could not be kept: {error.strerror}") from error
        finally:
            self._partial.unlink(missing_ok=True)

    def _open(self, picture: NDArray[np.uint8], timestamp_ns: int) -> None:
        cv2 = self._cv2
        height, width = picture.shape[:2]
        self._size_wh, self._first_ns = (width, height), timestamp_ns
        # MPEG-4 Part 2 because the wheels of OpenCV can encode it; H.264 needs a licence they lack.
        fourcc = cv2.VideoWriter_fourcc(*"mp4v")
        self._writer = cv2.VideoWriter(str(self._partial), fourcc, self._fps, self._size_wh)
        if not self._writer.isOpened():
            self._writer = None
            self._partial.unlink(missing_ok=True)
            raise UnsupportedError(
                f"this OpenCV cannot encode an MP4 of {width}x{height} at {self._fps:g} FPS; "
                "pip install edgefold[opencv] brings one that can"
            )

    def _fit(self, picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """A video has one size; pictures of another are scaled into it, keeping their shape."""
        width, height = self._size_wh
        if picture.shape[:2] == (height, width):
            return picture
        scale = min(width / picture.shape[1], height / picture.shape[0])
        inner_w, inner_h = (max(1, int(side * scale)) for side in (picture.shape[1], picture.shape[0]))
        canvas = np.zeros((height, width, 3), np.uint8)
        top, left = (height - inner_h) // 2, (width - inner_w) // 2
        canvas[top : top + inner_h, left : left + inner_w] = self._cv2.resize(picture, (inner_w, inner_h))
        return canvas

    def _write(self, picture: NDArray[np.uint8]) -> None:
        self._writer.write(picture)
        self.n_written += 1

    def _check_space(self) -> None:
        """OpenCV's writer does not report a full disk, so it must not come to that."""
        self._next_free_check_s = time.monotonic() + _FREE_CHECK_S
        free_bytes = shutil.disk_usage(self._path.parent).free
        if free_bytes < _FREE_RESERVE_BYTES:
            self._discard()
            raise EdgefoldError(
                f"recording {self._path} stopped: {free_bytes >> 20} MiB free on its disk, "
                f"{_FREE_RESERVE_BYTES >> 20} MiB are kept free; the unfinished file was removed. "
                "Make room, or record elsewhere"
            )

    def _check_whole(self) -> None:
        video = self._cv2.VideoCapture(str(self._partial))
        n_readable = int(video.get(self._cv2.CAP_PROP_FRAME_COUNT)) if video.isOpened() else 0
        video.release()
        if n_readable != self.n_written:
            raise EdgefoldError(
                f"the recording {self._path} is not whole: {n_readable} of {self.n_written} frames can be "
                "read back, so writing failed (disk full, or a quota); it was removed"
            )

    def _discard(self) -> None:
        if self._writer is not None:
            self._writer.release()
            self._writer = None
        self._partial.unlink(missing_ok=True)


def check_mp4_path(path: Path) -> None:
    """Checks where a recording is to go before there is a picture to record.

    Raises:
        UsageError: not an ``.mp4``, or the folder cannot be written to.
    """
    if path.suffix.lower() != ".mp4":
        raise UsageError(f"--record writes MP4; name the file {path.with_suffix('.mp4').name}")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise UsageError(f"cannot record to {path}: {path.parent} is no folder that can be written to")
    if path.is_dir():
        raise UsageError(f"cannot record to {path}: it is a folder")


class Window:
    """Shows the pictures; `closed` once the user closes it or presses q or Escape."""

    needs_picture = True

    def __init__(self, title: str) -> None:
        self._cv2 = opencv.load("the window")
        self._title = title
        self._shown = False
        self.closed = False

    def write(self, frame: Frame, prediction: Prediction, picture: NDArray[np.uint8] | None) -> None:
        """Shows the picture and looks at the keyboard."""
        assert picture is not None
        cv2 = self._cv2
        if not self._shown:
            cv2.namedWindow(self._title, cv2.WINDOW_NORMAL | cv2.WINDOW_KEEPRATIO | cv2.WINDOW_GUI_NORMAL)
            height, width = picture.shape[:2]
            scale = min(1.0, _MAX_WINDOW_WIDTH / width)
            cv2.resizeWindow(self._title, round(width * scale), round(height * scale))
            # Qt's window stays black for ever (seen with OpenCV 5.0 on X11) unless it may first appear.
            cv2.waitKey(_APPEAR_MS)
            self._shown = True
        cv2.imshow(self._title, picture)
        key = cv2.waitKey(1) & 0xFF
        if key in (ord("q"), 27) or cv2.getWindowProperty(self._title, cv2.WND_PROP_VISIBLE) < 1:
            self.closed = True

    def close(self) -> None:
        """Closes the window; twice is harmless."""
        if self._shown:
            self._cv2.destroyWindow(self._title)
            self._shown = False


def window_obstacle() -> str | None:
    """Why no window can be shown here, or ``None``.

    A toolkit that cannot reach its display ends the process (Qt aborts), so a child tries first.
    """
    if not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        return "no display"
    if not opencv.available():
        return "OpenCV is missing"
    try:
        probe = subprocess.run(
            [sys.executable, "-c", "import cv2; cv2.namedWindow('edgefold'); cv2.waitKey(1)"],
            capture_output=True,
            timeout=_PROBE_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "the display does not answer"
    return None if probe.returncode == 0 else "the display cannot be opened"
