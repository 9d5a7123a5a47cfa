"""Video files through PyAV, which hands over a decoder's planes as they are.

OpenCV turns every picture into BGR, with all its pixels: a seventh of what reading a film costs, and twice the bytes to
carry. Here planes of Y, U and V are copied once, to where the frame is handed on from, and `pipeline.planar` makes
the network's small picture of them. What the pictures say of their colours is handed on too; OpenCV takes all for
BT.601.

Taken are 8-bit pictures of 4:2:0 with even sides, BT.601 or BT.709, that are not to be turned. `open_planar` leaves
every other file, and every file that it cannot open, to OpenCV, which says what is wrong with it. A picture that
becomes another kind in the middle of a file is turned into BGR here.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections import deque
from collections.abc import Iterator
from types import ModuleType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from apps.streaming.sources.recorded import Recording
from apps.streaming.sources.source import DEFAULT_FPS, Delivered
from apps.streaming.uri_options import MAX_FPS
from apps.streaming.uris import SourceUri
from pipeline.artifacts import YuvCoding, YuvMatrix
from pipeline.errors import DataError
from pipeline.kernels import kernels
from pipeline.yuv import planes_of

__all__ = ["PlanarVideo", "open_planar"]

# AVColorSpace [ITU-T H.273, table 4]. What says nothing is taken for BT.601, as FFmpeg and OpenCV do.
_MATRICES: dict[int, YuvMatrix] = {1: "bt709", 2: "bt601", 5: "bt601", 6: "bt601"}
_FULL_RANGE = 2  # AVColorRange
_CENTERED = frozenset({"mjpeg", "mpeg1video"})
"""Codecs whose chroma lies in the middle of its pixels; PyAV does not hand over what a stream says of that."""

_DECODER_THREADS_A_CPU, _MAX_DECODER_THREADS = 3, 16
"""FFmpeg makes one more than there are CPUs, each for a picture. A picture that waits for the one it refers to holds its
thread, and beside an engine that holds another CPU both may wait: 1080p of H.264 took 4.5 ms a frame on two CPUs with
three threads, 4.2 with six."""


def open_planar(uri: SourceUri, labels: tuple[str, ...], notes: list[str]) -> PlanarVideo | None:
    """Opens a video file; ``None`` where it is OpenCV's to read.

    Args:
        uri: of the kind ``video``.
        labels: of the engine.
        notes: the source's.
    """
    if kernels() is None:
        return None  # what would have to be turned into BGR all the same, OpenCV does better
    try:
        import av
    except ImportError:
        return None
    try:
        video = PlanarVideo(av, uri, labels, notes)
    except DataError:
        return None
    if video.is_planar:
        return video
    video.close()
    return None


class PlanarVideo(Recording):
    """A video file as planes.

    Args:
        av: the module.
        uri: says what part, and whether to loop.
        labels: of the engine.
        notes: the source's.

    Raises:
        DataError: it cannot be opened, or holds no video; `read` raises it where it cannot be opened again.
    """

    color: Literal["RGB", "BGR"] = "BGR"

    def __init__(self, av: ModuleType, uri: SourceUri, labels: tuple[str, ...], notes: list[str]) -> None:
        self.source_id = uri.shown
        self.labels = labels
        self.notes = notes
        self._av = av
        self._uri = uri
        self._container: Any = None
        self._begin()
        rate = float(self._stream.average_rate or 0)
        self.fps = rate if 0 < rate <= MAX_FPS else DEFAULT_FPS
        self._promised = self._stream.frames or round(self._seconds() * rate)
        # Whether it is to be turned is said by the pictures only, so the first one is looked at.
        self._peeked = self._grab()
        turned = self._peeked and self._picture.rotation != 0
        self.is_planar = self._peeked and not turned and self._coding(self._picture) is not None
        """Whether the first picture can be handed on as planes."""

    def close(self) -> None:
        """Closes the file."""
        self._container.close()

    def _begin(self) -> None:
        if self._container is not None:
            self._container.close()
        try:
            self._container = self._av.open(str(self._uri.path.absolute()))
        except (self._av.FFmpegError, OSError) as error:
            raise DataError(f"{self.source_id} cannot be opened as a video: {error}") from error
        self._stream = self._container.streams.best("video")
        if self._stream is None:
            self._container.close()
            raise DataError(f"{self.source_id} holds no video")
        self._stream.thread_type = "AUTO"
        self._stream.codec_context.thread_count = min(
            _DECODER_THREADS_A_CPU * len(os.sched_getaffinity(0)), _MAX_DECODER_THREADS
        )
        self._origin = self._stream.start_time or 0
        self._decoded: deque[Any] = deque()
        self._picture: Any = None
        self._peeked = False
        start_s = self._uri.options.start_s
        if start_s:
            # Where a container cannot be sought in, the frames before the part are decoded and passed over.
            with contextlib.suppress(self._av.FFmpegError):
                offset = round(start_s / self._stream.time_base) + self._origin
                self._container.seek(offset, stream=self._stream)
        self._packets: Iterator[Any] = self._container.demux(self._stream)

    def _grab(self) -> bool:
        if self._peeked:
            self._peeked = False
            return True
        while not self._decoded:
            try:
                packet = next(self._packets)
            except StopIteration:
                return False
            except (self._av.FFmpegError, OSError):
                # The file cannot be read on; what the decoder still holds comes out.
                self._packets = iter([None])
                continue
            # What cannot be decoded is passed over; the next key frame makes up for it.
            with contextlib.suppress(self._av.FFmpegError):
                self._decoded.extend(self._stream.codec_context.decode(packet))
        self._picture = self._decoded.popleft()
        return True

    def _at_ms(self) -> float:
        pts = self._picture.pts if self._picture.pts is not None else self._picture.dts
        if pts is None:
            return 1000.0 * self._in_pass / self.fps
        return float(1000 * (pts - self._origin) * self._stream.time_base)

    def _deliver(self, into: NDArray[np.uint8] | None) -> Delivered:
        picture, self._picture = self._picture, None
        coding = self._coding(picture)
        if coding is None:
            return Delivered(picture.to_ndarray(format="bgr24"))
        height, width = picture.height, picture.width
        shape = (height * 3 // 2, width)
        if into is None or into.shape != shape:
            into = np.empty(shape, np.uint8)
        for plane, place in zip(picture.planes, planes_of(into), strict=True):
            rows = np.frombuffer(plane, np.uint8).reshape(place.shape[0], plane.line_size)
            np.copyto(place, rows[:, : place.shape[1]])
        return Delivered(into, yuv=coding)

    def _coding(self, picture: Any) -> YuvCoding | None:
        """What the planes of a picture mean; ``None`` where they are not handed on."""
        if picture.width % 2 or picture.height % 2:
            return None
        return _coding(
            picture.format.name,
            int(picture.colorspace),
            int(picture.color_range),
            self._stream.codec_context.codec.name in _CENTERED,
        )

    def _seconds(self) -> float:
        if self._stream.duration is not None:
            return float(self._stream.duration * self._stream.time_base)
        return (self._container.duration or 0) / float(self._av.time_base)


@functools.cache
def _coding(pixel_format: str, color_space: int, color_range: int, centered: bool) -> YuvCoding | None:
    """From FFmpeg's numbers: asked for every picture, so it is kept."""
    if pixel_format not in ("yuv420p", "yuvj420p") or color_space not in _MATRICES:
        return None
    full_range = pixel_format == "yuvj420p" or color_range == _FULL_RANGE
    return YuvCoding(_MATRICES[color_space], full_range, "center" if centered else "left")
