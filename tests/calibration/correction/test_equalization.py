"""Which channels scale together, and that scaling them changes nothing but how well they are quantized."""

from __future__ import annotations

import numpy as np
import pytest
from onnx_text import onnx_model, positive, reference, relative_error, weight
from tolerances import FOLDED_RELATIVE

from calibration.correction.channels import trace_channels
from calibration.correction.equalization import (
    CLIP_MARGIN,
    MARGIN,
    MAX_SCALE,
    channel_ranges,
    channel_scales,
    equalize,
    tensors_to_equalize,
)

pytest.importorskip("openvino")
from engines.openvino import fp32_runner

RESIDUAL = """g (float[2,4,8,8] x) => (float[2,3] y)
    { a = Conv<pads=[1,1,1,1]>(x, w, b)
      r = Relu(a)
      d = Conv<group=6, pads=[1,1,1,1]>(r, v, c)
      e = Relu(d)
      f = Conv(e, u, h)
      s = Add(f, r)
      m = MaxPool<kernel_shape=[2,2], strides=[2,2]>(s)
      n = Concat<axis=1>(m, m)
      p = GlobalAveragePool(n)
      q = Flatten(p)
      y = Gemm(q, k, l) }"""
WEIGHTS = {
    "w": weight(6, 4, 3, 3) * np.array([1, 0.1, 3, 0.02, 1, 0.5]).reshape(6, 1, 1, 1),
    "b": weight(6),
    "v": weight(6, 1, 3, 3),
    "c": weight(6),
    "u": weight(6, 6, 1, 1),
    "h": weight(6),
    "k": weight(12, 3),
    "l": weight(3),
}


def scales_of(model, atoms, seed=0):
    """Random scales, equal where they must be, 1 where they must be."""
    raw = positive(atoms.n_atoms, seed=seed)
    raw[sorted(atoms.fixed)] = 1.0
    return raw[atoms.roots(np.arange(atoms.n_atoms))]


def test_any_scales_leave_the_outputs_as_they_are():
    model = onnx_model(RESIDUAL, **WEIGHTS)
    expected = reference(model)
    atoms = trace_channels(model.graph)
    scales = scales_of(model, atoms)
    equalize(atoms, scales)
    assert relative_error(expected[0], reference(model)[0]) < FOLDED_RELATIVE
    changed = model.graph.initializers["u"].const_value.numpy()
    assert np.abs(changed - WEIGHTS["u"]).max() > 0.1, "something was scaled"


def test_an_add_ties_and_a_concat_does_not():
    model = onnx_model(RESIDUAL, **WEIGHTS)
    atoms = trace_channels(model.graph)
    roots = {name: list(atoms.roots(ids)) for name, ids in atoms.of.items()}
    assert roots["f"] == roots["r"] == roots["s"] == roots["m"] == roots["a"]
    assert roots["n"] == roots["m"] * 2
    assert not set(roots["d"]) & set(roots["a"])
    assert set(roots["y"]) <= atoms.fixed, "logits keep their scale"
    assert not set(roots["a"]) & atoms.fixed


@pytest.mark.parametrize(
    "graph",
    [
        "g (float[2,3,4,4] x) => (float[2,3,4,4] y) { a = Conv(x, w) s = Sigmoid(a) y = Conv(s, v) }",
        "g (float[2,3,4,4] x) => (float[2,3,4,4] y, float[2,3,4,4] a) { a = Conv(x, w) y = Conv(a, v) }",
        "g (float[2,3,4,4] x) => (float[2,3,4,4] y) { a = Conv(x, w) b = Add(a, x) y = Conv(b, v) }",
        "g (float[2,3,4,4] x) => (float[2,3,4,4] y) { a = Conv(x, w) y = Conv(a, w) z = Identity(v) }",
    ],
)
def test_what_lets_no_scale_pass_fixes_its_channels(graph):
    model = onnx_model(graph, w=weight(3, 3, 1, 1), v=weight(3, 3, 1, 1))
    expected = reference(model)
    atoms = trace_channels(model.graph)
    equalize(atoms, scales_of(model, atoms))
    for one, other in zip(expected, reference(model), strict=True):
        assert relative_error(one, other) < FOLDED_RELATIVE


def ranges_of(model, names, folder, images):
    """Of a model that takes float images; `channel_ranges` asks nothing of their type."""
    return channel_ranges(model, names, images, fp32_runner, folder)


def test_narrow_channels_are_widened_to_a_margin_below_the_widest(tmp_path):
    model = onnx_model(RESIDUAL, **WEIGHTS)
    images = np.random.default_rng(0).standard_normal((4, 4, 8, 8)).astype(np.float32)
    quantized = ["r", "e", "f", "s", "q"]
    names = tensors_to_equalize(model.graph, quantized)
    assert list(names) == quantized
    before = ranges_of(model, names, tmp_path, images)
    atoms = trace_channels(model.graph)
    scales = channel_scales(atoms, before, quantized)
    assert (scales >= 1.0).all()
    assert scales.max() <= MAX_SCALE
    equalize(atoms, scales)
    after = ranges_of(model, names, tmp_path, images)
    for name in quantized:
        assert after[name][1].max() == pytest.approx(before[name][1].max(), rel=1e-5), "no grid is wider"
        assert after[name][0].min() == pytest.approx(before[name][0].min(), rel=1e-5)
    widest = before["e"][1].max()
    free = (before["e"][1] > widest / (MARGIN * MAX_SCALE)) & (before["e"][1] < widest / MARGIN)
    assert free.sum() >= 1
    np.testing.assert_allclose(after["e"][1][free], widest / MARGIN, rtol=1e-5)


CLIPPED = """g (float[2,3,4,4] x) => (float[2,2,4,4] y)
    { a = Conv(x, w) r = Clip(a, low, high) y = Conv(r, v) }"""


def clipped_model(low=0.0):
    return onnx_model(
        CLIPPED,
        w=weight(4, 3, 1, 1) * np.array([4.0, 0.2, 1.0, 0.0]).reshape(4, 1, 1, 1),
        v=weight(2, 4, 1, 1),
        low=np.array(low),
        high=np.array(6.0),
    )


def test_a_clipped_channel_is_scaled_to_a_margin_below_the_clip(tmp_path):
    model = clipped_model()
    images = np.random.default_rng(0).standard_normal((8, 3, 4, 4)).astype(np.float32)
    names = tensors_to_equalize(model.graph, ["r"])
    assert set(names) == {"r", "a"}
    ranges = ranges_of(model, names, tmp_path, images)
    atoms = trace_channels(model.graph)
    scales = channel_scales(atoms, ranges, ["r"])[atoms.of["r"]]
    assert scales[0] == 1.0
    assert 1.0 < scales[1] <= 6.0 / (CLIP_MARGIN * ranges["a"][1][1]) + 1e-9
    assert scales[3] == 1.0, "never active: nothing is known of it"
    expected = reference(model, x=images[:2])
    full = channel_scales(atoms, ranges, ["r"])
    equalize(atoms, full)
    assert relative_error(expected[0], reference(model, x=images[:2])[0]) < FOLDED_RELATIVE


def test_a_clip_that_is_no_relu_from_below_lets_nothing_pass():
    atoms = trace_channels(clipped_model(low=-1.0).graph)
    assert set(atoms.roots(atoms.of["a"])) <= atoms.fixed
