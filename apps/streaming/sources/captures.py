"""Readers over ``cv2.VideoCapture``: a recording, a live stream, a V4L2 camera.

`retrieve` decodes straight into the caller's array where its shape and dtype are the frame's: OpenCV's
bindings hand that very array to the back-end, and make a new one where it does not fit (checked by
tests with OpenCV 5.0 and 4.6, for FFmpeg and GStreamer).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from apps.streaming.sources.network import lost
from apps.streaming.sources.recorded import Recording
from apps.streaming.sources.source import DEFAULT_FPS, Delivered
from apps.streaming.uri_options import MAX_FPS
from apps.streaming.uris import SourceUri
from pipeline.errors import SourceLostError

__all__ = ["LiveStream", "RecordedVideo", "V4l2Camera"]

_MAX_SILENT_READS = 3


class _Capture:
    """What the readers share: a capture, its rate, and frames of three channels out of four."""

    color: Literal["RGB", "BGR"] = "BGR"

    def __init__(self, cv2: ModuleType, uri: SourceUri, labels: tuple[str, ...], notes: list[str]) -> None:
        self.source_id = uri.shown
        self.labels = labels
        self.notes = notes
        self._cv2 = cv2
        self._uri = uri
        self.fps = DEFAULT_FPS
        self._capture: Any = None
        self._four_channels: NDArray[np.uint8] | None = None

    def _adopt(self, capture: Any) -> None:
        """Takes an open capture, and the rate that it names, if any."""
        self._capture = capture
        rate = float(capture.get(self._cv2.CAP_PROP_FPS))
        self.fps = rate if 0 < rate <= MAX_FPS else DEFAULT_FPS

    def close(self) -> None:
        """Releases the device or the file."""
        self._capture.release()

    def _retrieve(self, into: NDArray[np.uint8] | None) -> Any:
        """The picture that was grabbed; `None` where it cannot be decoded."""
        target = into if self._four_channels is None else self._four_channels
        ok, pixels = self._capture.retrieve() if target is None else self._capture.retrieve(target)
        if not ok or pixels is None:
            return None
        if pixels.ndim != 3 or pixels.shape[2] != 4:
            self._four_channels = None
            return pixels
        # BGRx: the fourth byte is padding, whatever its value.
        self._four_channels = pixels
        three = pixels[:, :, :3]
        if into is None or into.shape != three.shape or into.dtype != three.dtype:
            return np.ascontiguousarray(three)
        np.copyto(into, three)
        return into


class RecordedVideo(_Capture, Recording):
    """A video with an end.

    Args:
        cv2: the module.
        uri: says what part, and whether to loop.
        labels: of the engine.
        notes: the source's.
        opener: opens it from the beginning.

    Raises:
        DataError: nothing in it can be decoded.
    """

    def __init__(
        self,
        cv2: ModuleType,
        uri: SourceUri,
        labels: tuple[str, ...],
        notes: list[str],
        opener: Callable[[], Any],
    ) -> None:
        super().__init__(cv2, uri, labels, notes)
        self._opener = opener
        self._begin()
        self._promised = int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT))

    def _begin(self) -> None:
        if self._capture is not None:
            self._capture.release()
        self._adopt(self._opener())
        if self._uri.options.start_s:
            self._capture.set(self._cv2.CAP_PROP_POS_MSEC, 1000 * self._uri.options.start_s)

    def _grab(self) -> bool:
        return bool(self._capture.grab())

    def _at_ms(self) -> float:
        return float(self._capture.get(self._cv2.CAP_PROP_POS_MSEC))

    def _deliver(self, into: NDArray[np.uint8] | None) -> Delivered:
        return Delivered(self._retrieve(into))


class LiveStream(_Capture):
    """A stream without an end: where it ends all the same, it is lost and may be opened again."""

    live = True
    self_paced = True

    def __init__(
        self, cv2: ModuleType, uri: SourceUri, labels: tuple[str, ...], notes: list[str], capture: Any
    ) -> None:
        super().__init__(cv2, uri, labels, notes)
        self._adopt(capture)

    def read(self, into: NDArray[np.uint8] | None = None) -> Delivered | None:
        """The next frame; see `Source.read`."""
        if not self._capture.grab():
            raise SourceLostError(
                f"{self.source_id} ended, or sent no picture for {self._uri.options.timeout_s:g} s", "soon"
            )
        return Delivered(self._retrieve(into))


class V4l2Camera(_Capture):
    """A camera of this machine, found by its path each time it is opened.

    Raises:
        SourceLostError: it is not there, or gives no video; `read` raises it when it goes, or stays silent.
    """

    live = True
    self_paced = True

    def __init__(self, cv2: ModuleType, uri: SourceUri, labels: tuple[str, ...], notes: list[str]) -> None:
        super().__init__(cv2, uri, labels, notes)
        self._silent_reads = 0
        device = uri.path.resolve()
        if not device.exists():
            present = ", ".join(sorted(str(path) for path in Path("/dev").glob("video*"))) or "none"
            raise lost(uri, f"is not there (unplugged?); cameras here: {present}", "soon")
        # By number: for a path, OpenCV tries the back-ends that read files.
        capture = cv2.VideoCapture(int(device.name[len("video") :]), cv2.CAP_V4L2)
        if not capture.isOpened():
            raise lost(
                uri,
                "did not open as a V4L2 capture device: another program may hold it, or it is a "
                "metadata node (cameras often have two; try the other number)",
                "soon",
            )
        self._capture = capture
        self._configure()
        self._adopt(capture)

    def read(self, into: NDArray[np.uint8] | None = None) -> Delivered | None:
        """The next frame; see `Source.read`. A few reads in a row may fail."""
        if self._capture.grab():
            self._silent_reads = 0
            return Delivered(self._retrieve(into))
        self._silent_reads += 1
        if not self._uri.path.exists():
            raise lost(self._uri, "is gone (unplugged?)", "soon")
        if self._silent_reads > _MAX_SILENT_READS:
            raise lost(self._uri, f"gave no picture in {self._silent_reads} reads in a row", "soon")
        return Delivered(None)

    def _configure(self) -> None:
        """Asks for what the options say, and notes what the camera made of it."""
        cv2, options = self._cv2, self._uri.options
        # The pixel format first: it decides which sizes and rates there are.
        if options.format is not None:
            self._capture.set(cv2.CAP_PROP_FOURCC, cv2.VideoWriter_fourcc(*options.format))
            code = int(self._capture.get(cv2.CAP_PROP_FOURCC))
            self._compare("format", options.format, code.to_bytes(4, "little").decode("latin-1"))
        if options.size_wh is not None:
            self._capture.set(cv2.CAP_PROP_FRAME_WIDTH, options.size_wh[0])
            self._capture.set(cv2.CAP_PROP_FRAME_HEIGHT, options.size_wh[1])
            sides = (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT)
            got = "x".join(str(int(self._capture.get(side))) for side in sides)
            self._compare("size", "{}x{}".format(*options.size_wh), got)
        if options.fps is not None:
            self._capture.set(cv2.CAP_PROP_FPS, options.fps)
            self._compare("fps", f"{options.fps:g}", f"{self._capture.get(cv2.CAP_PROP_FPS):g}")

    def _compare(self, name: str, asked: str, got: str) -> None:
        if asked != got:
            self.notes.append(f"{self.source_id}: asked for {name}={asked}, the camera gives {got}")
