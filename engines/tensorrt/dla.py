"""What would not run on a Jetson's deep learning accelerator (DLA), and why: a report from the graph alone.

With GPU fallback allowed, TensorRT moves what the DLA cannot do to the GPU without a word, and every crossing
costs a copy and one more DLA *loadable*. The rules are those of "DLA Supported Layers and Restrictions" in
NVIDIA's TensorRT documentation and of the operator matrix of NVIDIA's Deep-Learning-Accelerator-SW, for Orin
with TensorRT 10.3 (JetPack 6.1 and 6.2). TensorRT 10.8 to 11.3 have no DLA support, and Thor has no DLA.
(Xavier differs: its DLA leaves no padding out of an average, and has no softmax.)
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import onnx_ir as ir

from engines.tensorrt.quantized_graph import QuantizedGraph, node_name
from pipeline.errors import UnsupportedError, UsageError
from pipeline.passes.linear import STANDARD_DOMAINS, describe

__all__ = ["MAX_LOADABLES", "DlaFallback", "DlaReport", "report_dla"]

MAX_BATCH = 4096
MAX_SIZE = 8192
"""Of any dimension but the batch."""
MAX_LOADABLES = 16
"""That one core can have loaded at a time."""
_BUFFER_BANKS = 16
"""Of the convolution buffer, for one kernel's weights and the rows of the image it needs."""


@dataclass(frozen=True, slots=True)
class DlaFallback:
    """A node that would run on the GPU, and what to do about it."""

    node: str
    op_type: str
    reason: str
    remedy: str


@dataclass(frozen=True, slots=True)
class DlaReport:
    """Where the nodes of a graph would run."""

    precision: Literal["int8", "fp16"]
    batch: int
    n_dla: int
    """Nodes that the DLA can run."""
    fallbacks: tuple[DlaFallback, ...]
    n_loadables: int
    """Parts that the DLA's share falls into; each runs after a copy from the GPU."""

    @property
    def fits(self) -> bool:
        """Whether the parts can all be loaded at once."""
        return self.n_loadables <= MAX_LOADABLES

    @property
    def by_operator(self) -> dict[str, int]:
        """Nodes on the GPU, by operator, the most frequent first."""
        return dict(Counter(fallback.op_type for fallback in self.fallbacks).most_common())

    def as_json(self) -> dict[str, Any]:
        """JSON-compatible values."""
        return {**dataclasses.asdict(self), "fits": self.fits, "by_operator": self.by_operator}


def report_dla(model: ir.Model, *, precision: Literal["int8", "fp16"] = "int8", batch: int = 1) -> DlaReport:
    """What of `model` a DLA would run.

    Args:
        model: folded, without Q/DQ: the DLA takes no explicit quantization (TensorRT#2222); int8 comes
            from a calibration cache (`engines.tensorrt.calibration_cache`).
        precision: the DLA computes in nothing else.
        batch: what the engine is built for. The DLA takes no dynamic shapes: minimum, optimum and maximum
            of the profile are the same.

    Raises:
        UnsupportedError: the graph has Q/DQ, or a shape is not known before it runs.
        UsageError: `batch` is not 1 to 4096.
    """
    if not 1 <= batch <= MAX_BATCH:
        raise UsageError(f"batch is {batch}; a DLA takes 1 to {MAX_BATCH}")
    quantizers = [node for node in model.graph if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    if quantizers:
        raise UnsupportedError(
            f"the graph has {len(quantizers)} Q/DQ nodes, and a DLA takes none; give it the folded model and a "
            "calibration cache"
        )
    graph = QuantizedGraph(model)
    gpu: dict[ir.Node, tuple[str, str]] = {}
    for node in graph.nodes:
        trouble = _trouble(graph, node, precision)
        if trouble is not None:
            gpu[node] = trouble
    return DlaReport(
        precision=precision,
        batch=batch,
        n_dla=len(graph.nodes) - len(gpu),
        fallbacks=tuple(
            DlaFallback(node_name(node), node.op_type, f"{describe(node)}: {reason}", remedy)
            for node, (reason, remedy) in gpu.items()
        ),
        n_loadables=_count_loadables(graph, set(gpu)),
    )


def _trouble(graph: QuantizedGraph, node: ir.Node, precision: str) -> tuple[str, str] | None:
    """Why `node` cannot run on the DLA, and the remedy; ``None``: it can."""
    rule = _RULES.get(node.op_type) if node.domain in STANDARD_DOMAINS else None
    for value in (*graph.activations(node), *node.outputs[:1]):
        graph.n_elements(value)  # raises where a shape is open
        if graph.precision(value) is None or value.dtype == ir.DataType.UINT8:
            remedy = (
                "none: the camera's bytes become numbers on the GPU"
                if value.dtype == ir.DataType.UINT8
                else "none"
            )
            return f"a DLA takes fp16 and int8 tensors, {value.name!r} is {value.dtype}", remedy
        sizes = _sizes(value)[1:]
        if any(size > MAX_SIZE for size in sizes):
            return (
                f"{value.name!r} is {list(sizes)}; a DLA takes at most {MAX_SIZE} in each dimension",
                "a smaller input",
            )
    if rule is None:
        return f"the DLA has no {node.op_type}", "fold it, or express it by operators that the DLA has"
    return rule(graph, node, precision)


# Rules, by operator: the reason and the remedy, or None ------------------------------------------------


def _convolution(graph: QuantizedGraph, node: ir.Node, precision: str) -> tuple[str, str] | None:
    weight = node.inputs[1]
    assert weight is not None
    if not graph.is_constant(weight):
        return "its weight is computed at run time", "none"
    shape = _sizes(weight)
    if len(shape) != 4:
        return f"it convolves {len(shape) - 2} dimensions; a DLA convolves two", "none"
    limits = (
        ("kernel", shape[2:], 1, 32),
        ("stride", _ints(node, "strides", 1), 1, 8),
        ("padding", _ints(node, "pads", 0), 0, 31),
        ("dilation", _ints(node, "dilations", 1), 1, 32),
        ("output channels", (shape[0],), 1, MAX_SIZE),
    )
    kernel, pads = shape[2:], _ints(node, "pads", 0)
    if any(pad >= kernel[axis % 2] for axis, pad in enumerate(pads)):
        return f"padding {list(pads)} is not smaller than the kernel {list(kernel)}", "none"
    return _outside(limits) or _buffer(node, shape, precision)


def _buffer(node: ir.Node, weight: tuple[int, ...], precision: str) -> tuple[str, str] | None:
    """The formula of NVIDIA's restrictions: banks for one kernel, and for the rows it reads."""
    data = node.inputs[0]
    assert data is not None
    width_bytes = 1 if precision == "int8" else 2
    _, channels, height, width = weight
    row_height = (height - 1) * _ints(node, "dilations", 1)[0] + 1
    kernel_bytes = math.ceil(channels * height * width * width_bytes / 128) * 128
    entries = math.ceil(math.ceil(channels * width_bytes / 32) * _sizes(data)[3] / 4)
    banks = math.ceil(kernel_bytes / 32768) + math.ceil(entries * row_height / 256)
    if banks > _BUFFER_BANKS:
        return (
            f"its kernel and the rows it reads take {banks} banks of the convolution buffer, which has {_BUFFER_BANKS}",
            "a smaller input or kernel, or int8 instead of fp16",
        )
    return None


def _transposed_convolution(graph: QuantizedGraph, node: ir.Node, precision: str) -> tuple[str, str] | None:
    if node.attributes.get_int("group", 1) != 1:
        return "a DLA has no grouped transposed convolution", "split it into one a group"
    if any(pad != 0 for pad in _ints(node, "pads", 0)):
        return "a DLA's transposed convolution takes no padding", "crop its output instead"
    if any(step != 1 for step in _ints(node, "dilations", 1)):
        return "a DLA's transposed convolution takes no dilation", "none"
    weight = node.inputs[1]
    assert weight is not None
    return _outside((("kernel", _sizes(weight)[2:], 1, 32), ("stride", _ints(node, "strides", 1), 1, 32)))


def _matrix_product(graph: QuantizedGraph, node: ir.Node, precision: str) -> tuple[str, str] | None:
    weight = node.inputs[1]
    if weight is None or not graph.is_constant(weight):
        return "its second factor is no constant", "none"
    return None


def _pool(graph: QuantizedGraph, node: ir.Node, precision: str) -> tuple[str, str] | None:
    padding = _ints(node, "pads", 0)
    if any(step != 1 for step in _ints(node, "dilations", 1)):
        return "a DLA's pool takes no dilation", "none"
    window = ("window", _ints(node, "kernel_shape", 1), 1, 8)
    return _outside((window, ("padding", padding, 0, 7), ("stride", _ints(node, "strides", 1), 1, 16)))


def _global_average(graph: QuantizedGraph, node: ir.Node, precision: str) -> tuple[str, str] | None:
    data = node.inputs[0]
    assert data is not None
    height, width = (*_sizes(data)[2:], 1, 1)[:2]
    if max(height, width) <= 8:
        remedy = f"write it as AveragePool with a window of {height}×{width}, which a DLA has"
    else:
        remedy = f"its window would be {height}×{width}, a DLA's is 8×8 at most: a smaller input"
    return "TensorRT runs it as a reduction, which it does not give to the DLA", remedy


def _concatenation(graph: QuantizedGraph, node: ir.Node, precision: str) -> tuple[str, str] | None:
    axis = node.attributes.get_int("axis", 1)
    rank = len(_sizes(node.outputs[0]))
    if axis % rank != 1:
        return f"it joins along axis {axis}; a DLA joins channels only", "none"
    if graph.constants(node):
        return "it joins a constant", "none"
    return None


def _elementwise(graph: QuantizedGraph, node: ir.Node, precision: str) -> tuple[str, str] | None:
    if all(len(_sizes(value)) != 4 for value in graph.activations(node)):
        return "its tensors are no images; a DLA takes four dimensions", "none"
    return None


def _clip(graph: QuantizedGraph, node: ir.Node, precision: str) -> tuple[str, str] | None:
    bounds = [ir.convenience.get_const_tensor(value) for value in node.inputs[1:3] if value is not None]
    numbers = [float(bound.numpy()) for bound in bounds if bound is not None]
    if len(numbers) != 2 or numbers[0] != 0 or not 1 <= numbers[1] <= 127:
        return f"a DLA clips from 0 to a bound of 1 to 127, this clips to {numbers}", "use Relu"
    return None


def _flattening(graph: QuantizedGraph, node: ir.Node, precision: str) -> tuple[str, str] | None:
    data = node.inputs[0]
    assert data is not None
    before, after = _sizes(data), _sizes(node.outputs[0])
    pixels = before[2:] if len(before) == 4 else ()
    if len(after) == 4 or (len(after) == 2 and pixels == (1, 1)):
        return None  # channels stay where they are: it vanishes into the product behind it
    return f"it makes {list(after)} of {list(before)}; a DLA keeps four dimensions", "none"


def _softmax(graph: QuantizedGraph, node: ir.Node, precision: str) -> tuple[str, str] | None:
    sizes = _sizes(node.outputs[0])
    axis = node.attributes.get_int("axis", -1) % len(sizes)
    if axis == 0 or math.prod(sizes[1:]) != sizes[axis]:
        return (
            f"it normalizes axis {axis} of {list(sizes)}; a DLA's softmax takes one vector",
            "do it on the host",
        )
    return None


def _anything(graph: QuantizedGraph, node: ir.Node, precision: str) -> tuple[str, str] | None:
    return None


_Rule = Callable[[QuantizedGraph, ir.Node, str], tuple[str, str] | None]
_RULES: Mapping[str, _Rule] = MappingProxyType(
    {
        "Add": _elementwise,
        "AveragePool": _pool,
        "BatchNormalization": _anything,
        "Clip": _clip,
        "Concat": _concatenation,
        "Conv": _convolution,
        "ConvTranspose": _transposed_convolution,
        "Flatten": _flattening,
        "Gemm": _matrix_product,
        "GlobalAveragePool": _global_average,
        "Identity": _anything,
        "LeakyRelu": _anything,
        "MatMul": _matrix_product,
        "Max": _elementwise,
        "MaxPool": _pool,
        "Min": _elementwise,
        "Mul": _elementwise,
        "ReduceMean": _global_average,
        "Relu": _anything,
        "Reshape": _flattening,
        "Sigmoid": _anything,
        "Softmax": _softmax,
        "Squeeze": _flattening,
        "Sub": _elementwise,
        "Sum": _elementwise,
        "Tanh": _anything,
    }
)
"""Operators of NVIDIA's matrix that classifiers have; whatever is not here falls back."""


def _outside(limits: tuple[tuple[str, tuple[int, ...], int, int], ...]) -> tuple[str, str] | None:
    for what, values, low, high in limits:
        if any(not low <= value <= high for value in values):
            return (
                f"{what} {list(values)}; a DLA takes {low} to {high}",
                "none in the graph: another architecture",
            )
    return None


def _ints(node: ir.Node, name: str, default: int) -> tuple[int, ...]:
    return tuple(node.attributes.get_ints(name, [default]))


def _sizes(value: ir.Value) -> tuple[int, ...]:
    assert value.shape is not None, f"{value.name!r} has no shape"
    return tuple(value.shape.numpy())


def _count_loadables(graph: QuantizedGraph, gpu: set[ir.Node]) -> int:
    """Connected parts between fallbacks.

    A node's *depth* is the number of times a path to it returns from the GPU to the DLA. Nodes of one depth
    that touch are one loadable: joining different depths would make a loadable wait for itself.
    """
    depth: dict[ir.Node, int] = {}
    part: dict[ir.Node, ir.Node] = {}

    def root(node: ir.Node) -> ir.Node:
        while part[node] is not node:
            node = part[node]
        return node

    for node in graph.nodes:
        sources = [p for v in graph.activations(node) if (p := v.producer()) is not None]
        crossings = [depth[s] + (s in gpu and node not in gpu) for s in sources]
        depth[node] = max(crossings, default=0)
        if node not in gpu:
            part[node] = node
            for source in sources:
                if source not in gpu and depth[source] == depth[node]:
                    part[root(source)] = node
    return len({root(node) for node in part})
