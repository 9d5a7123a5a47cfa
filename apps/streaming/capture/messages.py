"""What a capture process says to its supervisor, one datagram a message.

A capture process runs decoders on data from outside, so what it says is checked as such: a fixed
binary record for a frame, JSON for the rest, never pickle. The other way there are only the numbers
of slots that are free again, and the end of the socket, which means: stop.
"""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from dataclasses import dataclass
from typing import Any, Final, get_args

from pipeline.artifacts import PixelFormat, YuvCoding, YuvMatrix
from pipeline.errors import Retry

__all__ = [
    "MAX_MESSAGE_BYTES",
    "Alive",
    "Dropped",
    "Ended",
    "Failed",
    "FrameReady",
    "Labels",
    "Message",
    "Opened",
    "RingReady",
    "decode",
    "decode_slot",
    "encode",
    "encode_slot",
]

MAX_MESSAGE_BYTES: Final = 1 << 16
_FRAME = struct.Struct("<cIHIIBBqqdI")
_SLOT = struct.Struct("<IH")
_FRAME_TAG = b"F"
_FORMATS: Final[tuple[PixelFormat, ...]] = get_args(PixelFormat)
# What a byte says of planes: its place in this list.
_CODINGS: Final[tuple[YuvCoding | None, ...]] = (
    None,
    *(
        YuvCoding(matrix, full_range, chroma)
        for matrix in get_args(YuvMatrix)
        for full_range in (False, True)
        for chroma in ("left", "center")
    ),
)
_NO_LABEL = -1


@dataclass(frozen=True, slots=True)
class FrameReady:
    """A frame lies in a slot."""

    generation: int
    """Of the ring."""
    slot: int
    height: int
    width: int
    pixel_format: PixelFormat
    label: int | None
    timestamp_ns: int
    """Monotonic, at capture: one clock for all processes of a machine."""
    capture_s: float
    fingerprint: int
    """Equal for identical pixels, see `apps.streaming.capture.fingerprint`; 0: not taken."""
    yuv: YuvCoding | None = None
    """Of ``I420``, and of no other format."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(H, W) of a gray frame, (3H/2, W) of planes, else (H, W, C)."""
        if self.pixel_format == "I420":
            return (self.height * 3 // 2, self.width)
        channels = {"GRAY": 1, "RGBA": 4, "BGRA": 4}.get(self.pixel_format, 3)
        return (self.height, self.width) if channels == 1 else (self.height, self.width, channels)


@dataclass(frozen=True, slots=True)
class RingReady:
    """A new ring; its descriptor comes with the message."""

    generation: int
    n_slots: int
    slot_bytes: int


@dataclass(frozen=True, slots=True)
class Labels:
    """Further class names, before `Opened`; they are many, and a datagram is not large."""

    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Opened:
    """The source is open."""

    fps: float
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Alive:
    """Nothing to deliver yet, but at work: passing over what was delivered before a restart."""


@dataclass(frozen=True, slots=True)
class Dropped:
    """So many frames were read and cannot be used, or found no free slot."""

    reason: str
    count: int


@dataclass(frozen=True, slots=True)
class Ended:
    """The source has no more frames."""

    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Failed:
    """The source could not be opened or read."""

    error: str
    """Name of the class in `pipeline.errors`."""
    message: str
    retry: Retry | None
    """Of a `SourceLostError`."""


Message = FrameReady | RingReady | Labels | Opened | Alive | Dropped | Ended | Failed

_CONTROL: Final = {kind.__name__: kind for kind in (RingReady, Labels, Opened, Alive, Dropped, Ended, Failed)}


def encode(message: Message) -> bytes:
    """The datagram of a message."""
    if isinstance(message, FrameReady):
        return _FRAME.pack(
            _FRAME_TAG,
            message.generation,
            message.slot,
            message.height,
            message.width,
            _FORMATS.index(message.pixel_format),
            _CODINGS.index(message.yuv),
            _NO_LABEL if message.label is None else message.label,
            message.timestamp_ns,
            message.capture_s,
            message.fingerprint,
        )
    return json.dumps([type(message).__name__, dataclasses.asdict(message)]).encode()


def decode(datagram: bytes) -> Message:
    """The message of a datagram.

    Raises:
        ValueError: it is none.
    """
    if datagram[:1] == _FRAME_TAG:
        if len(datagram) != _FRAME.size:
            raise ValueError(f"a frame message of {len(datagram)} bytes; it has {_FRAME.size}")
        _, generation, slot, height, width, form, coding, label, timestamp_ns, capture_s, fingerprint = (
            _FRAME.unpack(datagram)
        )
        if form >= len(_FORMATS):
            raise ValueError(f"a frame of pixel format {form}; there are {len(_FORMATS)}")
        planar = _FORMATS[form] == "I420"
        if coding >= len(_CODINGS) or planar != (coding > 0) or (planar and (height % 2 or width % 2)):
            raise ValueError(f"a {_FORMATS[form]} frame of {width}×{height} with coding {coding}")
        return FrameReady(
            generation,
            slot,
            height,
            width,
            _FORMATS[form],
            None if label == _NO_LABEL else label,
            timestamp_ns,
            capture_s,
            fingerprint,
            _CODINGS[coding],
        )
    try:
        kind, fields = json.loads(datagram)
        message: Message = _CONTROL[kind](**{name: _checked(name, value) for name, value in fields.items()})
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"not a message of a capture process: {datagram[:40]!r}") from error
    return message


def _checked(name: str, value: Any) -> Any:
    """A field's value, if it is of the field's type. By hand: pydantic would be most of what a capture
    process spends on its imports."""
    if (
        name in ("names", "notes")
        and isinstance(value, list)
        and all(isinstance(item, str) for item in value)
    ):
        return tuple(value)
    if (
        name in ("generation", "n_slots", "slot_bytes", "count")
        and type(value) is int
        and 0 < value < 1 << 40
    ):
        return value
    if name == "fps" and isinstance(value, (int, float)) and math.isfinite(value) and value >= 0:
        return float(value)
    if name in ("reason", "error", "message") and isinstance(value, str):
        return value
    if name == "retry" and (value is None or value in get_args(Retry)):
        return value
    raise ValueError(f"{name} is {value!r}")


def encode_slot(generation: int, slot: int) -> bytes:
    """The datagram that gives a slot back."""
    return _SLOT.pack(generation, slot)


def decode_slot(datagram: bytes) -> tuple[int, int]:
    """Generation and number of the slot given back."""
    generation, slot = _SLOT.unpack(datagram)
    return generation, slot
