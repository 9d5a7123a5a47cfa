"""The options that stand in a source's fragment: ``clip.mp4#t=10,20&loop``.

=================  ============================  ====================================================
option             of                            meaning
=================  ============================  ====================================================
``t=START[,END]``  video files                   that part; seconds or ``[hh:]mm:ss``, as W3C's media
                                                 fragments write it
``loop``           files, images, synthetic      begin again at the end
``transport=``     RTSP                          ``tcp`` (default) or ``udp``
``latency=``       RTSP                          milliseconds to wait for packets that come late, 200
``timeout=``       RTSP, HTTP                    seconds for an answer, and for the next frame, 5
``tls=``           RTSPS, HTTPS                  ``verify`` (default), or ``unverified`` for a camera with
                                                 a certificate that it made itself
``backend=``       files, RTSP, HTTP             ``ffmpeg`` or ``gstreamer``; by default see `decoder`
``decoder=``       files, RTSP                   ``hardware`` or ``software``; by default hardware where
                                                 GStreamer has NVIDIA's decoder
``size=WxH``       V4L2, CSI                     pixels
``fps=``           V4L2, CSI                     frames a second
``format=``        V4L2                          FourCC, such as ``MJPG`` or ``YUYV``
=================  ============================  ====================================================

Sources: W3C Media Fragments URI 1.0, section 4.2.1 (``t``, Normal Play Time).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.errors import UsageError

__all__ = ["MAX_FPS", "SourceKind", "SourceOptions", "parse_options"]

SourceKind = Literal["synthetic", "video", "images", "v4l2", "csi", "rtsp", "http", "gst"]

MAX_FPS = 1000.0
_MAX_SIDE_PX = 16384
_MAX_LATENCY_MS = 10_000
_TIMEOUT_S = (0.5, 60.0)

_KNOWN: dict[SourceKind, tuple[str, ...]] = {
    "synthetic": ("loop",),
    "video": ("t", "loop", "backend", "decoder"),
    "images": ("loop",),
    "v4l2": ("size", "fps", "format"),
    "csi": ("size", "fps"),
    "rtsp": ("transport", "latency", "timeout", "tls", "backend", "decoder"),
    "http": ("timeout", "tls", "backend"),
    "gst": (),
}
_CHOICES = {
    "transport": ("tcp", "udp"),
    "tls": ("verify", "unverified"),
    "backend": ("ffmpeg", "gstreamer"),
    "decoder": ("hardware", "software"),
}
_CLOCK = re.compile(r"(?:(?:(\d{1,4}):)?([0-5]?\d):(?=[0-5]?\d(?:\.|$)))?(\d{1,9}(?:\.\d{0,9})?)")


@dataclass(frozen=True, slots=True)
class SourceOptions:
    """What the fragment asks for; `None` is the source's or the machine's choice."""

    start_s: float = 0.0
    end_s: float | None = None
    loop: bool = False
    transport: Literal["tcp", "udp"] = "tcp"
    latency_ms: int = 200
    timeout_s: float = 5.0
    tls: Literal["verify", "unverified"] = "verify"
    backend: Literal["ffmpeg", "gstreamer"] | None = None
    decoder: Literal["hardware", "software"] | None = None
    size_wh: tuple[int, int] | None = None
    fps: float | None = None
    format: str | None = None


def parse_options(fragment: str, kind: SourceKind, shown: str) -> SourceOptions:
    """Reads ``name=value&flag``.

    Args:
        fragment: what stands behind the ``#``.
        kind: of the source; decides which options there are.
        shown: the source, for messages; without credentials.

    Raises:
        UsageError: an option that this kind does not have, that is given twice, or out of range.
    """
    values: dict[str, Any] = {}
    seen: set[str] = set()
    for part in filter(None, fragment.split("&")):
        name, _, value = part.partition("=")
        if name not in _KNOWN[kind]:
            known = ", ".join(_KNOWN[kind]) or "none"
            raise UsageError(f"{shown}: unknown option {name!r}; a {kind} source has: {known}")
        if name in seen:
            raise UsageError(f"{shown}: the option {name!r} is given twice")
        seen.add(name)
        values.update(_value(name, value, shown))
    options = SourceOptions(**values)
    if options.decoder == "hardware" and options.backend == "ffmpeg":
        raise UsageError(
            f"{shown}: decoder=hardware is GStreamer's (nvv4l2decoder); leave backend=ffmpeg out"
        )
    if "t" in seen and "gstreamer" in (
        options.backend,
        "gstreamer" if options.decoder == "hardware" else None,
    ):
        raise UsageError(
            f"{shown}: t= needs the FFmpeg back-end, since OpenCV's GStreamer back-end does not seek "
            "reliably; leave backend and decoder out"
        )
    return options


def _value(name: str, value: str, shown: str) -> dict[str, Any]:
    """The fields of `SourceOptions` that one option sets."""
    if name in _CHOICES:
        if value not in _CHOICES[name]:
            raise UsageError(f"{shown}: {name}={value} is not {' or '.join(_CHOICES[name])}")
        return {name: value}
    if name == "loop":
        if value:
            raise UsageError(f"{shown}: loop takes no value, not {value!r}")
        return {"loop": True}
    if name == "t":
        return _interval(value, shown)
    if name == "size":
        match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", value)
        sides = (int(match[1]), int(match[2])) if match else (0, 0)
        if not all(2 <= side <= _MAX_SIDE_PX for side in sides):
            raise UsageError(f"{shown}: size={value} is not WIDTHxHEIGHT of 2 to {_MAX_SIDE_PX} pixels each")
        return {"size_wh": sides}
    if name == "format":
        if not re.fullmatch(r"[A-Z0-9]{4}", value):
            raise UsageError(
                f"{shown}: format={value} is not a FourCC of four capitals or digits, such as MJPG"
            )
        return {"format": value}
    if name == "latency":
        return {"latency_ms": int(_number(name, value, 0, _MAX_LATENCY_MS, "milliseconds", shown))}
    if name == "timeout":
        return {"timeout_s": _number(name, value, *_TIMEOUT_S, "seconds", shown)}
    return {"fps": _number(name, value, 0.1, MAX_FPS, "frames a second", shown)}


def _number(name: str, value: str, low: float, high: float, unit: str, shown: str) -> float:
    number = float(value) if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", value) else -1.0
    if not low <= number <= high:
        raise UsageError(f"{shown}: {name}={value} is not a number of {unit} from {low:g} to {high:g}")
    return number


def _interval(value: str, shown: str) -> dict[str, Any]:
    start, comma, end = value.removeprefix("npt:").partition(",")
    start_s, end_s = _clock_s(start or "0"), _clock_s(end) if comma else None
    malformed = start_s is None or (comma and end_s is None) or not (start or end)
    if malformed or (end_s is not None and start_s is not None and end_s <= start_s):
        raise UsageError(
            f"{shown}: t={value} is not START[,END] with END behind START, in seconds or [hh:]mm:ss, "
            "such as t=10,20 or t=1:30"
        )
    return {"start_s": start_s, "end_s": end_s}


def _clock_s(text: str) -> float | None:
    match = _CLOCK.fullmatch(text)
    if match is None:
        return None
    return 3600.0 * int(match[1] or 0) + 60.0 * int(match[2] or 0) + float(match[3])
