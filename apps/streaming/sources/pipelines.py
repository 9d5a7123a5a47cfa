"""The GStreamer pipelines of every kind of source, as text, and what of them this machine has.

A Jetson decodes in hardware and keeps pictures in NVMM memory until nvvidconv converts them. It
cannot write three-byte pixels, so what arrives is BGRx, whose fourth byte the reader drops.

* Live sources end in ``drop=true max-buffers=1 sync=false``: GStreamer's own queue would otherwise hold old
  frames, since OpenCV's ``CAP_PROP_BUFFERSIZE`` does nothing here.
* Files end in ``drop=false``: every frame counts, and the reader sets the pace.
* Values from the user stand in double quotes, and what would end them is refused.

Source: Accelerated GStreamer guide of Jetson Linux 36 (nvarguscamerasrc, nvv4l2decoder, nvvidconv).
"""

from __future__ import annotations

import functools
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from apps.streaming.gst_syntax import element_names, last_format
from apps.streaming.uris import SourceUri
from pipeline.errors import UnsupportedError, UsageError

__all__ = [
    "HARDWARE_DECODER",
    "csi_pipeline",
    "file_pipeline",
    "has_element",
    "http_pipeline",
    "require_elements",
    "rtsp_pipeline",
    "user_pipeline",
]

HARDWARE_DECODER = "nvv4l2decoder"

_LIVE_SINK = "appsink drop=true max-buffers=1 sync=false"
_FILE_SINK = "appsink drop=false max-buffers=4 sync=false"
_TO_BGR = "videoconvert ! video/x-raw,format=BGR"
_FROM_NVMM = "nvvidconv ! video/x-raw,format=BGRx"
# What OpenCV takes from an appsink and `apps.streaming.frames` knows.
_DIRECT_FORMATS = frozenset({"BGR", "BGRx", "GRAY8"})
# By the encoding name of the SDP: depayloader and parser, the decoder in software.
_CODECS = {
    "H264": ("rtph264depay ! h264parse", "avdec_h264"),
    "H265": ("rtph265depay ! h265parse", "avdec_h265"),
    "JPEG": ("rtpjpegdepay ! jpegparse", "jpegdec"),
}
_INSPECT_TIMEOUT_S = 20.0
_CSI_SIZE_WH, _CSI_FPS = (1920, 1080), 30.0


def file_pipeline(path: Path, decoder: Literal["hardware", "software"]) -> str:
    """Any container and codec that GStreamer has a demuxer and parser for."""
    head = f"filesrc location={_quoted(str(path.absolute()))}"
    if decoder == "hardware":
        return f"{head} ! parsebin ! {HARDWARE_DECODER} ! {_FROM_NVMM} ! {_FILE_SINK}"
    return f"{head} ! decodebin ! {_TO_BGR} ! {_FILE_SINK}"


def rtsp_pipeline(uri: SourceUri, codec: str, decoder: Literal["hardware", "software"]) -> str:
    """An RTSP stream.

    Args:
        uri: of the kind ``rtsp``.
        codec: encoding name from the stream's SDP, such as ``H264``.
        decoder: ``hardware`` is NVIDIA's.

    Raises:
        UnsupportedError: a codec that there is no pipeline for.
    """
    if codec not in _CODECS:
        raise UnsupportedError(
            f"{uri.shown} sends {codec}, which the GStreamer back-end has no pipeline for "
            f"({', '.join(_CODECS)}); set the camera to H264, or give #backend=ffmpeg"
        )
    depay, software = _CODECS[codec]
    options = uri.options
    timeout_us = round(options.timeout_s * 1e6)
    # Of TLS, GStreamer checks the certificate by default; 0 is "check nothing".
    tls = " tls-validation-flags=0" if options.tls == "unverified" else ""
    head = (
        f"rtspsrc location={_quoted(uri.address)} protocols={options.transport} latency={options.latency_ms} "
        f"drop-on-latency=true tcp-timeout={timeout_us} timeout={timeout_us}{tls} ! {depay}"
    )
    if decoder == "hardware" and codec != "JPEG":
        return f"{head} ! {HARDWARE_DECODER} ! {_FROM_NVMM} ! {_LIVE_SINK}"
    return f"{head} ! {software} ! {_TO_BGR} ! {_LIVE_SINK}"


def http_pipeline(uri: SourceUri) -> str:
    """MJPEG, or a file, over HTTP; decoded in software."""
    tls = " ssl-strict=false" if uri.options.tls == "unverified" else ""
    live = "true" if uri.live else "false"
    return (
        f"souphttpsrc location={_quoted(uri.address)} is-live={live} timeout={max(1, round(uri.options.timeout_s))}{tls} "
        f"! decodebin ! {_TO_BGR} ! {_LIVE_SINK if uri.live else _FILE_SINK}"
    )


def csi_pipeline(uri: SourceUri) -> str:
    """A sensor on the CSI connector through NVIDIA's image processor."""
    width, height = uri.options.size_wh or _CSI_SIZE_WH
    rate = _fraction(uri.options.fps or _CSI_FPS)
    return (
        f"nvarguscamerasrc sensor-id={uri.sensor} ! "
        f"video/x-raw(memory:NVMM),width={width},height={height},framerate={rate},format=NV12 ! "
        f"{_FROM_NVMM} ! {_LIVE_SINK}"
    )


def user_pipeline(uri: SourceUri) -> str:
    """The user's pipeline, converted where it must be, with the only sink that it may have."""
    sink = _LIVE_SINK if uri.live else _FILE_SINK
    if last_format(uri.address) in _DIRECT_FORMATS:
        return f"{uri.address} ! {sink}"
    return f"{uri.address} ! {_TO_BGR} ! {sink}"


def require_elements(pipeline: str, shown: str) -> None:
    """Says which of a pipeline's elements this machine lacks.

    Raises:
        UnsupportedError: at least one.
    """
    missing = [name for name in element_names(pipeline) if not has_element(name)]
    if missing:
        raise UnsupportedError(
            f"{shown} needs the GStreamer elements {', '.join(missing)}, which this machine lacks: "
            f"{_remedy(missing)}"
        )


@functools.cache
def has_element(name: str) -> bool:
    """Whether GStreamer here has an element, as ``gst-inspect-1.0`` says.

    Without that program nothing is known, and the elements are taken to be there but for NVIDIA's.
    """
    inspect = shutil.which("gst-inspect-1.0")
    if inspect is None:
        return not name.startswith("nv")
    try:
        done = subprocess.run(
            [inspect, "--exists", name], capture_output=True, timeout=_INSPECT_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def _remedy(missing: Iterable[str]) -> str:
    if any(name.startswith("nv") for name in missing):
        return "those that begin with nv come with JetPack (nvidia-l4t-gstreamer) and run on a Jetson only"
    return "apt install gstreamer1.0-plugins-base gstreamer1.0-plugins-good gstreamer1.0-plugins-bad gstreamer1.0-libav"


def _quoted(value: str) -> str:
    """A value that cannot end its own quotes."""
    if '"' in value or "\\" in value:
        raise UsageError("a name or address with a double quote or backslash cannot be given to GStreamer")
    return f'"{value}"'


def _fraction(fps: float) -> str:
    return f"{round(fps)}/1" if fps == round(fps) else f"{round(1000 * fps)}/1000"
