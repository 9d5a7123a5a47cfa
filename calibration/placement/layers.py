"""What the placements share: layers with a constant weight, tensors that are only moved, raw pixels."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from calibration.placement.points import Edge, WeightPoint
from pipeline.errors import UsageError

__all__ = [
    "MOVES",
    "STANDARD_DOMAINS",
    "WEIGHTED",
    "check_names",
    "describe",
    "edges",
    "in_graph_order",
    "is_constant",
    "moved_from",
    "name_of",
    "pixel_values",
    "tie_grids",
    "weight_point",
]

STANDARD_DOMAINS = frozenset({"", "ai.onnx"})
WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
MOVES = frozenset({"MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Identity"})
"""Operators whose outputs are some of the values of their first input."""


def pixel_values(graph: ir.Graph) -> tuple[tuple[str, ...], set[ir.Value]]:
    """The uint8 inputs that are only moved and cast to float, and every float tensor that holds them."""
    names: list[str] = []
    pixels: set[ir.Value] = set()
    for image in graph.inputs:
        if image.dtype != ir.DataType.UINT8:
            continue
        casts: set[ir.Value] = set()
        raw = [image]
        for value in raw:  # grows while it is walked
            for node, _ in value.uses():
                if node.op_type in MOVES:
                    raw.append(node.outputs[0])
                elif node.op_type == "Cast" and node.attributes.get_int("to", 0) == ir.DataType.FLOAT:
                    casts.add(node.outputs[0])
                elif node.op_type != "Shape":
                    break
            else:
                continue
            break
        else:
            names.append(name_of(image))
            pixels |= casts
    for node in graph:
        if node.op_type in MOVES and node.inputs[0] in pixels:
            pixels.add(node.outputs[0])
    return tuple(names), pixels


def weight_point(node: ir.Node) -> WeightPoint | str:
    """Where the weight of a layer is quantized, or why it is not."""
    data, weight = node.inputs[0], node.inputs[1]
    if data is None or weight is None or not is_constant(weight):
        return "its weight is computed at run time: the layer stays in float"
    if is_constant(data):
        return "its input is a constant: the layer stays in float"
    if weight.dtype != ir.DataType.FLOAT:
        return f"its weight is {weight.dtype}: only float32 is quantized"
    if node.op_type == "Gemm":
        if node.attributes.get_float("alpha", 1.0) != 1.0 or node.attributes.get_float("beta", 1.0) != 1.0:
            return "alpha or beta is not 1: the layer stays in float"
        if node.attributes.get_int("transA", 0):
            return "transA is set: the layer stays in float"
        axis = 0 if node.attributes.get_int("transB", 0) else 1
    elif node.op_type == "MatMul":
        if weight.shape is None or len(weight.shape) != 2:
            return "its weight is no matrix: the layer stays in float"
        axis = 1
    else:
        axis = 0 if node.op_type == "Conv" else 1
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    rank_one = bias is not None and bias.shape is not None and len(bias.shape) == 1
    if bias is not None and not (is_constant(bias) and rank_one):
        return "its bias is no constant vector: the layer stays in float"
    return WeightPoint(
        weight=name_of(weight),
        consumer=Edge(name_of(node.outputs[0]), 1),
        axis=axis,
        input=name_of(data),
        bias=None if bias is None else name_of(bias),
        reason=f"weight of {describe(node)}, one scale for each output channel",
    )


def tie_grids(
    wanted: dict[ir.Value, str], pixels: set[ir.Value], untied: Collection[ir.Value] = ()
) -> dict[ir.Value, list[ir.Value]]:
    """Extend `wanted` to what moves read, and give every tensor the sources its grid must cover.

    Args:
        wanted: tensors that are to be quantized, and why; grows.
        pixels: float tensors that hold raw pixels.
        untied: outputs of Concats whose inputs keep grids of their own. The output's grid still covers
            them all.
    """
    parent: dict[ir.Value, ir.Value] = {}

    def root(value: ir.Value) -> ir.Value:
        while parent.setdefault(value, value) is not value:
            value = parent[value]
        return value

    def origins(value: ir.Value) -> list[ir.Value]:
        inputs = moved_from(value, pixels)
        return [origin for source in inputs for origin in origins(source)] if inputs else [value]

    moved: set[ir.Value] = set()
    queue = list(wanted)
    for value in queue:  # grows while it is walked
        inputs = [] if value in untied else moved_from(value, pixels)
        if inputs:
            moved.add(value)
        for source in inputs:
            parent[root(source)] = root(value)
            if source not in wanted:
                producer = value.producer()
                assert producer is not None
                wanted[source] = (
                    f"{describe(producer)} only moves values: its input and output share one grid"
                )
                queue.append(source)
    members: dict[ir.Value, dict[ir.Value, None]] = {}
    for value in wanted:
        covered = members.setdefault(root(value), {})
        if value not in moved:
            covered.update(dict.fromkeys(origins(value) if value in untied else [value]))
    return {value: list(members[root(value)]) for value in wanted}


def moved_from(value: ir.Value, pixels: set[ir.Value]) -> list[ir.Value]:
    """The tensors whose values `value` consists of, if its producer computes nothing."""
    node = value.producer()
    if node is None or node.domain not in STANDARD_DOMAINS:
        return []
    if node.op_type == "Concat":
        inputs = [v for v in node.inputs if v is not None]
    elif node.op_type in MOVES and node.inputs[0] is not None:
        inputs = [node.inputs[0]]
    else:
        return []
    # A constant or raw pixels have a grid of their own, which cannot be tied.
    return [] if any(is_constant(v) or v in pixels for v in inputs) else inputs


def edges(value: ir.Value, left_out: Collection[ir.Node] = ()) -> tuple[Edge, ...]:
    """Every use of `value` by other nodes than those `left_out`, in a fixed order."""
    return tuple(
        sorted(Edge(name_of(node.outputs[0]), index) for node, index in value.uses() if node not in left_out)
    )


def in_graph_order(graph: ir.Graph, values: dict[ir.Value, str]) -> list[ir.Value]:
    """The keys of `values` as the graph computes them, its inputs first."""
    ordered = [*graph.inputs, *(value for node in graph for value in node.outputs)]
    return [value for value in ordered if value in values]


def is_constant(value: ir.Value | None) -> bool:
    """Whether `value` is stored in the file."""
    return value is not None and value.const_value is not None


def name_of(value: ir.Value) -> str:
    """The name of a tensor that has one."""
    assert value.name is not None, "a tensor without a name was read from a file"
    return value.name


def describe(node: ir.Node) -> str:
    """Operator and name (or output name): enough to find the node in a viewer."""
    return f"{node.op_type} {node.name or node.outputs[0].name!r}"


def check_names(graph: ir.Graph, names: frozenset[str], op_types: frozenset[str], argument: str) -> None:
    """Refuse names that are the output of no such operator.

    Raises:
        UsageError: names one of them, and the argument it came in.
    """
    known = {value.name for node in graph if node.op_type in op_types for value in node.outputs[:1]}
    unknown = sorted(names - known)
    if unknown:
        raise UsageError(
            f"{argument} names {unknown[0]!r}, which is the output of no {' or '.join(sorted(op_types))} "
            f"({len(unknown)} unknown); layers are named by their output tensor"
        )
