"""MJPEG over HTTP: one JPEG a part of a multipart body that has no end.

Read here and not by FFmpeg, for OpenCV's FFmpeg back-end keeps the size of the first frame: when the
camera's resolution changes, it goes on delivering arrays of the old size with wrong pixels in them
(measured with OpenCV 4.6 and 5.0). Here every JPEG is decoded by itself, at its own size.

Source: RFC 2046 section 5.1.1 (multipart).
"""

from __future__ import annotations

import http.client
from types import ModuleType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from apps.streaming.sources.http import Exchange
from apps.streaming.sources.network import lost, not_answered
from apps.streaming.sources.source import DEFAULT_FPS, Delivered
from apps.streaming.uris import SourceUri

__all__ = ["MjpegStream"]

_MAX_LINE_BYTES = 64 << 10
_MAX_HEADER_LINES = 64
_MAX_JPEG_BYTES = 32 << 20


class MjpegStream:
    """A stream of JPEGs.

    Args:
        cv2: the module; decodes.
        uri: of the kind ``http``.
        labels: of the engine.
        notes: the source's.
        exchange: answered with ``multipart/x-mixed-replace``; closed with the source.
    """

    color: Literal["RGB", "BGR"] = "BGR"
    live = True
    self_paced = True

    def __init__(
        self, cv2: ModuleType, uri: SourceUri, labels: tuple[str, ...], notes: list[str], exchange: Exchange
    ) -> None:
        self.source_id = uri.shown
        self.labels = labels
        self.notes = notes
        self.fps = DEFAULT_FPS  # the stream names none
        self._cv2 = cv2
        self._uri = uri
        self._exchange = exchange
        self._at_boundary = False
        # Some cameras write the dashes into the parameter too.
        self._boundary = b"--" + (exchange.boundary or "").encode("latin-1").removeprefix(b"--")

    def read(self, into: NDArray[np.uint8] | None = None) -> Delivered | None:
        """The next frame; see `Source.read`. A part that is no JPEG is a missing picture."""
        try:
            jpeg = self._part()
        except OSError as error:
            raise not_answered(self._uri, "its server", error) from error
        except http.client.HTTPException as error:
            raise lost(self._uri, f"broke off ({type(error).__name__})", "soon") from error
        pixels: Any = None
        if jpeg:
            pixels = self._cv2.imdecode(np.frombuffer(jpeg, np.uint8), self._cv2.IMREAD_COLOR)
        if pixels is None or into is None or into.shape != pixels.shape or into.dtype != pixels.dtype:
            return Delivered(pixels)
        np.copyto(into, pixels)
        return Delivered(into)

    def close(self) -> None:
        """Hangs up."""
        self._exchange.close()

    def _part(self) -> bytes:
        """The body of the next part."""
        while not self._at_boundary:
            self._at_boundary = self._line().startswith(self._boundary)
        self._at_boundary = False
        length: int | None = None
        for _ in range(_MAX_HEADER_LINES):
            line = self._line().strip()
            if not line:
                return self._by_length(length) if length is not None else self._by_boundary()
            name, _, value = line.partition(b":")
            if name.strip().lower() == b"content-length" and value.strip().isdigit():
                length = int(value)
        raise lost(self._uri, f"sends a part with more than {_MAX_HEADER_LINES} headers", "soon")

    def _by_length(self, length: int) -> bytes:
        if length > _MAX_JPEG_BYTES:
            raise self._too_large(length)
        data = self._exchange.answer.read(length)
        if len(data) < length:
            raise lost(self._uri, "ended within a picture", "soon")
        return data

    def _by_boundary(self) -> bytes:
        """Without a length, up to the next boundary, which begins the part behind it."""
        data = bytearray()
        while not (line := self._line()).startswith(self._boundary):
            data += line
            if len(data) > _MAX_JPEG_BYTES:
                raise self._too_large(len(data))
        self._at_boundary = True
        return bytes(data.removesuffix(b"\n").removesuffix(b"\r"))

    def _line(self) -> bytes:
        line = self._exchange.answer.readline(_MAX_LINE_BYTES)
        if not line:
            raise lost(self._uri, "ended", "soon")
        return line

    def _too_large(self, n_bytes: int) -> Exception:
        return lost(self._uri, f"sends a picture of {n_bytes} bytes (limit {_MAX_JPEG_BYTES})", "soon")
