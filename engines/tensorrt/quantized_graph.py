"""A TensorRT-bound graph as TensorRT's optimizer sees it: which tensors exist as int8, in which scale.

TensorRT moves QuantizeLinear (Q) up and DequantizeLinear (DQ) down the graph past operators that only move
values, so that as much as possible happens in int8 ("Explicit Quantization" in NVIDIA's TensorRT
documentation: *quantize as early, dequantize as late as possible*). Two questions therefore decide
everything, and both are answered here for any tensor:

* `QuantizedGraph.reads_int8`: do its readers get it in int8, because a DQ stands above it?
* `QuantizedGraph.stores_int8`: may its producer write it in int8, because *every* reader quantizes it, all
  with one scale?
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import onnx_ir as ir

from pipeline.errors import UnsupportedError
from pipeline.inspection import at_batch_one
from pipeline.passes.linear import STANDARD_DOMAINS

__all__ = ["PRECISION_BYTES", "Grid", "QuantizedGraph", "float_source", "is_move", "node_name", "sole_reader"]

_MOVES = frozenset(
    {
        "Concat",
        "DepthToSpace",
        "Dropout",
        "Flatten",
        "GlobalMaxPool",
        "Identity",
        "MaxPool",
        "Reshape",
        "Slice",
        "SpaceToDepth",
        "Squeeze",
        "Transpose",
        "Unsqueeze",
    }
)
"""Operators whose outputs are some of the values of their inputs: Q and DQ commute with them."""

PRECISION_BYTES = {"int8": 1, "fp16": 2, "bf16": 2, "fp32": 4}
"""Width of an element in each precision."""

_PRECISIONS = {
    ir.DataType.INT8: "int8",
    ir.DataType.UINT8: "int8",
    ir.DataType.FLOAT16: "fp16",
    ir.DataType.BFLOAT16: "bf16",
    ir.DataType.FLOAT: "fp32",
}


@dataclass(frozen=True, slots=True)
class Grid:
    """The int8 grid of a tensor: ``real = scale * (q - zero_point)``."""

    scale: float
    zero_point: int

    def __str__(self) -> str:
        return f"scale {self.scale:.6g}" + (f", zero point {self.zero_point}" if self.zero_point else "")


def is_move(node: ir.Node) -> bool:
    """Whether Q and DQ commute with `node`."""
    return (
        node.op_type in _MOVES
        and node.domain in STANDARD_DOMAINS
        and not any(output.uses() for output in node.outputs[1:])  # MaxPool's indices are no values
    )


def node_name(node: ir.Node) -> str:
    """The name the engine inspector will show for `node`; of a nameless one, its output's."""
    return node.name or node.outputs[0].name or node.op_type


def sole_reader(value: ir.Value) -> ir.Node | None:
    """The one node that reads `value`, once; ``None`` where others see it too."""
    uses = tuple(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def float_source(value: ir.Value) -> ir.Value:
    """The tensor calibration knows: what stood where Q and DQ were put, if `value` is behind them."""
    for op_type in ("DequantizeLinear", "QuantizeLinear"):
        node = value.producer()
        if node is None or node.op_type != op_type or node.inputs[0] is None:
            return value
        value = node.inputs[0]
    return value


class QuantizedGraph:
    """A copy of a model at batch one.

    Attributes:
        nodes: those that run, in graph order; what is computed from constants alone is folded away.
        batch: of a graph input whose batch is fixed; else 1.
    """

    def __init__(self, model: ir.Model) -> None:
        single = at_batch_one(model)
        self.graph = single.graph
        self._constant_nodes: set[ir.Node] = set()
        for node in self.graph:
            if all(value is None or self.is_constant(value) for value in node.inputs):
                self._constant_nodes.add(node)
        self.nodes = [node for node in self.graph if node not in self._constant_nodes]
        self.position = {node: index for index, node in enumerate(self.graph)}
        shape = self.graph.inputs[0].shape if self.graph.inputs else None
        self.batch = shape[0] if shape and isinstance(shape[0], int) else 1
        # Methods are cached on the instance, not on the class: a graph is let go with its caches.
        self.reads_int8 = functools.cache(self._reads_int8)
        self.stores_int8 = functools.cache(self._stores_int8)

    def is_constant(self, value: ir.Value) -> bool:
        """Whether `value` is stored in the file, or computed from what is."""
        producer = value.producer()
        if producer is not None:
            return producer in self._constant_nodes
        return value.const_value is not None and not value.is_graph_input()

    def activations(self, node: ir.Node) -> list[ir.Value]:
        """The inputs of `node` that are no constants, each once."""
        return list(dict.fromkeys(v for v in node.inputs if v is not None and not self.is_constant(v)))

    def constants(self, node: ir.Node) -> list[ir.Value]:
        """The constant inputs of `node`."""
        return [value for value in node.inputs if value is not None and self.is_constant(value)]

    def n_elements(self, value: ir.Value) -> int:
        """Elements of a tensor, of one image where it is an activation.

        Raises:
            UnsupportedError: the shape depends on the data.
        """
        if value.shape is None or not value.shape.is_static():
            raise UnsupportedError(
                f"the shape of tensor {value.name!r} is not known before the graph runs ({value.shape}); what "
                "TensorRT makes of it cannot be predicted: fix the input's size, or fold the graph first"
            )
        size = math.prod(value.shape.numpy())
        return size if self.is_constant(value) else max(1, size // self.batch)

    def precision(self, value: ir.Value) -> str | None:
        """``int8``, ``fp16``, ``bf16`` or ``fp32`` as the graph declares it; ``None``: no activation type."""
        return None if value.dtype is None else _PRECISIONS.get(value.dtype)

    def n_bytes(self, value: ir.Value, *, int8: bool) -> int:
        """Bytes of an activation of one image, in int8 or in the type the graph declares."""
        precision = "int8" if int8 else self.precision(value)
        return self.n_elements(value) * PRECISION_BYTES.get(precision or "fp32", 4)

    def grid(self, node: ir.Node) -> Grid:
        """The scale and zero point of a Q or DQ on an activation.

        Raises:
            UnsupportedError: they are not constants, or there is one for each channel.
        """
        numbers = [_scalar(value) for value in node.inputs[1:3] if value is not None]
        scale, zero_point = numbers if len(numbers) == 2 else (*numbers, 0.0)
        if scale is None or zero_point is None:
            raise UnsupportedError(
                f"{node.op_type} {node_name(node)!r} has no single constant scale and zero point; TensorRT "
                "quantizes activations with one scale a tensor: use per-tensor scales"
            )
        return Grid(float(scale), int(zero_point))

    def is_int8_weight(self, value: ir.Value) -> bool:
        """Whether `value` is a constant behind DequantizeLinear."""
        producer = value.producer()
        return producer is not None and producer.op_type == "DequantizeLinear" and self.is_constant(value)

    def quantizers(self, value: ir.Value) -> list[ir.Node]:
        """The Q nodes that quantize `value`, directly or behind moves."""
        found: list[ir.Node] = []
        for reader, _ in value.uses():
            if reader.op_type == "QuantizeLinear":
                found.append(reader)
            elif is_move(reader):
                found.extend(self.quantizers(reader.outputs[0]))
        return list(dict.fromkeys(found))

    def _reads_int8(self, value: ir.Value) -> Grid | None:
        """The grid in which readers of `value` get it: a DQ stands above it, or a Q made it."""
        node = value.producer()
        if node is None or node in self._constant_nodes:
            return None
        if node.op_type in ("DequantizeLinear", "QuantizeLinear"):
            return self.grid(node)
        if not is_move(node):
            return None
        grids = {self.reads_int8(source) for source in self.activations(node)}
        return grids.pop() if len(grids) == 1 and not self._joins_constant(node) else None

    def _stores_int8(self, value: ir.Value) -> Grid | None:
        """The one grid in which every reader of `value` quantizes it."""
        if value.is_graph_output() or not value.uses():
            return None
        grids: set[Grid | None] = set()
        for reader, _ in value.uses():
            if reader.op_type == "QuantizeLinear":
                grids.add(self.grid(reader))
            else:
                moved = is_move(reader) and not self._joins_constant(reader)
                grids.add(self.stores_int8(reader.outputs[0]) if moved else None)
        return grids.pop() if len(grids) == 1 else None

    def _joins_constant(self, node: ir.Node) -> bool:
        """Whether a Concat has a constant among its parts, which has no grid."""
        return node.op_type == "Concat" and bool(self.constants(node))


def _scalar(value: ir.Value) -> float | None:
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None or tensor.size != 1:
        return None
    return float(tensor.numpy().reshape(-1)[0])
