"""Pixels minus 128 before the first convolution, exactly, wherever that is possible."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx_text import onnx_model, op_counts, reference, relative_error, weight
from tolerances import FOLDED_RELATIVE

from pipeline.errors import PassError
from pipeline.passes import GraphPass, run_passes
from pipeline.passes.center_pixels import CENTER_PIXELS, center_pixels

_BODY = """g (uint8[N,9,9,3] image) => (float[N,4,H,W] z)
    {{ {} c = {} z = Relu(c) }}"""
_TRANSPOSE_FIRST = "t = Transpose<perm=[0,3,1,2]>(image) x = Cast<to=1>(t)"
_CAST_FIRST = "t = Cast<to=1>(image) x = Transpose<perm=[0,3,1,2]>(t)"
_VALID = "Conv<strides=[2,2]>(x, w, b)"


def _model(prologue=_TRANSPOSE_FIRST, convolution=_VALID):
    return onnx_model(
        _BODY.format(prologue, convolution), w=weight(4, 3, 3, 3), b=weight(4), m=weight(3, 1, 1)
    )


def _pixels():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 9, 9, 3), dtype=np.uint8)
    pixels[0, 0, :2, 0] = 0, 255
    return pixels


@pytest.mark.parametrize("prologue", [_TRANSPOSE_FIRST, _CAST_FIRST])
@pytest.mark.parametrize("convolution", [_VALID, "Conv(x, w)", 'Conv<auto_pad="VALID">(x, w, b)'])
def test_the_shift_goes_into_the_bias(prologue, convolution):
    model = _model(prologue, convolution)
    expected = reference(model, image=_pixels())[0]
    centered, (record,) = run_passes(model, (CENTER_PIXELS,))
    assert record.skipped == ()
    assert [node.op_type for node in centered.graph] == ["Cast", "Transpose", "Sub", "Conv", "Relu"]
    assert relative_error(expected, reference(centered, image=_pixels())[0]) < FOLDED_RELATIVE
    assert center_pixels(centered).n_rewrites == 0


def test_a_wrong_center_is_caught():
    """The verification can fail: a shift that the bias does not make up for."""

    def wrong(model):
        report = center_pixels(model)
        center = next(node.inputs[1] for node in model.graph if node.op_type == "Sub")
        center.const_value = ir.tensor(np.float32(127), name=center.name)
        return report

    with pytest.raises(PassError, match="numerics"):
        run_passes(_model(), (GraphPass("wrong_center", wrong),))


@pytest.mark.parametrize(
    ("prologue", "convolution", "reason", "n_rewrites"),
    [
        (_TRANSPOSE_FIRST, "Conv<pads=[1,1,1,1]>(x, w, b)", "pads with zeros", 1),
        (_CAST_FIRST, "Conv<pads=[1,1,1,1]>(x, w, b)", "pads with zeros", 0),
        (_TRANSPOSE_FIRST + " y = Sub(x, m)", "Conv(y, w, b)", "not to a convolution", 1),
        (_TRANSPOSE_FIRST + " y = Neg(x) v = Conv(y, w)", "Conv(x, w, b)", "has 2 consumers", 1),
    ],
)
def test_left_alone_with_a_reason_but_cast_first(prologue, convolution, reason, n_rewrites):
    model = _model(prologue, convolution)
    report = center_pixels(model)
    assert report.n_rewrites == n_rewrites
    assert reason in report.skipped[0][1]
    assert model.graph[0].op_type == "Cast"
    assert sum(node.op_type == "Sub" for node in model.graph) == ("Sub" in prologue)
    assert center_pixels(model).n_rewrites == 0


def test_a_float_input_is_none_of_its_business():
    model = onnx_model("g (float[N,3,9,9] x) => (float[N,4,H,W] z) { z = Conv(x, w) }", w=weight(4, 3, 3, 3))
    assert center_pixels(model).skipped == ()
    assert op_counts(model) == {"Conv": 1}
