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
* **A layer kept in float** (`float_layers`) reads its input as it was computed. An Add or an average
  goes with the layers it serves: it stays in float where every layer that reads its result, through
  whatever stands between, does. So with all layers in float nothing is quantized at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import onnx_ir as ir

from calibration.placement.layers import (
    STANDARD_DOMAINS,
    WEIGHTED,
    check_names,
    describe,
    edges,
    in_graph_order,
    is_constant,
    name_of,
    pixel_values,
    tie_grids,
    weight_point,
)
from calibration.placement.points import ActivationPoint, Placement, WeightPoint

__all__ = ["place"]

_ASKED_FOR = "asked for: it keeps its input and its weight in floating point"
_AVERAGES = frozenset({"AveragePool", "GlobalAveragePool", "ReduceMean"})


def place(model: ir.Model, *, float_layers: frozenset[str] = frozenset()) -> Placement:
    """Choose the tensors of a folded fp32 model that are quantized for the CPU engines.

    Args:
        model: float32, with batch norms folded; its uint8 image input, if it has one, reaches the
            network through a Cast.
        float_layers: layers that stay in floating point, by the name of their output tensor.

    Raises:
        UsageError: a name of `float_layers` is no layer of the model.
    """
    check_names(model.graph, float_layers, WEIGHTED, "float_layers")
    in_float = _serving_float_only(model.graph, float_layers) if float_layers else set()
    pixel_inputs, pixels = pixel_values(model.graph)
    wanted: dict[ir.Value, str] = {}
    weights: list[WeightPoint] = []
    skipped: list[tuple[str, str]] = []
    for node in model.graph:
        if node.domain not in STANDARD_DOMAINS:
            continue
        if node in in_float:
            if node.op_type in WEIGHTED:
                why = weight_point(node)
                skipped.append((describe(node), why if isinstance(why, str) else _ASKED_FOR))
            continue
        if node.op_type in WEIGHTED:
            point = weight_point(node)
            if isinstance(point, str):
                skipped.append((describe(node), point))
                continue
            weights.append(point)
            inputs: Sequence[ir.Value | None] = node.inputs[:1]
            reason = f"input of {describe(node)}"
        elif node.op_type == "Add" and not any(is_constant(value) for value in node.inputs):
            inputs, reason = (
                node.inputs,
                f"{describe(node)} adds integers only if both inputs are quantized",
            )
        elif node.op_type in _AVERAGES:
            inputs, reason = node.inputs[:1], f"input of {describe(node)}"
        else:
            continue
        for value in inputs:
            if value is not None and value not in pixels:
                wanted.setdefault(value, reason)
    sources = tie_grids(wanted, pixels)
    activations = tuple(
        ActivationPoint(name_of(value), read, tuple(map(name_of, sources[value])), wanted[value])
        for value in in_graph_order(model.graph, wanted)
        if (read := edges(value, in_float))
    )
    return Placement("cpu", "asymmetric_uint8", pixel_inputs, activations, tuple(weights), tuple(skipped))


def _serving_float_only(graph: ir.Graph, float_layers: frozenset[str]) -> set[ir.Node]:
    """The layers that stay in float, and every other operator whose result no layer in int8 reads.

    What no layer reads at all, behind the last one, goes with the layers that it is computed from.
    """
    in_int8 = {
        node
        for node in graph
        if node.domain in STANDARD_DOMAINS
        and node.op_type in WEIGHTED
        and name_of(node.outputs[0]) not in float_layers
        and isinstance(weight_point(node), WeightPoint)
    }

    def kinds(nodes: Iterable[ir.Node], reached: Mapping[ir.Node, frozenset[bool]]) -> frozenset[bool]:
        """Whether the layers next to an operator are in int8: none, one kind, or both."""
        return frozenset().union(
            *({node in in_int8} if node.op_type in WEIGHTED else reached[node] for node in nodes)
        )

    read_by: dict[ir.Node, frozenset[bool]] = {}
    for node in reversed(graph):
        read_by[node] = kinds((user for value in node.outputs for user, _ in value.uses()), read_by)
    made_of: dict[ir.Node, frozenset[bool]] = {}
    for node in graph:
        producers = (value.producer() for value in node.inputs if value is not None)
        made_of[node] = kinds((producer for producer in producers if producer is not None), made_of)
    only_float = frozenset({False})
    return {
        node
        for node in graph
        if (
            node not in in_int8
            if node.op_type in WEIGHTED
            else (read_by[node] or made_of[node]) == only_float
        )
    }
