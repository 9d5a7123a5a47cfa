"""The manifest of a bundle: what is in it, where it came from and what it costs.

Frozen dataclasses, validated by pydantic when they come from a file: unknown keys are errors, types
are strict, and numbers are finite. `docs/bundle-format.md` describes every field.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, NoReturn

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError

from pipeline.artifacts import Fingerprint, PreprocessSpec, StageRecord, TensorSpec
from pipeline.errors import IntegrityError, UnsupportedError

__all__ = [
    "FILE_NAME",
    "SCHEMA_VERSION",
    "AccuracySummary",
    "CalibrationSummary",
    "CandidateRecord",
    "Deployment",
    "EngineRecord",
    "FileRecord",
    "Manifest",
    "Measurement",
    "ModelSource",
    "manifest_from_json",
    "manifest_json_schema",
    "manifest_to_json",
]

SCHEMA_VERSION = 2
"""Raised by every change that an older reader would misread."""

_STRICT: dict[str, Any] = {"extra": "forbid", "allow_inf_nan": False}

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
# A bundle is flat. What is no plain file name (a separator, "..", a drive) cannot be written down.
FILE_NAME = r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$"
FileName = Annotated[str, Field(pattern=FILE_NAME)]


@dataclass(frozen=True, slots=True)
class FileRecord:
    """Size and SHA-256 of one file of the bundle."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    size_bytes: Annotated[int, Field(ge=0)]
    sha256: Sha256


@dataclass(frozen=True, slots=True)
class ModelSource:
    """The model as the user named it."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    spec: str
    weights: str
    """Where the weights are from, in words."""
    weights_sha256: Sha256 | None
    num_classes: Annotated[int, Field(ge=1)]
    input_size: int | None = None
    """``--input-size`` where it was given; ``preprocess.input_hw`` has the size in any case."""
    weights_option: str | None = None
    """``--weights`` as it was given; ``None`` where the spec brings its own."""


@dataclass(frozen=True, slots=True)
class CalibrationSummary:
    """How the ranges came about."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    method: str
    n_samples: Annotated[int, Field(ge=1)]
    table_sha256: Sha256
    statistics_sha256: Sha256
    dataset_sha256: Sha256
    dataset_name: str


@dataclass(frozen=True, slots=True)
class AccuracySummary:
    """What quantization cost, on which images. Top-1 and agreement are fractions in [0, 1]."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    dataset_name: str
    dataset_sha256: Sha256
    n_images: Annotated[int, Field(ge=1)]
    fp32_top1: float
    int8_top1: float
    drop_points: float
    """``100 * (fp32_top1 - int8_top1)``."""
    drop_low: float
    """Lower end of the 95% interval of the drop, in points."""
    drop_high: float
    """Upper end of the 95% interval of the drop, in points."""
    agreement: float
    sqnr_db: float | None
    """Of the logits; ``None`` where both engines give the same logits (an infinite ratio)."""


@dataclass(frozen=True, slots=True)
class EngineRecord:
    """The engine the bundle was built for, and the file it loads."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    backend: str
    file: FileName
    fingerprint: Fingerprint


@dataclass(frozen=True, slots=True)
class CandidateRecord:
    """A graph that the device may compile, with the accuracy it had when the host emulated it."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    name: str
    file: FileName
    precision: Literal["int8", "fp16", "bf16", "fp32"]
    """Of most of its layers."""
    reason: str
    """Why it is offered."""
    accuracy: AccuracySummary | None
    """Emulated on the host's CPU; ``None`` where no evaluation data was given."""
    within_budget: bool
    """Whether the emulated drop keeps the budget; true where there is none to keep."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """One candidate's plan as it was built and timed on the device."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    candidate: str
    plan_bytes: Annotated[int, Field(ge=1)]
    build_seconds: float
    p50_ms: float | None
    """At batch 1, transfers included; ``None``: built, not timed."""
    p99_ms: float | None


@dataclass(frozen=True, slots=True)
class Deployment:
    """What a bundle for a device that compiles on itself carries, and what it has made of it."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    sm: Annotated[int, Field(ge=10)]
    """Compute capability of the target, times ten."""
    jetpack: str | None
    tensorrt: str | None
    """The TensorRT version on the target, where it is known."""
    max_drop_points: float | None
    candidates: tuple[CandidateRecord, ...]
    chosen: str | None = None
    """The candidate whose plan the bundle's engine is."""
    measurements: tuple[Measurement, ...] = ()
    notes: tuple[str, ...] = ()
    """What whoever runs the plan should know."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """All that is known of a bundle. `files` is filled in by `pipeline.bundle.BundleWriter`."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    name: str
    created_utc: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}Z$")]
    """``YYYY-MM-DDThh:mm:ssZ``."""
    edgefold_version: str
    tools: dict[str, str]
    """Name to version of everything that took part."""
    target: str
    precision: Literal["int8", "fp16", "bf16", "fp32"]
    model: ModelSource
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    preprocess: PreprocessSpec
    preprocess_folded: bool
    """Whether normalization is inside the graph: its input is uint8 NHWC pixels."""
    input_color: Literal["RGB", "BGR"]
    """The channel order the graph expects."""
    labels: tuple[str, ...]
    calibration: CalibrationSummary | None
    accuracy: AccuracySummary | None
    stages: tuple[StageRecord, ...]
    engine: EngineRecord | None
    """``None`` until `edgefold finish` has run on the device that compiles the plan."""
    deployment: Deployment | None = None
    """Of the targets that run a compiled plan; ``None`` for a CPU."""
    files: dict[FileName, FileRecord] = field(default_factory=dict)
    schema_version: Annotated[int, Field(ge=SCHEMA_VERSION, le=SCHEMA_VERSION)] = SCHEMA_VERSION

    def ready_engine(self) -> EngineRecord:
        """The engine to run.

        Raises:
            UnsupportedError: the bundle was made for a device that has not finished it yet.
        """
        if self.engine is None:
            raise UnsupportedError(
                f"{self.name} for {self.target} has no engine yet: run `edgefold finish` on the {self.target}, "
                "which compiles it there"
            )
        return self.engine


@cache
def _adapter() -> TypeAdapter[Manifest]:
    return TypeAdapter(Manifest)


def manifest_to_json(manifest: Manifest) -> bytes:
    """The manifest as the bytes of ``manifest.json``.

    Non-finite numbers among the stages' checks are written as the strings ``"inf"``, ``"-inf"``,
    ``"nan"``: JSON has none, and a check may well have measured one.

    Raises:
        IntegrityError: the manifest would not be read back (a programming error, found at the build).
    """
    tree = asdict(manifest)
    for stage in tree["stages"]:
        stage["checks"] = _plain(stage["checks"])
    try:
        text = json.dumps(tree, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    except (TypeError, ValueError) as error:
        raise IntegrityError(f"the manifest holds a value that JSON cannot: {error}") from error
    manifest_from_json(text.encode(), "the manifest to be written")
    return text.encode()


def manifest_from_json(data: bytes, source: str = "manifest.json") -> Manifest:
    """Parse and validate.

    Args:
        data: UTF-8 JSON, already capped in size by the caller.
        source: how error messages name it.

    Raises:
        IntegrityError: not JSON, a duplicate or unknown key, a missing one, a wrong type or value.
        UnsupportedError: written by a newer edgefold.
    """
    try:
        tree = json.loads(data, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{source} is not valid JSON ({error}); build the bundle again") from error
    version = tree.get("schema_version") if isinstance(tree, dict) else None
    if not isinstance(version, int):
        raise IntegrityError(f"{source} has no schema_version: it is not the manifest of a bundle")
    if version > SCHEMA_VERSION:
        raise UnsupportedError(
            f"{source} has schema version {version}; this edgefold reads up to {SCHEMA_VERSION}: "
            f"install edgefold {tree.get('edgefold_version', 'of the build machine')} or newer"
        )
    if 0 < version < SCHEMA_VERSION:
        raise UnsupportedError(
            f"{source} has schema version {version}, of a development version of edgefold; this one reads "
            f"{SCHEMA_VERSION}: build the bundle again"
        )
    try:
        manifest = _adapter().validate_json(data, strict=True)
    except ValidationError as error:
        details = "; ".join(
            f"{'.'.join(map(str, item['loc'])) or 'document'}: {item['msg']}" for item in error.errors()[:5]
        )
        raise IntegrityError(f"{source} does not describe a bundle: {details}; build it again") from error
    for name in _named_files(manifest):
        if name not in manifest.files:
            raise IntegrityError(f"{source} names the engine file {name!r} but does not list it")
    if manifest.engine is None and manifest.deployment is None:
        raise IntegrityError(f"{source} has neither an engine nor a deployment that would make one")
    return manifest


def _named_files(manifest: Manifest) -> tuple[str, ...]:
    engine = () if manifest.engine is None else (manifest.engine.file,)
    candidates = () if manifest.deployment is None else manifest.deployment.candidates
    return (*engine, *(candidate.file for candidate in candidates))


def manifest_json_schema() -> dict[str, Any]:
    """The JSON schema of ``manifest.json``, for tools that read bundles without this package."""
    schema = _adapter().json_schema()
    schema["required"] = [item.name for item in fields(Manifest)]
    return schema


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"duplicate key {next(key for key in keys if keys.count(key) > 1)!r}")
    return tree


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON number")


def _plain(value: Any) -> Any:
    """`value` with NumPy's scalars as Python's, and non-finite numbers as strings."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
