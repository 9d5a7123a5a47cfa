"""Where Q/DQ stand for OpenVINO and ONNX Runtime on a CPU.

Both take asymmetric uint8 activations and int8 weights with one scale for each output channel, and both
fuse a layer only where *everything it reads and the tensor it ends in* is quantized:

* **Convolution, Gemm, MatMul**: the input and the weight. The bias becomes int32 in units of the
  accumulator, without which ONNX Runtime does not form QLinearConv. Q stands after the activation
  function, never between: a Relu disappears into a Q whose zero point is 0, which it is because the
  smallest output of a Relu is 0.
* **Add**: both inputs. (TensorRT wants the opposite: one bare branch.) With one float input, the other
  branch would be dequantized and the addition done in float.
* **Average pools, ReduceMean**: the input; what comes out has a range of its own.
* **MaxPool, Concat, Reshape, Transpose …** only move values: quantization commutes with them, so the
  grid of the input is the grid of the output. A Concat ties the grids of all its inputs to one,
  or engines requantize every branch.
* **The last layer's output** is not quantized: logits are ranked against each other, and nothing
  is gained behind them.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from calibration.placement.points import ActivationPoint, Edge, Placement, WeightPoint

__all__ = ["place"]

_STANDARD_DOMAINS = ("", "ai.onnx")
_AVERAGES = frozenset({"AveragePool", "GlobalAveragePool", "ReduceMean"})
_MOVES = frozenset({"MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Identity"})
"""Operators whose outputs are some of the values of their first input."""


def place(model: ir.Model) -> Placement:
    """Choose the tensors of a folded fp32 model that are quantized for the CPU engines.

    Args:
        model: float32, with batch norms folded; its uint8 image input, if it has one, reaches the
            network through a Cast.
    """
    pixel_inputs, pixels = _pixel_values(model.graph)
    wanted: dict[ir.Value, str] = {}
    weights: list[WeightPoint] = []
    skipped: list[tuple[str, str]] = []
    for node in model.graph:
        if node.domain not in _STANDARD_DOMAINS:
            continue
        if node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
            point = _weight_point(node)
            if isinstance(point, str):
                skipped.append((_name(node), point))
                continue
            weights.append(point)
            inputs: Sequence[ir.Value | None] = node.inputs[:1]
            reason = f"input of {_name(node)}"
        elif node.op_type == "Add" and not any(_is_constant(value) for value in node.inputs):
            inputs, reason = (
                node.inputs,
                f"{_name(node)} adds integers only if both inputs are quantized",
            )
        elif node.op_type in _AVERAGES:
            inputs, reason = node.inputs[:1], f"input of {_name(node)}"
        else:
            continue
        for value in inputs:
            if value is not None and value not in pixels:
                wanted.setdefault(value, reason)
    sources = _tie_grids(wanted, pixels)
    activations = tuple(
        ActivationPoint(_name_of(value), _edges(value), tuple(map(_name_of, sources[value])), wanted[value])
        for value in _in_graph_order(model.graph, wanted)
        if value.uses()
    )
    return Placement("cpu", "asymmetric_uint8", pixel_inputs, activations, tuple(weights), tuple(skipped))


def _pixel_values(graph: ir.Graph) -> tuple[tuple[str, ...], set[ir.Value]]:
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
                if node.op_type in _MOVES:
                    raw.append(node.outputs[0])
                elif node.op_type == "Cast" and node.attributes.get_int("to", 0) == ir.DataType.FLOAT:
                    casts.add(node.outputs[0])
                elif node.op_type != "Shape":
                    break
            else:
                continue
            break
        else:
            names.append(_name_of(image))
            pixels |= casts
    for node in graph:
        if node.op_type in _MOVES and node.inputs[0] in pixels:
            pixels.add(node.outputs[0])
    return tuple(names), pixels


def _weight_point(node: ir.Node) -> WeightPoint | str:
    """Where the weight of a layer is quantized, or why it is not."""
    data, weight = node.inputs[0], node.inputs[1]
    if data is None or weight is None or not _is_constant(weight):
        return "its weight is computed at run time: the layer stays in float"
    if _is_constant(data):
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
    if bias is not None and not (_is_constant(bias) and rank_one):
        return "its bias is no constant vector: the layer stays in float"
    return WeightPoint(
        weight=_name_of(weight),
        consumer=Edge(_name_of(node.outputs[0]), 1),
        axis=axis,
        input=_name_of(data),
        bias=None if bias is None else _name_of(bias),
        reason=f"weight of {_name(node)}, one scale for each output channel",
    )


def _tie_grids(wanted: dict[ir.Value, str], pixels: set[ir.Value]) -> dict[ir.Value, list[ir.Value]]:
    """Extend `wanted` to what moves read, and give every tensor the sources its grid must cover."""
    parent: dict[ir.Value, ir.Value] = {}

    def root(value: ir.Value) -> ir.Value:
        while parent.setdefault(value, value) is not value:
            value = parent[value]
        return value

    moved: set[ir.Value] = set()
    queue = list(wanted)
    for value in queue:  # grows while it is walked
        inputs = _moved_from(value, pixels)
        if inputs:
            moved.add(value)
        for source in inputs:
            parent[root(source)] = root(value)
            if source not in wanted:
                producer = value.producer()
                assert producer is not None
                wanted[source] = f"{_name(producer)} only moves values: its input and output share one grid"
                queue.append(source)
    members: dict[ir.Value, list[ir.Value]] = {}
    for value in wanted:
        members.setdefault(root(value), []).append(value)
    return {value: [v for v in members[root(value)] if v not in moved] for value in wanted}


def _moved_from(value: ir.Value, pixels: set[ir.Value]) -> list[ir.Value]:
    """The tensors whose values `value` consists of, if its producer computes nothing."""
    node = value.producer()
    if node is None or node.domain not in _STANDARD_DOMAINS:
        return []
    if node.op_type == "Concat":
        inputs = [v for v in node.inputs if v is not None]
    elif node.op_type in _MOVES and node.inputs[0] is not None:
        inputs = [node.inputs[0]]
    else:
        return []
    # A constant or raw pixels have a grid of their own, which cannot be tied.
    return [] if any(_is_constant(v) or v in pixels for v in inputs) else inputs


def _edges(value: ir.Value) -> tuple[Edge, ...]:
    return tuple(sorted(Edge(_name_of(node.outputs[0]), index) for node, index in value.uses()))


def _in_graph_order(graph: ir.Graph, values: dict[ir.Value, str]) -> list[ir.Value]:
    ordered = [*graph.inputs, *(value for node in graph for value in node.outputs)]
    return [value for value in ordered if value in values]


def _is_constant(value: ir.Value | None) -> bool:
    return value is not None and value.const_value is not None


def _name_of(value: ir.Value) -> str:
    assert value.name is not None, "a tensor without a name was read from a file"
    return value.name


def _name(node: ir.Node) -> str:
    return f"{node.op_type} {node.name or node.outputs[0].name!r}"
