"""Layers as matrices, against ONNX's reference evaluator."""

from __future__ import annotations

import numpy as np
import pytest
from onnx_text import onnx_model, reference, weight
from tolerances import SAME_SUMS_ATOL

from calibration.correction.linear import linear_layer
from calibration.placement.layers import weight_point
from pipeline.artifacts import QuantParams


def layer_of(text, **weights):
    model = onnx_model(text, **weights)
    (node,) = model.graph
    return model, linear_layer(node, weight_point(node))


@pytest.mark.parametrize(
    ("attributes", "shape"),
    [
        ("pads=[1,1,1,1]", (6, 4, 3, 3)),
        ("pads=[0,1,2,0], strides=[2,1]", (6, 4, 3, 2)),
        ("dilations=[2,1], pads=[2,0,2,0]", (6, 4, 3, 1)),
        ("group=2", (6, 2, 1, 1)),
        ("group=4, pads=[1,1,1,1], strides=[2,2]", (4, 1, 3, 3)),
    ],
)
def test_samples_of_a_convolution_give_its_outputs(attributes, shape):
    w = weight(*shape)
    model, linear = layer_of(
        f"g (float[3,4,7,6] x) => (float[3,{shape[0]},h,v] y) {{ y = Conv<{attributes}>(x, w) }}", w=w
    )
    x = np.random.default_rng(1).standard_normal((3, 4, 7, 6)).astype(np.float32)
    (y,) = reference(model, x=x)
    drawn = linear.samples(x, None, y, np.arange(3), 60, np.random.default_rng(0))
    computed = drawn.inputs @ linear.matrix(w).transpose(0, 2, 1).astype(np.float32)
    np.testing.assert_allclose(computed, drawn.outputs, rtol=0, atol=SAME_SUMS_ATOL)
    assert drawn.inputs.shape[1] >= 60 or drawn.inputs.shape[1] == y[:, 0].size
    np.testing.assert_array_equal(linear.weight(linear.matrix(w), w.shape), w)


@pytest.mark.parametrize(("trans", "shape"), [(0, (5, 3)), (1, (3, 5))])
def test_a_gemm_is_one_group(trans, shape):
    w = weight(*shape)
    model, linear = layer_of(
        f"g (float[4,5] x) => (float[4,3] y) {{ y = Gemm<transB={trans}>(x, w, b) }}", w=w, b=weight(3)
    )
    x = np.random.default_rng(1).standard_normal((4, 5)).astype(np.float32)
    (y,) = reference(model, x=x)
    drawn = linear.samples(x, None, y, np.arange(4), 1, np.random.default_rng(0))
    computed = drawn.inputs @ linear.matrix(w).transpose(0, 2, 1).astype(np.float32) + weight(3)
    np.testing.assert_allclose(computed[0], y, rtol=0, atol=SAME_SUMS_ATOL)
    np.testing.assert_array_equal(linear.weight(linear.matrix(w), w.shape), w)


def test_integers_are_read_on_their_grid():
    _, linear = layer_of(
        "g (float[1,2,3,3] x) => (float[1,1,3,3] y) { y = Conv<pads=[1,1,1,1]>(x, w) }", w=weight(1, 2, 3, 3)
    )
    grid = QuantParams(np.asarray(0.5, np.float32), np.asarray(7, np.uint8), "uint8")
    stored = np.full((1, 2, 3, 3), 9, np.uint8)
    drawn = linear.samples(
        stored, grid, np.zeros((1, 1, 3, 3), np.float32), np.arange(1), 9, np.random.default_rng(0)
    )
    assert set(np.unique(drawn.inputs)) == {0.0, 1.0}, "padding is a real zero, not the integer zero"


def test_what_cannot_be_seen_as_a_matrix_says_why():
    model = onnx_model(
        "g (float[1,2,4,4] x) => (float[1,3,8,8] y) { y = ConvTranspose<strides=[2,2]>(x, w) }",
        w=weight(2, 3, 2, 2),
    )
    (node,) = model.graph
    assert "ConvTranspose" in linear_layer(node, weight_point(node))
    padded = onnx_model(
        'g (float[1,2,4,4] x) => (float[1,3,4,4] y) { y = Conv<auto_pad="SAME_UPPER">(x, w) }',
        w=weight(3, 2, 3, 3),
    )
    (node,) = padded.graph
    assert "padding" in linear_layer(node, weight_point(node))
