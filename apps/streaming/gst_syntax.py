"""Which GStreamer pipelines a source may name: one straight chain of elements from an allow list.

GStreamer's launch syntax can write files, run programs and open sockets (``filesink``, ``tee``,
``fdsink``, ``shmsink`` …), and a URI may come from a file that someone else wrote. So a pipeline is
parsed here, in a small part of that syntax, and what is not understood is refused::

    pipeline = element { "!" (element | caps) }
    element  = NAME { PROPERTY "=" VALUE }
    caps     = MEDIA/TYPE [ "(memory:NVMM)" ] { "," FIELD "=" [ "(" TYPE ")" ] VALUE }

There are no bins, no references by name, no branches. Every element has its own list of properties;
the only ones that name a resource are a source element's own (``location``, ``device``, ``port``).
The first element is a source and no other is; the sink is appended by `apps.streaming.sources.pipelines`.

Source: GStreamer's ``gst/parse/grammar.y`` and ``gst-inspect-1.0`` 1.22; for NVIDIA's elements, the
Accelerated GStreamer guide of Jetson Linux 36.
"""

from __future__ import annotations

import re

from pipeline.errors import UsageError

__all__ = ["check_pipeline", "element_names", "is_live_pipeline", "last_format"]

_SOURCES: dict[str, tuple[str, ...]] = {
    "v4l2src": ("device", "io-mode", "do-timestamp", "num-buffers"),
    "nvv4l2camerasrc": ("device", "do-timestamp", "num-buffers"),
    "nvarguscamerasrc": (
        *(
            "sensor-id",
            "sensor-mode",
            "wbmode",
            "saturation",
            "exposuretimerange",
            "gainrange",
            "ispdigitalgainrange",
        ),
        *(
            "tnr-mode",
            "tnr-strength",
            "ee-mode",
            "ee-strength",
            "aeantibanding",
            "aelock",
            "awblock",
            "num-buffers",
        ),
    ),
    "libcamerasrc": ("camera-name",),
    "rtspsrc": (
        "location",
        "latency",
        "protocols",
        "user-id",
        "user-pw",
        "drop-on-latency",
        "timeout",
        "tcp-timeout",
    ),
    "udpsrc": ("port", "address", "multicast-group", "caps", "timeout"),
    "souphttpsrc": ("location", "is-live", "timeout", "user-id", "user-pw", "do-timestamp"),
    "filesrc": ("location",),
    "videotestsrc": ("pattern", "is-live", "num-buffers", "foreground-color"),
}
_LIVE_SOURCES = frozenset(_SOURCES) - {"filesrc", "videotestsrc"}
_FILTERS: dict[str, tuple[str, ...]] = {
    "queue": ("max-size-buffers", "max-size-bytes", "max-size-time", "leaky"),
    "identity": ("sync", "drop-allocation"),
    "capsfilter": ("caps",),
    "videorate": ("drop-only", "max-rate"),
    **dict.fromkeys(
        ("qtdemux", "matroskademux", "tsdemux", "avidemux", "multipartdemux", "parsebin", "decodebin"), ()
    ),
    **dict.fromkeys(("h264parse", "h265parse", "jpegparse", "mpeg4videoparse", "vp9parse", "av1parse"), ()),
    **dict.fromkeys(("rtph264depay", "rtph265depay", "rtpjpegdepay", "rtpmp4vdepay", "rtpvrawdepay"), ()),
    "rtpjitterbuffer": ("latency", "drop-on-latency"),
    **dict.fromkeys(("avdec_h264", "avdec_h265", "avdec_mjpeg"), ("max-threads",)),
    **dict.fromkeys(("openh264dec", "jpegdec", "vp8dec", "vp9dec", "dav1ddec", "nvjpegdec"), ()),
    "nvv4l2decoder": (
        "enable-max-performance",
        "drop-frame-interval",
        "num-extra-surfaces",
        "mjpeg",
        "disable-dpb",
    ),
    **dict.fromkeys(
        ("nvvidconv", "nvvideoconvert"),
        ("flip-method", "interpolation-method", "left", "right", "top", "bottom"),
    ),
    "videoconvert": ("n-threads",),
    "videoscale": ("method",),
    "videocrop": ("left", "right", "top", "bottom"),
    "videoflip": ("method", "video-direction"),
    "bayer2rgb": (),
}
_ELEMENTS = {**_SOURCES, **_FILTERS}

_NAME = r"[A-Za-z0-9][A-Za-z0-9_-]*"
_ELEMENT = re.compile(rf"({_NAME})(?=\s|$)")
_PROPERTY = re.compile(rf'({_NAME})\s*=\s*("[^"\\]*"|[^\s"\'!;\\]+)(?=\s|$)')
_FIELD = rf"\s*,\s*{_NAME}\s*=\s*(?:\((?:string|int|fraction|boolean)\)\s*)?[A-Za-z0-9_/.:+-]+"
_CAPS = re.compile(rf"(?:video|image|application)/[A-Za-z0-9.-]+(?:\(memory:NVMM\))?(?:{_FIELD})*")
_FORMAT = re.compile(r"format\s*=\s*(?:\(string\)\s*)?([A-Za-z0-9_]+)\s*(?:,|$)")


def check_pipeline(pipeline: str, shown: str) -> None:
    """Refuses a pipeline that is more than a chain of known elements.

    Args:
        pipeline: what stands behind ``gst:``.
        shown: the source, for messages; without credentials.

    Raises:
        UsageError: syntax, element or property outside of the lists above.
    """
    links = _links(pipeline)
    for position, link in enumerate(links):
        if not link:
            raise UsageError(
                f"{shown}: element {position + 1} of the pipeline is empty; write SOURCE ! ELEMENT ! …"
            )
        if _CAPS.fullmatch(link) and position:
            continue
        name = _ELEMENT.match(link)
        if name is None:
            raise UsageError(
                f"{shown}: part {position + 1} of the pipeline is neither an element with its properties nor caps "
                "(bins, names of other elements and branches are not allowed)"
            )
        _check_element(name[1], link[name.end() :], position, shown)


def element_names(pipeline: str) -> list[str]:
    """The elements of a pipeline that `check_pipeline` accepted, in their order."""
    return [link.split()[0] for link in _links(pipeline) if not _CAPS.fullmatch(link)]


def is_live_pipeline(pipeline: str) -> bool:
    """Whether its source element delivers whether or not it is read."""
    first = _links(pipeline)[0]
    return (
        first.split()[0] in _LIVE_SOURCES or re.search(r"\bis-live\s*=\s*(true|1)\b", first, re.I) is not None
    )


def last_format(pipeline: str) -> str | None:
    """The pixel format that the caps at the end of a pipeline ask for; `None` where it ends in an element."""
    last = _links(pipeline)[-1]
    match = _FORMAT.search(last) if _CAPS.fullmatch(last) and last.startswith("video/x-raw") else None
    return None if match is None else match[1]


def _links(pipeline: str) -> list[str]:
    """The parts between ``!``, which is no separator within double quotes."""
    return [part.strip() for part in re.split(r'!(?=(?:[^"]*"[^"]*")*[^"]*$)', pipeline)]


def _check_element(name: str, rest: str, position: int, shown: str) -> None:
    if name not in _ELEMENTS:
        raise UsageError(
            f"{shown}: the element {name!r} is not on the list of what a source may use; sources: "
            f"{', '.join(sorted(_SOURCES))}; others: {', '.join(sorted(_FILTERS))}"
        )
    if (name in _SOURCES) != (position == 0):
        where = "first, and nowhere else" if name in _SOURCES else "behind a source element"
        raise UsageError(f"{shown}: the element {name!r} stands {where}; the sink is added by edgefold")
    at = 0
    while rest[at:].strip():
        at += len(rest[at:]) - len(rest[at:].lstrip())
        match = _PROPERTY.match(rest, at)
        if match is None:
            # The text itself is not repeated: it may be half of a password.
            raise UsageError(
                f"{shown}: what follows {name!r} is not PROPERTY=VALUE; values hold no ! ; ' or \\, and "
                'spaces only within "double quotes"'
            )
        if match[1] not in _ELEMENTS[name]:
            allowed = ", ".join(_ELEMENTS[name]) or "none"
            raise UsageError(
                f"{shown}: {name!r} may not be given the property {match[1]!r}; allowed: {allowed}"
            )
        if match[1] == "caps" and not _CAPS.fullmatch(match[2].strip('"')):
            raise UsageError(f"{shown}: the caps of {name!r} are not MEDIA/TYPE,FIELD=VALUE,…")
        at = match.end()
