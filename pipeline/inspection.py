"""What a graph holds and costs: operators, parameters, multiply-accumulates."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
from onnx_ir.passes import common

from pipeline.artifacts import TensorSpec
from pipeline.errors import IntegrityError
from pipeline.onnx_files import interface, load_model
from pipeline.passes.graph_pass import PassRecord

if TYPE_CHECKING:
    from pipeline.contracts import Progress
    from pipeline.models.resolve import ResolvedModel

__all__ = [
    "Change",
    "GraphSummary",
    "Inspection",
    "at_batch_one",
    "compare",
    "inspect_bundle",
    "inspect_onnx",
    "inspect_resolved",
    "node_macs",
    "summarize",
    "summarize_model",
]


@dataclass(frozen=True, slots=True)
class GraphSummary:
    """A graph in numbers."""

    op_counts: dict[str, int]
    """Operator to number of nodes, most frequent first."""
    n_nodes: int
    n_parameters: int
    """Elements of all stored tensors but int64 ones, which hold shapes and axes."""
    parameter_bytes: int
    macs: int
    """Multiply-accumulates of Conv, ConvTranspose, Gemm and MatMul in the main graph, at batch 1."""
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def as_json(self) -> dict[str, Any]:
        """JSON-compatible values; what `from_json` reads."""
        values = dataclasses.asdict(self)
        for side in ("inputs", "outputs"):
            values[side] = [{**spec, "shape": list(spec["shape"])} for spec in values[side]]
        return values

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> GraphSummary:
        """A summary as a stage record keeps it."""
        specs = {side: tuple(map(_spec_from_json, values[side])) for side in ("inputs", "outputs")}
        return cls(**{**values, **specs})


@dataclass(frozen=True, slots=True)
class Inspection:
    """A model before and after folding, and what folding did."""

    model: str
    graphs: dict[str, GraphSummary]
    """``before``, ``after`` and, in an int8 bundle, ``int8``."""
    passes: tuple[PassRecord, ...]

    def as_json(self) -> dict[str, Any]:
        """JSON-compatible values."""
        return {
            "model": self.model,
            "graphs": {name: summary.as_json() for name, summary in self.graphs.items()},
            "passes": [record.as_json() for record in self.passes],
        }


@dataclass(frozen=True, slots=True)
class Change:
    """One quantity of two graphs."""

    quantity: str
    before: int
    after: int


def summarize(path: Path) -> GraphSummary:
    """Summarize an ONNX file.

    Raises:
        ModelSpecError, IntegrityError: as `pipeline.onnx_files.load_model`.
    """
    return summarize_model(load_model(path))


def summarize_model(model: ir.Model) -> GraphSummary:
    """Summarize a graph in memory, which is not changed."""
    inputs, outputs = interface(model)
    counts = Counter(node.op_type for node in model.graph.all_nodes())
    tensors = [
        value.const_value
        for value in model.graph.initializers.values()
        if value.const_value is not None and value.const_value.dtype != ir.DataType.INT64
    ]
    return GraphSummary(
        op_counts=dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))),
        n_nodes=counts.total(),
        n_parameters=sum(tensor.size for tensor in tensors),
        parameter_bytes=sum(tensor.nbytes for tensor in tensors),
        macs=sum(node_macs(node) for node in at_batch_one(model).graph),
        inputs=inputs,
        outputs=outputs,
    )


def inspect_bundle(path: Path) -> Inspection:
    """What the manifest of a bundle tells about folding, and what its int8 graph holds.

    Raises:
        UsageError, IntegrityError: as `pipeline.bundle.open_bundle`.
        IntegrityError: the manifest has no record of the fold stage, or one that cannot be read.
    """
    from pipeline.bundle import open_bundle
    from pipeline.compile import QUANTIZED_NAME

    bundle = open_bundle(path)
    checks = next((stage.checks for stage in bundle.manifest.stages if stage.stage == "fold"), None)
    try:
        if checks is None:
            raise KeyError("fold")
        graphs = {name: GraphSummary.from_json(checks[name]) for name in ("before", "after")}
        passes = tuple(PassRecord.from_json(record) for record in checks["passes"])
    except (KeyError, TypeError, ValueError) as error:
        raise IntegrityError(
            f"the manifest of {str(path)!r} has no readable record of the fold stage ({error!r}): build it again"
        ) from error
    if QUANTIZED_NAME in bundle.manifest.files:
        graphs["int8"] = summarize(bundle.file(QUANTIZED_NAME))
    return Inspection(bundle.manifest.name, graphs, passes)


def inspect_onnx(path: Path, progress: Progress | None = None) -> Inspection:
    """Fold an ONNX file in memory, but for its preprocessing, which a file does not tell.

    Raises:
        ModelSpecError, IntegrityError, ExportError, PassError: the file cannot be read or folded.
    """
    from pipeline.export import load_current
    from pipeline.passes import DEFAULT_PASSES, run_passes

    model = load_current(path)
    folded, passes = run_passes(model, DEFAULT_PASSES, progress=progress)
    return Inspection(path.name, {"before": summarize_model(model), "after": summarize_model(folded)}, passes)


def inspect_resolved(model: ResolvedModel, progress: Progress | None = None) -> Inspection:
    """Export and fold a model, preprocessing included; nothing is kept.

    Raises:
        ExportError, PassError: the stage that failed.
    """
    from pipeline.compile import export_resolved
    from pipeline.passes import fold

    with tempfile.TemporaryDirectory(prefix="edgefold-inspect-") as folder:
        exported = export_resolved(model, Path(folder) / "exported.onnx")
        folded, passes = fold(exported, Path(folder) / "folded.onnx", progress=progress)
    checks = folded.history[-1].checks
    graphs = {name: GraphSummary.from_json(checks[name]) for name in ("before", "after")}
    return Inspection(model.name, graphs, passes)


def compare(before: GraphSummary, after: GraphSummary) -> tuple[Change, ...]:
    """Nodes, parameters, bytes, MACs, then every operator of either graph."""
    totals = [
        Change(name, getattr(before, name), getattr(after, name))
        for name in ("n_nodes", "n_parameters", "parameter_bytes", "macs")
    ]
    ops = [
        Change(op, before.op_counts.get(op, 0), after.op_counts.get(op, 0))
        for op in dict.fromkeys([*before.op_counts, *after.op_counts])
    ]
    return (*totals, *ops)


def _spec_from_json(values: dict[str, Any]) -> TensorSpec:
    return TensorSpec(values["name"], values["dtype"], tuple(values["shape"]))


def at_batch_one(model: ir.Model) -> ir.Model:
    """A copy of `model` whose free input dimensions are 1, with every shape inferred from there.

    A fixed batch stays as it is.
    """
    single = model.clone()
    for value in single.graph.inputs:
        if value.shape is not None:
            value.shape = ir.Shape([dim if isinstance(dim, int) else 1 for dim in value.shape])
    for node in single.graph:
        for value in node.outputs:
            value.shape = None
    common.ShapeInferencePass(data_prop=True)(single)
    return single


def node_macs(node: ir.Node) -> int:
    """Multiply-accumulates of one Conv, ConvTranspose, Gemm or MatMul; 0 of anything else."""
    if node.op_type in ("Conv", "ConvTranspose"):
        # Each weight is used once for every output position (of a transposed one: input position).
        positions = _shape(node.outputs[0] if node.op_type == "Conv" else node.inputs[0])
        weight = _shape(node.inputs[1])
        return math.prod(positions[:1]) * math.prod(positions[2:]) * math.prod(weight)
    if node.op_type == "Gemm":
        left = _shape(node.inputs[0])
        depth = left[0] if node.attributes.get_int("transA", 0) and left else math.prod(left[1:])
        return math.prod(_shape(node.outputs[0])) * depth
    if node.op_type == "MatMul":
        return math.prod(_shape(node.outputs[0])) * math.prod(_shape(node.inputs[0])[-1:])
    return 0


def _shape(value: ir.Value | None) -> Sequence[int]:
    """Static sizes; a shape that could not be inferred counts as no work."""
    if value is None or value.shape is None or not value.shape.is_static():
        return (0,)
    return value.shape.numpy()
