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

from calibration.placement.layers import (
    STANDARD_DOMAINS,
    WEIGHTED,
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

_AVERAGES = frozenset({"AveragePool", "GlobalAveragePool", "ReduceMean"})


def place(model: ir.Model) -> Placement:
    """Choose the tensors of a folded fp32 model that are quantized for the CPU engines.

    Args:
        model: float32, with batch norms folded; its uint8 image input, if it has one, reaches the
            network through a Cast.
    """
    pixel_inputs, pixels = pixel_values(model.graph)
    wanted: dict[ir.Value, str] = {}
    weights: list[WeightPoint] = []
    skipped: list[tuple[str, str]] = []
    for node in model.graph:
        if node.domain not in STANDARD_DOMAINS:
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
        ActivationPoint(name_of(value), edges(value), tuple(map(name_of, sources[value])), wanted[value])
        for value in in_graph_order(model.graph, wanted)
        if value.uses()
    )
    return Placement("cpu", "asymmetric_uint8", pixel_inputs, activations, tuple(weights), tuple(skipped))
