"""Opens a source of any kind, by the back-end that reads it best on this machine.

Recordings, RTSP and HTTP: GStreamer with NVIDIA's decoder where the installed OpenCV and the machine
have both (a Jetson), else FFmpeg, else GStreamer in software. Video files: PyAV before OpenCV's FFmpeg, where it is
installed and hands over planes (`open_planar`). CSI cameras and pipelines: GStreamer.
MJPEG over HTTP: `MjpegStream`. Network sources are asked what they are first (`probe_rtsp`, `ask_http`).
"""

from __future__ import annotations

import os
import re
import ssl
import threading
import time
from types import ModuleType
from typing import Any, Literal

from apps.streaming import opencv
from apps.streaming.sources import pipelines
from apps.streaming.sources.captures import LiveStream, RecordedVideo, V4l2Camera
from apps.streaming.sources.http import ask_http
from apps.streaming.sources.mjpeg import MjpegStream
from apps.streaming.sources.network import lost
from apps.streaming.sources.planar import open_planar
from apps.streaming.sources.rtsp import probe_rtsp
from apps.streaming.sources.source import DEFAULT_FPS, ModelClasses, Source
from apps.streaming.uri_options import MAX_FPS
from apps.streaming.uris import SourceUri
from pipeline.errors import DataError, UnsupportedError, UsageError

__all__ = ["open_source"]

_FILE_TIMEOUT_S = 5.0
_CSI_TRIES = 3
_CSI_PAUSE_S = 1.0
_FFMPEG_OPTIONS = "OPENCV_FFMPEG_CAPTURE_OPTIONS"
_ffmpeg_options_lock = threading.Lock()

Decoder = Literal["hardware", "software"]


def open_source(uri: SourceUri, classes: ModelClasses, fps: float | None = None) -> Source:
    """Opens a source.

    Args:
        uri: from `parse_source`.
        classes: the bundle's; a source that knows the truth gives it in their indices, and gives none
            where its own classes are not among them.
        fps: rate of a synthetic camera or an image folder; the others have their own.

    Raises:
        UsageError: `fps` out of range, or given to a source that has its own rate.
        DataError: the file is no video, the folder holds no image.
        SourceLostError: a camera or stream that cannot be opened now; it says whether to try again.
        UnsupportedError: OpenCV, one of its back-ends or a GStreamer element is needed and missing.
    """
    if fps is not None and not 0 < fps <= MAX_FPS:
        raise UsageError(f"--fps {fps:g} is out of range; give more than 0 and at most {MAX_FPS:g}")
    if not uri.foreign:
        # Here, since a capture process needs none of what they import.
        from apps.streaming.sources.own import ImageSource, SyntheticSource

        kind = SyntheticSource if uri.kind == "synthetic" else ImageSource
        return kind(uri, classes, fps or DEFAULT_FPS)
    if fps is not None:
        raise UsageError(
            f"--fps sets the rate of a synthetic camera or an image folder; {uri.shown} has its own"
        )
    notes: list[str] = []
    labels = classes.named(None, notes)
    if _may_be_planar(uri):
        video = open_planar(uri, labels, notes)
        if video is not None:
            return video
    cv2 = opencv.load(f"reading {uri.shown}")
    if uri.kind == "v4l2":
        return V4l2Camera(cv2, uri, labels, notes)
    if uri.kind == "csi":
        return LiveStream(cv2, uri, labels, notes, _open_csi(cv2, uri))
    if uri.kind == "http" and uri.live and uri.options.backend is None:
        exchange = ask_http(uri)
        if exchange.content_type == "multipart/x-mixed-replace":
            return MjpegStream(cv2, uri, labels, notes, exchange)
        exchange.close()
    if uri.live:
        return LiveStream(cv2, uri, labels, notes, _open(cv2, uri))
    return RecordedVideo(cv2, uri, labels, notes, lambda: _open(cv2, uri))


def _may_be_planar(uri: SourceUri) -> bool:
    """Whether neither the user nor the machine has something better for a video file than PyAV."""
    options = uri.options
    if uri.kind != "video" or options.backend is not None or options.decoder == "hardware":
        return False
    return options.decoder == "software" or not pipelines.has_element(pipelines.HARDWARE_DECODER)


def _open(cv2: ModuleType, uri: SourceUri) -> Any:
    """An open capture of a file, a stream or a pipeline."""
    if uri.kind == "gst":
        return _open_gstreamer(cv2, uri, pipelines.user_pipeline(uri))
    codec = probe_rtsp(uri) if uri.kind == "rtsp" else ""
    if uri.kind == "http":
        ask_http(uri).close()
    decoder = _gstreamer_decoder(cv2, uri)
    if decoder is None:
        return _open_ffmpeg(cv2, uri)
    if uri.kind == "video":
        return _open_gstreamer(cv2, uri, pipelines.file_pipeline(uri.path, decoder))
    if uri.kind == "rtsp":
        return _open_gstreamer(cv2, uri, pipelines.rtsp_pipeline(uri, codec, decoder))
    return _open_gstreamer(cv2, uri, pipelines.http_pipeline(uri))


def _gstreamer_decoder(cv2: ModuleType, uri: SourceUri) -> Decoder | None:
    """How GStreamer is to decode; `None` where FFmpeg reads the source."""
    options, backends = uri.options, _backends(cv2)
    hardware = cv2.CAP_GSTREAMER in backends and pipelines.has_element(pipelines.HARDWARE_DECODER)
    if options.decoder == "hardware":
        if not hardware:
            raise UnsupportedError(
                f"{uri.shown}: decoder=hardware needs an OpenCV with GStreamer and the element "
                f"{pipelines.HARDWARE_DECODER} (JetPack's, on a Jetson); leave it out to decode in software"
            )
        return "hardware"
    seeks = bool(options.start_s) or options.end_s is not None
    decodes = uri.kind in ("video", "rtsp") and options.decoder is None
    if hardware and decodes and not seeks and options.backend != "ffmpeg":
        return "hardware"
    if options.backend == "gstreamer":
        return "software"
    if cv2.CAP_FFMPEG in backends or options.backend == "ffmpeg" or seeks:
        return None
    return "software"


def _backends(cv2: ModuleType) -> set[int]:
    """FFmpeg and GStreamer as far as they are built in.

    The registry cannot be asked: it lists GStreamer in the wheels too, as a plug-in that might be there.
    """
    names = {cv2.CAP_FFMPEG: "FFMPEG", cv2.CAP_GSTREAMER: "GStreamer"}
    built = cv2.getBuildInformation()
    return {backend for backend, name in names.items() if re.search(rf"\b{name}:\s+YES", built)}


def _open_ffmpeg(cv2: ModuleType, uri: SourceUri) -> Any:
    if cv2.CAP_FFMPEG not in _backends(cv2):
        raise UnsupportedError(
            f"{uri.shown} needs an OpenCV with FFmpeg, which this one ({cv2.__version__}) has not"
        )
    network = uri.kind != "video"
    timeout_ms = round(1000 * (uri.options.timeout_s if network else _FILE_TIMEOUT_S))
    parameters = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, timeout_ms, cv2.CAP_PROP_READ_TIMEOUT_MSEC, timeout_ms]
    # The timeouts are read only at opening, and only where the back-end is named; the options only from
    # the environment, at opening too.
    with _ffmpeg_options_lock:
        before = os.environ.get(_FFMPEG_OPTIONS)
        if network:
            os.environ[_FFMPEG_OPTIONS] = _ffmpeg_options(uri)
        try:
            capture = cv2.VideoCapture(
                uri.address if network else str(uri.path.absolute()), cv2.CAP_FFMPEG, parameters
            )
        finally:
            if before is not None:
                os.environ[_FFMPEG_OPTIONS] = before
            elif network:
                del os.environ[_FFMPEG_OPTIONS]
    if capture.isOpened():
        return capture
    if network:
        raise lost(
            uri,
            f"answers, but FFmpeg got no picture out of it within {uri.options.timeout_s:g} s "
            "(an unknown codec, or nothing is sent)",
            "soon",
        )
    raise _no_video(uri, "FFmpeg")


def _ffmpeg_options(uri: SourceUri) -> str:
    options: dict[str, str] = {}
    if uri.kind == "rtsp":
        options["rtsp_transport"] = uri.options.transport
        options["max_delay"] = str(1000 * uri.options.latency_ms)
    authorities = ssl.get_default_verify_paths().cafile
    if uri.address.startswith(("rtsps:", "https:")) and uri.options.tls == "verify" and authorities:
        options |= {"tls_verify": "1", "ca_file": authorities}
    return "|".join(f"{name};{value}" for name, value in options.items())


def _open_gstreamer(cv2: ModuleType, uri: SourceUri, pipeline: str) -> Any:
    _require_gstreamer(cv2, uri)
    pipelines.require_elements(pipeline, uri.shown)
    capture = cv2.VideoCapture(pipeline, cv2.CAP_GSTREAMER)
    if capture.isOpened():
        return capture
    if uri.kind == "video":
        raise _no_video(uri, "GStreamer")
    raise lost(uri, "did not start: GStreamer got no picture out of the pipeline", "soon")


def _require_gstreamer(cv2: ModuleType, uri: SourceUri) -> None:
    if cv2.CAP_GSTREAMER not in _backends(cv2):
        raise UnsupportedError(
            f"{uri.shown} needs an OpenCV with GStreamer, which this one ({cv2.__version__}) has not, like all "
            "wheels: use the system's (JetPack's; or apt install python3-opencv) in an environment made with "
            "--system-site-packages, without the opencv-python wheel"
        )


def _open_csi(cv2: ModuleType, uri: SourceUri) -> Any:
    """A camera whose daemon may be stuck: a few tries, then the remedy."""
    _require_gstreamer(cv2, uri)
    pipeline = pipelines.csi_pipeline(uri)
    pipelines.require_elements(pipeline, uri.shown)
    for attempt in range(_CSI_TRIES):
        if attempt:
            time.sleep(_CSI_PAUSE_S)
        capture = cv2.VideoCapture(pipeline, cv2.CAP_GSTREAMER)
        if capture.isOpened():
            return capture
        capture.release()
    raise lost(
        uri,
        f"did not open in {_CSI_TRIES} tries: the camera's daemon has to be restarted (sudo systemctl restart "
        "nvargus-daemon); if that does not help, check the ribbon cable and the sensor's number",
        "seldom",
    )


def _no_video(uri: SourceUri, backend: str) -> DataError:
    return DataError(
        f"{uri.shown} holds no video that OpenCV's {backend} back-end can decode (not a video, audio only, "
        "or cut off before its index)"
    )
