"""Batch norm into the linear layer before it."""

from __future__ import annotations

import numpy as np
import pytest
from onnx_text import (
    assert_left_alone,
    assert_rewrites,
    batch_norm,
    onnx_model,
    positive,
    reference,
    relative_error,
    weight,
)
from tolerances import FOLDED_RELATIVE

from pipeline.passes.batch_norm import fold_batch_norm

_BN = "z = BatchNormalization <epsilon = 0.1> (y, gamma, beta, mean, var)"


@pytest.mark.parametrize(
    ("layer", "shape", "channels"),
    [
        ("Conv <pads = [1, 1, 1, 1]> (x, w, b)", (6, 4, 3, 3), 6),
        ("Conv <pads = [1, 1, 1, 1], group = 4> (x, w)", (4, 1, 3, 3), 4),
        ("Conv <group = 2> (x, w, b)", (6, 2, 3, 3), 6),
        ("ConvTranspose (x, w, b)", (4, 6, 3, 3), 6),
        ("ConvTranspose <group = 2, strides = [2, 2]> (x, w)", (4, 3, 2, 2), 6),
    ],
    ids=["conv", "depthwise", "grouped", "transposed", "grouped-transposed"],
)
def test_folds_into_convolutions(layer: str, shape: tuple[int, ...], channels: int) -> None:
    weights = {"w": weight(*shape), **batch_norm(channels)}
    if "b)" in layer:
        weights["b"] = weight(channels)
    model = onnx_model(
        f"agraph (float[N,4,7,7] x) => (float[N,{channels},H,W] z) {{ y = {layer} {_BN} }}", **weights
    )
    assert_rewrites(fold_batch_norm, model, 1, {layer.split()[0].split("(")[0]: 1})


@pytest.mark.parametrize(
    ("layer", "weights"),
    [
        ("Gemm <transB = 1> (x, w)", {"w": weight(5, 8)}),
        ("Gemm <alpha = 0.5, beta = 3.0> (x, w, b)", {"w": weight(8, 5), "b": weight(1, 5)}),
        ("Gemm (x, w, b)", {"w": weight(8, 5), "b": weight(1)}),
        ("MatMul (x, w)", {"w": weight(8, 5)}),
    ],
    ids=["gemm", "gemm-alpha-beta", "gemm-scalar-bias", "matmul"],
)
def test_folds_into_matrix_products(layer: str, weights: dict[str, np.ndarray]) -> None:
    model = onnx_model(
        f"agraph (float[N,8] x) => (float[N,5] z) {{ y = {layer} {_BN} }}", **weights, **batch_norm(5)
    )
    # MatMul has no bias, so it becomes a Gemm.
    assert_rewrites(fold_batch_norm, model, 1, {"Gemm": 1})


def test_takes_a_separate_bias_along() -> None:
    """Keras and Caffe write Conv, Add, BatchNormalization."""
    model = onnx_model(
        f"agraph (float[N,4,7,7] x) => (float[N,6,5,5] z) {{ c = Conv (x, w) y = Add (c, b) {_BN} }}",
        w=weight(6, 4, 3, 3),
        b=weight(6, 1, 1),
        **batch_norm(6),
    )
    assert_rewrites(fold_batch_norm, model, 2, {"Conv": 1})


def test_a_shared_bias_is_copied_not_changed() -> None:
    """Exporters give one zero bias to all convolutions; folding one must not shift the other."""
    model = onnx_model(
        f"""agraph (float[N,4,5,5] x) => (float[N,6,5,5] z, float[N,6,5,5] other) {{
            y = Conv (x, w, b) {_BN} other = Conv (x, w2, b) }}""",
        w=weight(6, 4, 1, 1),
        w2=weight(6, 4, 1, 1, seed=9),
        b=weight(6),
        **batch_norm(6),
    )
    assert_rewrites(fold_batch_norm, model, 1, {"Conv": 2})


def test_epsilon_is_part_of_the_algebra() -> None:
    """The check would see a wrong epsilon: with 0.1 in place of 0.001 the result is another."""
    text = "agraph (float[N,4,7,7] x) => (float[N,6,5,5] z) {{ y = Conv (x, w) {} }}"
    weights = {"w": weight(6, 4, 3, 3), **batch_norm(6)}
    right = reference(onnx_model(text.format(_BN.replace("0.1", "0.001")), **weights))[0]
    wrong = onnx_model(text.format(_BN), **weights)
    fold_batch_norm(wrong)
    assert relative_error(right, reference(wrong)[0]) > 100 * FOLDED_RELATIVE


_CONV = "y = Conv (x, w)"


@pytest.mark.parametrize(
    ("nodes", "outputs", "reason"),
    [
        (f"{_CONV} {_BN} s = Relu (y)", "float[N,6,5,5] z, float[N,6,5,5] s", "'y' has 2 consumers"),
        (f"{_CONV} {_BN}", "float[N,6,5,5] z, float[N,6,5,5] y", "'y' is an output of the graph"),
        (
            f"{_CONV} {_BN} s = Conv (x, w)",
            "float[N,6,5,5] z, float[N,6,5,5] s",
            "weight 'w' of Conv 'y' is shared",
        ),
        (
            f"c = Conv (x, w) y = Relu (c) {_BN}",
            "float[N,6,5,5] z",
            "comes from Relu 'y', which is not a linear layer",
        ),
        (f"y = Conv (x, v) {_BN}", "float[N,6,5,5] z", "weight 'v' of Conv 'y' is not an initializer"),
    ],
    ids=["second-consumer", "graph-output", "shared-weight", "not-linear", "computed-weight"],
)
def test_leaves_alone(nodes: str, outputs: str, reason: str) -> None:
    weights = {"w": weight(6, 4, 3, 3), **batch_norm(6)}
    if "(x, v)" in nodes:
        nodes = f"v = Abs (w) {nodes}"
    model = onnx_model(f"agraph (float[N,4,7,7] x) => ({outputs}) {{ {nodes} }}", **weights)
    assert_left_alone(fold_batch_norm, model, reason)


def test_leaves_alone_the_model_input() -> None:
    model = onnx_model(f"agraph (float[N,6,7,7] y) => (float[N,6,7,7] z) {{ {_BN} }}", **batch_norm(6))
    assert_left_alone(fold_batch_norm, model, "the model's input, not a linear layer")


def test_leaves_alone_training_mode() -> None:
    training = "z, m, v = BatchNormalization <training_mode = 1> (y, gamma, beta, mean, var)"
    model = onnx_model(
        f"agraph (float[N,4,7,7] x) => (float[N,6,5,5] z) {{ {_CONV} {training} }}",
        w=weight(6, 4, 3, 3),
        **batch_norm(6),
    )
    assert_left_alone(fold_batch_norm, model, "is in training mode")


def test_leaves_alone_a_variance_that_gives_no_finite_weight() -> None:
    weights = {"w": weight(6, 4, 3, 3), **batch_norm(6)} | {"var": -positive(6)}
    model = onnx_model(f"agraph (float[N,4,7,7] x) => (float[N,6,5,5] z) {{ {_CONV} {_BN} }}", **weights)
    assert_left_alone(fold_batch_norm, model, "give no finite scale")
