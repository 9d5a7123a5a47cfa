"""Which nodes run inside the kernel of the node before them: TensorRT's epilogue and pointwise fusions.

From "Layer Fusion" in NVIDIA's TensorRT documentation: *Convolution and ReLU*, *Convolution and Generic
Activation*, *Convolution and Scale*, *Convolution and ElementWise Operation* (a simple sum that does not
broadcast), *PointWise Fusion*.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

import onnx_ir as ir

from engines.tensorrt.quantized_graph import QuantizedGraph, sole_reader

__all__ = ["LINEAR", "POINTWISE", "Epilogue", "linear_epilogue", "pointwise_chain", "runs_in_int8"]

LINEAR = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_ACTIVATIONS = frozenset({"Clip", "Elu", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Mish", "PRelu", "Relu", "Selu", "Sigmoid", "Softplus", "Softsign", "Tanh"})  # fmt: skip
_ARITHMETIC = frozenset({"Add", "Div", "Max", "Min", "Mul", "Pow", "Sub", "Sum"})
_UNARY = frozenset({"Abs", "Ceil", "Cos", "Erf", "Exp", "Floor", "Log", "Neg", "Reciprocal", "Round", "Sin", "Sqrt"})  # fmt: skip
POINTWISE = _ACTIVATIONS | _ARITHMETIC | _UNARY | {"BatchNormalization", "Cast"}


@dataclass(frozen=True, slots=True)
class Epilogue:
    """What one kernel computes: a linear layer and what follows it, up to the tensor it writes."""

    nodes: tuple[ir.Node, ...]
    value: ir.Value
    """What the kernel writes."""
    operand: ir.Value | None
    """What it adds besides a bias."""


def runs_in_int8(graph: QuantizedGraph, node: ir.Node) -> bool:
    """Whether DQ stands above everything a linear layer multiplies."""
    factors = [value for value in node.inputs[:2] if value is not None]
    return all(
        graph.is_int8_weight(value) if graph.is_constant(value) else graph.reads_int8(value) is not None
        for value in factors
    )


def linear_epilogue(graph: QuantizedGraph, node: ir.Node) -> Epilogue:
    """What runs in the kernel of the linear layer `node`, in order: scale and bias, sum, activation."""
    nodes = _with_constant_arithmetic(graph, node)
    value = nodes[-1].outputs[0]
    operand = _summand(graph, value, node)
    if operand is not None:
        add = sole_reader(value)
        assert add is not None
        nodes.append(add)
        value = add.outputs[0]
    nodes += _activation(graph, value)
    return Epilogue(tuple(nodes), nodes[-1].outputs[0], operand)


def pointwise_chain(
    graph: QuantizedGraph, node: ir.Node, taken: Container[ir.Node]
) -> tuple[list[ir.Node], list[ir.Value], ir.Value]:
    """The elementwise nodes that run as one kernel beginning with `node`.

    Returns:
        The nodes, every tensor the kernel reads, and the tensor it writes.
    """
    nodes, reads, value = [node], graph.activations(node), node.outputs[0]
    while (reader := sole_reader(value)) is not None and reader not in taken:
        others = [v for v in graph.activations(reader) if v is not value]
        if reader.op_type not in POINTWISE or graph.precision(reader.outputs[0]) is None:
            break
        if any(_linear_behind(graph, v) is not None for v in others):
            break  # that layer takes the sum into its own kernel
        reads += [v for v in others if v not in reads]
        nodes.append(reader)
        value = reader.outputs[0]
    return nodes, reads, value


def _with_constant_arithmetic(graph: QuantizedGraph, node: ir.Node) -> list[ir.Node]:
    """`node` and the bias behind it, and a scale too where the weight can take it: an int8 weight cannot."""
    nodes = [node]
    foldable = (
        {"Add", "Sub"} if runs_in_int8(graph, node) else {"Add", "Sub", "Mul", "Div", "BatchNormalization"}
    )
    while True:
        value = nodes[-1].outputs[0]
        reader = sole_reader(value)
        if reader is None or reader.op_type not in foldable or reader.inputs[0] is not value:
            return nodes
        if graph.activations(reader) != [value] or not _same_shape(value, reader.outputs[0]):
            return nodes
        nodes.append(reader)


def _summand(graph: QuantizedGraph, value: ir.Value, layer: ir.Node) -> ir.Value | None:
    """What `layer`, which ends in `value`, adds in its epilogue; ``None`` where no sum is its own."""
    add = sole_reader(value)
    if add is None or add.op_type not in ("Add", "Sum") or len(add.inputs) != 2:
        return None
    operands = graph.activations(add)
    if len(operands) != 2 or not _same_shape(*operands):
        return None
    other = operands[0] if operands[1] is value else operands[1]
    rival = _linear_behind(graph, other)
    if rival is not None and graph.position[rival] > graph.position[layer]:
        return None  # the later one can read what this one has written
    return other


def _linear_behind(graph: QuantizedGraph, value: ir.Value) -> ir.Node | None:
    """The linear layer whose kernel, before any sum, ends in `value` and that nothing else reads."""
    node, last = value.producer(), value
    while node is not None and sole_reader(last) is not None:
        if node.op_type in LINEAR:
            return node if _with_constant_arithmetic(graph, node)[-1].outputs[0] is value else None
        sources = graph.activations(node)
        if node.op_type not in _ARITHMETIC or len(sources) != 1:
            return None
        last, node = sources[0], sources[0].producer()
    return None


def _activation(graph: QuantizedGraph, value: ir.Value) -> list[ir.Node]:
    """The activation function behind `value`, also one of the form ``x * f(x)`` (SiLU, HardSwish)."""
    reader = sole_reader(value)
    if reader is not None:
        alone = reader.op_type in _ACTIVATIONS and graph.activations(reader) == [value]
        return [reader] if alone else []
    readers = {use.node for use in value.uses()}
    if len(readers) != 2 or value.is_graph_output():
        return []
    first, second = sorted(readers, key=graph.position.__getitem__)
    gated = (
        first.op_type in _ACTIVATIONS and sole_reader(first.outputs[0]) is second and second.op_type == "Mul"
    )
    return [first, second] if gated and set(second.inputs) == {value, first.outputs[0]} else []


def _same_shape(left: ir.Value, right: ir.Value) -> bool:
    return left.shape is not None and left.shape == right.shape
