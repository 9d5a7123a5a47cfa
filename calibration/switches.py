"""A graph in which the int8 of every layer can be switched on and off, one image and version at a time.

`calibration.sensitivity` asks it what each layer costs on a calibration that is under way, `calibration.attribution`
on a bundle that is built. What a layer is in int8 comes from a placement and a table, or is read from the int8
graph that ships.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from calibration.collect import fix_batch
from calibration.placement import Placement
from calibration.placement.layers import name_of
from calibration.qdq import activation_params, weight_params
from calibration.qparams import dequantize, quantize
from pipeline.artifacts import ModelArtifact, QuantParams, TensorRange
from pipeline.contracts import Runner

__all__ = [
    "ROWS_A_RUN",
    "SwitchedLayer",
    "hadamard",
    "layers_of_graph",
    "layers_of_placement",
    "switched_graph",
    "versions_of",
]

ROWS_A_RUN = 9
"""The image itself and eight versions go through the engine together: more gain little and take memory."""
_SWITCHES = "edgefold_switches"
_ENERGIES = "edgefold_energies"
_LAYER_OPS = frozenset({"Conv", "Gemm", "MatMul"})
_DEFAULT_AXIS = 1
"""Of DequantizeLinear, where a node does not say."""


@dataclass(frozen=True, slots=True)
class SwitchedLayer:
    """A layer, and what it is in int8."""

    layer: str
    """The name of its output tensor."""
    input: str
    """The name of the tensor it reads."""
    grid: QuantParams | None
    """Of that tensor; ``None``: it is read as it is (pixels)."""
    weight: NDArray[np.float32]
    """What its integers stand for."""
    bias: NDArray[np.float32] | None = None
    """The same of its bias; ``None``: that of fp32."""


def layers_of_placement(
    model: ir.Model,
    placement: Placement,
    ranges: Mapping[str, TensorRange],
    corrected: ir.Model | None = None,
) -> tuple[SwitchedLayer, ...]:
    """Every layer that `placement` quantizes, its weights rounded to nearest.

    Args:
        model: the fp32 model that `placement` was made for.
        placement: whose grids are used.
        ranges: of every tensor in ``placement.observed``.
        corrected: the same graph with the constants that layers have in int8; ``None``: they have `model`'s.
    """
    grids = {
        point.tensor: activation_params(point, placement, ranges)
        for point in placement.activations
        if point.scale is None
    }
    source = corrected or model
    values = {value.name: value for node in source.graph for value in node.outputs}
    found = []
    for point in placement.weights:
        array = _constant(source.graph.initializers[point.weight])
        assert array is not None, "a weight point names a constant"
        params = weight_params(array, point, placement)
        rounded = dequantize(quantize(array, params), params).astype(np.float32)
        node = _producer(values[point.consumer.node])
        assert node is not None, "a layer's output has a producer"
        bias = _constant(node.inputs[2]) if corrected is not None and len(node.inputs) > 2 else None
        found.append(SwitchedLayer(point.consumer.node, point.input, grids.get(point.input), rounded, bias))
    return tuple(found)


def layers_of_graph(model: ir.Model, quantized: ir.Model) -> tuple[SwitchedLayer, ...]:
    """Every layer that is int8 in the graph that ships, with its own weights, bias and grids.

    Args:
        model: the folded fp32 model.
        quantized: its Q/DQ form; a layer has the same output tensor in both.
    """
    exact = {name_of(node.outputs[0]): node for node in model.graph if node.op_type in _LAYER_OPS}
    found = []
    for node in quantized.graph:
        if node.op_type not in _LAYER_OPS:
            continue
        name = name_of(node.outputs[0])
        weight = _constant_behind(node.inputs[1])
        if name not in exact or weight is None or _producer(node.inputs[1]) is None:
            continue
        source = exact[name].inputs[0]
        assert source is not None, "a layer reads a tensor"
        bias = _constant_behind(node.inputs[2]) if len(node.inputs) > 2 else None
        grid = _grid_of(node.inputs[0])
        found.append(SwitchedLayer(name, name_of(source), grid, weight, bias))
    return tuple(found)


def _producer(value: ir.Value | None) -> ir.Node | None:
    return None if value is None else value.producer()


def _constant(value: ir.Value | None) -> NDArray[Any] | None:
    return None if value is None or value.const_value is None else value.const_value.numpy()


def _params_of(node: ir.Node, dtype: Any) -> QuantParams | None:
    """Scale and zero point of a QuantizeLinear or DequantizeLinear."""
    scale = _constant(node.inputs[1])
    if scale is None:
        return None
    zero_point = _constant(node.inputs[2]) if len(node.inputs) > 2 else None
    if zero_point is None:
        zero_point = np.zeros(scale.shape, dtype)
    axis = node.attributes.get_int("axis", _DEFAULT_AXIS) if scale.ndim else None
    return QuantParams(scale, zero_point, zero_point.dtype.name, axis)


def _constant_behind(value: ir.Value | None) -> NDArray[np.float32] | None:
    """The float constant that an input is: stored so, or dequantized from integers."""
    node = _producer(value)
    if node is None:
        array = _constant(value)
        return None if array is None else array.astype(np.float32)
    integers = _constant(node.inputs[0])
    if node.op_type != "DequantizeLinear" or integers is None:
        return None
    params = _params_of(node, integers.dtype)
    return None if params is None else dequantize(integers, params).astype(np.float32)


def _grid_of(value: ir.Value | None) -> QuantParams | None:
    restored = _producer(value)
    if restored is None or restored.op_type != "DequantizeLinear":
        return None
    steps = _producer(restored.inputs[0])
    if steps is None or steps.op_type != "QuantizeLinear":
        return None  # pixels: integers already
    return _params_of(steps, np.uint8)


def hadamard(order: int) -> NDArray[np.float64]:
    """Sylvester's: rows and columns of +1 and -1, orthogonal; the first column is constant.

    Args:
        order: a power of two.
    """
    matrix = np.ones((1, 1))
    while len(matrix) < order:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def versions_of(
    runner: Runner,
    model: ModelArtifact,
    image: NDArray[np.uint8],
    rows: int,
    switches: NDArray[np.float32],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The logits of every version of an image, and what int8 does to each layer of it.

    Args:
        runner: of the switched graph.
        model: what the graph was made from.
        image: uint8 ``[H, W, 3]``.
        rows: the batch size the graph was made for.
        switches: float32 ``[versions, layers]``.

    Returns:
        Logits, float64 ``[versions, C]``; energies of each layer's noise and output, float64 ``[2, layers]``.
    """
    pixels = np.ascontiguousarray(np.broadcast_to(image, (rows, *image.shape)))
    n_clean = 1 if rows > 1 else 0
    step = rows - n_clean
    found, energies = [], np.zeros((2, switches.shape[1]))
    for start in range(0, len(switches), step):
        some = switches[start : start + step]
        table = np.zeros((rows, switches.shape[1]), np.float32)
        table[n_clean : n_clean + len(some)] = some
        outputs = runner.infer({model.inputs[0].name: pixels, _SWITCHES: table})
        logits = np.array(outputs[model.outputs[0].name], np.float64).reshape(rows, -1)
        found.append(logits[n_clean : n_clean + len(some)])
        energies = np.array(outputs[_ENERGIES], np.float64)
    return np.concatenate(found), energies


def switched_graph(model: ir.Model, layers: Sequence[SwitchedLayer], rows: int) -> None:
    """Give every one of `layers` a switch for its noise, in place.

    Given::

        y = Conv(x, W, b)

    Result, with ``s`` a column of the new input, float32 ``[rows, layers]``::

        d = Conv(DQ(Q(x[0:1])), W_int8 as float, b) - y[0:1]
        y = Conv(x, W, b) + s d

    The noise is that of the first row, so that it is the same in every version: give that row no
    noise. A graph for one row only has no other; there each version has the noise of its own input.

    Args:
        model: the fp32 model.
        layers: `layers_of_placement` or `layers_of_graph`.
        rows: the batch size the graph is made for.
    """
    fix_batch(model, rows)
    _Switches(model.graph, layers, rows).run()


class _Switches:
    def __init__(self, graph: ir.Graph, layers: Sequence[SwitchedLayer], rows: int) -> None:
        self._graph, self._layers, self._rows = graph, layers, rows
        self._values = {name_of(v): v for v in (*graph.inputs, *(v for node in graph for v in node.outputs))}
        self._energies: tuple[list[ir.Value], list[ir.Value]] = ([], [])
        self._rounded: dict[str, ir.Value] = {}
        self._input = ir.Value(
            name=_SWITCHES,
            type=ir.TensorType(ir.DataType.FLOAT),
            shape=ir.Shape([rows, len(layers)]),
        )
        graph.inputs.append(self._input)

    def run(self) -> None:
        for column, layer in enumerate(self._layers):
            self._switch(layer, column)
        self._put_out_energies()

    def _switch(self, layer: SwitchedLayer, column: int) -> None:
        exact = self._values[layer.layer]
        node = exact.producer()
        assert node is not None, "a layer's output has a producer"
        weight = self._constant(f"edgefold_weight_{column}", layer.weight)
        biases = node.inputs[2:]
        if layer.bias is not None:
            biases = (self._constant(f"edgefold_bias_{column}", layer.bias),)
        data = self._rounded_input(layer)
        readers, is_output = list(exact.uses()), exact.is_graph_output()
        clean = self._first_row(exact)
        quantized = ir.Node("", node.op_type, [data, weight, *biases], node.attributes.values())
        rank = len(exact.shape or ())
        index = self._constant(f"edgefold_column_{column}", np.array([column], np.int64))
        shape = self._constant(f"edgefold_switch_shape_{rank}", np.array([-1] + [1] * (rank - 1), np.int64))
        gathered = ir.node("Gather", [self._input, index], {"axis": 1})
        switch = ir.node("Reshape", [gathered.outputs[0], shape])
        noise = ir.node("Sub", [quantized.outputs[0], clean])
        switched = ir.node("Mul", [noise.outputs[0], switch.outputs[0]])
        total = ir.node("Add", [exact, switched.outputs[0]])
        nodes = [quantized, gathered, switch, noise, switched, total]
        for sums, value in zip(self._energies, (noise.outputs[0], clean), strict=True):
            squares = ir.node("ReduceSumSquare", [value], {"keepdims": 0})
            flat = ir.node(
                "Reshape", [squares.outputs[0], self._constant("edgefold_one", np.array([1], np.int64))]
            )
            nodes += [squares, flat]
            sums.append(flat.outputs[0])
        self._insert_behind(clean, nodes)
        for reader, position in readers:
            reader.replace_input_with(position, total.outputs[0])
        self._values[layer.layer] = total.outputs[0]
        if is_output:
            self._take_over_output(exact, total.outputs[0])

    def _put_out_energies(self) -> None:
        """One output, float32 ``[2, layers]``: the sums of squares of each layer's noise and of what it computes."""
        rows = [ir.node("Concat", values, {"axis": 0}) for values in self._energies]
        both = ir.node("Concat", [row.outputs[0] for row in rows], {"axis": 0})
        shape = self._constant("edgefold_energies_shape", np.array([2, -1], np.int64))
        table = ir.node("Reshape", [both.outputs[0], shape])
        self._graph.extend([*rows, both, table])
        output = table.outputs[0]
        output.name, output.type = _ENERGIES, ir.TensorType(ir.DataType.FLOAT)
        output.shape = ir.Shape([2, len(self._layers)])
        self._graph.outputs.append(output)

    def _take_over_output(self, exact: ir.Value, total: ir.Value) -> None:
        name = exact.name
        exact.name = f"{name}_exact"
        total.name, total.type, total.shape = name, exact.type, exact.shape
        outputs = [total if value is exact else value for value in self._graph.outputs]
        self._graph.outputs.clear()
        self._graph.outputs.extend(outputs)

    def _rounded_input(self, layer: SwitchedLayer) -> ir.Value:
        """The first row of a layer's input on its grid; pixels as they are."""
        name = layer.input
        if name not in self._rounded:
            value = self._first_row(self._values[name])
            if layer.grid is not None:
                stem = f"edgefold_grid_{len(self._rounded)}"
                scale = self._constant(f"{stem}_scale", layer.grid.scale)
                zero_point = self._constant(f"{stem}_zero_point", layer.grid.zero_point)
                steps = ir.node("QuantizeLinear", [value, scale, zero_point])
                restored = ir.node("DequantizeLinear", [steps.outputs[0], scale, zero_point])
                self._insert_behind(value, [steps, restored])
                value = restored.outputs[0]
            self._rounded[name] = value
        return self._rounded[name]

    def _first_row(self, value: ir.Value) -> ir.Value:
        if self._rows == 1:
            return value
        bounds = [self._constant(f"edgefold_{i}", np.array([i], np.int64)) for i in (0, 1)]
        sliced = ir.node("Slice", [value, bounds[0], bounds[1], bounds[0]])
        self._insert_behind(value, [sliced])
        return sliced.outputs[0]

    def _insert_behind(self, value: ir.Value, nodes: list[ir.Node]) -> None:
        producer = value.producer()
        if producer is None:
            self._graph.insert_before(self._graph[0], nodes)
        else:
            self._graph.insert_after(producer, nodes)

    def _constant(self, name: str, array: NDArray[Any]) -> ir.Value:
        if name not in self._graph.initializers:
            tensor = ir.tensor(array, name=name)
            self._graph.initializers[name] = ir.Value(
                name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor
            )
        return self._graph.initializers[name]
