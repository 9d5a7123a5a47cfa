"""Where Q/DQ stand for the CPU engines, on graphs small enough to list every tensor."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx_text import onnx_model, op_counts, reference, weight

from calibration.placement.cpu import place
from calibration.qdq import insert_qdq
from pipeline.artifacts import TensorRange
from pipeline.errors import CalibrationError, UsageError

EVALUATED_OPSET = 19
"""ONNX's reference evaluator has no DequantizeLinear of opset 18."""


def points(placement):
    return {point.tensor: point for point in placement.activations}


def quantized(model):
    """`model` with Q/DQ, valid, with ranges from its own activations."""
    placement = place(model)
    ranges = {name: TensorRange(-4.0, 4.0) for name in placement.observed}
    insert_qdq(model, placement, ranges)
    onnx.checker.check_model(ir.serde.serialize_model(model), full_check=True)
    return model


def conv_relu(opset=18):
    return onnx_model(
        """g (float[N,3,8,8] x) => (float[N,4,8,8] y)
        { c = Conv<pads=[1,1,1,1]>(x, w, b)
          r = Relu(c)
          y = Conv(r, v) }""",
        w=weight(4, 3, 3, 3),
        b=weight(4),
        v=weight(4, 4, 1, 1),
        opset=opset,
    )


def test_conv_relu_quantizes_behind_the_relu():
    placement = place(conv_relu())
    assert list(points(placement)) == ["x", "r"]  # not c, not y
    assert [(w.weight, w.bias, w.axis, w.input) for w in placement.weights] == [
        ("w", "b", 0, "x"),
        ("v", None, 0, "r"),
    ]
    assert placement.skipped == ()


def test_the_quantized_graph_is_valid_and_close():
    expected = reference(conv_relu(EVALUATED_OPSET))[0]
    model = quantized(conv_relu(EVALUATED_OPSET))
    assert op_counts(model) == {"Conv": 2, "Relu": 1, "QuantizeLinear": 2, "DequantizeLinear": 5}
    kinds = {name: value.dtype for name, value in model.graph.initializers.items()}
    assert kinds["w_int8"] == kinds["v_int8"] == ir.DataType.INT8
    assert kinds["b_int32"] == ir.DataType.INT32
    assert "w" not in kinds, "the float weight must not stay in the file"
    got = reference(model)[0]
    noise = np.mean((got - expected) ** 2)
    assert 0.0 < noise < 1e-3 * np.mean(expected**2)


def test_a_residual_add_has_both_inputs_quantized():
    model = onnx_model(
        """g (float[N,4,8,8] x) => (float[N,4,8,8] y)
        { c = Conv(x, w)
          s = Add(c, x)
          r = Relu(s)
          y = Conv(r, v) }""",
        w=weight(4, 4, 1, 1),
        v=weight(4, 4, 1, 1, seed=1),
    )
    placement = place(model)
    assert list(points(placement)) == ["x", "c", "r"]  # not s: Q stands behind the Relu
    assert {(e.node, e.index) for e in points(placement)["x"].consumers} == {("c", 0), ("s", 1)}
    assert [(e.node, e.index) for e in points(placement)["c"].consumers] == [("s", 0)]
    add = next(node for node in quantized(model).graph if node.op_type == "Add")
    assert [value.producer().op_type for value in add.inputs] == ["DequantizeLinear"] * 2


def test_adding_a_constant_asks_for_nothing():
    model = onnx_model("g (float[N,4] x) => (float[N,4] y) { y = Add(x, k) }", k=weight(4))
    assert place(model).activations == ()


def test_a_concat_shares_one_grid():
    model = onnx_model(
        """g (float[N,3,8,8] x) => (float[N,2,8,8] y)
        { a = Conv(x, w)
          b = Conv(x, v)
          t = Concat<axis=1>(a, b)
          y = Conv(t, u) }""",
        w=weight(4, 3, 1, 1),
        v=weight(4, 3, 1, 1, seed=1),
        u=weight(2, 8, 1, 1),
    )
    placement = place(model)
    found = points(placement)
    assert set(found) == {"x", "a", "b", "t"}
    assert found["a"].sources == found["b"].sources == found["t"].sources
    assert set(found["t"].sources) == {"a", "b"}
    assert found["x"].sources == ("x",)
    insert_qdq(
        model,
        placement,
        {"x": TensorRange(-1, 1), "a": TensorRange(-1, 2), "b": TensorRange(-3, 1)},
    )
    scales = {
        node.inputs[0].name: (node.inputs[1].const_value.numpy(), node.inputs[2].const_value.numpy())
        for node in model.graph
        if node.op_type == "QuantizeLinear"
    }
    assert scales["a"] == scales["b"] == scales["t"]
    assert scales["t"][0] == np.float32(5 / 255)  # the hull of both


def test_max_pool_passes_the_grid_through():
    model = onnx_model(
        """g (float[N,3,8,8] x) => (float[N,2,4,4] y)
        { c = Conv(x, w)
          r = Relu(c)
          p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r)
          y = Conv(p, v) }""",
        w=weight(4, 3, 1, 1),
        v=weight(2, 4, 1, 1),
    )
    placement = place(model)
    found = points(placement)
    assert list(found) == ["x", "r", "p"]
    assert found["r"].sources == found["p"].sources == ("r",)
    assert placement.observed == ("x", "r")  # the pool's output need not be looked at


@pytest.mark.parametrize(("trans_b", "axis"), [(0, 1), (1, 0)])
def test_global_average_pool_and_gemm(trans_b, axis):
    model = onnx_model(
        f"""g (float[N,4,8,8] x) => (float[N,5] logits)
        {{ p = GlobalAveragePool(x)
          f = Flatten(p)
          logits = Gemm<transB={trans_b}>(f, w, b) }}""",
        w=weight(5, 4) if trans_b else weight(4, 5),
        b=weight(5),
    )
    placement = place(model)
    found = points(placement)
    assert list(found) == ["x", "p", "f"]  # not the logits
    assert found["x"].sources == ("x",)
    assert found["p"].sources == found["f"].sources == ("p",)  # an average has a range of its own
    assert [(w.weight, w.bias, w.axis) for w in placement.weights] == [("w", "b", axis)]
    quantized(model)


PIXELS = """g (uint8[N,8,8,3] image) => (float[N,2,8,8] y)
    {{ {prologue}
      y = Conv(x, w) }}"""


@pytest.mark.parametrize(
    "prologue",
    [
        "f = Cast<to=1>(image) x = Transpose<perm=[0,3,1,2]>(f)",
        "t = Transpose<perm=[0,3,1,2]>(image) x = Cast<to=1>(t)",
    ],
)
def test_pixels_enter_the_first_convolution_exactly(prologue):
    def model():
        return onnx_model(PIXELS.format(prologue=prologue), opset=EVALUATED_OPSET, w=weight(2, 3, 1, 1))

    placement = place(model())
    assert placement.pixels == ("image",)
    assert placement.activations == ()  # nothing is rounded, so nothing is observed
    changed = quantized(model())
    assert op_counts(changed) == {"DequantizeLinear": 2, "Transpose": 1, "Conv": 1}
    first = changed.graph[0]
    assert first.op_type == "DequantizeLinear"
    assert first.inputs[0].name == "image"
    assert first.inputs[1].const_value.numpy() == 1.0
    assert first.inputs[2].const_value.numpy() == 0
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    weights = next(v.const_value.numpy() for n, v in changed.graph.initializers.items() if n == "w_int8")
    scale = changed.graph.initializers["w_scale"].const_value.numpy()
    real = weights[:, :, 0, 0] * scale[:, None]
    expected = np.einsum("oc,nhwc->nohw", real, pixels.astype(np.float32))
    assert np.allclose(reference(changed, image=pixels)[0], expected, rtol=1e-5, atol=1e-3)


def test_pixels_that_are_computed_with_get_a_grid():
    model = onnx_model(
        PIXELS.format(prologue="f = Cast<to=1>(image) n = Sub(f, m) x = Transpose<perm=[0,3,1,2]>(n)"),
        w=weight(2, 3, 1, 1),
        m=weight(3),
    )
    assert set(points(place(model))) == {"n", "x"}


@pytest.mark.parametrize(
    ("node", "weights", "reason"),
    [
        ("MatMul(x, x2)", {}, "computed at run time"),
        ("Gemm<alpha=0.5>(x, w)", {"w": weight(4, 4)}, "alpha or beta is not 1"),
        ("Gemm<transA=1>(x, w)", {"w": weight(4, 4)}, "transA is set"),
        ("Gemm(x, w, b)", {"w": weight(4, 4), "b": weight(4, 4)}, "no constant vector"),
        ("MatMul(x, w)", {"w": weight(1, 4, 4)}, "no matrix"),
    ],
)
def test_layers_left_in_float_are_listed_with_a_reason(node, weights, reason):
    shape = "1,4,4" if "no matrix" in reason else "4,4"
    model = onnx_model(f"g (float[4,4] x, float[4,4] x2) => (float[{shape}] y) {{ y = {node} }}", **weights)
    placement = place(model)
    assert placement.weights == placement.activations == ()
    ((name, why),) = placement.skipped
    assert node.partition("(")[0].partition("<")[0] in name
    assert reason in why


def test_a_missing_range_is_named():
    model = conv_relu()
    with pytest.raises(CalibrationError, match="no range of tensor 'r'"):
        insert_qdq(model, place(model), {"x": TensorRange(-1.0, 1.0)})


def test_a_weight_that_is_not_finite_is_named():
    model = onnx_model(
        "g (float[N,4] x) => (float[N,4] y) { y = MatMul(x, head) }", head=np.full((4, 4), np.nan)
    )
    with pytest.raises(CalibrationError, match="tensor 'head'"):
        insert_qdq(model, place(model), {"x": TensorRange(-1.0, 1.0)})


RESIDUAL = """g (float[N,4,8,8] x) => (float[N,3] y)
    { a = Conv(x, w) r = Relu(a) b = Conv(r, v) s = Add(b, r) t = Relu(s)
      c = Conv(t, u) p = GlobalAveragePool(c) f = Flatten(p) y = Gemm(f, h) }"""


def residual():
    weights = {name: weight(4, 4, 1, 1, seed=i) for i, name in enumerate("wvu")}
    return onnx_model(RESIDUAL, **weights, h=weight(4, 3))


def layers(placement):
    return [point.consumer.node for point in placement.weights]


def test_a_layer_in_float_reads_its_input_as_it_was_computed():
    placement = place(residual(), float_layers=frozenset({"b"}))
    assert layers(placement) == ["a", "c", "y"]
    assert placement.skipped == (
        ("Conv 'b'", "asked for: it keeps its input and its weight in floating point"),
    )
    # The Add still serves c, which is in int8: both its inputs are quantized, but not for b.
    found = points(placement)
    assert {(e.node, e.index) for e in found["r"].consumers} == {("s", 1)}
    assert list(found) == ["x", "r", "b", "t", "c", "p", "f"]


def test_an_add_and_a_pool_go_with_the_layers_they_serve():
    placement = place(residual(), float_layers=frozenset({"c"}))
    assert list(points(placement)) == ["x", "r", "c", "p", "f"]  # s is added in float: c alone reads it
    placement = place(residual(), float_layers=frozenset({"y"}))
    assert list(points(placement)) == ["x", "r", "b", "t"]  # and the average is taken in float


def test_with_all_layers_in_float_nothing_is_quantized():
    model = residual()
    placement = place(model, float_layers=frozenset("abcy"))
    assert placement.activations == placement.weights == ()
    tail = onnx_model(
        "g (float[N,4,8,8] x) => (float[N,4,1,1] y) { a = Conv(x, w) y = GlobalAveragePool(a) }",
        w=weight(4, 4, 1, 1),
    )
    assert list(points(place(tail))) == ["x", "a"]
    assert place(tail, float_layers=frozenset({"a"})).activations == ()


def test_no_layer_in_float_is_the_same_as_saying_nothing():
    assert place(residual(), float_layers=frozenset()) == place(residual())


def test_a_float_layer_that_is_none_is_named():
    with pytest.raises(UsageError, match="float_layers names 's'"):
        place(residual(), float_layers=frozenset({"s"}))


@pytest.mark.parametrize("kept", [{"a"}, {"b", "y"}, {"a", "c"}, {"a", "b", "c", "y"}])
def test_a_mixed_graph_is_valid_and_close(kept):
    weights = {name: weight(4, 4, 1, 1, seed=i) for i, name in enumerate("wvu")}
    model = onnx_model(RESIDUAL, opset=EVALUATED_OPSET, **weights, h=weight(4, 3))
    expected = reference(model)[0]
    placement = place(model, float_layers=frozenset(kept))
    insert_qdq(model, placement, {name: TensorRange(-4.0, 4.0) for name in placement.observed})
    onnx.checker.check_model(ir.serde.serialize_model(model), full_check=True)
    noise = np.mean((reference(model)[0] - expected) ** 2)
    assert noise < 5e-2 * np.mean(expected**2)  # a range of 4 is coarse for an average
    assert (noise == 0.0) == (len(kept) == 4)
