"""What TensorRT makes of a graph: which nodes become one kernel, and in which precision it runs.

A prediction by documented rules, made without TensorRT. The rules, with where they come from ("Explicit
Quantization" and "Layer Fusion" in NVIDIA's TensorRT documentation, and engines recorded with TensorRT's
inspector, which the tests compare against):

* **Convolution + Add + activation.** An activation behind a convolution, and a simple sum in between, run
  in its epilogue. The sum must not broadcast. Where two convolutions meet in one sum, the later one takes
  it and reads what the other wrote.
* **Int8.** A convolution or matrix product is int8 if DequantizeLinear (DQ) stands above its input *and*
  its weight. It writes int8 if every reader quantizes its output with one scale, and, where it carries a
  sum, if the other operand is int8 too: a float operand forces a float result, and QuantizeLinear (Q)
  stays behind as a kernel of its own.
* **Elementwise operators and average pools** are int8 only between DQ and Q.
* **Max pools, concatenations, reshapes** move values: Q and DQ pass through them. A concatenation of equal
  scales costs nothing, its producers write into its output; an unequal scale costs a requantization.
* **Q, DQ or Cast left between int8 and float** is a kernel that only rewrites memory: a reformat.

Not predicted, because only the builder's timing decides it: a max pool inside the convolution before it,
1×1 convolutions of one input merged into one kernel (whose part of a concatenation is then copied), reformats
between memory layouts of one precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import onnx_ir as ir

from engines.tensorrt.epilogue import LINEAR, POINTWISE, linear_epilogue, pointwise_chain, runs_in_int8
from engines.tensorrt.layers import FusedLayer, Kind, Precision
from engines.tensorrt.quantized_graph import (
    PRECISION_BYTES,
    Grid,
    QuantizedGraph,
    float_source,
    is_move,
    node_name,
)
from pipeline.inspection import node_macs
from pipeline.passes.linear import STANDARD_DOMAINS

__all__ = ["FusedLayer", "Kind", "Precision", "plan_layers", "predict_layers"]


def predict_layers(model: ir.Model) -> tuple[FusedLayer, ...]:
    """The kernels TensorRT is expected to build from `model`, in an order in which they can run.

    Args:
        model: strongly typed, Q/DQ explicit where it is quantized; a graph without Q/DQ is predicted in
            the types it declares. It is not changed. Free dimensions count as 1.

    Raises:
        UnsupportedError: a scale is not one constant a tensor, or a shape depends on the data.
    """
    return plan_layers(QuantizedGraph(model))


def plan_layers(graph: QuantizedGraph) -> tuple[FusedLayer, ...]:
    """As `predict_layers`, of a graph that the caller has further questions to."""
    return _Planner(graph).run()


@dataclass(slots=True)
class _Draft:
    layer: FusedLayer
    position: int
    nodes: list[ir.Node] = field(default_factory=list)


class _Planner:
    def __init__(self, graph: QuantizedGraph) -> None:
        self._graph = graph
        self._drafts: list[_Draft] = []
        self._owner: dict[ir.Node, _Draft] = {}
        self._rewrites: dict[tuple[ir.Value, Kind, Grid | None], _Draft] = {}

    def run(self) -> tuple[FusedLayer, ...]:
        for value in self._graph.graph.inputs:
            grid = self._graph.stores_int8(value)
            if grid is not None:
                self._quantize(value, grid, 0, f"the graph's input {value.name!r} is float")
        for node in self._graph.nodes:
            if node not in self._owner:
                self._plan(node)
        self._assign_rest()
        position = self._graph.position
        return tuple(
            replace(draft.layer, nodes=tuple(map(node_name, sorted(draft.nodes, key=position.__getitem__))))
            for draft in sorted(self._drafts, key=lambda draft: draft.position)
        )

    def _plan(self, node: ir.Node) -> None:
        op_type = node.op_type if node.domain in STANDARD_DOMAINS else ""
        if op_type == "QuantizeLinear":
            self._left_quantizer(node)
        elif op_type == "DequantizeLinear":
            pass  # belongs to whoever writes the int8 tensor, or to the kernel that makes it float
        elif op_type in LINEAR:
            self._linear(node)
        elif op_type in ("AveragePool", "GlobalAveragePool") or _averages_pixels(node):
            self._average(node)
        elif is_move(node):
            self._move(node)
        elif self._graph.precision(node.outputs[0]) is None:
            self._emit("noop", [node], [], [], node.outputs[0], "shape arithmetic, done by the builder")
        elif op_type in POINTWISE:
            self._pointwise(node)
        else:
            kind: Kind = "reduce" if op_type.startswith("Reduce") else "other"
            kind = "softmax" if op_type == "Softmax" else kind
            self._emit(kind, [node], [], self._graph.activations(node), node.outputs[0], "is float only")

    def _linear(self, node: ir.Node) -> None:
        graph, kernel = self._graph, linear_epilogue(self._graph, node)
        reads = graph.activations(node)
        if kernel.operand is not None:
            reads.append(kernel.operand)
        int8 = runs_in_int8(graph, node)
        why, writes_int8 = _why_linear(graph, node, int8), int8
        if int8 and kernel.operand is not None and graph.reads_int8(kernel.operand) is None:
            why += f"; it adds {kernel.operand.name!r}, which is float, so its result is float"
            writes_int8 = False
        self._emit(
            "conv" if node.op_type.startswith("Conv") else "fc",
            list(kernel.nodes),
            [v for v in reads if int8 and graph.reads_int8(v)],
            [v for v in reads if not (int8 and graph.reads_int8(v))],
            kernel.value,
            why,
            int8=int8,
            writes_int8=writes_int8,
        )

    def _average(self, node: ir.Node) -> None:
        data, value = node.inputs[0], node.outputs[0]
        assert data is not None
        quantized = self._graph.reads_int8(data) is not None
        int8 = quantized and self._graph.stores_int8(value) is not None
        if int8:
            why = "stands between DQ and Q"
        else:
            why = "its output is read as float" if quantized else "its input is float"
        int8_reads, float_reads = ([data], []) if int8 else ([], [data])
        self._emit("pool", [node], int8_reads, float_reads, value, why, int8=int8, writes_int8=int8)

    def _pointwise(self, node: ir.Node) -> None:
        nodes, reads, value = pointwise_chain(self._graph, node, self._owner)
        int8 = all(self._graph.reads_int8(v) for v in reads) and self._graph.stores_int8(value) is not None
        only_casts = all(n.op_type == "Cast" for n in nodes)
        if only_casts:
            why = "changes the type"
        else:
            why = "inputs and output are int8" if int8 else "does not stand between DQ and Q"
        self._emit(
            "reformat" if only_casts else "elementwise",
            nodes,
            reads if int8 else [],
            [] if int8 else reads,
            value,
            why,
            int8=int8,
            writes_int8=int8,
        )

    def _move(self, node: ir.Node) -> None:
        graph, value = self._graph, node.outputs[0]
        sources = graph.activations(node)
        grid = graph.reads_int8(value) or graph.stores_int8(value)
        in_place = list(sources)
        for source in sources:
            has = graph.reads_int8(source)
            if grid is None or grid == (has or graph.stores_int8(source)):
                continue
            in_place.remove(source)  # the kernel that rewrites it writes where it is wanted
            position = graph.position[node]
            if has is not None:
                self._requantize(source, has, grid, position)
            else:
                self._quantize(source, grid, position, f"{source.name!r} is also read as float")
        why = "moves float values" if grid is None else f"moves int8 values, {grid}"
        reads = sources
        if node.op_type == "Concat":
            reads = [v for v in in_place if self._must_be_copied(v, node)]
            copied = ", ".join(repr(v.name) for v in reads)
            why += f"; copies {copied}" if reads else "; its producers write into its output"
            kind: Kind = "concat" if reads else "noop"
        elif node.op_type == "Transpose":
            kind = "reformat"
        else:
            kind = "pool" if "Pool" in node.op_type else "noop"
        int8 = grid is not None
        self._emit(
            kind,
            [node],
            reads if int8 else [],
            [] if int8 else reads,
            value,
            why,
            int8=int8,
            writes_int8=int8,
        )

    def _must_be_copied(self, value: ir.Value, concat: ir.Node) -> bool:
        """Whether no kernel can write `value` straight into the output of `concat`.

        The builder goes from the last concatenation to the first and gives each tensor one place; an input
        or a slice of another tensor is "not movable" (its words, in a verbose build log).
        """
        source = float_source(value)
        producer = source.producer()
        if producer is None or producer.op_type in ("Slice", "Split"):
            return True
        return any(
            node.op_type == "Concat"
            and self._graph.position[node] > self._graph.position[concat]
            and any(float_source(part) is source for part in self._graph.activations(node))
            for node in self._graph.nodes
        )

    # Kernels that only rewrite memory ------------------------------------------------------------------

    def _left_quantizer(self, node: ir.Node) -> None:
        """A Q that no kernel before it took."""
        source = node.inputs[0]
        assert source is not None
        grid, has = self._graph.grid(node), self._graph.reads_int8(source)
        position = self._graph.position[node]
        if has is None:
            self._quantize(source, grid, position, f"{source.name!r} is also read otherwise", [node])
        elif has != grid:
            self._requantize(source, has, grid, position, [node])

    def _quantize(self, value: ir.Value, grid: Grid, position: int, why: str, nodes: Sequence[ir.Node] = ()) -> None:  # fmt: skip
        found = nodes or self._quantizers(value, grid)
        self._rewrite("quantize", value, grid, position, f"{why}; to int8, {grid}", found)

    def _requantize(self, value: ir.Value, has: Grid, grid: Grid, position: int, nodes: Sequence[ir.Node] = ()) -> None:  # fmt: skip
        found = nodes or self._quantizers(value, grid)
        self._rewrite("requantize", value, grid, position, f"from {has} to {grid}", found)

    def _dequantize(self, value: ir.Value, position: int, reader: ir.Node) -> None:
        producer = value.producer()
        nodes = [producer] if producer is not None and producer.op_type == "DequantizeLinear" else []
        why = f"{reader.op_type} {node_name(reader)!r} reads an int8 tensor as float"
        self._rewrite("dequantize", value, None, position, why, nodes)

    def _rewrite(
        self, kind: Kind, value: ir.Value, grid: Grid | None, position: int, why: str, nodes: Sequence[ir.Node]
    ) -> None:  # fmt: skip
        """A kernel that rewrites `value` as int8, in another grid, or as float: one for all who want it so."""
        draft = self._rewrites.get((value, kind, grid))
        if draft is None:
            layer = FusedLayer(
                name=f"{kind} {value.name}",
                kind=kind,
                nodes=(),
                precision=self._declared(value) if kind == "dequantize" else "int8",
                macs=0,
                input_bytes=self._graph.n_bytes(value, int8=kind != "quantize"),
                weight_bytes=0,
                output_bytes=self._graph.n_bytes(value, int8=kind != "dequantize"),
                reason=why,
            )
            draft = self._rewrites[value, kind, grid] = _Draft(layer, position)
            self._drafts.append(draft)
        draft.position = min(draft.position, position)
        self._own(draft, nodes)

    # Bookkeeping ---------------------------------------------------------------------------------------

    def _emit(
        self,
        kind: Kind,
        nodes: list[ir.Node],
        int8_reads: Sequence[ir.Value],
        float_reads: Sequence[ir.Value],
        value: ir.Value,
        why: str,
        *,
        int8: bool = False,
        writes_int8: bool = False,
    ) -> None:
        """Add a kernel that computes `nodes` and writes `value`, and what must rewrite its inputs or output.

        Args:
            int8: it computes in int8; else in the type the graph declares.
            writes_int8: it can write int8, and does where the readers want that.
        """
        graph = self._graph
        position = max(graph.position[node] for node in nodes)
        for source in float_reads:
            if graph.reads_int8(source) is not None:
                self._dequantize(source, position, nodes[0])
        grid = graph.stores_int8(value) or (graph.reads_int8(value) if is_move(nodes[-1]) else None)
        stores = writes_int8 and grid is not None
        computing = next((node for node in nodes if node.op_type != "Cast"), nodes[-1])
        precision: Precision = "int8" if int8 else self._declared(computing.outputs[0])
        input_bytes = sum(graph.n_bytes(v, int8=True) for v in int8_reads)
        input_bytes += sum(graph.n_bytes(v, int8=False) for v in float_reads)
        output_bytes = graph.n_bytes(value, int8=stores)
        if kind == "noop":
            input_bytes = output_bytes = 0
        layer = FusedLayer(
            name=" + ".join(map(node_name, nodes)),
            kind=kind,
            nodes=(),
            precision=precision,
            macs=sum(map(node_macs, nodes)) // graph.batch,
            input_bytes=input_bytes,
            weight_bytes=sum(self._weight_bytes(node, precision) for node in nodes),
            output_bytes=input_bytes if kind == "concat" else output_bytes,
            reason=f"{why}; writes int8, {grid}" if stores and not is_move(nodes[-1]) else why,
        )
        draft = _Draft(layer, position)
        self._drafts.append(draft)
        self._own(draft, nodes)
        if stores and grid is not None:
            self._own(draft, self._quantizers(value, grid))
        elif grid is not None:
            self._quantize(
                value, grid, position, f"{nodes[-1].op_type} {node_name(nodes[-1])!r} writes float"
            )

    def _own(self, draft: _Draft, nodes: Sequence[ir.Node]) -> None:
        for node in nodes:
            if node not in self._owner:
                self._owner[node] = draft
                draft.nodes.append(node)

    def _quantizers(self, value: ir.Value, grid: Grid) -> list[ir.Node]:
        return [node for node in self._graph.quantizers(value) if self._graph.grid(node) == grid]

    def _assign_rest(self) -> None:
        """Give what costs nothing to a layer: Q and DQ to who wrote their tensor, constants to who reads them."""
        for node in self._graph.nodes:
            source = node.inputs[0]
            producer = None if source is None else source.producer()
            if node not in self._owner and producer in self._owner:
                self._own(self._owner[producer], [node])
        for node in reversed(list(self._graph.graph)):
            for output in node.outputs:
                for reader, _ in output.uses():
                    if reader in self._owner:
                        self._own(self._owner[reader], [node])

    def _weight_bytes(self, node: ir.Node, precision: Precision) -> int:
        if node.op_type not in LINEAR and node.op_type not in POINTWISE:
            return 0  # constants of other operators are shapes and limits
        total = 0
        for index, value in enumerate(node.inputs):
            if value is not None and self._graph.is_constant(value):
                is_weight = node.op_type in LINEAR and index < 2
                # What is added to an int32 sum stays float32.
                width = 4 if precision == "int8" and not is_weight else PRECISION_BYTES[precision]
                total += self._graph.n_elements(value) * width
        return total

    def _declared(self, value: ir.Value) -> Precision:
        return cast(Precision, self._graph.precision(value) or "fp32")


def _why_linear(graph: QuantizedGraph, node: ir.Node, int8: bool) -> str:
    if int8:
        return "input and weight are int8"
    data, weight = node.inputs[0], node.inputs[1]
    assert data is not None
    assert weight is not None
    if graph.is_int8_weight(weight):
        return f"its weight is quantized but its input {data.name!r} is float"
    if graph.reads_int8(data) is not None:
        return f"its input is quantized but its weight {weight.name!r} is float"
    return "neither its input nor its weight is quantized"


def _averages_pixels(node: ir.Node) -> bool:
    """Whether `node` is the average over height and width that TensorRT runs as a pool."""
    if node.op_type != "ReduceMean" or not node.attributes.get_int("keepdims", 1):
        return False
    axes = list(node.attributes.get_ints("axes", []))
    if not axes and len(node.inputs) > 1 and node.inputs[1] is not None:
        tensor = ir.convenience.get_const_tensor(node.inputs[1])
        axes = [] if tensor is None else [int(axis) for axis in tensor.numpy()]
    shape = None if node.inputs[0] is None else node.inputs[0].shape
    return shape is not None and len(shape) == 4 and sorted(axis % 4 for axis in axes) == [2, 3]
