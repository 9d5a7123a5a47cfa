"""The strongly typed graphs for TensorRT, from the folded fp32 model and one calibration table."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from calibration.float_layers import restore_float_layers
from calibration.placement.points import Placement
from calibration.placement.tensorrt import place
from calibration.qdq import insert_qdq
from calibration.table import check_table
from pipeline.artifacts import CalibrationTable, ModelArtifact, StageRecord, TensorRange
from pipeline.errors import CalibrationError, UsageError
from pipeline.onnx_files import interface, load_model, opset_of, save_model
from pipeline.passes import PassRecord, run_passes
from pipeline.passes.center_pixels import CENTER_PIXELS
from pipeline.passes.graph_pass import Feeds
from pipeline.passes.half_precision import HALF_MAX, HalfType, half_precision
from pipeline.passes.verify import execute

__all__ = ["FLOAT16_HEADROOM", "TensorRTForms", "choose_remainder"]

FLOAT16_HEADROOM = 2.0
"""Calibration images are a sample, and `percentile` and others cut off the largest values that were seen: a
range may come as near to float16's largest value as half of it."""


def choose_remainder(
    graph: ir.Model, ranges: Mapping[str, TensorRange], wanted: HalfType | None = None
) -> tuple[HalfType, str]:
    """The type of what is not quantized, and why: float16 unless something would overflow in it.

    float16 has three bits more for the fraction than bfloat16, and every GPU since SM 53 has it;
    bfloat16 has float32's range. What is looked at are the model's constants and the calibrated ranges.

    Args:
        graph: the folded fp32 model.
        ranges: of its activations; empty where nothing was calibrated.
        wanted: ``None`` to choose.

    Raises:
        CalibrationError: float16 is wanted and something does not fit; names it, its value and the limit.
    """
    limit = HALF_MAX["float16"] / FLOAT16_HEADROOM
    peaks = {name: max(-seen.low, seen.high) for name, seen in ranges.items()}
    over = [
        f"tensor {name!r} reaches {peak:.6g} in calibration, above {limit:.6g} (half of what float16 holds)"
        for name, peak in peaks.items()
        if peak > limit
    ]
    for value in graph.graph.initializers.values():
        if value.dtype == ir.DataType.FLOAT and value.const_value is not None and value.const_value.size:
            peak = float(np.abs(value.const_value.numpy()).max())
            if peak > HALF_MAX["float16"]:
                over.append(
                    f"constant {value.name!r} reaches {peak:.6g}; float16 holds {HALF_MAX['float16']:.6g}"
                )
    if not over:
        largest = max(peaks, key=peaks.__getitem__, default=None)
        if wanted is not None:
            return wanted, "asked for"
        return "float16", (
            "no range is known; judge the result"
            if largest is None
            else f"the largest range is {peaks[largest]:.6g} ({largest!r}), within float16's {limit:.6g}"
        )
    if wanted == "float16":
        more = f" ({len(over) - 1} more)" if len(over) > 1 else ""
        raise CalibrationError(f"{over[0]}{more}: choose bfloat16")
    return "bfloat16", "asked for" if wanted else over[0]


class TensorRTForms:
    """What TensorRT can be given of one model: int8 by several placements, and half precision.

    Of a corrected model, layers in int8 have the corrected constants, all others their own.

    The graphs are strongly typed: float32 is found at the outputs only (and at an input that is no image
    of bytes). Every step but the quantization itself is verified by executing the graph before and after.

    To judge the accuracy of an int8 form on a CPU, run it in ONNX Runtime, or in OpenVINO with
    ``LP_TRANSFORMS_MODE`` off, widened by `pipeline.passes.half_precision.widen`. OpenVINO's low-precision
    transformations get the bare branch of a residual Add wrong (2026.4).
    """

    def __init__(
        self,
        model: ModelArtifact,
        table: CalibrationTable | None,
        remainder: HalfType | None = None,
        *,
        corrected: ModelArtifact | None = None,
    ) -> None:
        """Load the model and centre its pixels.

        Args:
            model: folded fp32 ONNX.
            table: its ranges; ``None`` where only half precision is wanted.
            remainder: the type of what is not quantized; ``None``: `choose_remainder`.
            corrected: `model` with the weights and biases that quantized layers get
                (`calibration.quantizer.Corrected.model`), its pixels centred; ``None``: they get its own.

        Raises:
            IntegrityError: the table is another model's.
            CalibrationError: float16 is wanted and does not suffice.
            PassError: centring the pixels changed what the model computes.
        """
        if table is not None:
            check_table(table, model)
        folded = load_model(model.path)
        self.model = model
        self.table = table
        self.remainder, self.remainder_reason = choose_remainder(
            folded, {} if table is None else table.ranges, remainder
        )
        self._graph, self._centering = run_passes(folded, (CENTER_PIXELS,))
        self._corrected = self._graph
        self._source = model
        if corrected is not None and corrected.sha256 != model.sha256:
            self._corrected, self._source = load_model(corrected.path), corrected

    def placement(
        self,
        *,
        float_layers: frozenset[str] = frozenset(),
        untied_concats: frozenset[str] = frozenset(),
    ) -> Placement:
        """Where Q/DQ would stand; see `calibration.placement.tensorrt.place`."""
        return place(
            self._graph,
            float_layers=float_layers,
            untied_concats=untied_concats,
            remainder=self.remainder,
        )

    @property
    def graph(self) -> ir.Graph:
        """The fp32 graph with centred pixels that placements are made for; not to be changed."""
        return self._graph.graph

    def concats(self) -> tuple[str, ...]:
        """The output tensors of all Concats, in graph order."""
        return tuple(node.outputs[0].name or "" for node in self._graph.graph if node.op_type == "Concat")

    def int8(self, placement: Placement, out_path: Path) -> tuple[ModelArtifact, StageRecord]:
        """Write the int8 graph with Q/DQ where `placement` (one of `placement`'s) says.

        Raises:
            UsageError: there is no calibration table.
            CalibrationError: the table lacks a tensor, nothing can be quantized, or a weight is not finite.
            PassError: lowering to the remainder's type changed what the graph computes.
        """
        start = time.perf_counter()
        if self.table is None:
            raise UsageError(
                f"{self.model.path} cannot be quantized without a calibration table; pass images"
            )
        if not placement.weights:
            reasons = "; ".join(f"{node}: {reason}" for node, reason in placement.skipped)
            raise CalibrationError(
                f"{self.model.path} has no layer that can be quantized: {reasons or 'no Conv, Gemm or MatMul'}"
            )
        graph = self._corrected.clone()
        if self._corrected is not self._graph:
            restore_float_layers(graph, self._graph, placement)
        insert_qdq(graph, placement, self.table.ranges)
        checks = {
            "method": self.table.method,
            "placement": placement.family,
            "n_images": self.table.n_samples,
            "n_quantized_layers": len(placement.weights),
            "n_quantized_activations": len(placement.activations),
            "left_in_float": [list(item) for item in placement.skipped],
        }
        sources = (self._source.sha256, self.table.dataset_sha256)
        return self._write("quantize", graph, sources, out_path, checks, start)

    def half(self, out_path: Path) -> tuple[ModelArtifact, StageRecord]:
        """Write the graph in the remainder's type throughout, without Q/DQ.

        Raises:
            PassError: lowering changed what the graph computes.
        """
        return self._write("lower", self._graph, (self.model.sha256,), out_path, {}, time.perf_counter())

    def float32(self, out_path: Path) -> tuple[ModelArtifact, StageRecord]:
        """Write the graph in float32, without Q/DQ, its pixels cast before anything else: for a network without
        int8, and for a DLA, which takes its int8 scales from a calibration cache.
        """
        sources = (self.model.sha256,)
        return self._write("center", self._graph, sources, out_path, {}, time.perf_counter(), lower=False)

    def _write(
        self,
        stage: str,
        graph: ir.Model,
        sources: tuple[str, ...],
        out_path: Path,
        checks: dict[str, Any],
        start: float,
        *,
        lower: bool = True,
    ) -> tuple[ModelArtifact, StageRecord]:
        passes = (half_precision(self.remainder),) if lower else ()
        lowered, lowering = run_passes(graph, passes, run=_execute_unrounded)
        sha256 = save_model(lowered, out_path)
        records: tuple[PassRecord, ...] = (*self._centering, *lowering)
        record = StageRecord(
            stage=stage,
            inputs=sources,
            outputs=(sha256,),
            seconds=time.perf_counter() - start,
            checks={
                **checks,
                **({"remainder": self.remainder, "remainder_reason": self.remainder_reason} if lower else {}),
                "passes": [entry.as_json() for entry in records],
            },
        )
        inputs, outputs = interface(lowered)
        artifact = dataclasses.replace(
            self.model,
            path=out_path,
            sha256=sha256,
            inputs=inputs,
            outputs=outputs,
            opset=opset_of(lowered),
            history=(*self.model.history, record),
        )
        return artifact, record


def _execute_unrounded(model: ir.Model, feeds: Feeds) -> Feeds:
    """Run `model` without the rounding of its activations.

    Constants that move by 2^-12 tip some activation over to the next step of its grid, and a few layers on
    that is as much noise as int8 makes in all: it would hide a real fault of the lowering. The grids
    themselves need no execution: `half_precision` refuses a scale that is not exact.
    """
    smooth = model.clone()
    for node in list(smooth.graph):
        if node.op_type == "QuantizeLinear":
            for reader, _ in list(node.outputs[0].uses()):
                source = node.inputs[0]
                assert source is not None
                reader.outputs[0].replace_all_uses_with(source, replace_graph_outputs=True)
    common.RemoveUnusedNodesPass()(smooth)
    return execute(smooth, feeds)
