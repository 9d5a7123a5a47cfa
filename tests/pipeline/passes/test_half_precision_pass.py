"""Strongly typed graphs: half precision between the edges, nothing else changed."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx_text import onnx_model, op_counts, weight
from tolerances import HALF_SQNR_DB

from pipeline.errors import CalibrationError, PassError
from pipeline.metrics import sqnr_db
from pipeline.onnx_files import interface, opset_of
from pipeline.passes import run_passes
from pipeline.passes.half_precision import half_precision, widen
from pipeline.passes.verify import execute, seeded_feeds

_TYPES = {"float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}
_PIXELS = """g (uint8[N,8,8,3] image) => (float[N,5] logits)
    { f = Cast<to=1>(image) x = Transpose<perm=[0,3,1,2]>(f) c = Conv<strides=[2,2]>(x, w, b)
      r = Clip(c, low, high) p = GlobalAveragePool(r) q = Flatten(p) logits = Gemm(q, h) }"""


def _model(opset=18, **changed):
    weights = {"w": weight(8, 3, 3, 3) / 64, "b": weight(8), "h": weight(8, 5)}
    bounds = {"low": np.asarray(0.0), "high": np.asarray(6.0)}
    return onnx_model(_PIXELS, opset, **{**weights, **bounds, **changed})


def _float32_values(model):
    return {
        value.name
        for value in (*model.graph.initializers.values(), *(v for node in model.graph for v in node.outputs))
        if value.dtype == ir.DataType.FLOAT
    }


@pytest.mark.parametrize("half_type", ["float16", "bfloat16"])
def test_only_the_output_stays_float32(half_type):
    model = _model()
    lowered, (record,) = run_passes(model, (half_precision(half_type),))
    assert record.n_rewrites == 7  # five constants, the Cast of the pixels, the Cast of the logits
    assert _float32_values(lowered) == {"logits"}
    assert interface(lowered) == interface(model)
    assert opset_of(lowered) == {"float16": 19, "bfloat16": 22}[half_type]
    assert [node.op_type for node in lowered.graph].count("Cast") == 2
    onnx.checker.check_model(ir.serde.serialize_model(lowered), full_check=True)
    feeds = seeded_feeds(model, 1)
    assert (
        sqnr_db(execute(model, feeds)["logits"], execute(lowered, feeds)["logits"]) > HALF_SQNR_DB[half_type]
    )
    _, (second,) = run_passes(lowered, (half_precision(half_type),))
    assert second.n_rewrites == 0


@pytest.mark.parametrize("half_type", ["float16", "bfloat16"])
def test_a_float_input_is_cast_once(half_type):
    model = onnx_model(
        """g (float[N,3,8,8] x) => (float[N,4,6,6] y, float[N,4,6,6] z)
        { y = Conv(x, w) r = Conv(x, v) z = Relu(r) }""",
        w=weight(4, 3, 3, 3),
        v=weight(4, 3, 3, 3, seed=1),
    )
    lowered, _ = run_passes(model, (half_precision(half_type),))
    assert op_counts(lowered) == {"Cast": 3, "Conv": 2, "Relu": 1}
    assert _float32_values(lowered) == {"y", "z"}
    assert interface(lowered) == interface(model)
    assert run_passes(lowered, (half_precision(half_type),))[1][0].n_rewrites == 0


def test_a_constant_that_overflows_float16_is_named_with_the_remedy():
    model = _model(b=np.full(8, 7e4))
    with pytest.raises(
        CalibrationError, match=r"'b' reaches 70000; float16 holds at most 65504: choose bfloat16"
    ):
        run_passes(model, (half_precision("float16"),))
    run_passes(model, (half_precision("bfloat16"),))


def test_a_scale_that_is_no_half_value_is_refused():
    def model(scale):
        return onnx_model(
            """g (float[N,4] x) => (float[N,4] y)
            { z = Constant<value = int8 {0}>() q = QuantizeLinear(x, s, z)
              d = DequantizeLinear(q, s, z) y = Relu(d) }""",
            opset=19,
            s=np.asarray(scale),
        )

    with pytest.raises(PassError, match="scale 's' is no float16 value"):
        run_passes(model(0.1), (half_precision("float16"),))
    lowered, _ = run_passes(model(0.125), (half_precision("float16"),))
    assert lowered.graph.initializers["s"].dtype == ir.DataType.FLOAT16


def test_the_scales_of_a_resize_stay_float32():
    model = onnx_model(
        'g (float[N,4,8,8] x) => (float[N,4,16,16] y) { r = Relu(x) y = Resize<mode="nearest">(r, , s) }',
        s=np.asarray([1.0, 1.0, 2.0, 2.0]),
    )
    lowered, _ = run_passes(model, (half_precision("float16"),))
    assert _float32_values(lowered) == {"s", "y"}


def test_subgraphs_are_refused():
    model = onnx_model(
        """g (bool c, float[4] x) => (float[4] y)
        { y = If(c) <then_branch = t () => (float[4] a) { a = Relu(x) },
                     else_branch = e () => (float[4] b) { b = Neg(x) }> }"""
    )
    with pytest.raises(ValueError, match="has subgraphs"):
        half_precision("float16").rewrite(model)


def test_a_lowering_that_loses_a_constant_is_caught():
    """The verification can fail although the tolerance is wide."""
    good = half_precision("bfloat16")

    def wrong(model):
        report = good.rewrite(model)
        bias = model.graph.initializers["b"]
        bias.const_value = ir.tensor(np.zeros(8, bias.dtype.numpy()), dtype=bias.dtype, name="b")
        return report

    with pytest.raises(PassError, match="numerics"):
        run_passes(_model(), (dataclasses.replace(good, rewrite=wrong),))


@pytest.mark.parametrize("half_type", ["float16", "bfloat16"])
def test_widened_it_is_a_float32_graph_with_the_same_constants(half_type):
    lowered, _ = run_passes(_model(), (half_precision(half_type),))
    wide = lowered.clone()
    widen(wide)
    onnx.checker.check_model(ir.serde.serialize_model(wide), full_check=True)
    assert all(value.dtype != _TYPES[half_type] for node in wide.graph for value in node.outputs)
    for name, value in lowered.graph.initializers.items():
        stored = value.const_value.numpy().astype(np.float32)
        assert np.array_equal(stored, wide.graph.initializers[name].const_value.numpy())
    feeds = seeded_feeds(lowered, 1)
    close = sqnr_db(execute(lowered, feeds)["logits"], execute(wide, feeds)["logits"])
    assert close > HALF_SQNR_DB[half_type]
