"""Frozen values passed between the stages.

A stage is ``f(artifact, config) -> artifact`` plus its `StageRecord`. The classes are plain
dataclasses so that importing them costs nothing; `pipeline.manifest` validates the same classes
with pydantic where they come from a file (``__pydantic_config__`` makes unknown keys errors).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "CalibrationTable",
    "EngineArtifact",
    "EngineOptions",
    "Fingerprint",
    "Frame",
    "Interpolation",
    "ModelArtifact",
    "PixelFormat",
    "PreprocessSpec",
    "QuantParams",
    "Sample",
    "StageRecord",
    "TensorRange",
    "TensorSpec",
    "TensorStatistics",
    "YuvCoding",
    "YuvMatrix",
]

PixelFormat = Literal["RGB", "BGR", "GRAY", "RGBA", "BGRA", "I420"]
"""``I420``: planes of Y, U and V one behind the other, U and V of half the size each way; as an array (3H/2, W) with
even H and W. What its bytes mean is a `YuvCoding`."""
YuvMatrix = Literal["bt601", "bt709"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
_STRICT: dict[str, Any] = {"extra": "forbid"}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor at an interface. A dimension is a size, or a name where it may vary."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    name: str
    dtype: str
    """NumPy's name: ``uint8``, ``float32``, …"""
    shape: tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class PreprocessSpec:
    """How an image becomes the network's input; `pipeline.preprocess` is its one implementation.

    Two halves. *Geometry* works on uint8 pixels: resize, then a centred crop to ``input_hw``.
    *Normalization* is affine: ``x = (pixel / 255 * (hi - lo) + lo - mean) / std`` for
    ``value_range = (lo, hi)``, in colour order ``color``. Geometry stays on the host;
    normalization is folded into the graph, which then takes uint8 NHWC pixels.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    input_hw: tuple[int, int]
    resize: Literal["shorter", "squash", "none"] = "shorter"
    """``shorter``: the shorter side to ``floor(input / crop_fraction)``, keeping the aspect;
    ``squash``: both sides to ``floor(input / crop_fraction)``; ``none``: the image must already
    have ``input_hw``."""
    interpolation: Interpolation = "bilinear"
    antialias: bool = True
    crop_fraction: float = 1.0
    color: Literal["RGB", "BGR"] = "RGB"
    """The channel order the network was trained on."""
    value_range: tuple[float, float] = (0.0, 1.0)
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    """Of the network before folding."""


@dataclass(frozen=True, slots=True)
class StageRecord:
    """What one stage did: digests of what went in and came out, and what it checked.

    ``checks`` holds JSON-compatible values: measured numbers beside their limits.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    stage: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    seconds: float
    checks: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ModelArtifact:
    """An ONNX file and what must be known to feed it and read it.

    ``input_color`` is the channel order the *graph* expects now: after preprocessing has been
    folded it may differ from ``preprocess.color``, and ``inputs[0]`` is uint8 NHWC.
    """

    path: Path
    sha256: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    opset: int
    preprocess: PreprocessSpec
    input_color: Literal["RGB", "BGR"] = "RGB"
    labels: tuple[str, ...] = ()
    history: tuple[StageRecord, ...] = ()

    @property
    def preprocess_folded(self) -> bool:
        """Whether normalization is inside the graph (its input is raw uint8 pixels)."""
        return self.inputs[0].dtype == "uint8"


@dataclass(frozen=True, slots=True)
class QuantParams:
    """Affine quantization: ``real = scale * (q - zero_point)``.

    ``scale`` is float32 and ``zero_point`` has ``dtype``; both are 0-d, or 1-d along ``axis``.
    """

    scale: NDArray[np.float32]
    zero_point: NDArray[Any]
    dtype: Literal["int8", "uint8", "int32"]
    axis: int | None = None


@dataclass(frozen=True, slots=True)
class TensorRange:
    """A real-valued range ``[low, high]`` of a tensor, before any rounding to a grid."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class TensorStatistics:
    """What was observed of every activation, keyed by tensor name.

    ``histogram`` maps a tensor to counts whose bins `calibration.observers` defines. The three
    digests say what was run on what; statistics whose digests differ are never reused.
    """

    min: dict[str, float]
    max: dict[str, float]
    histogram: dict[str, NDArray[np.int64]]
    n_samples: int
    dataset_sha256: str
    model_sha256: str
    preprocess_sha256: str


@dataclass(frozen=True, slots=True)
class CalibrationTable:
    """The range of every activation by one method, and all that they depend on: the calibration manifest.

    Symmetric and asymmetric forms derive from the ranges. Used again, what they depend on must be the same:
    `calibration.reuse` names what is not.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    ranges: dict[str, TensorRange]
    method: str
    n_samples: int
    statistics_sha256: str
    model_sha256: str
    dataset_sha256: str
    preprocess_sha256: str
    method_options: dict[str, float] = field(default_factory=dict)
    """Every constant of the method, and of the statistics that it was given."""
    corrections: tuple[str, ...] = ()
    """What was asked for beside the ranges, sorted: `calibration.correction.CORRECTIONS`."""
    tools: dict[str, str] = field(default_factory=dict)
    """Name to version of what took part: of what decoded, ran and counted."""


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Device and version identity of whatever compiles and runs an engine."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    engine: str
    version: str
    device: str
    capabilities: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How an engine is to run. ``None`` leaves the choice to the engine."""

    mode: Literal["latency", "throughput"] = "latency"
    threads: int | None = None
    batch: int | None = None
    """Batch size to compile for; ``None`` keeps the model's own (possibly free) batch dimension.
    A fixed one is faster."""
    cache_dir: Path | None = None
    """Where compiled blobs may be kept; ``None``: no cache on disk."""
    streams: int | None = None
    """Submitted requests that run at the same time; ``None``: as many as the mode asks for."""


@dataclass(frozen=True, slots=True)
class EngineArtifact:
    """What a backend made of a model. On a CPU it is the ONNX file itself: portable."""

    path: Path
    sha256: str
    model_sha256: str
    backend: str
    fingerprint: Fingerprint
    portable: bool = True


@dataclass(frozen=True, slots=True)
class Sample:
    """One image of a dataset: uint8 HWC RGB pixels at their own size, and what it shows."""

    image: NDArray[np.uint8]
    label: int | None
    key: str
    """Identity within the dataset: a relative path, or an index."""


@dataclass(frozen=True, slots=True)
class YuvCoding:
    """How the planes of a picture encode its colours; what a video's stream says of itself."""

    matrix: YuvMatrix = "bt601"
    full_range: bool = False
    """Luma from 0 to 255 (JPEG); else from 16 to 235, and chroma from 16 to 240."""
    chroma: Literal["left", "center"] = "left"
    """Where a sample of chroma lies among the four pixels that share it: between the two on the left (MPEG-2, H.264),
    or in the middle of all (JPEG, MPEG-1)."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame of a stream. ``timestamp_ns`` is monotonic (`time.monotonic_ns`) at capture."""

    image: NDArray[np.uint8]
    pixel_format: PixelFormat
    source_id: str
    index: int
    timestamp_ns: int
    label: int | None = None
    """The truth where the source knows it (synthetic camera, labelled folder)."""
    yuv: YuvCoding | None = None
    """Of an ``I420`` frame, and of no other."""
