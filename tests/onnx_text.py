"""Tiny ONNX models from text, run by ONNX's reference evaluator, which shares no code with an engine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from tolerances import FOLDED_RELATIVE

from pipeline.passes.verify import execute

Array = NDArray[Any]


def onnx_model(graph: str, opset: int = 18, **weights: Array) -> ir.Model:
    """A model from the text of its graph, ``agraph (inputs) => (outputs) { nodes }``, shapes inferred."""
    proto = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : {opset}]> {graph}')
    for name, values in weights.items():
        array = values if values.dtype == np.int64 else values.astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    onnx.checker.check_model(proto, full_check=True)
    return ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(proto))


def weight(*shape: int, seed: int = 0) -> Array:
    """Reproducible values around zero, of a size that keeps activations near one."""
    fan_in = int(np.prod(shape[1:])) or 1
    return np.random.default_rng((seed, *shape)).standard_normal(shape) / np.sqrt(fan_in)


def positive(*shape: int, seed: int = 0) -> Array:
    """Reproducible values from 0.5 to 2."""
    return np.random.default_rng((seed, *shape)).uniform(0.5, 2.0, shape)


def batch_norm(channels: int, seed: int = 0) -> dict[str, Array]:
    """Non-trivial ``gamma``, ``beta``, ``mean``, ``var``."""
    return {
        "gamma": positive(channels, seed=seed + 1),
        "beta": weight(channels, seed=seed + 2),
        "mean": weight(channels, seed=seed + 3),
        "var": positive(channels, seed=seed + 4),
    }


def reference(model: ir.Model, seed: int = 0, **feeds: Array) -> list[Array]:
    """Outputs on `feeds`, or on seeded ones with a free batch of 2."""
    if not feeds:
        rng = np.random.default_rng(seed)
        for value in model.graph.inputs:
            shape = [size if isinstance(size, int) else 2 for size in value.shape]
            feeds[value.name] = rng.standard_normal(shape).astype(np.float32)
    if any(node.op_type == "ConvTranspose" for node in model.graph):
        # The evaluator's ConvTranspose cannot do groups (onnx 1.23); OpenVINO can.
        return list(execute(model, feeds).values())
    return list(ReferenceEvaluator(ir.serde.serialize_model(model)).run(None, feeds))


def op_counts(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def relative_error(expected: Array, got: Array) -> float:
    assert expected.shape == got.shape
    return float(np.abs(expected - got).max() / np.abs(expected).max())


def assert_rewrites(
    rewrite: Callable[[ir.Model], Any], model: ir.Model, n_rewrites: int, ops: dict[str, int]
) -> ir.Model:
    """`rewrite` makes exactly these ops, valid, with equal results, and nothing the second time."""
    expected = reference(model)
    folded = model.clone()
    report = rewrite(folded)
    assert report.n_rewrites == n_rewrites, report
    assert dict(op_counts(folded)) == ops
    onnx.checker.check_model(ir.serde.serialize_model(folded), full_check=True)
    for before, after in zip(expected, reference(folded), strict=True):
        assert relative_error(before, after) < FOLDED_RELATIVE
    assert [value.name for value in folded.graph.outputs] == [value.name for value in model.graph.outputs]
    assert rewrite(folded).n_rewrites == 0, "a second run must find nothing to do"
    return folded


def assert_left_alone(rewrite: Callable[[ir.Model], Any], model: ir.Model, reason: str) -> None:
    """`rewrite` changes nothing and says `reason`."""
    untouched = ir.serde.serialize_model(model).SerializeToString()
    report = rewrite(model)
    assert report.n_rewrites == 0
    assert any(reason in why for _, why in report.skipped), report.skipped
    assert ir.serde.serialize_model(model).SerializeToString() == untouched
