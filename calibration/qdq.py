"""Inserts QuantizeLinear and DequantizeLinear where a placement says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from calibration.placement import ActivationPoint, Edge, Placement, WeightPoint
from calibration.qparams import (
    ACTIVATION_FORMS,
    half_scale,
    int32_bias,
    min_weight_scale,
    per_channel_int8,
    quantize,
)
from pipeline.artifacts import QuantParams, TensorRange
from pipeline.errors import CalibrationError

__all__ = ["activation_params", "insert_qdq", "weight_params"]

_PIXEL = QuantParams(np.asarray(1.0, np.float32), np.asarray(0, np.uint8), "uint8")


def insert_qdq(model: ir.Model, placement: Placement, ranges: Mapping[str, TensorRange]) -> None:
    """Quantize `model` in place.

    Given::

        y = Relu(Conv(x, W, b))

    Result::

        W8: int8, b32: int32 (scale of x times scale of W)
        y = Relu(Conv(DQ(Q(x)), DQ(W8), DQ(b32)))

    Args:
        model: the folded fp32 model that `placement` was made for.
        placement: which tensors, and in which form.
        ranges: of every tensor in ``placement.observed``.

    Raises:
        CalibrationError: a range is missing or not finite, or a weight is, or a scale does not fit in the
            placement's remainder; names the tensor.
    """
    _Inserter(model.graph, placement, ranges).run()


def activation_params(
    point: ActivationPoint, placement: Placement, ranges: Mapping[str, TensorRange]
) -> QuantParams:
    """The grid of an activation: over the ranges of all its sources.

    Raises:
        CalibrationError: a range is missing or not finite, or its scale does not fit in the placement's
            remainder; names the tensor.
    """
    if point.scale is not None:
        return QuantParams(np.asarray(point.scale, np.float32), np.asarray(0, np.int8), "int8")
    missing = [name for name in point.sources if name not in ranges]
    if missing:
        raise CalibrationError(
            f"the calibration table has no range of tensor {missing[0]!r} ({len(missing)} missing); "
            "calibrate this model again"
        )
    covered = [ranges[name] for name in point.sources]
    hull = TensorRange(min(r.low for r in covered), max(r.high for r in covered))
    try:
        return _representable(ACTIVATION_FORMS[placement.activation_form](hull), placement)
    except CalibrationError as error:
        raise CalibrationError(f"tensor {point.tensor!r}: {error}") from error


def weight_params(
    weights: NDArray[np.float32],
    point: WeightPoint,
    placement: Placement,
    min_scale: NDArray[Any] | float = 0.0,
) -> QuantParams:
    """The grids of a layer's weight, one for each output channel, none finer than `min_scale`."""
    return _representable(per_channel_int8(weights, point.axis, min_scale), placement)


def _representable(params: QuantParams, placement: Placement) -> QuantParams:
    """`params` with scales that the remainder's type holds exactly, before any integer is made."""
    return params if placement.remainder == "float32" else half_scale(params, placement.remainder)


class _Inserter:
    def __init__(self, graph: ir.Graph, placement: Placement, ranges: Mapping[str, TensorRange]) -> None:
        self._graph = graph
        self._placement = placement
        self._ranges = ranges
        self._values = _named_values(graph)
        self._params: dict[str, QuantParams] = {}
        self._constants: dict[tuple[str, ...], tuple[ir.Value, ir.Value]] = {}

    def run(self) -> None:
        for name in self._placement.pixels:
            self._take_pixels(name)
        for point in self._placement.activations:
            self._quantize_activation(point)
        for weight in self._placement.weights:
            self._quantize_weight(weight)
        for value in list(self._graph.initializers.values()):
            if not value.uses() and not value.is_graph_output():
                del self._graph.initializers[value.name or ""]

    def _take_pixels(self, name: str) -> None:
        """Put DequantizeLinear right behind the input, and drop the Casts behind it.

        Before the Transpose, not after it: OpenVINO then makes the first convolution an integer one
        and the transpose a change of strides. After it, the convolution stays in float.
        """
        image = self._values[name]
        scale, zero_point = self._add_params(name, _PIXEL)
        node = self._node("DequantizeLinear", [image, scale, zero_point], f"{name}_dequantized")
        real = node.outputs[0]
        image.replace_all_uses_with(real)
        node.replace_input_with(0, image)
        self._graph.insert_before(self._graph[0], node)
        queue = [real]
        for value in queue:  # grows while it is walked
            value.type = ir.TensorType(ir.DataType.FLOAT)  # a new one: clones of a graph share theirs
            self._params[value.name or ""] = _PIXEL
            for consumer, _ in list(value.uses()):
                if consumer.op_type == "Cast":
                    self._params[consumer.outputs[0].name or ""] = _PIXEL
                    consumer.outputs[0].replace_all_uses_with(value, replace_graph_outputs=True)
                    self._graph.remove(consumer, safe=True)
                elif consumer.op_type != "Shape":
                    queue.append(consumer.outputs[0])

    def _quantize_activation(self, point: ActivationPoint) -> None:
        value = self._values[point.tensor]
        params, scale, zero_point = self._grid(point)
        self._params[point.tensor] = params
        quantized = self._node("QuantizeLinear", [value, scale, zero_point], f"{point.tensor}_quantized")
        restored = self._node(
            "DequantizeLinear", [quantized.outputs[0], scale, zero_point], f"{point.tensor}_dequantized"
        )
        producer = value.producer()
        if producer is None:
            self._graph.insert_before(self._graph[0], [quantized, restored])
        else:
            self._graph.insert_after(producer, [quantized, restored])
        for edge in point.consumers:
            self._consumer(edge).replace_input_with(edge.index, restored.outputs[0])

    def _grid(self, point: ActivationPoint) -> tuple[QuantParams, ir.Value, ir.Value]:
        params = activation_params(point, self._placement, self._ranges)
        key = point.sources or (point.tensor,)
        if key not in self._constants:
            self._constants[key] = self._add_params(key[0], params)
        return params, *self._constants[key]

    def _quantize_weight(self, point: WeightPoint) -> None:
        consumer = self._consumer(point.consumer)
        weights = _array(self._values[point.weight])
        bias = None if point.bias is None else _array(self._values[point.bias])
        if bias is not None and not np.isfinite(bias).all():
            raise CalibrationError(f"tensor {point.bias!r} holds NaN or Inf; check the checkpoint")
        try:
            smallest = 0.0 if bias is None else min_weight_scale(bias, self._input_params(point).scale)
            params = weight_params(weights, point, self._placement, smallest)
        except CalibrationError as error:
            raise CalibrationError(f"tensor {point.weight!r}: {error}") from error
        restored = self._constant(consumer, point.weight, quantize(weights, params), params)
        consumer.replace_input_with(point.consumer.index, restored)
        if bias is not None and point.bias is not None:
            steps, bias_params = int32_bias(bias, self._input_params(point).scale, params.scale)
            consumer.replace_input_with(2, self._constant(consumer, point.bias, steps, bias_params))

    def _input_params(self, point: WeightPoint) -> QuantParams:
        """The grid of a layer's input, which raw pixels reach through moves."""
        name = point.input
        while name not in self._params:
            source = _producer(self._values[name]).inputs[0]
            assert source is not None
            name = source.name or ""
        return self._params[name]

    def _constant(
        self, consumer: ir.Node, name: str, quantized: NDArray[Any], params: QuantParams
    ) -> ir.Value:
        stored = self._initializer(f"{name}_{params.dtype}", quantized)
        scale, zero_point = self._add_params(name, params)
        node = self._node("DequantizeLinear", [stored, scale, zero_point], f"{name}_dequantized")
        if params.axis is not None:
            node.attributes["axis"] = ir.AttrInt64("axis", params.axis)
        self._graph.insert_before(consumer, node)
        return node.outputs[0]

    def _add_params(self, name: str, params: QuantParams) -> tuple[ir.Value, ir.Value]:
        scale = self._initializer(f"{name}_scale", params.scale)
        return scale, self._initializer(f"{name}_zero_point", params.zero_point)

    def _initializer(self, name: str, array: NDArray[Any]) -> ir.Value:
        name = self._unused(name)
        tensor = ir.tensor(array, name=name)
        value = ir.Value(
            name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor
        )
        self._graph.initializers[name] = value
        self._values[name] = value
        return value

    def _node(self, op_type: str, inputs: list[ir.Value], output: str) -> ir.Node:
        node = ir.node(op_type, inputs)
        node.outputs[0].name = self._unused(output)
        self._values[node.outputs[0].name] = node.outputs[0]
        return node

    def _unused(self, name: str) -> str:
        candidate, n = name, 1
        while candidate in self._values:
            n += 1
            candidate = f"{name}_{n}"
        return candidate

    def _consumer(self, edge: Edge) -> ir.Node:
        return _producer(self._values[edge.node])


def _named_values(graph: ir.Graph) -> dict[str, ir.Value]:
    values = [*graph.inputs, *graph.initializers.values(), *(v for node in graph for v in node.outputs)]
    return {value.name: value for value in values if value.name}


def _producer(value: ir.Value) -> ir.Node:
    node = value.producer()
    assert node is not None, f"{value.name!r} is computed by no node"
    return node


def _array(value: ir.Value) -> NDArray[np.float32]:
    assert value.const_value is not None, f"{value.name!r} is no constant"
    array: NDArray[np.float32] = value.const_value.numpy()
    return array
