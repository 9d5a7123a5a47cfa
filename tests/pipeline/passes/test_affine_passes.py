"""Mul, Add, Sub, Div by constants into the linear layers before and after them, and residual scales."""

from __future__ import annotations

import numpy as np
import pytest
from onnx_text import assert_left_alone, assert_rewrites, batch_norm, onnx_model, positive, reference, weight

from pipeline.passes.affine import fold_affine
from pipeline.passes.affine_before import fold_affine_before
from pipeline.passes.residual_scale import fold_residual_scale


@pytest.mark.parametrize(
    ("chain", "n_nodes"),
    [
        ("m = Mul (y, s) z = Add (t, m)", 2),
        ("m = Sub (y, t) z = Div (m, s)", 2),
        ("z = Sub (t, y)", 1),
        ("m = Mul (half, y) n = Add (m, t) z = Mul (n, s)", 3),
    ],
)
@pytest.mark.parametrize("shape", [(6, 1, 1), (1, 6, 1, 1)])
def test_folds_chains_after_a_convolution(chain: str, n_nodes: int, shape: tuple[int, ...]) -> None:
    model = onnx_model(
        f"agraph (float[N,4,7,7] x) => (float[N,6,7,7] z) {{ y = Conv <pads = [1, 1, 1, 1]> (x, w) {chain} }}",
        w=weight(6, 4, 3, 3),
        s=positive(*shape),
        t=weight(*shape),
        half=np.array(0.5),
    )
    assert_rewrites(fold_affine, model, n_nodes, {"Conv": 1})


def test_a_dense_bias_makes_matmul_a_gemm() -> None:
    model = onnx_model(
        "agraph (float[N,8] x) => (float[N,5] z) { y = MatMul (x, w) z = Add (y, t) }",
        w=weight(8, 5),
        t=weight(5),
    )
    assert_rewrites(fold_affine, model, 1, {"Gemm": 1})


def test_a_matmul_of_higher_rank_takes_a_scale_but_no_bias() -> None:
    text = "agraph (float[N,3,8] x) => (float[N,3,5] z) {{ y = MatMul (x, w) z = {} (y, t) }}"
    weights = {"w": weight(8, 5), "t": weight(5)}
    assert_rewrites(fold_affine, onnx_model(text.format("Mul"), **weights), 1, {"MatMul": 1})
    assert_left_alone(fold_affine, onnx_model(text.format("Add"), **weights), "as Gemm cannot")


@pytest.mark.parametrize(
    ("op", "constant", "reason"),
    [
        ("Mul (y, c)", weight(5, 5), "neither a scalar nor one value a channel"),
        ("Add (y, c)", weight(5), "neither a scalar nor one value a channel"),
        ("Div (c, y)", weight(6, 1, 1), "divides a constant"),
        ("Div (y, c)", np.zeros((6, 1, 1)), "or by zero"),
        ("Mul (y, c)", np.full((6, 1, 1), 3e38), "would not be finite"),
    ],
    ids=["spatial", "width", "reciprocal", "zero", "overflow"],
)
def test_leaves_alone_after(op: str, constant: np.ndarray, reason: str) -> None:
    model = onnx_model(
        f"agraph (float[N,4,7,7] x) => (float[N,6,5,5] z) {{ y = Conv (x, w) z = {op} }}",
        w=10 * weight(6, 4, 3, 3),
        c=constant,
    )
    assert_left_alone(fold_affine, model, reason)


def test_leaves_alone_a_constant_that_adds_channels() -> None:
    model = onnx_model(
        "agraph (float[N,4,7,7] x) => (float[N,6,5,5] z) { y = Conv (x, w) z = Mul (y, c) }",
        w=weight(1, 4, 3, 3),
        c=weight(6, 1, 1),
    )
    assert_left_alone(fold_affine, model, "broadcasts over more channels")


_RESIDUAL = """agraph (float[N,8,5,5] x) => (float[N,8,5,5] z) {{
    h = Relu (x) u = Conv (h, w, b) m = {} a = {} z = Relu (a) }}"""
_UP = {"w": weight(8, 8, 1, 1), "b": weight(8), "s": np.array(0.17), "p": positive(8, 1, 1)}


@pytest.mark.parametrize("scale", ["Mul (u, s)", "Mul (s, u)", "Mul (u, p)", "Div (u, p)"])
@pytest.mark.parametrize("add", ["Add (m, x)", "Add (x, m)", "Sum (x, m)"])
def test_residual_scale(scale: str, add: str) -> None:
    folded = assert_rewrites(
        fold_residual_scale,
        onnx_model(_RESIDUAL.format(scale, add), **_UP),
        1,
        {"Relu": 2, "Conv": 1, add.split()[0]: 1},
    )
    # The bias must be scaled as well, not the weight alone.
    bias = next(node for node in folded.graph if node.op_type == "Conv").inputs[2]
    by = _UP["s"] if "s" in scale.split("(")[1] else _UP["p"].reshape(-1)
    np.testing.assert_allclose(
        bias.const_value.numpy(), _UP["b"] / by if "Div" in scale else _UP["b"] * by, rtol=1e-6
    )


def test_residual_scale_is_not_taken_for_plain_arithmetic() -> None:
    """The report must show it under its own name."""
    model = onnx_model(_RESIDUAL.format("Mul (u, s)", "Add (x, m)"), **_UP)
    assert fold_affine(model).n_rewrites == 0
    plain = onnx_model(
        "agraph (float[N,8,5,5] x) => (float[N,8,5,5] z) { u = Conv (x, w, b) z = Mul (u, s) }", **_UP
    )
    assert fold_residual_scale(plain).n_rewrites == 0


def test_residual_scale_of_something_that_is_not_linear() -> None:
    model = onnx_model(
        "agraph (float[N,8,5,5] x) => (float[N,8,5,5] z) { u = Relu (x) m = Mul (u, s) z = Add (x, m) }",
        s=_UP["s"],
    )
    assert_left_alone(fold_residual_scale, model, "comes from Relu 'u', which is not a linear layer")


_BEFORE = "agraph (float[N,4,7,7] x) => (float[N,6,H,W] z) {{ y = {} z = {} }}"
_BN = "BatchNormalization (x, gamma, beta, mean, var)"


@pytest.mark.parametrize(
    ("affine", "layer", "shape"),
    [
        (_BN, "Conv (y, w, b)", (6, 4, 3, 3)),
        (_BN, "Conv <group = 2> (y, w)", (6, 2, 3, 3)),
        (_BN, "Conv <pads = [1, 1, 1, 1], auto_pad = \"VALID\"> (y, w, b)", (6, 4, 3, 3)),
        ("Sub (x, t)", "Conv (y, w, b)", (6, 4, 3, 3)),
        ("Sub (t, x)", "Conv (y, w)", (6, 4, 3, 3)),
        ("Mul (x, t)", "Conv <pads = [1, 1, 1, 1]> (y, w, b)", (6, 4, 3, 3)),
        ("Div (x, half)", "Conv <auto_pad = \"SAME_UPPER\"> (y, w, b)", (6, 4, 3, 3)),
        (_BN, "Conv <auto_pad = \"SAME_UPPER\"> (y, w, b)", (6, 4, 1, 1)),
        ("Mul (x, t)", "ConvTranspose <group = 2, strides = [2, 2]> (y, w, b)", (4, 3, 3, 3)),
    ],
)  # fmt: skip
def test_folds_before_a_convolution_where_exact(affine: str, layer: str, shape: tuple[int, ...]) -> None:
    model = onnx_model(
        _BEFORE.format(affine, layer),
        w=weight(*shape),
        b=weight(6),
        t=weight(4, 1, 1),
        half=np.array(0.5),
        **batch_norm(4),
    )
    assert_rewrites(fold_affine_before, model, 1, {layer.split()[0]: 1})


@pytest.mark.parametrize(
    ("layer", "w", "t"),
    [
        ("Gemm (y, w, b)", weight(8, 5), weight(8)),
        ("Gemm <transB = 1, alpha = 0.5, beta = 2.0> (y, w, b)", weight(5, 8), weight(1, 8)),
        ("MatMul (y, w)", weight(8, 5), weight(8)),
    ],
)
def test_folds_before_a_matrix_product(layer: str, w: np.ndarray, t: np.ndarray) -> None:
    model = onnx_model(
        f"agraph (float[N,8] x) => (float[N,5] z) {{ m = Mul (x, s) y = Add (m, t) z = {layer} }}",
        w=w,
        b=weight(5),
        s=positive(8),
        t=t,
    )
    assert_rewrites(fold_affine_before, model, 2, {"Gemm": 1})


@pytest.mark.parametrize(
    ("affine", "layer", "reason"),
    [
        (_BN, "Conv <pads = [1, 1, 1, 1]> (y, w)", "pads with zeros"),
        (_BN, 'Conv <auto_pad = "SAME_LOWER"> (y, w)', "pads with zeros"),
        ("Add (x, t)", "ConvTranspose (y, wt)", "sums a varying number of inputs"),
        ("Mul (x, t)", "Relu (y)", "goes to Relu 'z', which is not a linear layer"),
        ("Mul (x, t)", "Sum (y, y)", "'y' has 2 consumers"),
    ],
)
def test_leaves_alone_before(affine: str, layer: str, reason: str) -> None:
    weights = {"w": weight(6, 4, 3, 3), "wt": weight(4, 6, 3, 3), "t": weight(4, 1, 1), **batch_norm(4)}
    text = _BEFORE if "w" in layer else _BEFORE.replace("N,6", "N,4")
    assert_left_alone(fold_affine_before, onnx_model(text.format(affine, layer), **weights), reason)


def test_leaves_alone_a_constant_that_widens_the_input() -> None:
    model = onnx_model(
        "agraph (float[N,1,7,7] x) => (float[N,6,5,5] z) { y = Mul (x, c) z = Conv (y, w) }",
        c=weight(4, 1, 1),
        w=weight(6, 4, 3, 3),
    )
    assert_left_alone(fold_affine_before, model, "may widen its input")


def test_folding_a_shift_before_padding_would_be_wrong() -> None:
    """Why the padded case is left alone: the same graph without padding folds, and differs at the border."""
    weights = {"w": weight(6, 4, 3, 3), "t": 3.0 + weight(4, 1, 1)}
    padded = onnx_model(_BEFORE.format("Add (x, t)", "Conv <pads = [1, 1, 1, 1]> (y, w)"), **weights)
    expected = reference(padded)[0]
    wrong = onnx_model(_BEFORE.format("Add (x, t)", "Conv (y, w)"), **weights)
    fold_affine_before(wrong)
    convolution = next(iter(wrong.graph))
    convolution.attributes["pads"] = next(n for n in padded.graph if n.op_type == "Conv").attributes["pads"]
    got = reference(wrong)[0]
    np.testing.assert_allclose(got[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1], atol=1e-4)
    assert np.abs(got - expected).max() > 0.1
