"""Where Q/DQ stand for TensorRT, on graphs small enough to list every tensor."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx_text import onnx_model, reference, weight

from calibration.placement import PLACEMENTS, observed_by_all
from calibration.placement.tensorrt import place
from calibration.qdq import insert_qdq
from pipeline.artifacts import TensorRange
from pipeline.errors import UsageError
from pipeline.passes.center_pixels import center_pixels

OPSET = 19
"""ONNX's reference evaluator has no DequantizeLinear of opset 18."""


def points(placement):
    return {point.tensor: point for point in placement.activations}


def consumers(placement, tensor):
    return {(edge.node, edge.index) for edge in points(placement)[tensor].consumers}


def quantized(model, ranges=None, **options):
    placement = place(model, **options)
    if ranges is None:
        ranges = {name: TensorRange(-4.0, 4.0) for name in placement.observed}
    insert_qdq(model, placement, ranges)
    onnx.checker.check_model(ir.serde.serialize_model(model), full_check=True)
    return model


def scales(model):
    return {
        node.inputs[0].name: float(node.inputs[1].const_value.numpy())
        for node in model.graph
        if node.op_type == "QuantizeLinear"
    }


def chain(**changed):
    weights = {"w": weight(16, 16, 3, 3), "b": weight(16), "v": weight(16, 16, 1, 1), **changed}
    return onnx_model(
        """g (float[N,16,8,8] x) => (float[N,16,8,8] y)
        { c = Conv<pads=[1,1,1,1]>(x, w, b)
          r = Relu(c)
          y = Conv(r, v) }""",
        OPSET,
        **weights,
    )


def test_input_and_weight_are_symmetric_int8_and_the_bias_stays_float():
    placement = place(chain())
    assert list(points(placement)) == ["x", "r"]  # not c: Q stands behind the Relu; not y
    assert [(w.weight, w.bias, w.axis) for w in placement.weights] == [("w", None, 0), ("v", None, 0)]
    assert placement.skipped == ()
    expected = reference(chain())[0]
    model = quantized(chain())
    stored = dict(model.graph.initializers)
    assert stored["w_int8"].dtype == ir.DataType.INT8
    assert stored["b"].dtype == ir.DataType.FLOAT
    zero_points = [v.const_value.numpy() for n, v in stored.items() if "zero_point" in n]
    assert zero_points
    assert all(zero.dtype == np.int8 and not zero.any() for zero in zero_points)
    noise = np.mean((reference(model)[0] - expected) ** 2)
    assert 0.0 < noise < 1e-3 * np.mean(expected**2)


@pytest.mark.parametrize(("remainder", "dtype"), [("float16", np.float16), ("bfloat16", None)])
def test_every_scale_is_a_value_of_the_remainder(remainder, dtype):
    dtype = dtype or ir.DataType.BFLOAT16.numpy()
    model = quantized(chain(), {"x": TensorRange(-1.0, 3.1), "r": TensorRange(0.0, 0.7)}, remainder=remainder)
    found = [v.const_value.numpy() for n, v in model.graph.initializers.items() if n.endswith("_scale")]
    assert len(found) == 4
    for scale in found:
        assert np.array_equal(scale.astype(dtype).astype(np.float32), scale)
    # Rounded up, so that nothing clips more than the range says.
    assert 3.1 / 127 <= scales(model)["x"] < 3.1 / 127 * (1 + 2**-7)


RESIDUAL = """g (float[N,16,8,8] x) => (float[N,16,8,8] y)
    {{ a = Conv(x, u)
      i = Relu(a)
      c = Conv(i, w)
      s = Add({})
      r = Relu(s)
      y = Conv(r, v) }}"""


def residual(order="c, i", body=RESIDUAL):
    return onnx_model(
        body.format(order),
        OPSET,
        u=weight(16, 16, 1, 1, seed=2),
        w=weight(16, 16, 1, 1),
        v=weight(16, 16, 1, 1, seed=1),
    )


@pytest.mark.parametrize(("order", "index"), [("c, i", 1), ("i, c", 0)])
def test_only_the_identity_of_a_residual_add_is_quantized(order, index):
    placement = place(residual(order))
    assert list(points(placement)) == ["x", "i", "r"]  # the convolution c is bare
    assert consumers(placement, "i") == {("c", 0), ("s", index)}
    model = quantized(residual(order))
    add = next(node for node in model.graph if node.op_type == "Add")
    assert add.inputs[index].producer().op_type == "DequantizeLinear"
    assert add.inputs[1 - index].producer().op_type == "Conv"
    assert sum(node.op_type == "QuantizeLinear" and node.inputs[0].name == "i" for node in model.graph) == 1


def test_of_two_convolutions_the_later_one_is_bare():
    body = """g (float[N,16,8,8] x) => (float[N,16,8,8] y)
        {{ i = Conv(x, u) a = Conv(x, v) r = Relu(a) c = Conv(r, w) s = Add({}) y = Relu(s) }}"""
    placement = place(residual("i, c", body))
    assert consumers(placement, "i") == {("s", 0)}
    assert "c" not in points(placement)


def test_an_add_without_an_int8_convolution_is_left_in_float():
    body = """g (float[N,16,8,8] x) => (float[N,16,8,8] y)
        {{ a = Conv(x, u) i = Relu(a) b = Conv(x, w) c = Relu(b) s = Add({}) y = Conv(s, v) }}"""
    placement = place(residual("c, i", body))
    assert list(points(placement)) == ["x", "s"]
    assert any("Add" in name and "no convolution in int8" in why for name, why in placement.skipped)


def test_a_convolution_that_others_read_too_is_no_bare_branch():
    body = """g (float[N,16,8,8] x) => (float[N,16,8,8] y, float[N,16,8,8] z)
        {{ a = Conv(x, u) i = Relu(a) c = Conv(i, w) s = Add({}) y = Relu(s) z = Conv(c, v) }}"""
    placement = place(residual("c, i", body))
    assert consumers(placement, "i") == {("c", 0)}
    assert consumers(placement, "c") == {("z", 0)}  # the Add reads it in float


def test_a_layer_asked_to_stay_in_float_reads_its_input_unquantized():
    placement = place(residual(), float_layers=frozenset({"c"}))
    assert list(points(placement)) == ["x", "r"]
    assert [point.consumer.node for point in placement.weights] == ["a", "y"]
    reasons = dict(placement.skipped)
    assert any("asked for" in why for why in reasons.values())
    assert any("no convolution in int8 ends in it" in why for why in reasons.values())


CONCAT = """g (float[N,16,8,8] x) => (float[N,16,4,4] y, float[N,16,8,8] z)
    { a = Conv(x, w) ra = Relu(a)
      z = Conv(ra, o)
      p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(ra)
      b = Conv<strides=[2,2]>(x, v) rb = Relu(b)
      t = Concat<axis=1>(p, rb)
      y = Conv(t, u) }"""


def concat():
    return onnx_model(
        CONCAT,
        OPSET,
        w=weight(16, 16, 1, 1),
        v=weight(16, 16, 1, 1, seed=1),
        o=weight(16, 16, 1, 1, seed=2),
        u=weight(16, 32, 1, 1),
    )


_RANGES = {"x": TensorRange(-1, 1), "ra": TensorRange(0, 2), "rb": TensorRange(0, 8)}


def test_a_concat_shares_one_grid_with_everything_moved_into_it():
    placement = place(concat())
    found = points(placement)
    assert set(found) == {"x", "ra", "p", "rb", "t"}
    assert {found[name].sources for name in ("ra", "p", "rb", "t")} == {("ra", "rb")}
    grids = scales(quantized(concat(), _RANGES))
    assert grids["ra"] == grids["p"] == grids["rb"] == grids["t"] >= 8 / 127


def test_an_untied_concat_leaves_its_inputs_their_grids():
    placement = place(concat(), untied_concats=frozenset({"t"}))
    found = points(placement)
    # Of the inputs, only what others read as well keeps a Q; the rest gets the Concat's, moved back.
    assert set(found) == {"x", "ra", "t"}
    assert found["ra"].sources == ("ra",)
    assert set(found["t"].sources) == {"ra", "rb"}  # the output still covers them all
    assert consumers(placement, "ra") == {("z", 0)}
    assert any("untied" in why for _, why in placement.skipped)
    grids = scales(quantized(concat(), _RANGES, untied_concats=frozenset({"t"})))
    assert grids["ra"] < 2.01 / 127 < 8 / 127 <= grids["t"]


@pytest.mark.parametrize("argument", ["float_layers", "untied_concats"])
def test_names_that_are_no_such_layer_are_refused(argument):
    with pytest.raises(UsageError, match=rf"{argument} names 'ra'.*named by their output tensor"):
        place(concat(), **{argument: frozenset({"ra"})})


def test_an_average_pool_in_int8_has_a_range_of_its_own_behind_it():
    model = onnx_model(
        """g (float[N,16,8,8] x) => (float[N,16,4,4] y)
        { a = AveragePool<kernel_shape=[2,2], strides=[2,2]>(x) y = Conv(a, w) }""",
        w=weight(16, 16, 1, 1),
    )
    found = points(place(model))
    assert list(found) == ["x", "a"]
    assert (found["x"].sources, found["a"].sources) == (("x",), ("a",))


@pytest.mark.parametrize("pool", ["GlobalAveragePool(r)", "ReduceMean<keepdims=1>(r, axes)"])
def test_the_global_pool_and_the_head_stay_in_half_precision(pool):
    axes = {"axes": np.asarray([2, 3])} if "Reduce" in pool else {}
    model = onnx_model(
        f"""g (float[N,16,8,8] x) => (float[N,5] logits)
        {{ c = Conv(x, w) r = Relu(c) p = {pool} f = Flatten(p) logits = Gemm(f, h) }}""",
        w=weight(16, 16, 1, 1),
        h=weight(16, 5),
        **axes,
    )
    placement = place(model)
    assert list(points(placement)) == ["x"]  # neither the pool's input nor the head's, nor the logits
    reasons = " | ".join(why for _, why in placement.skipped)
    assert "no int8 kernel" in reasons
    assert "fully connected" in reasons


def test_a_head_of_millions_of_weights_is_quantized_and_its_logits_are_not():
    model = onnx_model(
        """g (float[N,512] x) => (float[N,8631] logits) { logits = Gemm<transB=1>(x, h, b) }""",
        h=weight(8631, 512),
        b=weight(8631),
    )
    placement = place(model)
    assert list(points(placement)) == ["x"]
    (head,) = placement.weights
    assert (head.weight, head.axis, head.bias) == ("h", 0, None)
    assert placement.skipped == ()


@pytest.mark.parametrize(
    ("shape", "groups", "int8"),
    [
        ((16, 16, 1, 1), 1, True),
        ((8, 24, 3, 3), 1, True),
        ((12, 16, 3, 3), 1, False),
        ((16, 12, 3, 3), 1, False),
        ((16, 1, 3, 3), 16, True),
        ((12, 1, 3, 3), 12, False),
        ((16, 1, 1, 1), 16, False),
        ((32, 16, 1, 1), 2, True),
    ],
)
def test_narrow_convolutions_are_left(shape, groups, int8):
    channels = shape[1] * groups
    model = onnx_model(
        f"""g (float[N,16,8,8] x) => (float[N,{shape[0]},H,W] y)
        {{ c = Conv(x, f) r = Relu(c) y = Conv<group={groups}>(r, w) }}""",
        f=weight(channels, 16, 1, 1),
        w=weight(*shape),
    )
    placement = place(model)
    assert ("y" in {point.consumer.node for point in placement.weights}) is int8
    if not int8:
        assert any("channels" in why for _, why in placement.skipped)


PIXELS = """g (uint8[N,8,8,3] image) => (float[N,16,H,W] y)
    {{ f = Cast<to=1>(image) t = Transpose<perm=[0,3,1,2]>(f) {} y = Conv{}({}, w) }}"""


def pixels(prologue="", attributes="", data="t"):
    model = onnx_model(
        PIXELS.format(prologue, attributes, data), OPSET, w=weight(16, 3, 3, 3), m=weight(3, 1, 1)
    )
    center_pixels(model)
    return model


def test_centred_pixels_have_scale_one_and_no_range():
    placement = place(pixels())
    (point,) = placement.activations
    assert (point.scale, point.sources) == (1.0, ())
    assert placement.observed == ()
    assert [weight_point.consumer.node for weight_point in placement.weights] == ["y"]


@pytest.mark.parametrize("remainder", ["float16", "bfloat16"])
def test_every_pixel_value_passes_the_first_grid_unchanged(remainder):
    """All 256 of them, executed: Q, DQ and the shift give back the pixel, bit for bit."""
    model = pixels()
    insert_qdq(model, place(model, remainder=remainder), {})
    restored = next(node for node in model.graph if node.op_type == "DequantizeLinear").outputs[0]
    model.graph.outputs.append(restored)
    image = np.arange(256, dtype=np.uint8).repeat(3)[: 8 * 8 * 3 * 4].reshape(4, 8, 8, 3)
    seen = reference(model, image=image)[1]
    assert np.array_equal(seen.transpose(0, 2, 3, 1) + 128, image)


def test_weights_on_the_grid_make_the_first_layer_exact():
    """Integers all the way: pixels, weights and bias are exact, so the output is bit for bit."""
    rng = np.random.default_rng(0)
    w = rng.integers(-127, 128, (16, 3, 3, 3)) / 128.0
    w[:, 0, 0, 0] = 127 / 128  # the largest of each channel, so that its scale is 1/128
    image = rng.integers(0, 256, (2, 8, 8, 3), np.uint8)
    model = onnx_model(PIXELS.format("", "", "t"), OPSET, w=w)
    expected = reference(model, image=image)[0]
    center_pixels(model)
    insert_qdq(model, place(model), {})
    assert np.array_equal(reference(model, image=image)[0], expected)


@pytest.mark.parametrize(
    ("prologue", "data", "int8"), [("n = Sub(t, m)", "n", True), ("", "t", False)], ids=["prologue", "raw"]
)
def test_a_first_convolution_that_pads(prologue, data, int8):
    """A subtraction left there is an activation like any other; raw pixels stay exact in half precision."""
    placement = place(pixels(prologue, "<pads=[1,1,1,1]>", data))
    assert list(points(placement)) == (["n"] if int8 else [])
    if not int8:
        assert any("one of their eight bits" in why for _, why in placement.skipped)


@pytest.mark.parametrize("model", [chain, residual, concat, pixels], ids=lambda make: make.__name__)
def test_one_calibration_serves_every_placement(model):
    observed = observed_by_all(model())
    for family_place in PLACEMENTS.values():
        assert set(family_place(model()).observed) <= set(observed)
