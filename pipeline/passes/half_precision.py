"""The strongly typed form: every float32 value becomes float16 or bfloat16."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

import numpy as np
import onnx_ir as ir

from pipeline.errors import CalibrationError
from pipeline.passes.graph_pass import GraphPass, RewriteReport, Tolerance
from pipeline.passes.linear import STANDARD_DOMAINS, describe, unused_name

__all__ = ["HALF_MAX", "HalfType", "half_precision", "widen"]

HalfType = Literal["float16", "bfloat16"]

_DATA_TYPES: Mapping[HalfType, ir.DataType] = MappingProxyType(
    {"float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}
)
HALF_MAX: Mapping[HalfType, float] = MappingProxyType({"float16": 65504.0, "bfloat16": 3.3895313892515355e38})
"""The largest finite value."""

_MIN_OPSETS: Mapping[HalfType, int] = MappingProxyType({"float16": 19, "bfloat16": 22})
"""QuantizeLinear takes a float16 scale from opset 19 on, convolutions and pools bfloat16 from 22 on."""

_TOLERANCES: Mapping[HalfType, Tolerance] = MappingProxyType(
    {"float16": Tolerance(relative=0.01, sqnr_db=50.0), "bfloat16": Tolerance(relative=0.05, sqnr_db=35.0)}
)
_NUDGES: Mapping[HalfType, float] = MappingProxyType({"float16": 2.0**-12, "bfloat16": 2.0**-9})
_WORST: Mapping[HalfType, Tolerance] = MappingProxyType(
    {"float16": Tolerance(relative=0.3, sqnr_db=12.0), "bfloat16": Tolerance(relative=0.6, sqnr_db=6.0)}
)
_FLOAT32_INPUTS: frozenset[tuple[str, int]] = frozenset({("Resize", 2), ("Upsample", 1)})
"""Inputs that ONNX declares as float32 whatever the data is: the scales of a resize."""


def half_precision(half_type: HalfType) -> GraphPass:
    """The pass that leaves float32 at the graph's inputs and outputs only.

    Given::

        x: float32;  y = Relu(Conv(DequantizeLinear(QuantizeLinear(x, s)), W, b))

    Result, with ``s'``, ``W'``, ``b'`` in `half_type`::

        y' = Relu(Conv(DequantizeLinear(QuantizeLinear(Cast(x), s')), W', b'))
        y = Cast(y')                     # float32 again

    A strongly typed engine takes its precisions from the graph: what is between a DequantizeLinear and
    the next QuantizeLinear then runs as int8 or in half precision, and never silently as float32. A Cast
    from uint8 goes to `half_type` at once, in which every pixel is exact. Scales must be values of
    `half_type` already (`calibration.qparams.half_scale`): one that would be rounded here is an error,
    because the integers were made with another.

    The opset is raised to 19 (float16) or 22 (bfloat16), the first to have these types where needed.

    The tolerance is that of rounding weights and biases, by up to 2^-11 (float16) or 2^-8 (bfloat16) of
    each and half as much on the average: on trained networks it leaves 62 to 65 dB in float16 and 37 to
    45 dB in bfloat16. Networks with random weights cancel more (Inception-v3: 34 and 16 dB, Inception-v4:
    15 and 10 dB), and are compared with their own weights nudged by that average, which predicts the
    outcome to 4 dB. What is executed are the rounded constants in float32, not the engine's arithmetic; whether that overflows is
    for the calibrated ranges to say (`calibration.tensorrt_form.choose_remainder`).
    """

    def rewrite(model: ir.Model) -> RewriteReport:
        for node in model.graph:
            if any(
                attr.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
                for attr in node.attributes.values()
            ):
                raise ValueError(f"{describe(node)} has subgraphs, whose types cannot be lowered")
        n_rewrites = _lower_constants(model.graph, half_type)
        n_rewrites += _lower_attributes(model.graph, half_type)
        n_rewrites += _cast_interface(model.graph, half_type)
        if n_rewrites:
            for node in model.graph:
                for value in node.outputs:
                    if value.dtype == ir.DataType.FLOAT and not value.is_graph_output():
                        # A new type: clones of a graph share the old one, and setting dtype changes it.
                        value.type = ir.TensorType(_DATA_TYPES[half_type])
            _raise_opset(model, _MIN_OPSETS[half_type])
        return RewriteReport(n_rewrites)

    return GraphPass(
        f"to_{half_type}",
        rewrite,
        tolerance=_TOLERANCES[half_type],
        nudge=_NUDGES[half_type],
        worst=_WORST[half_type],
    )


def widen(model: ir.Model) -> None:
    """Make a half-precision graph a float32 one with the same constants, in place: for CPUs to execute.

    Given::

        y = Cast<float32>(Conv(Cast<float16>(x), W, b))      # W, b: float16

    Result::

        y = Cast<float32>(Conv(Cast<float32>(x), W, b))      # W, b: the same numbers in float32

    CPU engines have no kernels for most operators in half precision, and those in bfloat16 not even a
    way round (ONNX Runtime 1.32 refuses the graph, OpenVINO 2026.4 fails on its Q/DQ). A GPU's integer
    convolution adds bias and identity in float32 and rounds once, to int8, so float32 is also the
    closer of the two where Q/DQ stand.
    """
    halves = frozenset(_DATA_TYPES.values())
    for value in model.graph.initializers.values():
        if value.dtype in halves and value.const_value is not None:
            wide = value.const_value.numpy().astype(np.float32)
            value.const_value = ir.tensor(wide, name=value.name)
            value.type = ir.TensorType(ir.DataType.FLOAT)
    for node in model.graph:
        if node.op_type == "Cast" and node.attributes.get_int("to", 0) in halves:
            node.attributes["to"] = ir.AttrInt64("to", int(ir.DataType.FLOAT))
        for value in node.outputs:
            if value.dtype in halves:
                value.type = ir.TensorType(ir.DataType.FLOAT)


def _lower_constants(graph: ir.Graph, half_type: HalfType) -> int:
    n_rewrites = 0
    for value in graph.initializers.values():
        uses = [(node.op_type, index) for node, index in value.uses()]
        if value.dtype != ir.DataType.FLOAT or any(use in _FLOAT32_INPUTS for use in uses):
            continue
        assert value.const_value is not None, "an initializer has a value"
        wide = value.const_value.numpy()
        with np.errstate(over="ignore"):
            narrow = wide.astype(_DATA_TYPES[half_type].numpy())
        if not np.isfinite(narrow.astype(np.float32)).all():
            raise CalibrationError(
                f"tensor {value.name!r} reaches {np.abs(wide).max():.6g}; {half_type} holds at most "
                f"{HALF_MAX[half_type]:.6g}: "
                + ("choose bfloat16" if half_type == "float16" else "check the checkpoint")
            )
        is_scale = any(op in ("QuantizeLinear", "DequantizeLinear") and index == 1 for op, index in uses)
        if is_scale and not np.array_equal(narrow.astype(np.float32), wide):
            raise ValueError(
                f"scale {value.name!r} is no {half_type} value: the integers were made with another one; "
                f"place Q/DQ for a {half_type} remainder"
            )
        value.const_value = ir.tensor(narrow, dtype=_DATA_TYPES[half_type], name=value.name)
        value.type = ir.TensorType(_DATA_TYPES[half_type])
        n_rewrites += 1
    return n_rewrites


def _lower_attributes(graph: ir.Graph, half_type: HalfType) -> int:
    """Casts to float32, and constants that are made by a node."""
    n_rewrites = 0
    for node in graph:
        if node.domain not in STANDARD_DOMAINS:
            continue
        is_edge = node.outputs[0].is_graph_output()
        if node.op_type == "Cast" and node.attributes.get_int("to", 0) == ir.DataType.FLOAT and not is_edge:
            node.attributes["to"] = ir.AttrInt64("to", int(_DATA_TYPES[half_type]))
            n_rewrites += 1
        elif node.op_type == "ConstantOfShape" and node.outputs[0].dtype == ir.DataType.FLOAT:
            fill = node.attributes.get_tensor("value")
            array = np.zeros(1, np.float32) if fill is None else fill.numpy()
            tensor = ir.tensor(array.astype(_DATA_TYPES[half_type].numpy()), dtype=_DATA_TYPES[half_type])
            node.attributes["value"] = ir.AttrTensor("value", tensor)
            node.outputs[0].type = ir.TensorType(_DATA_TYPES[half_type])
            n_rewrites += 1
    return n_rewrites


def _cast_interface(graph: ir.Graph, half_type: HalfType) -> int:
    n_rewrites = 0
    for value in graph.inputs:
        readers = {node for node, _ in value.uses()}
        if value.dtype != ir.DataType.FLOAT or all(node.op_type == "Cast" for node in readers):
            continue
        cast = _cast(graph, value, half_type, f"{value.name}_{half_type}")
        value.replace_all_uses_with(cast.outputs[0])
        cast.replace_input_with(0, value)
        graph.insert_before(graph[0], cast)
        n_rewrites += 1
    for index, value in enumerate(graph.outputs):
        producer = value.producer()
        if value.dtype != ir.DataType.FLOAT or producer is None or producer.op_type == "Cast":
            continue
        name = value.name
        value.name = unused_name(graph, f"{name}_{half_type}")
        cast = _cast(graph, value, "float32", name or "")
        graph.append(cast)
        graph.outputs[index] = cast.outputs[0]
        value.type = ir.TensorType(_DATA_TYPES[half_type])
        n_rewrites += 1
    return n_rewrites


def _cast(graph: ir.Graph, value: ir.Value, to: HalfType | Literal["float32"], name: str) -> ir.Node:
    data_type = ir.DataType.FLOAT if to == "float32" else _DATA_TYPES[to]
    node = ir.node("Cast", [value], {"to": int(data_type)})
    node.outputs[0].name = unused_name(graph, name)
    node.outputs[0].type, node.outputs[0].shape = ir.TensorType(data_type), value.shape
    return node


def _raise_opset(model: ir.Model, minimum: int) -> None:
    from onnxscript import version_converter  # a second to import, and only building needs it

    from pipeline.onnx_files import opset_of

    if opset_of(model) < minimum:
        version_converter.convert_version(model, minimum)
