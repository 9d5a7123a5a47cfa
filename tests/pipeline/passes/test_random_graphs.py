"""The passes on random chains of layers: the results stay, and what must go is gone."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_text import onnx_model, op_counts, positive, reference, relative_error, weight
from tolerances import FOLDED_RELATIVE

from pipeline.passes import DEFAULT_PASSES, run_passes

_CHANNELS = 4
_LAYERS = {
    "pointwise": ("{y} = Conv ({x}, {w1})", {"w1": (4, 4, 1, 1)}),
    "biased": ("{y} = Conv ({x}, {w1}, {b})", {"w1": (4, 4, 1, 1), "b": (4,)}),
    "padded": ("{y} = Conv <pads = [1, 1, 1, 1]> ({x}, {w3}, {b})", {"w3": (4, 4, 3, 3), "b": (4,)}),
    "depthwise": ("{y} = Conv <group = 4, pads = [1, 1, 1, 1]> ({x}, {wd})", {"wd": (4, 1, 3, 3)}),
    "grouped": ("{y} = Conv <group = 2> ({x}, {wg})", {"wg": (4, 2, 1, 1)}),
    "norm": ("{y} = BatchNormalization <epsilon = 0.01> ({x}, {p}, {b}, {b2}, {p2})",
             {"p": (4,), "b": (4,), "b2": (4,), "p2": (4,)}),
    "scale": ("{y} = Mul ({p}, {x})", {"p": (4, 1, 1)}),
    "divide": ("{y} = Div ({x}, {p})", {"p": ()}),
    "shift": ("{y} = Add ({x}, {b})", {"b": (1, 4, 1, 1)}),
    "negate": ("{y} = Sub ({b}, {x})", {"b": ()}),
    "map": ("{y} = Mul ({x}, {p})", {"p": (5, 5)}),
    "relu": ("{y} = Relu ({x})", {}),
    "identity": ("{y} = Identity ({x})", {}),
    "residual": ("{y}u = Conv ({x}, {w1}, {b}) {y}m = Mul ({y}u, {p}) {y} = Add ({x}, {y}m)",
                 {"w1": (4, 4, 1, 1), "b": (4,), "p": ()}),
    "two_users": ("{y}c = Conv ({x}, {w1}) {y}m = Mul ({y}c, {p}) {y} = Add ({y}c, {y}m)",
                  {"w1": (4, 4, 1, 1), "p": (4, 1, 1)}),
}  # fmt: skip


def _graph(layers: list[str]) -> ir.Model:
    nodes, weights = [], {}
    for index, layer in enumerate(layers):
        text, parameters = _LAYERS[layer]
        names = {key: f"{key}_{index}" for key in parameters}
        for key, shape in parameters.items():
            draw = positive if key.startswith("p") else weight
            weights[names[key]] = draw(*shape, seed=index)
        nodes.append(text.format(x=f"t{index}", y=f"t{index + 1}", **names))
    end = f"t{len(layers)}"
    return onnx_model(
        f"agraph (float[N,{_CHANNELS},5,5] t0) => (float[N,{_CHANNELS},5,5] {end}) {{ {' '.join(nodes)} }}",
        **weights,
    )


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(sorted(_LAYERS)), min_size=1, max_size=8))
def test_every_pass_keeps_the_result_and_is_idempotent(layers: list[str]) -> None:
    model = _graph(layers)
    expected = reference(model)[0]
    for graph_pass in DEFAULT_PASSES:
        graph_pass.rewrite(model)
        assert relative_error(expected, reference(model)[0]) < FOLDED_RELATIVE * len(layers), graph_pass.name
        assert graph_pass.rewrite(model).n_rewrites == 0, graph_pass.name


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.lists(st.sampled_from(["norm", "scale", "divide", "shift", "negate", "identity"]), max_size=5),
    st.sampled_from(["pointwise", "biased", "padded", "depthwise", "grouped"]),
)
def test_whatever_is_affine_after_a_convolution_goes(affine: list[str], convolution: str) -> None:
    folded = _graph([convolution, *affine, "relu"])
    for graph_pass in DEFAULT_PASSES:
        graph_pass.rewrite(folded)
    assert dict(op_counts(folded)) == {"Conv": 1, "Relu": 1}


@settings(max_examples=4, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(sorted(_LAYERS)), min_size=3, max_size=6))
def test_the_driver_agrees(layers: list[str]) -> None:
    model = _graph(layers)
    folded, _ = run_passes(model, DEFAULT_PASSES)
    np.testing.assert_allclose(
        reference(folded)[0],
        reference(model)[0],
        atol=FOLDED_RELATIVE * len(layers) * np.abs(reference(model)[0]).max(),
    )
