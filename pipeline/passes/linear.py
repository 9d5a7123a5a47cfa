"""What the folding passes share: linear layers, per-channel affine maps, and putting one into the other.

A *linear layer* is ``y = W * x + b`` with constant ``W``: Conv (of any group count), ConvTranspose, Gemm,
MatMul. An *affine map* is ``z = scale * y + shift`` with one scale and one shift a channel: inference
batch norm, or Mul, Add, Sub, Div with a constant. Composed they are a linear layer again:

* after:  ``scale * (W * x + b) + shift  =  (scale W) * x + (scale b + shift)``, per output channel;
* before: ``W * (scale x + shift) + b    =  (W scale) * x + (b + sum W shift)``, per input channel.

The first always holds. The second holds at the borders only if the layer does not pad, or shift is zero:
padding puts the number 0 where the map would have put ``shift``. All is computed in float64 and rounded
once to the weight's type.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from pipeline.passes.graph_pass import LeaveAlone, RewriteReport

__all__ = [
    "STANDARD_DOMAINS",
    "Affine",
    "LinearLayer",
    "add_initializer",
    "affine_of",
    "bypass",
    "constant_operand",
    "describe",
    "fold_backwards",
    "is_linear",
    "sole_consumer",
    "sweep",
    "unused_name",
]

Vector = NDArray[np.float64]

LINEAR_OPS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
ARITHMETIC = frozenset({"Mul", "Add", "Sub", "Div"})
STANDARD_DOMAINS = frozenset({"", "ai.onnx"})
_FLOAT_TYPES = frozenset({ir.DataType.FLOAT16, ir.DataType.FLOAT, ir.DataType.DOUBLE})


@dataclass(frozen=True, slots=True)
class Affine:
    """``z = scale * y + shift``: float64, shape (1,) for all channels alike, or (C,)."""

    scale: Vector
    shift: Vector

    def then(self, after: Affine) -> Affine:
        """``after(self(y))``."""
        return Affine(after.scale * self.scale, after.scale * self.shift + after.shift)


IDENTITY = Affine(np.ones(1), np.zeros(1))


@dataclass(frozen=True, slots=True)
class LinearLayer:
    """A node of `LINEAR_OPS` whose weight is a constant that belongs to it alone."""

    node: ir.Node
    weight: ir.Value
    groups: int
    out_channels: int
    in_channels: int
    rank: int
    """Of the output."""
    channel_axis: int
    """Of the output."""

    @classmethod
    def of(cls, node: ir.Node) -> LinearLayer:
        """Read `node`; raises `LeaveAlone` where its weight may not be changed."""
        weight = node.inputs[1]
        assert weight is not None
        values = _floats(weight)
        if values is None or not weight.is_initializer():
            raise LeaveAlone(f"weight {weight.name!r} of {describe(node)} is not an initializer")
        if len(weight.uses()) > 1 or weight.is_graph_output():
            raise LeaveAlone(f"weight {weight.name!r} of {describe(node)} is shared")
        groups = node.attributes.get_int("group", 1)
        shape = values.shape
        if node.op_type == "Conv":
            return cls(node, weight, groups, shape[0], shape[1] * groups, values.ndim, 1)
        if node.op_type == "ConvTranspose":
            return cls(node, weight, groups, shape[1] * groups, shape[0], values.ndim, 1)
        if node.op_type == "Gemm":
            if node.attributes.get_int("transA", 0):
                raise LeaveAlone(f"{describe(node)} transposes its input")
            transposed = node.attributes.get_int("transB", 0) == 1
            rows, columns = shape if not transposed else shape[::-1]
            return cls(node, weight, 1, columns, rows, 2, 1)
        data, result = node.inputs[0], node.outputs[0]
        shapes = [value.shape for value in (data, result) if value is not None and value.shape is not None]
        if values.ndim != 2 or not shapes:
            raise LeaveAlone(f"{describe(node)} multiplies tensors of unknown or higher rank")
        return cls(node, weight, 1, shape[1], shape[0], len(shapes[0]), len(shapes[0]) - 1)

    @property
    def pads(self) -> bool:
        """Whether zeros are put around the input (or may be: ``auto_pad``)."""
        attributes = self.node.attributes
        if self.node.op_type not in ("Conv", "ConvTranspose"):
            return False
        auto_pad = attributes.get_string("auto_pad", "NOTSET")
        if auto_pad in ("SAME_UPPER", "SAME_LOWER"):
            return any(side > 1 for side in self.kernel)
        return auto_pad != "VALID" and any(attributes.get_ints("pads", ()))

    @property
    def kernel(self) -> tuple[int, ...]:
        """Spatial size of the kernel; empty for Gemm and MatMul."""
        return self.weight_array().shape[2:]

    def weight_array(self) -> NDArray[np.float64]:
        """The weight as it is stored, in float64."""
        values = _floats(self.weight)
        assert values is not None
        return values

    def bias_array(self) -> Vector:
        """The bias as the layer adds it, float64, shape (out_channels,)."""
        bias = self.node.inputs[2] if len(self.node.inputs) > 2 else None
        if bias is None:
            return np.zeros(self.out_channels)
        values = _floats(bias)
        if values is None:
            raise LeaveAlone(f"bias {bias.name!r} of {describe(self.node)} is not a constant")
        per_channel = values.size == self.out_channels and values.shape[-1] == self.out_channels
        if values.size != 1 and not per_channel:
            raise LeaveAlone(f"bias {bias.name!r} of {describe(self.node)} differs from row to row")
        beta = self.node.attributes.get_float("beta", 1.0)
        return np.broadcast_to(beta * values.reshape(-1), self.out_channels).astype(np.float64)

    def put_after(self, affine: Affine) -> None:
        """Make the layer compute ``affine(layer(x))``."""
        scale = np.broadcast_to(affine.scale, self.out_channels)
        weight = self.weight_array()
        if self.node.op_type == "Conv" or self.node.attributes.get_int("transB", 0) == 1:
            scaled = weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
        elif self.node.op_type == "ConvTranspose":
            grouped = weight.reshape(self.groups, -1, *weight.shape[1:])
            scaled = grouped * scale.reshape(self.groups, 1, -1, *[1] * len(weight.shape[2:]))
        else:
            scaled = weight * scale
        self.store(scaled.reshape(weight.shape), scale * self.bias_array() + affine.shift)

    def put_before(self, affine: Affine) -> None:
        """Make the layer compute ``layer(affine(x))``; raises `LeaveAlone` where that is inexact."""
        scale = np.broadcast_to(affine.scale, self.in_channels)
        shift = np.broadcast_to(affine.shift, self.in_channels)
        if np.any(shift):
            if self.pads:
                raise LeaveAlone(
                    f"{describe(self.node)} pads with zeros, where the shifted input goes on with the shift"
                )
            if self.node.op_type == "ConvTranspose":
                raise LeaveAlone(
                    f"{describe(self.node)} sums a varying number of inputs, so a shift is no bias"
                )
        weight, bias = self.weight_array(), self.bias_array()
        if self.node.op_type == "Conv":
            # [group, out / group, in / group, kernel…]: every group sees its own input channels.
            grouped = weight.reshape(self.groups, -1, *weight.shape[1:])
            kernel_axes = tuple(range(3, grouped.ndim))
            bias = bias + np.einsum(
                "goi,gi->go", grouped.sum(axis=kernel_axes), shift.reshape(self.groups, -1)
            ).reshape(-1)
            scaled = grouped * scale.reshape(self.groups, 1, -1, *[1] * len(kernel_axes))
        elif self.node.attributes.get_int("transB", 0) == 1:
            bias, scaled = bias + self._alpha() * (weight @ shift), weight * scale
        else:
            if self.node.op_type != "ConvTranspose":
                bias = bias + self._alpha() * (shift @ weight)
            scaled = weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
        self.store(scaled.reshape(weight.shape), bias)

    def store(self, weight: NDArray[np.float64], bias: Vector) -> None:
        """Replace weight and bias; raises `LeaveAlone`, having changed nothing, if they are not finite."""
        dtype = self.weight.const_value.dtype if self.weight.const_value else ir.DataType.FLOAT
        with np.errstate(over="ignore"):
            new_weight, new_bias = weight.astype(dtype.numpy()), bias.astype(dtype.numpy())
        if not (np.isfinite(new_weight).all() and np.isfinite(new_bias).all()):
            raise LeaveAlone(
                f"the folded weight of {describe(self.node)} would not be finite in {dtype.name}"
            )
        has_bias = len(self.node.inputs) > 2 and self.node.inputs[2] is not None
        if has_bias or np.any(new_bias):
            self._store_bias(new_bias)
        # The weight has no other user, so its value can change in place and keep its name.
        self.weight.const_value = ir.tensor(new_weight, name=self.weight.name)
        self.weight.shape = ir.Shape(new_weight.shape)

    def _store_bias(self, bias: NDArray[np.float64]) -> None:
        if self.node.op_type == "MatMul":
            if self.rank != 2:
                raise LeaveAlone(
                    f"{describe(self.node)} has no bias and works on rank {self.rank}, as Gemm cannot"
                )
            self.node.op_type = "Gemm"
        if self.node.op_type == "Gemm" and self.node.attributes.get_float("beta", 1.0) != 1.0:
            self.node.attributes["beta"] = ir.AttrFloat32("beta", 1.0)
        if len(self.node.inputs) < 3:
            self.node.resize_inputs(3)
        old = self.node.inputs[2]
        if old is not None and old.is_initializer() and len(old.uses()) == 1 and not old.is_graph_output():
            old.const_value = ir.tensor(bias, name=old.name)
            old.shape = ir.Shape(bias.shape)
            return
        # Absent, or shared with other layers (exporters share one zero bias): it gets one of its own.
        graph = self.node.graph
        assert isinstance(graph, ir.Graph)  # functions are inlined before
        value = add_initializer(graph, f"{self.node.outputs[0].name}.bias", bias)
        self.node.replace_input_with(2, value)

    def _alpha(self) -> float:
        return self.node.attributes.get_float("alpha", 1.0)


def is_linear(node: ir.Node) -> bool:
    """Whether `node` is one of `LINEAR_OPS` of the standard operator set."""
    return node.op_type in LINEAR_OPS and node.domain in STANDARD_DOMAINS


def constant_operand(node: ir.Node) -> int | None:
    """Index of the constant input of a Mul, Add, Sub or Div whose other input is not constant."""
    if node.op_type not in ARITHMETIC or node.domain not in STANDARD_DOMAINS:
        return None
    constant = [value is not None and _floats(value) is not None for value in node.inputs]
    return constant.index(True) if sum(constant) == 1 else None


def affine_of(node: ir.Node, rank: int, channel_axis: int) -> Affine:
    """The map that a batch norm, or arithmetic with a constant, applies to a tensor of this rank.

    Raises:
        LeaveAlone: the constant varies along another axis than the channels', widens the tensor, or is
            not finite.
    """
    affine = (
        _batch_norm(node) if node.op_type == "BatchNormalization" else _arithmetic(node, rank, channel_axis)
    )
    if not (np.isfinite(affine.scale).all() and np.isfinite(affine.shift).all()):
        raise LeaveAlone(f"{describe(node)} has constants that give no finite scale and shift")
    return affine


def _arithmetic(node: ir.Node, rank: int, channel_axis: int) -> Affine:
    index = constant_operand(node)
    if index is None:
        raise LeaveAlone(f"{describe(node)} has no constant operand")
    operand = node.inputs[index]
    values = _floats(operand) if operand is not None else None
    assert values is not None
    aligned = (1,) * (rank - values.ndim) + values.shape
    if len(aligned) > rank or any(size != 1 for axis, size in enumerate(aligned) if axis != channel_axis):
        raise LeaveAlone(
            f"{describe(node)} has a constant of shape {list(values.shape)}, which is neither a scalar nor "
            "one value a channel"
        )
    vector = values.reshape(-1)
    if node.op_type == "Mul":
        return Affine(vector, np.zeros(1))
    if node.op_type == "Add":
        return Affine(np.ones(1), vector)
    if node.op_type == "Sub":
        return Affine(np.ones(1), -vector) if index == 1 else Affine(-np.ones(1), vector)
    if index == 0 or np.any(vector == 0):
        raise LeaveAlone(f"{describe(node)} divides a constant, or by zero: not an affine map")
    return Affine(1.0 / vector, np.zeros(1))


def _batch_norm(node: ir.Node) -> Affine:
    """``gamma (y - mean) / sqrt(var + eps) + beta``, inference form."""
    if node.attributes.get_int("training_mode", 0) or any(output.uses() for output in node.outputs[1:]):
        raise LeaveAlone(f"{describe(node)} is in training mode: its statistics come from the batch")
    arrays = [_floats(value) for value in node.inputs[1:] if value is not None]
    gamma, beta, mean, variance = arrays
    if gamma is None or beta is None or mean is None or variance is None:
        raise LeaveAlone(f"{describe(node)} has parameters that are not constants")
    with np.errstate(invalid="ignore", divide="ignore"):  # a negative variance; the caller refuses the result
        scale = gamma / np.sqrt(variance + node.attributes.get_float("epsilon", 1e-5))
    return Affine(scale, beta - scale * mean)


def sole_consumer(value: ir.Value) -> ir.Node:
    """The one node that uses `value`; raises `LeaveAlone` where others see it too."""
    if value.is_graph_output():
        raise LeaveAlone(f"{value.name!r} is an output of the graph")
    uses = value.uses()
    if len(uses) != 1:
        raise LeaveAlone(f"{value.name!r} has {len(uses)} consumers")
    return next(iter(uses)).node


def fold_backwards(node: ir.Node) -> int:
    """Put `node`, and affine nodes between it and the linear layer behind it, into that layer.

    Returns:
        How many nodes went.

    Raises:
        LeaveAlone: there is no such layer, or folding would change what others see.
    """
    chain = [node]
    while True:
        index = constant_operand(chain[-1])
        data = chain[-1].inputs[0 if index is None else 1 - index]
        producer = data.producer() if data is not None else None
        if data is None or producer is None:
            raise LeaveAlone("its input is the model's input, not a linear layer")
        sole_consumer(data)
        if is_linear(producer):
            break
        if constant_operand(producer) is None:
            raise LeaveAlone(f"its input comes from {describe(producer)}, which is not a linear layer")
        chain.append(producer)
    layer = LinearLayer.of(producer)
    total = IDENTITY
    for link in reversed(chain):
        total = total.then(affine_of(link, layer.rank, layer.channel_axis))
    if max(total.scale.size, total.shift.size) not in (1, layer.out_channels):
        raise LeaveAlone(f"{describe(node)} broadcasts over more channels than {describe(producer)} has")
    layer.put_after(total)
    for link in reversed(chain):
        bypass(link, producer.outputs[0])
    return len(chain)


def bypass(node: ir.Node, replacement: ir.Value) -> None:
    """Remove `node`; whoever used its first output uses `replacement`. Output names stay."""
    output, graph = node.outputs[0], node.graph
    assert graph is not None
    is_output, name = output.is_graph_output(), output.name
    output.replace_all_uses_with(replacement, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    if is_output:
        replacement.name = name
        replacement.type, replacement.shape = output.type, output.shape


def sweep(
    model: ir.Model,
    candidate: Callable[[ir.Node], bool],
    fold: Callable[[ir.Node], int],
    *,
    backwards: bool = False,
) -> RewriteReport:
    """Try `fold` on every candidate of the main graph, in order, and gather what was left alone."""
    n_rewrites = 0
    skipped: list[tuple[str, str]] = []
    nodes = list(model.graph)
    for node in reversed(nodes) if backwards else nodes:
        if node.graph is None or not candidate(node):  # removed by an earlier fold of this sweep
            continue
        try:
            n_rewrites += fold(node)
        except LeaveAlone as reason:
            skipped.append((describe(node), str(reason)))
    return RewriteReport(n_rewrites, tuple(skipped))


def add_initializer(graph: ir.Graph, name: str, values: NDArray[Any]) -> ir.Value:
    """A new constant of `graph`, named `name` or like it."""
    name = unused_name(graph, name)
    value = ir.Value(
        name=name,
        type=ir.TensorType(ir.DataType.from_numpy(values.dtype)),
        shape=ir.Shape(values.shape),
        const_value=ir.tensor(values, name=name),
    )
    graph.initializers.add(value)
    return value


def unused_name(graph: ir.Graph, name: str) -> str:
    """`name`, numbered if the graph has a value of that name already."""
    taken = {value.name for node in graph for value in node.outputs} | set(graph.initializers)
    candidate, count = name, 1
    while candidate in taken:
        candidate, count = f"{name}_{count}", count + 1
    return candidate


def describe(node: ir.Node) -> str:
    """Operator and output name: enough to find the node in a viewer."""
    return f"{node.op_type} {node.outputs[0].name!r}"


def _floats(value: ir.Value) -> NDArray[np.float64] | None:
    """A floating-point constant as float64, or ``None`` when `value` is not one."""
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None or value.is_graph_input() or tensor.dtype not in _FLOAT_TYPES:
        return None
    return tensor.numpy().astype(np.float64)
