"""The order of the stages, written against the contracts only.

    export → fold → calibrate and place Q/DQ → engine

What exports is in this package; what quantizes and what compiles is handed in by the caller. Every
stage leaves a `StageRecord` in the history of the model it makes. `prepare` is the first two stages,
which every target shares; `compile_model` is all of them for an engine that compiles here.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pipeline.artifacts import CalibrationTable, EngineArtifact, EngineOptions, ModelArtifact, StageRecord
from pipeline.contracts import Batches, EngineBackend, Progress, Quantizer

if TYPE_CHECKING:
    from pipeline.models.resolve import ResolvedModel
    from pipeline.passes import PassRecord

__all__ = [
    "FOLDED_NAME",
    "QUANTIZED_NAME",
    "Calibration",
    "Compiled",
    "Prepared",
    "compile_model",
    "export_resolved",
    "prepare",
]

FOLDED_NAME = "model.onnx"
QUANTIZED_NAME = "model.int8.onnx"


@dataclass(frozen=True, slots=True)
class Calibration:
    """The images to calibrate on, as the folded graph takes them, and how to turn them into ranges."""

    quantizer: Quantizer
    batches: Batches
    dataset_sha256: str


@dataclass(frozen=True, slots=True)
class Prepared:
    """The graph as PyTorch wrote it, the folded fp32 graph that ships, and what each pass did."""

    exported: ModelArtifact
    folded: ModelArtifact
    passes: tuple[PassRecord, ...]


@dataclass(frozen=True, slots=True)
class Compiled:
    """What every stage made.

    ``exported`` is the graph as PyTorch wrote it, ``folded`` the fp32 graph that ships, ``final`` the
    graph the engine runs: the int8 one, or ``folded`` again where no calibration was asked for.
    """

    exported: ModelArtifact
    folded: ModelArtifact
    final: ModelArtifact
    passes: tuple[PassRecord, ...]
    table: CalibrationTable | None
    engine: EngineArtifact


def export_resolved(model: ResolvedModel, out_path: Path) -> ModelArtifact:
    """The model as fp32 ONNX: exported from PyTorch, or taken over from the file the user has."""
    from pipeline.export import export_module, import_onnx

    if model.module is not None:
        return export_module(
            model.module, model.preprocess, model.preprocess.input_hw, out_path, labels=model.labels
        )
    assert model.onnx_path is not None, "a resolved model has a module or a file"
    return import_onnx(model.onnx_path, model.preprocess, out_path, labels=model.labels)


def prepare(
    model: ResolvedModel,
    *,
    work_dir: Path,
    bundle_dir: Path,
    input_color: Literal["RGB", "BGR"],
    progress: Progress,
) -> Prepared:
    """Export and fold.

    Args:
        model: what to compile.
        work_dir: for files that do not ship.
        bundle_dir: where `FOLDED_NAME` goes.
        input_color: the channel order the graph is to take; cameras deliver BGR.
        progress: told the name of each pass.

    Raises:
        ExportError, PassError: the stage that failed, and why.
    """
    from pipeline.passes import fold

    exported = export_resolved(model, work_dir / "exported.onnx")
    folded, passes = fold(exported, bundle_dir / FOLDED_NAME, input_color=input_color, progress=progress)
    return Prepared(exported, folded, passes)


def compile_model(
    model: ResolvedModel,
    *,
    work_dir: Path,
    bundle_dir: Path,
    calibration: Calibration | None,
    input_color: Literal["RGB", "BGR"],
    backend: EngineBackend,
    options: EngineOptions,
    progress: Progress,
) -> Compiled:
    """Run the stages in order.

    Args:
        model: what to compile.
        work_dir: for files that do not ship.
        bundle_dir: where `FOLDED_NAME`, `QUANTIZED_NAME` and the engine's files go.
        calibration: ``None`` for an fp32 engine.
        input_color: the channel order the graph is to take; cameras deliver BGR.
        backend: what compiles.
        options: how the engine is to run.
        progress: told what is done.

    Raises:
        ExportError, PassError, CalibrationError, EngineError: the stage that failed, and why.
    """
    n_stages = 3 if calibration is not None else 2
    progress("stages", 0, n_stages)
    prepared = prepare(
        model, work_dir=work_dir, bundle_dir=bundle_dir, input_color=input_color, progress=progress
    )
    folded = prepared.folded
    progress("stages", 1, n_stages)
    final, table = folded, None
    if calibration is not None:
        final, table, record = calibration.quantizer.quantize(
            folded, calibration.batches, calibration.dataset_sha256, bundle_dir / QUANTIZED_NAME, progress
        )
        if record not in final.history:
            final = replace(final, history=(*final.history, record))
        progress("stages", 2, n_stages)
    began = time.perf_counter()
    engine = backend.build(final, bundle_dir, options)
    record = StageRecord(
        "engine",
        inputs=(final.sha256,),
        outputs=(engine.sha256,),
        seconds=round(time.perf_counter() - began, 3),
        checks={"backend": engine.backend, "portable": engine.portable},
    )
    progress("stages", n_stages, n_stages)
    final = replace(final, history=(*final.history, record))
    return Compiled(prepared.exported, folded, final, prepared.passes, table, engine)
