"""One syntax for all sources, checked before anything is opened; credentials are never shown.

=======================================  =====================================================
``synthetic:SEED``                       the synthetic camera, without end (live)
``synthetic:SEED:COUNT``                 its first COUNT frames
``FILE``                                 a video file
``FOLDER`` or ``FILE.npz``               images as `pipeline.datasets.open_dataset` reads them
``/dev/videoN``, ``/dev/v4l/by-id/…``    a V4L2 camera (live)
``csi:SENSOR_ID``                        a camera on a Jetson's CSI connector (live)
``rtsp://…``, ``rtsps://…``              a network camera (live)
``http://…``, ``https://…``              MJPEG (live), or a video file over HTTP
``gst:PIPELINE``                         a GStreamer pipeline up to raw video, from an allow list
=======================================  =====================================================

Options follow behind ``#``, see `apps.streaming.uri_options`; a file whose name holds a ``#`` is found
first. ``${NAME}`` in the userinfo or query of a URL is an environment variable.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from urllib.parse import quote, urlsplit

from apps.streaming.gst_syntax import check_pipeline, is_live_pipeline
from apps.streaming.redaction import redact_urls, secrets_of, without_secrets
from apps.streaming.uri_options import SourceKind, SourceOptions, parse_options
from pipeline.errors import DataError, UnsupportedError, UsageError

__all__ = ["FORMS", "SourceUri", "parse_source"]

FORMS = (
    "synthetic:SEED[:COUNT], a video file, an image folder, an .npz file, /dev/videoN, /dev/v4l/by-id/NAME, "
    "csi:SENSOR_ID, rtsp://, rtsps://, http://, https:// or gst:PIPELINE"
)
_IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm"})
# Over HTTP a name is all there is to tell a file from a camera before anything is asked.
_FILE_SUFFIXES = frozenset({".mp4", ".mkv", ".avi", ".mov", ".webm", ".m4v", ".mpg", ".mpeg"})
_VARIABLE = re.compile(r"\$\{([^}]*)\}")
_MAX_SENSOR = 15


@dataclass(frozen=True, slots=True)
class SourceUri:
    """A parsed source. It can be pickled, for a capture process; `repr` holds no credentials."""

    kind: SourceKind
    text: str = field(repr=False)
    """As the user wrote it. Never show it: `shown` is for that."""
    shown: str
    """Without credentials; names the source in output."""
    address: str = field(repr=False, default="")
    """What the back-end opens: URL or pipeline, variables expanded, without the options."""
    path: Path = Path()
    """Of a file, a folder or a device; a device's link by id stays what it is until it is opened, so
    that a camera which comes back under another number is found again."""
    seed: int = 0
    count: int | None = None
    """Of a synthetic source; ``None``: without end."""
    sensor: int = 0
    options: SourceOptions = field(default_factory=SourceOptions)
    secrets: tuple[str, ...] = field(repr=False, default=())

    @property
    def live(self) -> bool:
        """Whether frames pass whether or not they are read."""
        if self.kind == "synthetic":
            return self.count is None
        if self.kind == "http":
            return PurePosixPath(urlsplit(self.address).path).suffix.lower() not in _FILE_SUFFIXES
        if self.kind == "gst":
            return is_live_pipeline(self.address)
        return self.kind in ("v4l2", "csi", "rtsp")

    @property
    def foreign(self) -> bool:
        """Whether reading it runs code that can hang or crash (decoders, drivers): in a process of its own."""
        return self.kind not in ("synthetic", "images")

    def redact(self, text: str) -> str:
        """`text` (a library's log line, an error message) without this source's credentials."""
        return without_secrets(text, self.secrets)


def parse_source(uri: str) -> SourceUri:
    """Checks a source as the user wrote it, without opening it.

    Raises:
        UsageError: malformed, an unknown scheme or option, or an environment variable that is not set.
        DataError: a path that is not there, or is nothing that can be streamed.
        UnsupportedError: a camera that is not there or must not be read. One named by id may be away:
            it is the same when it comes back, which a number does not promise.
    """
    shown = redact_urls(uri)
    if re.search(r"[\x00-\x1f\x7f]", uri):
        raise UsageError(f"the source {shown!r} holds control characters")
    if uri.startswith("gst:"):
        check_pipeline(uri[len("gst:") :], shown)
        return SourceUri("gst", uri, shown, address=uri[len("gst:") :].strip(), secrets=secrets_of(uri))
    if re.match(r"(rtsps?|https?):", uri, re.IGNORECASE):
        return _parse_url(uri, shown)
    if uri.startswith("synthetic:"):
        return _parse_synthetic(uri)
    if uri.startswith("csi:"):
        return _parse_csi(uri)
    base, _, fragment = uri.rpartition("#") if "#" in uri and not _is_there(uri) else (uri, "", "")
    path = Path(base).expanduser()
    if base.startswith("/dev/"):
        _check_device(path)
        return SourceUri("v4l2", uri, uri, path=path, options=parse_options(fragment, "v4l2", uri))
    kind = _kind_of_file(path, base)
    return SourceUri(kind, uri, uri, path=path, options=parse_options(fragment, kind, uri))


def _is_there(uri: str) -> bool:
    return Path(uri).expanduser().exists()


def _kind_of_file(path: Path, written: str) -> SourceKind:
    if path.is_dir():
        return "images"
    if path.is_file():
        if path.suffix.lower() in _IMAGE_SUFFIXES:
            raise DataError(f"{written} is a single image; put it into a folder and give the folder")
        if path.stat().st_size == 0:
            raise DataError(f"{written} is an empty file (0 bytes), not a video")
        return "images" if path.suffix.lower() == ".npz" else "video"
    if path.exists():
        raise DataError(f"{written} is neither a file nor a folder; a source is {FORMS}")
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):", written)
    if scheme:
        raise UsageError(f"unknown source scheme {scheme[1]!r}; a source is {FORMS}")
    raise DataError(f"no such file or folder: {written!r} (looked in {Path.cwd()}); a source is {FORMS}")


def _parse_synthetic(uri: str) -> SourceUri:
    base, _, fragment = uri.partition("#")
    match = re.fullmatch(r"synthetic:(\d{1,10})(?::(\d{1,10}))?", base)
    if not match:
        raise UsageError(f"{uri!r} is not synthetic:SEED[:COUNT] with whole numbers, such as synthetic:7:500")
    count = None if match[2] is None else int(match[2])
    if count == 0:
        raise UsageError(f"{uri!r} asks for no frames; COUNT is at least 1, or left out for a live camera")
    options = parse_options(fragment, "synthetic", uri)
    if options.loop and count is None:
        raise UsageError(f"{uri!r} has no end to begin again at; give synthetic:SEED:COUNT#loop")
    return SourceUri("synthetic", uri, uri, seed=int(match[1]), count=count, options=options)


def _parse_csi(uri: str) -> SourceUri:
    base, _, fragment = uri.partition("#")
    match = re.fullmatch(r"csi:(\d{1,2})", base)
    if not match or int(match[1]) > _MAX_SENSOR:
        raise UsageError(f"{uri!r} is not csi:SENSOR_ID with a number from 0 to {_MAX_SENSOR}, such as csi:0")
    options = parse_options(fragment, "csi", uri)
    return SourceUri("csi", uri, uri, sensor=int(match[1]), options=options)


def _parse_url(uri: str, shown: str) -> SourceUri:
    base, _, fragment = uri.partition("#")
    secret_values: list[str] = []

    def expand(match: re.Match[str]) -> str:
        value = os.environ.get(match[1])
        if not value:
            raise UsageError(
                f"{shown}: the environment variable {match[1]!r} is not set, or empty; set it, "
                "or give the value in the place of ${…}"
            )
        secret_values.extend((value, quote(value, safe="")))
        return quote(value, safe="")

    try:
        parts = urlsplit(base)
        userinfo, at, host = parts.netloc.rpartition("@")
        if not host.strip("[]") or not parts.hostname or parts.port == 0:
            raise ValueError("no host")
    except ValueError:
        # Not chained: its message may hold a part of a password that was taken for the port.
        raise UsageError(
            f"{shown} is not SCHEME://[USER:PASSWORD@]HOST[:PORT]/PATH; characters such as / @ : # in a "
            "password are written as %2F %40 %3A %23"
        ) from None
    if re.search(r"\s", base):
        raise UsageError(f"{shown} holds a space; write it as %20")
    if "${" in host or "${" in parts.path:
        raise UsageError(f"{shown}: ${{…}} is expanded in the userinfo and the query only")
    parts = parts._replace(
        netloc=f"{_VARIABLE.sub(expand, userinfo)}{at}{host}", query=_VARIABLE.sub(expand, parts.query)
    )
    kind: SourceKind = "rtsp" if parts.scheme in ("rtsp", "rtsps") else "http"
    address = parts.geturl()
    secrets = sorted({*secrets_of(address), *secrets_of(base), *secret_values}, key=len, reverse=True)
    options = parse_options(fragment, kind, shown)
    if options.tls == "unverified" and parts.scheme not in ("rtsps", "https"):
        raise UsageError(f"{shown}: tls= is an option of rtsps:// and https://")
    return SourceUri(kind, uri, shown, address=address, options=options, secrets=tuple(secrets))


def _check_device(path: Path) -> None:
    """Refuses what is no camera; lets a camera by id be away."""
    present = ", ".join(sorted(str(p) for p in Path("/dev").glob("video*"))) or "none"
    by_name = str(path).startswith(("/dev/v4l/by-id/", "/dev/v4l/by-path/")) and ".." not in path.parts
    if not path.exists():
        if by_name:
            return
        raise UnsupportedError(f"no such device: {path}; cameras here: {present}")
    device = path.resolve()
    if not stat.S_ISCHR(device.stat().st_mode) or not re.fullmatch(r"/dev/video\d+", str(device)):
        raise DataError(f"{path} is not a video capture device; cameras here: {present}")
    if not os.access(device, os.R_OK | os.W_OK):
        raise UnsupportedError(
            f"no permission to open {device}; add the user to the group that owns it "
            "(usually: sudo usermod -aG video $USER, then log in again)"
        )
