"""Raw pixels in: normalization and colour order in the first convolution, or before it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from onnx_text import onnx_model, op_counts, reference, relative_error, weight
from tolerances import FOLDED_RELATIVE

from pipeline.artifacts import PreprocessSpec, TensorSpec
from pipeline.errors import PassError
from pipeline.onnx_files import interface
from pipeline.passes import fold_preprocess, run_passes
from pipeline.preprocess import normalize

_IMAGENET = PreprocessSpec(input_hw=(9, 9), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
_SCALE_ONLY = PreprocessSpec(input_hw=(9, 9))
_NCHW = "agraph (float[N,3,9,9] x) => (float[N,4,H,W] z) {{ c = {} z = Relu (c) }}"
_NHWC = """agraph (float[N,9,9,3] x) => (float[N,4,H,W] z) {{
    t = Transpose <perm = [0, 3, 1, 2]> (x) c = {} z = Relu (c) }}"""
_WEIGHTS = {"w": weight(4, 3, 3, 3), "b": weight(4), "w1": weight(4, 3, 1, 1)}
_PADDED = "Conv <pads = [1, 1, 1, 1]> (x, w, b)"


def _check(model: ir.Model, spec: PreprocessSpec, color: str, ops: dict[str, int]) -> tuple[str, ...]:
    """Fold, compare with the one implementation of normalization, and return the reasons given."""
    pixels = np.random.default_rng(0).integers(0, 256, (2, 9, 9, 3), dtype=np.uint8)
    pixels[0, 0, 0] = 0, 255, 128
    expected = reference(model, x=normalize(pixels, spec, color))[0]
    folded, (record,) = run_passes(model, (fold_preprocess(spec, color),))
    assert dict(op_counts(folded)) == ops
    assert interface(folded)[0] == (TensorSpec("image", "uint8", ("N", 9, 9, 3)),)
    assert relative_error(expected, reference(folded, image=pixels)[0]) < FOLDED_RELATIVE
    _, (second,) = run_passes(folded, (fold_preprocess(spec, color),))
    assert (second.n_rewrites, second.skipped) == (0, ())
    return tuple(reason for _, reason in record.skipped)


@pytest.mark.parametrize("color", ["RGB", "BGR"])
@pytest.mark.parametrize("trained_on", ["RGB", "BGR"])
@pytest.mark.parametrize(
    ("spec", "convolution"),
    [
        (_IMAGENET, "Conv (x, w, b)"),
        (_IMAGENET, "Conv <strides = [2, 2]> (x, w)"),
        (_IMAGENET, 'Conv <auto_pad = "SAME_UPPER"> (x, w1, b)'),
        (_SCALE_ONLY, _PADDED),
    ],
    ids=["valid", "strided", "pointwise", "padded-zero-shift"],
)
def test_folds_exactly(spec: PreprocessSpec, convolution: str, trained_on: str, color: str) -> None:
    spec = replace(spec, color=trained_on)
    model = onnx_model(_NCHW.format(convolution), **_WEIGHTS)
    assert _check(model, spec, color, {"Transpose": 1, "Cast": 1, "Conv": 1, "Relu": 1}) == ()


@pytest.mark.parametrize("color", ["RGB", "BGR"])
def test_a_padded_convolution_keeps_only_the_subtraction(color: str) -> None:
    model = onnx_model(_NCHW.format(_PADDED), **_WEIGHTS)
    reasons = _check(model, _IMAGENET, color, {"Transpose": 1, "Cast": 1, "Sub": 1, "Conv": 1, "Relu": 1})
    pixel = "(123.68, 116.28, 103.53)" if color == "RGB" else "(103.53, 116.28, 123.68)"
    assert len(reasons) == 1
    assert pixel in reasons[0]


@pytest.mark.parametrize("color", ["RGB", "BGR"])
@pytest.mark.parametrize(
    ("nodes", "reason"),
    [
        ("Conv (x, w, b) s = Relu (x)", "'x' has 2 consumers"),
        ("Conv <group = 3> (x, wd)", "has 3 groups"),
        ("MaxPool <kernel_shape = [2, 2]> (x)", "goes to MaxPool 'c', not to a convolution"),
    ],
)
def test_anything_else_keeps_the_whole_prologue(nodes: str, reason: str, color: str) -> None:
    text = _NCHW.replace("N,4", "N,C")
    if "s = " in nodes:
        text = text.replace("H,W] z)", "H,W] z, float[N,3,9,9] s)")
    model = onnx_model(text.format(nodes), wd=weight(3, 1, 3, 3), **_WEIGHTS)
    own = dict(op_counts(model))
    prologue = {"Transpose": 1, "Cast": 1, "Mul": 1, "Add": 1} | ({"Gather": 1} if color == "BGR" else {})
    (why,) = _check(model, _IMAGENET, color, own | prologue)
    assert reason in why


@pytest.mark.parametrize(
    ("convolution", "extra"), [("Conv (t, w, b)", {}), ("Conv <pads = [1, 1, 1, 1]> (t, w)", {"Sub": 1})]
)
def test_the_transpose_of_an_nhwc_network_is_reused(convolution: str, extra: dict[str, int]) -> None:
    spec = PreprocessSpec(input_hw=(9, 9), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4), layout="NHWC")
    model = onnx_model(_NHWC.format(convolution), **_WEIGHTS)
    _check(model, spec, "BGR", {"Transpose": 1, "Cast": 1, "Conv": 1, "Relu": 1} | extra)


def test_an_nhwc_network_without_a_transpose_gets_a_prologue() -> None:
    spec = PreprocessSpec(input_hw=(9, 9), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4), layout="NHWC")
    model = onnx_model("agraph (float[N,9,9,3] x) => (float[N,9,9,3] z) { z = Relu (x) }")
    (why,) = _check(model, spec, "BGR", {"Cast": 1, "Gather": 1, "Mul": 1, "Add": 1, "Relu": 1})
    assert "goes to Relu" in why


def test_the_wrong_colour_order_is_caught() -> None:
    """Verification compares with pixels in the order declared: swapped channels are another network."""
    model = onnx_model(_NCHW.format("Conv (x, w, b)"), **_WEIGHTS)
    right, wrong = fold_preprocess(_IMAGENET, "BGR"), fold_preprocess(_IMAGENET, "RGB")
    mixed = type(right)("mixed", right.rewrite, right.tolerance, wrong.original_feeds)
    with pytest.raises(PassError, match="moved by") as caught:
        run_passes(model, (mixed,))
    assert caught.value.step == "numerics"


def test_another_layout_than_the_spec_says_is_refused() -> None:
    model = onnx_model(_NHWC.format("Conv (t, w, b)"), **_WEIGHTS)
    with pytest.raises(PassError, match="expected rank 4 with 3 channels on axis 1"):
        run_passes(model, (fold_preprocess(_IMAGENET, "BGR"),))
