"""What the worker process is asked to do: written as JSON into its standard input."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import TypeAdapter

from engines.tensorrt.api import Flavour
from engines.tensorrt.options import TensorRtOptions

__all__ = ["BuildJob", "Job", "ProbeJob", "job_from_json", "job_to_json"]

_STRICT: dict[str, Any] = {"extra": "forbid"}


@dataclass(frozen=True, slots=True)
class BuildJob:
    """Build a plan and write it to `plan_path`, which exists and is nobody else's."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    flavour: Flavour
    model_path: Path
    model_sha256: str
    plan_path: Path
    options: TensorRtOptions
    timing_cache: Path | None


@dataclass(frozen=True, slots=True)
class ProbeJob:
    """Deserialize a plan and read its inspector."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    flavour: Flavour
    plan_path: Path
    plan_sha256: str


Job = BuildJob | ProbeJob
_ADAPTER: TypeAdapter[Job] = TypeAdapter(Job)


def job_to_json(job: Job) -> bytes:
    """One line."""
    return _ADAPTER.dump_json(job) + b"\n"


def job_from_json(line: bytes) -> Job:
    """The job that `job_to_json` wrote."""
    return _ADAPTER.validate_json(line)
