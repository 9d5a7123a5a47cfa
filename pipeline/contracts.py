"""What the stages require of one another, as protocols.

`calibration` and `engines` implement these and never import each other; `apps` wires them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from pipeline.artifacts import (
    CalibrationTable,
    EngineArtifact,
    EngineOptions,
    Fingerprint,
    ModelArtifact,
    Sample,
    StageRecord,
    TensorSpec,
)

__all__ = [
    "Batches",
    "Dataset",
    "EngineBackend",
    "Outputs",
    "Progress",
    "Quantizer",
    "Runner",
    "RunnerFactory",
]

Outputs = dict[str, NDArray[Any]]

Progress = Callable[[str, int, int | None], None]
"""``progress(what, done, total)``: called from the working thread; ``total`` may be unknown."""

Batches = Callable[[], Iterator[NDArray[np.uint8]]]
"""Starts a fresh, identical pass over the data: uint8 NHWC batches at the network's input size,
in the channel order the graph expects. The last batch may be short."""


@runtime_checkable
class Runner(Protocol):
    """A loaded engine, ready to infer. A context manager; closing twice is harmless.

    Arrays are checked against `inputs`: a wrong name, dtype or shape is an `EngineError` that names
    both sides. A dimension given by name accepts any size.
    """

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What `infer` takes."""
        ...

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What `infer` returns."""
        ...

    @property
    def reuses_outputs(self) -> bool:
        """Whether `infer` returns buffers that the next `infer` overwrites."""
        ...

    @property
    def n_streams(self) -> int:
        """How many submitted requests run at the same time; more than this many queue."""
        ...

    def infer(self, inputs: Mapping[str, NDArray[Any]]) -> Outputs:
        """Run once and wait."""
        ...

    def submit(self, inputs: Mapping[str, NDArray[Any]]) -> Future[Outputs]:
        """Start a run; the future's arrays belong to the caller. Inputs must not change until it
        is done. Blocks when every request slot is busy (bounded)."""
        ...

    def close(self) -> None:
        """Release the engine; what was submitted is finished first."""
        ...

    def __enter__(self) -> Runner: ...

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...


class EngineBackend(Protocol):
    """One engine family. Stateless."""

    @property
    def name(self) -> str:
        """Its key in the registry."""
        ...

    def build(self, model: ModelArtifact, out_dir: Path, options: EngineOptions) -> EngineArtifact:
        """Compile `model` as far as can be done ahead of time; raises `EngineError`."""
        ...

    def load(self, artifact: EngineArtifact, options: EngineOptions) -> Runner:
        """Make the engine ready to run here; raises `EngineError`, `IntegrityError`."""
        ...

    def fingerprint(self) -> Fingerprint:
        """Identity of this engine on this machine."""
        ...


RunnerFactory = Callable[[Path, Sequence[str]], Runner]
"""``make(onnx_path, extra_outputs)``: an fp32 runner over a file that the caller has just written, also returning those
tensors. Its weights may lie in other files beside it (`pipeline.onnx_files.save_for_runner`)."""


class Dataset(Protocol):
    """Images in a fixed order, read one at a time; memory does not grow with their number."""

    @property
    def name(self) -> str:
        """How reports call it."""
        ...

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Index to name, or ``None`` where the images carry no labels."""
        ...

    @property
    def sha256(self) -> str:
        """Digest of the content (files and labels), not of the path."""
        ...

    @property
    def skipped(self) -> Sequence[tuple[str, str]]:
        """``(key, reason)`` of every image left out in the passes so far."""
        ...

    def __len__(self) -> int:
        """The number of candidates, before any is found unreadable."""
        ...

    def __iter__(self) -> Iterator[Sample]: ...


class Quantizer(Protocol):
    """Turns a folded fp32 model into an int8 one from images without labels."""

    def quantize(
        self,
        model: ModelArtifact,
        batches: Batches,
        dataset_sha256: str,
        out_path: Path,
        progress: Progress,
    ) -> tuple[ModelArtifact, CalibrationTable, StageRecord]:
        """Calibrate `model` on `batches` and write its int8 form to `out_path`."""
        ...
