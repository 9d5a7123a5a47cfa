"""Clean-up, padding, and consecutive 1×1 convolutions."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx_text import assert_left_alone, assert_rewrites, onnx_model, reference, weight

from pipeline.passes.pad import fold_pad
from pipeline.passes.pointwise import merge_pointwise
from pipeline.passes.tidy import tidy


def test_tidy_leaves_only_what_computes() -> None:
    model = onnx_model(
        """agraph (float[N,8] x) => (float[N,5] z) {
            wt = Transpose <perm = [1, 0]> (w)
            half = Constant <value_float = 0.5> ()
            two = Constant <value = float {2.0}> ()
            one = Mul (half, two)
            i = Identity (x)
            unused = Relu (i)
            d = Dropout (i)
            y = Gemm (d, wt)
            z = Mul (y, one)
        }""",
        w=weight(5, 8),
    )
    folded = assert_rewrites(tidy, model, 7, {"Gemm": 1, "Mul": 1})
    assert set(folded.graph.initializers) == {"wt", "one"}


def test_tidy_makes_a_computed_reshape_constant_and_keeps_the_batch_free() -> None:
    """A free batch reaches the head by Shape, Gather, Concat, which keeps the input in use by two nodes."""
    model = onnx_model(
        """agraph (float[N,4,2,2] x) => (float[N,16] z) {
            y = Relu (x)
            s = Shape (x)
            n = Gather (s, zero)
            c = Concat <axis = 0> (n, rest)
            z = Reshape (y, c)
        }""",
        zero=np.array([0]),
        rest=np.array([16]),
    )
    folded = assert_rewrites(tidy, model, 3, {"Relu": 1, "Reshape": 1})
    for batch in (1, 3):
        assert reference(folded, x=np.ones((batch, 4, 2, 2), np.float32))[0].shape == (batch, 16)


def test_tidy_keeps_a_training_dropout() -> None:
    model = onnx_model(
        """agraph (float[N,8] x) => (float[N,8] z) {
            training = Constant <value = bool {1}> ()
            y = Dropout (x, ratio, training)
            z = Relu (y)
        }""",
        ratio=np.array(0.5),
    )
    tidy(model)
    assert [node.op_type for node in model.graph] == ["Dropout", "Relu"]


_PAIR = """agraph (float[N,{c0},9,9] x) => (float[N,{c2},H,W] z) {{
    y = Conv <strides = [{s1}, {s1}]> (x, w1, b1) z = Conv <strides = [{s2}, {s2}]> (y, w2) }}"""


def _pair(c0: int, c1: int, c2: int, s1: int = 1, s2: int = 1, text: str = _PAIR) -> ir.Model:
    return onnx_model(
        text.format(c0=c0, c2=c2, s1=s1, s2=s2),
        w1=weight(c1, c0, 1, 1),
        b1=weight(c1),
        w2=weight(c2, c1, 1, 1),
    )


@pytest.mark.parametrize(("s1", "s2"), [(1, 1), (2, 1), (1, 2), (2, 2), (2, 3)])
def test_merges_where_it_saves(s1: int, s2: int) -> None:
    assert_rewrites(merge_pointwise, _pair(4, 8, 6, s1, s2), 1, {"Conv": 1})


def test_merges_a_chain() -> None:
    model = onnx_model(
        "agraph (float[N,4,5,5] x) => (float[N,4,5,5] z) { a = Conv (x, w) b = Conv (a, v) z = Conv (b, u) }",
        w=weight(4, 4, 1, 1, seed=1),
        v=weight(4, 4, 1, 1, seed=2),
        u=weight(4, 4, 1, 1, seed=3),
    )
    assert_rewrites(merge_pointwise, model, 2, {"Conv": 1})


def test_leaves_a_bottleneck_alone() -> None:
    """8 → 2 → 8 channels: 32 multiplications a pixel as two, 64 as one."""
    assert_left_alone(merge_pointwise, _pair(8, 2, 8), "cost 32 multiplications a pixel as two and 64 as one")


def test_a_stride_makes_the_same_bottleneck_worth_merging() -> None:
    """With stride 2 on the second, the first wastes three of four pixels: 2 (4·8 + 8) = 80 against 64."""
    assert_rewrites(merge_pointwise, _pair(8, 2, 8, s2=2), 1, {"Conv": 1})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (_PAIR.replace("z = Conv <", "z = Conv <pads = [1, 1, 1, 1], "), "has padding"),
        (_PAIR.replace("y = Conv <", "y = Conv <pads = [1, 1, 1, 1], "), "has padding"),
        (_PAIR.replace("(float[N,{c2},H,W] z)", "(float[N,{c2},H,W] z, float[N,C,J,K] y)"), "is an output"),
        (
            _PAIR.replace("(float[N,{c2},H,W] z)", "(float[N,{c2},H,W] z, float[N,C,J,K] r)").replace(
                "}}", "r = Relu (y) }}"
            ),
            "has 2 consumers",
        ),
    ],
)  # fmt: skip
def test_leaves_pairs_alone(text: str, reason: str) -> None:
    assert_left_alone(merge_pointwise, _pair(4, 8, 6, text=text), reason)


def test_leaves_grouped_pairs_alone() -> None:
    model = onnx_model(
        "agraph (float[N,4,5,5] x) => (float[N,4,5,5] z) { y = Conv <group = 2> (x, w) z = Conv (y, v) }",
        w=weight(4, 2, 1, 1),
        v=weight(4, 4, 1, 1),
    )
    assert_left_alone(merge_pointwise, model, "has 2 groups")


def test_an_activation_between_the_two_is_no_pair() -> None:
    model = onnx_model(
        "agraph (float[N,4,5,5] x) => (float[N,4,5,5] z) { y = Conv (x, w) r = Relu (y) z = Conv (r, v) }",
        w=weight(4, 4, 1, 1),
        v=weight(4, 4, 1, 1, seed=1),
    )
    assert merge_pointwise(model).n_rewrites == 0


_PADDED = "agraph (float[N,4,8,8] x) => (float[N,6,H,W] z) {{ y = Pad {} z = Conv {} }}"
_LOPSIDED = np.array([0, 0, 0, 0, 0, 0, 1, 1])


@pytest.mark.parametrize(
    ("pad", "convolution"),
    [
        ("(x, p)", "<strides = [2, 2]> (y, w)"),
        ("(x, p, zero)", "<pads = [1, 0, 2, 0]> (y, w)"),
        ("(x, q, zero, axes)", "<strides = [2, 2]> (y, w)"),
        ("(x, p)", '<auto_pad = "VALID"> (y, w)'),
    ],
)
def test_a_pad_becomes_the_padding_of_the_convolution(pad: str, convolution: str) -> None:
    model = onnx_model(
        _PADDED.format(pad, convolution),
        w=weight(6, 4, 3, 3),
        p=_LOPSIDED,
        q=np.array([0, 2, 1, 1]),
        axes=np.array([-1, 2]),
        zero=np.array(0.0),
    )
    assert_rewrites(fold_pad, model, 1, {"Conv": 1})


@pytest.mark.parametrize(
    ("pad", "convolution", "amounts", "reason"),
    [
        ("(x, p, one)", "(y, w)", [0, 0, 1, 1, 0, 0, 1, 1], "something else than zeros"),
        ('<mode = "reflect"> (x, p)', "(y, w)", [0, 0, 1, 1, 0, 0, 1, 1], "something else than zeros"),
        ("(x, p)", "(y, w)", [0, 0, -1, 0, 0, 0, 0, 0], "crops"),
        ("(x, p)", "(y, w)", [1, 0, 0, 0, 0, 0, 0, 0], "pads batch or channels"),
        (
            "(x, p)",
            '<auto_pad = "SAME_UPPER"> (y, w)',
            [0, 0, 1, 1, 0, 0, 1, 1],
            "computes its padding itself",
        ),
        ("(x, v)", "(y, w)", [0, 0, 1, 1, 0, 0, 1, 1], "amounts are not constants"),
    ],
)
def test_leaves_pads_alone(pad: str, convolution: str, amounts: list[int], reason: str) -> None:
    text = _PADDED.replace("[N,6", "[M,6").replace("{{", "{{ v = Abs (p)" if "v)" in pad else "{{")
    model = onnx_model(
        text.format(pad, convolution), w=weight(6, 4, 3, 3), p=np.array(amounts), one=np.array(1.0)
    )
    assert_left_alone(fold_pad, model, reason)
