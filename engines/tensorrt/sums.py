"""Residual sums and concatenations of a graph: why one is not free, and the edit that would make it so.

Both audits ask this module, so that a finding reads the same whether it was predicted or seen in the engine.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from engines.tensorrt.audit import Edit, Finding
from engines.tensorrt.epilogue import LINEAR, linear_epilogue, runs_in_int8
from engines.tensorrt.quantized_graph import Grid, QuantizedGraph, float_source, node_name, sole_reader
from pipeline.passes.linear import constant_operand, describe

__all__ = ["concat_finding", "float_add", "residual_sums", "unfused_add"]


def residual_sums(graph: QuantizedGraph) -> list[ir.Node]:
    """The nodes that add two activations."""
    return [
        node for node in graph.nodes if node.op_type in ("Add", "Sum") and len(graph.activations(node)) == 2
    ]


def unfused_add(graph: QuantizedGraph, add: ir.Node, layer: str) -> Finding:
    """Why the sum `add`, which runs in `layer`, is in no convolution's kernel."""
    left, right = graph.activations(add)
    if left.shape != right.shape:
        return Finding(
            "unfused_add",
            layer,
            f"{describe(add)} broadcasts {left.shape} and {right.shape}; a convolution adds only equal shapes",
            "none: the network adds tensors of two shapes",
        )
    reasons = [_why_not(graph, value, add) for value in (left, right)]
    detail, remedy, edit = next((reason for reason in reasons if reason[2] is not None), reasons[0])
    if all(reason[2] is None for reason in reasons):
        detail = "; ".join(dict.fromkeys(reason[0] for reason in reasons))
    return Finding("unfused_add", layer, f"{describe(add)}: {detail}", remedy, edit)


def _why_not(graph: QuantizedGraph, value: ir.Value, add: ir.Node) -> tuple[str, str, Edit | None]:
    """Why the layer that makes `value` does not take the sum: detail, remedy, edit."""
    node = value.producer()
    if node is None:
        return f"{value.name!r} is an input of the graph", "none", None
    if node.op_type == "DequantizeLinear":
        source = float_source(value)
        layer = source.producer()
        if layer is None or layer.op_type not in LINEAR:
            return f"{value.name!r} is the dequantized identity, not a convolution", "none", None
        return (
            f"Q/DQ stand between {describe(layer)} and the sum",
            "leave that branch bare: Q/DQ belong on the identity input only",
            Edit("remove_qdq", (source.name or "",), (node_name(add),)),
        )
    if node.op_type in LINEAR:
        if sole_reader(value) is None:
            return f"{value.name!r} is read by others than the sum, or is an output", "none", None
        return f"another layer takes the sum before {describe(node)}", "none", None
    if node.op_type in ("Mul", "Div") and constant_operand(node) is not None:
        source = graph.activations(node)[0]
        layer = source.producer()
        if layer is not None and layer.op_type in LINEAR and runs_in_int8(graph, layer):
            return (
                f"{describe(node)} stands between {describe(layer)}, whose weight is int8 already, and the sum",
                "fold the residual scale into the convolution before calibration (pass residual_scale)",
                Edit("fold", (), (node_name(node),)),
            )
    return f"{value.name!r} comes from {describe(node)}, not straight from a convolution", "none", None


def float_add(graph: QuantizedGraph, add: ir.Node, layer: str) -> Finding | None:
    """Whether the int8 convolution that runs `add` must write float, because what it adds is float."""
    layers = [
        node for node in graph.nodes if node.op_type in LINEAR and add in linear_epilogue(graph, node).nodes
    ]
    if not layers or not runs_in_int8(graph, layers[0]):
        return None
    kernel = linear_epilogue(graph, layers[0])
    if (
        kernel.operand is None
        or graph.reads_int8(kernel.operand) is not None
        or not graph.quantizers(kernel.value)
    ):
        return None
    name = kernel.operand.name or ""
    producer = kernel.operand.producer()
    other = f"from {describe(producer)}" if producer is not None else "an input of the graph"
    return Finding(
        "float_add",
        layer,
        f"{describe(add)} runs in {describe(layers[0])}, but {name!r} ({other}) is float: the sum is written in "
        "float and quantized by a kernel of its own",
        "put Q/DQ on that operand, with the scale its other readers use",
        Edit("insert_qdq", (name,), (node_name(add),)),
    )


def concat_finding(graph: QuantizedGraph, concat: ir.Node, layer: str, copied: bool) -> Finding | None:
    """What a concatenation costs; ``None``: nothing."""
    value = concat.outputs[0]
    has = {float_source(v).name or "": graph.reads_int8(v) for v in graph.activations(concat)}
    grid = graph.reads_int8(value) or graph.stores_int8(value)
    if grid is not None:
        unequal = {name: own for name, own in has.items() if own is not None and own != grid}
        if unequal:
            return Finding(
                "concat_requantized",
                layer,
                f"{describe(concat)} is read in {grid}, but {_scales(unequal)}: each is requantized",
                "give every part the union of their ranges, or opt this concatenation out if accuracy suffers",
                Edit("share_scale", (*has, value.name or "")),
            )
    elif any(own is not None for own in has.values()):
        return Finding(
            "concat_float",
            layer,
            f"{describe(concat)} runs in float: {_scales(has)}, and its readers do not agree on one scale",
            "quantize every part and every reader with one scale",
            Edit("share_scale", (*has, value.name or "")),
        )
    if copied:
        return Finding(
            "concat_copied",
            layer,
            f"{describe(concat)} copies a part that is a graph input, a slice, or written into a later concatenation",
            "none: a tensor can be written into one place only",
        )
    return None


def _scales(grids: Mapping[str, Grid | None]) -> str:
    return ", ".join(f"{name!r} has {'no scale' if grid is None else grid}" for name, grid in grids.items())
