"""What TensorRT's ONNX parser complains of, told in terms of the model and of what made the node.

The parser names a node and quotes its own assertions. A person needs to know which layer of the
network that is, which stage put the node there, and what to do. The patterns below are the words of
the parsers of TensorRT-RTX 1.7 (the real one, run in the tests), which share their source with
TensorRT's; a complaint that matches none is passed on as it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["ParserFailure", "explain_parser_failures", "explain_uint8_quantization"]

_SHOWN = 3
_NOISE = re.compile(r"^\[?checkMacros\.cpp|catchCudaError|^Invalid Node - ")
_UINT8_AS_INT8 = "UINT8 zero_point only on DLA"
_NEAREST_FORM = {
    "QLinearConv": "Conv between DequantizeLinear and QuantizeLinear",
    "ConvInteger": "Conv between DequantizeLinear and QuantizeLinear",
    "QLinearMatMul": "MatMul between DequantizeLinear and QuantizeLinear",
    "MatMulInteger": "MatMul between DequantizeLinear and QuantizeLinear",
    "DynamicQuantizeLinear": "QuantizeLinear with a scale from calibration",
    "GlobalLpPool": "ReduceL2 over the two spatial axes",
    "LpPool": "Pow, AveragePool and Pow",
    "MaxUnpool": "Resize",
    "Det": "the arithmetic of the determinant",
    "BitShift": "Mul or Div by a power of two",
    "Unique": "a step outside the engine, on its output",
}
"""Operators the parser has no importer for, and the nearest form it has one for."""


@dataclass(frozen=True, slots=True)
class ParserFailure:
    """One error of the parser, as its binding gives it."""

    code: str
    """``ErrorCode``'s name: ``INVALID_NODE``, ``UNSUPPORTED_NODE``, …"""
    description: str
    node_index: int
    """Position in the graph; −1 where the error is of no node."""
    node_name: str
    operator: str
    in_function: bool
    """Whether `node_index` counts in a model-local function instead of the graph."""


@dataclass(frozen=True, slots=True)
class _Rule:
    matches: Callable[[ParserFailure, Any], bool]
    remedy: Callable[[ParserFailure, Any], str]


def explain_parser_failures(failures: Sequence[ParserFailure], onnx_bytes: bytes) -> str:
    """A message for a person: which node, who made it, what TensorRT says and the remedy.

    Args:
        failures: the parser's errors, in order.
        onnx_bytes: the model that was parsed.
    """
    model = _load(onnx_bytes)
    if model is None or not failures:
        return "TensorRT cannot read the model as ONNX; export it again"
    lines = [_explain(failure, model) for failure in failures[:_SHOWN]]
    if len(failures) > _SHOWN:
        lines.append(f"… and {len(failures) - _SHOWN} more of the kind")
    return "\n".join(lines)


def explain_uint8_quantization(log: Sequence[str], onnx_bytes: bytes) -> str | None:
    """Why a graph with uint8 grids is refused, or ``None`` if the parser did not complain of any.

    The parser only warns that it takes them for int8. What it then builds clips at 127 what the
    graph clips at 255: another function, without an error.
    """
    if not any(_UINT8_AS_INT8 in line for line in log):
        return None
    model = _load(onnx_bytes)
    nodes = [] if model is None else [node for node in model.graph.node if _zero_point_is_uint8(model, node)]
    where = f"{_describe(model, nodes[0])}; {len(nodes)} nodes in all" if nodes else "in the graph"
    return (
        f"the graph quantizes to uint8 ({where}), which TensorRT reads as int8 after a mere warning, so that it "
        "would compute something else; quantize it with the TensorRT placement (symmetric int8, zero point 0)"
    )


def _load(onnx_bytes: bytes) -> Any:
    import onnx  # only where something failed

    try:
        return onnx.ModelProto.FromString(onnx_bytes)
    except Exception:  # protobuf has several
        return None


def _explain(failure: ParserFailure, model: Any) -> str:
    node = _find(failure, model)
    where = f"node {failure.node_name!r} ({failure.operator})" if node is None else _describe(model, node)
    for rule in _RULES:
        if rule.matches(failure, node):
            return f"TensorRT refuses {where}: {_words(failure)}; {rule.remedy(failure, node)}"
    return f"TensorRT refuses {where}: {_words(failure)} ({failure.code})"


def _words(failure: ParserFailure) -> str:
    """The parser's description without the lines that only repeat that there is no GPU."""
    lines = [line.strip() for line in failure.description.splitlines()]
    kept = [line for line in lines if line and not _NOISE.search(line)]
    text = " ".join(kept).replace("Assertion failed: ", "")
    text = re.sub(r"\.? In \w+ at [^\s)]+\)?", "", text)
    text = re.sub(r"\S+: Error Code \d+: [\w ]+ \((\w+: )?", "", text)  # repeats the node's name
    return "it has no importer for it" if text in ("false", "") else text[:400]


def _find(failure: ParserFailure, model: Any) -> Any:
    """The node an error is about; its index is only the graph's where no function encloses it."""
    nodes = model.graph.node
    if not failure.in_function and 0 <= failure.node_index < len(nodes):
        node = nodes[failure.node_index]
        if node.op_type == failure.operator:
            return node
    named = [node for node in nodes if node.name and node.name == failure.node_name]
    return named[0] if named else None


def _describe(model: Any, node: Any) -> str:
    """Node, layer of the network and the stage it comes from: ``DequantizeLinear 'b_dequantized' …``."""
    output = node.output[0] if node.output else node.name
    layer = _module_path(model, node)
    name = f" (node {node.name!r})" if node.name and node.name != output else ""
    at = f" of layer {layer!r}" if layer else ""
    return f"{node.op_type} {output!r}{name}{at}, {_origin(node, output)}"


def _origin(node: Any, output: str) -> str:
    """Who made a node, told by the names that the stages give."""
    if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        stored = node.input[0] if node.input else ""
        if re.search(r"_int32(_\d+)?$", stored):
            return "an int32 bias as the CPU placement stores it (calibration.placement.cpu)"
        if re.search(r"_(int8|uint8)(_\d+)?$", stored):
            return "a weight quantized by calibration.qdq"
        match = re.fullmatch(r"(.+?)_(?:de)?quantized(_\d+)?", output)
        if match:
            return f"placed on tensor {match[1]!r} by calibration.qdq"
        return "as the model file has it"
    if output.startswith("image_"):
        return "made by the pass that folds preprocessing (pipeline.passes.preprocess)"
    return "as exported"


def _module_path(model: Any, node: Any) -> str | None:
    """The layer a node belongs to: the exporter's record, else the name of the weights it, or the
    layer behind it, reads: ``stem.0.conv.weight`` → ``stem.0.conv``."""
    for prop in node.metadata_props:
        if prop.key == "namespace" and prop.value:
            return str(prop.value)
    for candidate in (node, *_consumers(model, node)):
        for name in candidate.input:
            match = re.fullmatch(r"(.+)\.(?:weight|bias)(?:_\w+)?", name)
            if match:
                return match[1]
    return None


def _consumers(model: Any, node: Any) -> Iterator[Any]:
    return (other for other in model.graph.node if set(other.input) & set(node.output))


def _zero_point_is_uint8(model: Any, node: Any) -> bool:
    if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or len(node.input) < 3:
        return False
    uint8 = 2  # onnx.TensorProto.UINT8
    return any(t.name == node.input[2] and t.data_type == uint8 for t in model.graph.initializer)


def _says(pattern: str) -> Callable[[ParserFailure, Any], bool]:
    compiled = re.compile(pattern)
    return lambda failure, node: compiled.search(failure.description) is not None


def _lacks_importer(failure: ParserFailure, node: Any) -> bool:
    bare = failure.description.replace("Assertion failed: ", "").strip()
    return "Plugin not found" in failure.description or bare in ("false", "")


def _nearest(failure: ParserFailure, node: Any) -> str:
    if node is not None and node.domain not in ("", "ai.onnx"):
        return (
            f"it is of domain {node.domain!r}, not of ONNX: export the model again, without another "
            "runtime's optimizations"
        )
    nearest = _NEAREST_FORM.get(failure.operator)
    form = f"the nearest form it takes is {nearest}" if nearest else "write it with operators it has"
    return f"{form}, or build for --target cpu"


def _uint8_remedy(failure: ParserFailure, node: Any) -> str:
    if failure.operator == "DequantizeLinear":
        return (
            "it dequantizes int8 only: pixels go through a Cast to float, weights are symmetric int8, as the "
            "TensorRT placement makes them"
        )
    return "a uint8 tensor is only taken by Cast: put the Cast to float right behind the input"


_RULES: tuple[_Rule, ...] = (
    _Rule(
        _says(r"has type Int32 but must have type .*Int8"),
        lambda failure, node: "keep the bias in floating point, as the TensorRT placement does",
    ),
    _Rule(
        _says(r"Non-zero zero point|shiftIsAllZeros"),
        lambda failure, node: "quantize symmetrically (int8, zero point 0), as the TensorRT placement does",
    ),
    _Rule(_says(r"unsupported input type of UINT8|has type UInt8 but must have"), _uint8_remedy),
    _Rule(
        _says(r"must (have|be of) (the )?same (input )?type"),
        lambda failure, node: (
            "a strongly typed graph casts explicitly: lower the whole graph to one floating-point type, "
            "or put a Cast in front of the odd input"
        ),
    ),
    _Rule(_lacks_importer, _nearest),
)
"""Tried in order; the first that matches gives the remedy."""
