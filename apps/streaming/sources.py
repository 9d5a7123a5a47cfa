"""Where frames come from: one syntax for all sources, checked before anything is opened.

===========================  ==========================================================
``synthetic:SEED``           the synthetic camera, without end, at ``--fps`` (live)
``synthetic:SEED:COUNT``     its first COUNT frames
``FILE``                     a video file, in whatever format the installed OpenCV decodes
``FOLDER`` or ``FILE.npz``   images as `pipeline.datasets.open_dataset` reads them
``/dev/videoN``              a V4L2 camera, also by ``/dev/v4l/by-id/…`` (live)
===========================  ==========================================================
"""

from __future__ import annotations

import itertools
import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from apps.streaming import opencv
from pipeline.artifacts import Sample
from pipeline.datasets import open_dataset
from pipeline.errors import DataError, DeviceFaultError, UnsupportedError, UsageError
from pipeline.synthetic import CLASS_NAMES, SyntheticCamera
from pipeline.validation import match_labels

__all__ = ["DEFAULT_FPS", "Delivered", "ModelClasses", "Source", "SourceUri", "open_source", "parse_source"]

DEFAULT_FPS = 30.0
_FORMS = "synthetic:SEED[:COUNT], a video file, an image folder, an .npz file, or /dev/videoN"
_OPEN_TIMEOUT_MS = 5000
_READ_TIMEOUT_MS = 5000
_MAX_FPS = 1000.0
_MAX_SKIPS_LISTED = 5
_IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm"})


@dataclass(frozen=True, slots=True)
class SourceUri:
    """A parsed source; what it names existed when it was parsed."""

    kind: Literal["synthetic", "video", "images", "v4l2"]
    text: str
    """As the user wrote it; names the source in output."""
    path: Path = Path()
    seed: int = 0
    count: int | None = None
    """Of a synthetic source; ``None``: without end."""

    @property
    def shown(self) -> str:
        """Names the source in output."""
        return self.text

    @property
    def live(self) -> bool:
        """Whether frames pass whether or not they are read."""
        return self.kind == "v4l2" or (self.kind == "synthetic" and self.count is None)

    @property
    def foreign(self) -> bool:
        """Whether reading it runs code that can hang or crash (decoders, drivers): in a process of its own."""
        return self.kind not in ("synthetic", "images")

    def redact(self, text: str) -> str:
        """`text` without this source's credentials; these kinds have none."""
        return text


@dataclass(frozen=True, slots=True)
class Delivered:
    """What a source handed over: unchecked pixels, and the true class where it is known."""

    pixels: Any
    label: int | None = None


@dataclass(frozen=True, slots=True)
class ModelClasses:
    """The classes of the engine: how many scores it gives, and what they are called."""

    labels: tuple[str, ...]
    """As many as `count`; or none, where the model came without names."""
    count: int

    def named(self, source_names: Sequence[str] | None, notes: list[str]) -> tuple[str, ...]:
        """The labels; without them the source's class names where they are as many, else numbers."""
        if self.labels:
            return self.labels
        if source_names is not None and len(source_names) == self.count:
            return tuple(source_names)
        notes.append("the bundle names no classes, so they are numbered; give --labels to edgefold build")
        return tuple(str(index) for index in range(self.count))


class Source(Protocol):
    """One open source, read by one thread."""

    source_id: str
    color: Literal["RGB", "BGR"]
    """The order in which three channels come."""
    live: bool
    """Whether frames pass whether or not they are read; live sources default to ``newest``."""
    self_paced: bool
    """Whether `read` itself waits for the next frame (a camera); the others deliver at once."""
    fps: float
    """Nominal rate; a recording plays at it."""
    labels: tuple[str, ...]
    """The engine's classes by name, see `ModelClasses.named`."""
    notes: list[str]
    """What the user should know about how the source was read."""

    def read(self, into: NDArray[np.uint8] | None = None) -> Delivered | None:
        """The next frame, or ``None`` at the end. May block as long as the device does.

        Where the frame has the shape of `into`, it may be written there, and `into` is its pixels.
        """
        ...

    def close(self) -> None:
        """Releases the device or file. Called once, after the last `read` has returned."""
        ...


def parse_source(uri: str) -> SourceUri:
    """Checks a source as the user wrote it, without opening it.

    Raises:
        UsageError: malformed, or a scheme that does not exist.
        DataError: a path that is not there, or is nothing that can be streamed.
        UnsupportedError: a camera that is not there or must not be read.
    """
    if uri.startswith("synthetic:"):
        return _parse_synthetic(uri)
    path = Path(uri).expanduser()
    if uri.startswith("/dev/"):
        return SourceUri("v4l2", uri, _camera_device(path))
    if path.is_dir():
        return SourceUri("images", uri, path)
    if path.is_file():
        if path.suffix.lower() in _IMAGE_SUFFIXES:
            raise DataError(f"{uri} is a single image; put it into a folder and give the folder")
        if path.stat().st_size == 0:
            raise DataError(f"{uri} is an empty file (0 bytes), not a video")
        return SourceUri("images" if path.suffix.lower() == ".npz" else "video", uri, path)
    if path.exists():
        raise DataError(f"{uri} is neither a file nor a folder; a source is {_FORMS}")
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):", uri)
    if scheme:
        raise UsageError(f"unknown source scheme {scheme[1]!r}; a source is {_FORMS}")
    raise DataError(f"no such file or folder: {uri!r} (looked in {Path.cwd()}); a source is {_FORMS}")


def open_source(uri: SourceUri, classes: ModelClasses, fps: float | None = None) -> Source:
    """Opens a source.

    Args:
        uri: from `parse_source`.
        classes: the bundle's; a source that knows the truth gives it in their indices, and gives none
            where its own classes are not among them.
        fps: rate of a synthetic camera or an image folder; the others have their own.

    Raises:
        UsageError: `fps` out of range, or given to a source that has its own rate.
        DataError: the file is no video, the folder holds no image, the device gives no frames.
        UnsupportedError: OpenCV is needed and missing.
    """
    if fps is not None and not 0 < fps <= _MAX_FPS:
        raise UsageError(f"--fps {fps:g} is out of range; give more than 0 and at most {_MAX_FPS:g}")
    if uri.kind == "synthetic":
        return _SyntheticSource(uri, classes, fps or DEFAULT_FPS)
    if uri.kind == "images":
        return _ImageSource(uri, classes, fps or DEFAULT_FPS)
    if fps is not None:
        raise UsageError(
            f"--fps sets the rate of a synthetic camera or an image folder; {uri.text} has its own"
        )
    return _VideoSource(uri, classes) if uri.kind == "video" else _CameraSource(uri, classes)


def _parse_synthetic(uri: str) -> SourceUri:
    match = re.fullmatch(r"synthetic:(\d{1,10})(?::(\d{1,10}))?", uri)
    if not match:
        raise UsageError(f"{uri!r} is not synthetic:SEED[:COUNT] with whole numbers, such as synthetic:7:500")
    count = None if match[2] is None else int(match[2])
    if count == 0:
        raise UsageError(f"{uri!r} asks for no frames; COUNT is at least 1, or left out for a live camera")
    return SourceUri("synthetic", uri, seed=int(match[1]), count=count)


def _camera_device(path: Path) -> Path:
    """The ``/dev/videoN`` behind a device path or one of udev's links to it."""
    present = ", ".join(sorted(str(p) for p in Path("/dev").glob("video*"))) or "none"
    if not path.exists():
        raise UnsupportedError(f"no such device: {path}; cameras here: {present}")
    device = path.resolve()
    if not stat.S_ISCHR(device.stat().st_mode) or not re.fullmatch(r"/dev/video\d+", str(device)):
        raise DataError(f"{path} is not a video capture device; cameras here: {present}")
    if not os.access(device, os.R_OK | os.W_OK):
        raise UnsupportedError(
            f"no permission to open {device}; add the user to the group that owns it "
            "(usually: sudo usermod -aG video $USER, then log in again)"
        )
    return device


class _TruthMap:
    """The source's classes in the bundle's indices, matched as validation matches them."""

    def __init__(
        self, names: Sequence[str] | None, labels: tuple[str, ...], source: str, notes: list[str]
    ) -> None:
        self._indices: list[int] | None = None
        if names is None:
            return
        try:
            indices, note = match_labels(names, labels, source)
        except DataError:
            notes.append(
                f"accuracy is not measured: the {len(names)} classes of {source} ({names[0]!r}, …) are not "
                f"the bundle's {len(labels)} ({labels[0]!r}, …)"
            )
            return
        self._indices = [int(index) for index in indices]
        if note is not None:
            notes.append(note)

    def label(self, source_label: int | None) -> int | None:
        """The bundle's index of a class of the source; ``None`` where it has none."""
        return None if self._indices is None or source_label is None else self._indices[source_label]


class _SyntheticSource:
    color: Literal["RGB", "BGR"] = "RGB"
    self_paced = False

    def __init__(self, uri: SourceUri, classes: ModelClasses, fps: float) -> None:
        self.source_id = uri.text
        self.live = uri.count is None
        self.fps = fps
        self.notes: list[str] = []
        self._camera = SyntheticCamera(uri.seed)
        self._count = uri.count
        self._index = 0
        self.labels = classes.named(CLASS_NAMES, self.notes)
        self._truth = _TruthMap(CLASS_NAMES, self.labels, uri.text, self.notes)

    def read(self, into: NDArray[np.uint8] | None = None) -> Delivered | None:
        if self._index == self._count:
            return None
        image, label = self._camera.frame(self._index)
        self._index += 1
        return Delivered(image, self._truth.label(label))

    def close(self) -> None:
        pass


class _ImageSource:
    color: Literal["RGB", "BGR"] = "RGB"
    live = False
    self_paced = False

    def __init__(self, uri: SourceUri, classes: ModelClasses, fps: float) -> None:
        self.source_id = uri.text
        self.fps = fps
        self.notes: list[str] = []
        # As validation opens and matches it, so that both judge by the same indices.
        try:
            self._dataset = open_dataset(str(uri.path), labels=classes.labels or None)
        except DataError:
            self._dataset = open_dataset(str(uri.path))
        names = self._dataset.class_names
        self.labels = classes.named(names, self.notes)
        self._truth = _TruthMap(names, self.labels, uri.text, self.notes)
        self._samples: Iterator[Sample] = iter(self._dataset)
        self._skips_seen = len(self._dataset.skipped)

    def read(self, into: NDArray[np.uint8] | None = None) -> Delivered | None:
        sample = next(self._samples, None)
        if self._skips_seen < len(self._dataset.skipped):
            # Every image that could not be decoded is a frame this source failed to deliver.
            self._skips_seen += 1
            if sample is not None:
                self._samples = itertools.chain([sample], self._samples)
            return Delivered(None)
        if sample is None:
            return None
        return Delivered(sample.image, self._truth.label(sample.label))

    def close(self) -> None:
        skipped = self._dataset.skipped
        self.notes += [f"skipped {key}: {reason}" for key, reason in skipped[:_MAX_SKIPS_LISTED]]
        if len(skipped) > _MAX_SKIPS_LISTED:
            self.notes.append(f"skipped {len(skipped) - _MAX_SKIPS_LISTED} more images")


class _VideoSource:
    color: Literal["RGB", "BGR"] = "BGR"
    live = False
    self_paced = False

    def __init__(self, uri: SourceUri, classes: ModelClasses) -> None:
        cv2 = opencv.load(f"reading the video {uri.text}")
        self.source_id = uri.text
        self.notes: list[str] = []
        self.labels = classes.named(None, self.notes)
        available = set(cv2.videoio_registry.getStreamBackends())
        # The timeouts are read only at opening, and only where the back-end is named.
        backend = next((b for b in (cv2.CAP_FFMPEG, cv2.CAP_GSTREAMER) if b in available), None)
        if backend is None:
            raise UnsupportedError("this OpenCV reads no video files: it has neither FFmpeg nor GStreamer")
        self._capture = cv2.VideoCapture(
            str(uri.path),
            backend,
            [
                cv2.CAP_PROP_OPEN_TIMEOUT_MSEC,
                _OPEN_TIMEOUT_MS,
                cv2.CAP_PROP_READ_TIMEOUT_MSEC,
                _READ_TIMEOUT_MS,
            ],
        )
        if not self._capture.isOpened():
            raise DataError(
                f"{uri.text} holds no video that OpenCV's {cv2.videoio_registry.getBackendName(backend)} "
                "back-end can decode (not a video, audio only, or cut off before its index)"
            )
        rate = float(self._capture.get(cv2.CAP_PROP_FPS))
        self.fps = rate if 0 < rate <= _MAX_FPS else DEFAULT_FPS
        self._promised = int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT))
        self._read = 0

    def read(self, into: NDArray[np.uint8] | None = None) -> Delivered | None:
        ok, pixels = self._capture.read(into)
        if not ok:
            # Containers may miscount by a frame or two; a file that was cut off misses many.
            if self._read < self._promised - max(2, self._promised // 100):
                self.notes.append(
                    f"the video ended after {self._read} of {self._promised} frames; it is damaged or cut off"
                )
            return None
        self._read += 1
        return Delivered(pixels)

    def close(self) -> None:
        self._capture.release()


class _CameraSource:
    color: Literal["RGB", "BGR"] = "BGR"
    live = True
    self_paced = True

    def __init__(self, uri: SourceUri, classes: ModelClasses) -> None:
        cv2 = opencv.load(f"reading the camera {uri.text}")
        self.source_id = uri.text
        self.notes: list[str] = []
        self.labels = classes.named(None, self.notes)
        self._capture = cv2.VideoCapture(int(uri.path.name[len("video") :]), cv2.CAP_V4L2)
        if not self._capture.isOpened():
            raise DeviceFaultError(
                f"{uri.text} did not open as a V4L2 capture device: another program may hold it, or it is a "
                "metadata node (cameras often have two; try the other number)"
            )
        rate = float(self._capture.get(cv2.CAP_PROP_FPS))
        self.fps = rate if 0 < rate <= _MAX_FPS else DEFAULT_FPS

    def read(self, into: NDArray[np.uint8] | None = None) -> Delivered | None:
        ok, pixels = self._capture.read(into)
        return Delivered(pixels if ok else None)

    def close(self) -> None:
        self._capture.release()
