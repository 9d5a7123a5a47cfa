"""Runs passes one after another and believes none of them."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir
from onnx_ir.passes import common

from pipeline.artifacts import ModelArtifact, StageRecord
from pipeline.contracts import Progress
from pipeline.errors import EdgefoldError, PassError
from pipeline.onnx_files import interface, load_model, opset_of, save_model
from pipeline.passes.affine import AFFINE
from pipeline.passes.affine_before import AFFINE_BEFORE
from pipeline.passes.batch_norm import BATCH_NORM
from pipeline.passes.graph_pass import Feeds, GraphPass, PassRecord
from pipeline.passes.pad import PAD
from pipeline.passes.pointwise import POINTWISE
from pipeline.passes.preprocess import fold_preprocess
from pipeline.passes.residual_scale import RESIDUAL_SCALE
from pipeline.passes.tidy import TIDY
from pipeline.passes.verify import (
    Execute,
    check_interface,
    check_numerics,
    check_structure,
    execute,
    nudged,
    seeded_feeds,
)

__all__ = ["DEFAULT_PASSES", "fold", "run_passes"]

DEFAULT_PASSES: tuple[GraphPass, ...] = (
    # First: the others match initializers, not Constant nodes, Identity or Dropout between layers.
    TIDY,
    # Early: it settles which convolutions pad, which decides what may be folded into them from before.
    PAD,
    # Before the arithmetic: frameworks write Conv, BatchNorm, Mul, Add (Caffe's Scale), and the Mul reaches
    # the convolution only once the batch norm is gone. A bias Add *before* it is taken along.
    BATCH_NORM,
    # After batch norm, see above; before the residual scale, which may stand behind a separate bias Add.
    AFFINE,
    # Its Mul now follows the up-projection itself.
    RESIDUAL_SCALE,
    # After the passes that fold backwards, which are always exact: only what has no linear layer behind it
    # looks for one ahead.
    AFFINE_BEFORE,
    # Last: two convolutions are consecutive only once nothing stands between them.
    POINTWISE,
)


def run_passes(
    model: ir.Model,
    passes: Sequence[GraphPass],
    *,
    run: Execute = execute,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[ir.Model, tuple[PassRecord, ...]]:
    """Apply `passes` in order, each to a clone, each verified against what was before it.

    A pass that reports no rewrite costs no execution, and its clone is dropped. The outputs of one
    pass's result serve as the reference of the next.

    Returns:
        The rewritten model (`model` itself is not changed; unchanged weights are shared) and one record
        a pass.

    Raises:
        PassError: naming the pass and the step: ``rewrite``, ``check``, ``shapes``, ``interface``,
            ``numerics``.
    """
    current = model.clone()
    common.ShapeInferencePass()(current)
    feeds = seeded_feeds(current, seed)
    outputs: Feeds | None = None
    records: list[PassRecord] = []
    for index, graph_pass in enumerate(passes):
        if progress is not None:
            progress(f"fold: {graph_pass.name}", index, len(passes))
        started = time.monotonic()
        candidate = current.clone()
        try:
            report = graph_pass.rewrite(candidate)
            common.RemoveUnusedNodesPass()(candidate)
        except EdgefoldError:
            raise
        except Exception as error:
            raise PassError(graph_pass.name, "rewrite", f"{type(error).__name__}: {error}") from error
        max_error: float | None = None
        sqnr: float | None = None
        if report.n_rewrites:
            check_structure(graph_pass.name, candidate)
            check_interface(graph_pass, current, candidate)
            feeds, outputs, max_error, sqnr = _compare(
                graph_pass, run, current, candidate, feeds, outputs, seed
            )
            current = candidate
        records.append(
            PassRecord(
                name=graph_pass.name,
                n_rewrites=report.n_rewrites,
                skipped=report.skipped,
                seconds=time.monotonic() - started,
                max_abs_error=max_error,
                sqnr_db=sqnr if sqnr is not None and math.isfinite(sqnr) else None,
            )
        )
    if progress is not None:
        progress("fold", len(passes), len(passes))
    return current, tuple(records)


def fold(
    model: ModelArtifact,
    out_path: Path,
    *,
    fold_input: bool = True,
    input_color: Literal["RGB", "BGR"] = "BGR",
    progress: Progress | None = None,
) -> tuple[ModelArtifact, tuple[PassRecord, ...]]:
    """Fold everything that is linear and constant into the layers, and write the result.

    Args:
        model: an exported or imported model.
        out_path: the ONNX file to write.
        fold_input: also `fold_preprocess`: the graph then takes uint8 NHWC pixels.
        input_color: channel order of those pixels; cameras deliver BGR.
        progress: told the name of each pass.

    Returns:
        The folded model, whose history ends with a ``fold`` record (op counts before and after, and
        what each pass did), and the record of each pass.

    Raises:
        PassError: a pass failed or changed what the model computes; nothing is written.
    """
    from pipeline.inspection import summarize_model

    started = time.monotonic()
    source = load_model(model.path)
    passes = DEFAULT_PASSES
    # Very last, so that it finds whatever the graph itself did to its input already in the first layer.
    if fold_input and not model.preprocess_folded:
        passes = (*passes, fold_preprocess(model.preprocess, input_color))
    folded, records = run_passes(source, passes, progress=progress)
    digest = save_model(folded, out_path)
    inputs, outputs = interface(folded)
    checks: dict[str, Any] = {
        "passes": [record.as_json() for record in records],
        "before": summarize_model(source).as_json(),
        "after": summarize_model(folded).as_json(),
    }
    record = StageRecord("fold", (model.sha256,), (digest,), time.monotonic() - started, checks)
    artifact = dataclasses.replace(
        model,
        path=out_path,
        sha256=digest,
        inputs=inputs,
        outputs=outputs,
        opset=opset_of(folded),
        input_color=input_color if fold_input and not model.preprocess_folded else model.input_color,
        history=(*model.history, record),
    )
    return artifact, records


def _compare(
    graph_pass: GraphPass,
    run: Execute,
    original: ir.Model,
    rewritten: ir.Model,
    feeds: Feeds,
    outputs: Feeds | None,
    seed: int,
) -> tuple[Feeds, Feeds, float, float]:
    """Run both graphs; `outputs` are the original's, where they are known.

    Returns:
        Feeds and outputs of the rewritten graph, largest absolute error, SQNR in dB.
    """
    new_feeds = feeds
    if graph_pass.original_feeds is not None:
        new_feeds = seeded_feeds(rewritten, seed)
        feeds, outputs = graph_pass.original_feeds(original, new_feeds), None
    if outputs is None:
        outputs = _execute(graph_pass, run, original, feeds)
    new_outputs = _execute(graph_pass, run, rewritten, new_feeds)
    max_error, sqnr = check_numerics(
        graph_pass,
        outputs,
        new_outputs,
        rounding=lambda: _execute(graph_pass, run, nudged(original, seed, graph_pass.nudge), feeds),
    )
    return new_feeds, new_outputs, max_error, sqnr


def _execute(graph_pass: GraphPass, run: Execute, model: ir.Model, feeds: Feeds) -> Feeds:
    try:
        return run(model, feeds)
    except Exception as error:
        raise PassError(graph_pass.name, "numerics", f"the graph cannot be executed: {error}") from error
