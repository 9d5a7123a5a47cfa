"""Where Q/DQ stand for TensorRT 10 and 11, and TensorRT-RTX.

TensorRT moves a QuantizeLinear backwards and a DequantizeLinear forwards until both meet a layer, and
runs in int8 what then stands between a DQ and a Q. It takes symmetric int8 only, and what it fuses into
one kernel (convolution, bias, addition, Relu, output Q) it fuses only if nothing else stands between:

* **Convolution**: the input and the weight, zero point 0; the weight with one scale for each output
  channel. The bias stays in floating point: TensorRT's parser refuses an int32 bias. Its output gets no
  Q of its own; the next layer's input Q, behind the activation function, becomes the fused output Q.
* **Residual Add**: the identity is quantized, the convolution that ends in the Add is bare, so that
  convolution, Add and Relu are one kernel. A float identity would make that kernel's output float
  (TensorRT#1992, Model-Optimizer PR#425). The identity and every branch that starts from it read
  *one* Q: two of them are two kernels. Of two convolutions the later one is bare.
* **Concat**: one grid over all inputs and the output. Equal scales cancel, so the convolutions write
  straight into the result; with unequal ones every input is requantized (TensorRT#3861, #4401). Where
  sharing takes too much resolution from a tensor that is read elsewhere as well, the Concat can be
  untied: each input then keeps its own grid and is requantized there.
* **MaxPool, Reshape, Transpose …** only move values: same grid before and behind.
* **AveragePool** computes: DQ, pool, Q, with a range of its own behind.
* **Global average pool**: half precision. TensorRT makes a reduction of it (the parser shows a REDUCE
  layer for GlobalAveragePool and ReduceMean), and a reduction has no int8 kernel: with a Q in front it
  is one more kernel, without it the last convolution writes half precision directly.
* **Fully connected layers on a vector** stay in half precision: at batch 1 they only read their
  weight once. One of millions of weights (a face network's classes) is the exception: there reading is what
  takes the time, and int8 halves it. Logits are never quantized.
* **Narrow convolutions** (fewer than 16 channels in or out, not a multiple of 8; grouped ones by what
  one group sees) stay in half precision: integer kernels work on channels in packs, and padding a
  pack costs more than it saves. NVIDIA Model Optimizer draws the line at the same numbers. The first
  layer's three channels are an exception, for which there are kernels.
* **The pixel**: with ``pixel - 128`` in front of the first convolution
  (`pipeline.passes.center_pixels`) its grid has scale 1, and nothing is rounded. Where that
  convolution pads with zeros, the shift cannot go into its bias. If normalization left a subtraction
  there, its result is quantized like any activation; raw pixels stay in half precision, which holds
  them exactly, where symmetric int8 would take one of their eight bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from calibration.placement.layers import (
    MOVES,
    STANDARD_DOMAINS,
    WEIGHTED,
    check_names,
    describe,
    in_graph_order,
    is_constant,
    name_of,
    pixel_values,
    tie_grids,
    weight_point,
)
from calibration.placement.points import ActivationPoint, Edge, FloatType, Placement, WeightPoint
from pipeline.passes.center_pixels import PIXEL_CENTER

__all__ = ["place"]

_NARROW = 16
_PACK = 8
_LARGE_HEAD = 1 << 22
"""Weights from which on a fully connected layer is worth quantizing for a single vector: 8 MB in half precision, which
take longer to read (80 µs at 100 GB/s) than one more kernel takes to run."""
_GLOBAL_AVERAGES = frozenset({"GlobalAveragePool", "ReduceMean"})


def place(
    model: ir.Model,
    *,
    float_layers: frozenset[str] = frozenset(),
    untied_concats: frozenset[str] = frozenset(),
    remainder: FloatType = "float16",
) -> Placement:
    """Choose the tensors of a folded fp32 model that are quantized for TensorRT.

    Args:
        model: float32, with batch norms folded and shapes known; pixels centred where they can be.
        float_layers: layers that stay in floating point, by the name of their output tensor. They read
            their input unquantized.
        untied_concats: Concats whose inputs keep their own grids, by the name of their output tensor.
        remainder: the type that everything else will have; scales are chosen among its values.

    Raises:
        UsageError: a name of either set is no such layer of the model.
    """
    check_names(model.graph, float_layers, WEIGHTED, "float_layers")
    check_names(model.graph, untied_concats, frozenset({"Concat"}), "untied_concats")
    return _Placer(model.graph, float_layers, untied_concats, remainder).run()


class _Placer:
    def __init__(
        self,
        graph: ir.Graph,
        float_layers: frozenset[str],
        untied_concats: frozenset[str],
        remainder: FloatType,
    ) -> None:
        self._graph = graph
        self._float_layers = float_layers
        self._remainder = remainder
        _, self._pixels = pixel_values(graph)
        self._untied = {
            node.outputs[0]
            for node in graph
            if node.op_type == "Concat" and name_of(node.outputs[0]) in untied_concats
        }
        self._order = {value: i for i, value in enumerate(v for node in graph for v in node.outputs)}
        self._behind_a_layer = _behind_a_layer(graph)
        self._int8_layers: dict[ir.Node, WeightPoint] = {}
        self._identity_index: dict[ir.Node, int] = {}
        """Of every Add that a convolution in int8 ends in."""
        self._wanted: dict[ir.Value, str] = {}
        self._skipped: list[tuple[str, str]] = []

    def run(self) -> Placement:
        for node in self._graph:
            if node.domain in STANDARD_DOMAINS and node.op_type in WEIGHTED:
                self._take_layer(node)
        for node in self._graph:
            if node.op_type == "Add" and node.domain in STANDARD_DOMAINS:
                self._take_add(node)
        for node in reversed(self._graph):
            self._take_average(node)
        centered = {value for value in self._wanted if self._is_centered_pixel(value)}
        sources = tie_grids(self._wanted, self._pixels, self._untied)
        self._skipped += [
            (describe(node), "untied: its inputs keep their grids and are requantized")
            for node in self._graph
            if node.outputs[0] in self._untied
        ]
        activations = []
        for value in in_graph_order(self._graph, self._wanted):
            consumers = tuple(sorted(self._reading_int8(value)))
            pixel = value in centered
            if consumers:
                covered = () if pixel else tuple(map(name_of, sources[value]))
                reason = "pixel - 128: integers already, nothing is rounded" if pixel else self._wanted[value]
                activations.append(
                    ActivationPoint(name_of(value), consumers, covered, reason, 1.0 if pixel else None)
                )
        return Placement(
            "tensorrt",
            "symmetric_int8",
            (),
            tuple(activations),
            tuple(self._int8_layers.values()),
            tuple(self._skipped),
            self._remainder,
        )

    def _take_layer(self, node: ir.Node) -> None:
        point = weight_point(node)
        reason = point if isinstance(point, str) else self._reason_for_float(node)
        if reason is not None:
            self._skipped.append((describe(node), reason))
            return
        assert isinstance(point, WeightPoint)
        # Without `bias`: it stays in floating point.
        self._int8_layers[node] = dataclasses.replace(point, bias=None)
        data = node.inputs[0]
        assert data is not None
        self._wanted.setdefault(data, f"input of {describe(node)}")

    def _reason_for_float(self, node: ir.Node) -> str | None:
        data, weight = node.inputs[0], node.inputs[1]
        assert data is not None
        assert weight is not None
        if name_of(node.outputs[0]) in self._float_layers:
            return "asked for: it keeps its input and its weight in floating point"
        if data in self._pixels:
            return "raw pixels, 0 to 255: symmetric int8 would take one of their eight bits"
        if node.op_type in ("Gemm", "MatMul"):
            rank = 2 if node.op_type == "Gemm" or data.shape is None else len(data.shape)
            n_weights = 0 if weight.const_value is None else weight.const_value.size
            if rank < 3 and n_weights < _LARGE_HEAD:
                return "fully connected on a vector: half precision is the faster at batch 1"
            return None
        if weight.shape is None:
            return "its weight has no known shape"
        shape = tuple(int(size) for size in weight.shape if isinstance(size, int))
        return _too_narrow(node, shape, is_first=data not in self._behind_a_layer)

    def _take_add(self, node: ir.Node) -> None:
        inputs = [value for value in node.inputs if value is not None]
        if len(inputs) != 2 or any(map(is_constant, inputs)):
            return
        branches = [
            (self._order[value], index) for index, value in enumerate(inputs) if self._is_bare_branch(value)
        ]
        if not branches:
            self._skipped.append((describe(node), "no convolution in int8 ends in it alone: added in float"))
            return
        identity = 1 - max(branches)[1]
        self._identity_index[node] = identity
        self._wanted.setdefault(
            inputs[identity], f"identity of {describe(node)}; the convolution stays bare and fuses with it"
        )

    def _is_bare_branch(self, value: ir.Value) -> bool:
        node = value.producer()
        return node in self._int8_layers and len(value.uses()) == 1 and not value.is_graph_output()

    def _take_average(self, node: ir.Node) -> None:
        """From behind: an average is taken in int8 where its result is wanted so."""
        if node.op_type in _GLOBAL_AVERAGES and node.domain in STANDARD_DOMAINS:
            self._skipped.append((describe(node), "a reduction has no int8 kernel: half precision"))
        elif node.op_type == "AveragePool" and node.domain in STANDARD_DOMAINS:
            data = node.inputs[0]
            assert data is not None
            if self._is_moved_into_int8(node.outputs[0]) and data not in self._pixels:
                self._wanted.setdefault(data, f"input of {describe(node)}")
            else:
                self._skipped.append((describe(node), "nothing in int8 reads it: half precision"))

    def _is_moved_into_int8(self, value: ir.Value) -> bool:
        """Whether `value`, or what moves make of it, is to be quantized."""
        return value in self._wanted or any(
            self._is_moved_into_int8(node.outputs[0])
            for node, _ in value.uses()
            if node.op_type in MOVES or node.op_type == "Concat"
        )

    def _reading_int8(self, value: ir.Value) -> Iterable[Edge]:
        """The uses of a quantized tensor that take its quantized form."""
        for node, index in value.uses():
            result = node.outputs[0]
            if (
                (node in self._int8_layers and index == 0)
                or self._identity_index.get(node) == index
                or (
                    (node.op_type in MOVES or node.op_type in ("Concat", "AveragePool"))
                    and result in self._wanted
                )
            ):
                yield Edge(name_of(result), index)

    def _is_centered_pixel(self, value: ir.Value) -> bool:
        node = value.producer()
        if node is None or node.op_type != "Sub" or node.inputs[0] not in self._pixels:
            return False
        center = node.inputs[1].const_value if node.inputs[1] is not None else None
        return center is not None and bool(np.all(center.numpy() == PIXEL_CENTER))


def _too_narrow(node: ir.Node, shape: tuple[int, ...], *, is_first: bool) -> str | None:
    """Why a convolution is left in floating point for its channel counts, or ``None``.

    Model Optimizer's `find_nodes_from_convs_to_exclude` takes a grouped convolution whose groups are
    narrow if it has a multiple of 8 channels and a kernel of at least 3 in every direction.
    """
    groups = node.attributes.get_int("group", 1)
    out_channels, group_inputs = (shape[0], shape[1]) if node.op_type == "Conv" else (shape[1], shape[0])
    if groups > 1:
        if group_inputs < _NARROW and (out_channels % _PACK or min(shape[2:]) < 3):
            return (
                f"{groups} groups of {group_inputs} input channels, {out_channels} outputs: int8 kernels want "
                f"groups of {_NARROW}, or a multiple of {_PACK} outputs and a 3×3 kernel"
            )
        return None
    for count, what in ((group_inputs, "input"), (out_channels, "output")):
        if count < _NARROW and count % _PACK and not (is_first and what == "input"):
            return f"{count} {what} channels: fewer than {_NARROW} and no multiple of {_PACK}"
    return None


def _behind_a_layer(graph: ir.Graph) -> set[ir.Value]:
    """Everything that a layer with weights has contributed to."""
    behind: set[ir.Value] = set()
    for node in graph:
        if node.op_type in WEIGHTED or any(value in behind for value in node.inputs if value is not None):
            behind.update(node.outputs)
    return behind
