"""A graph run layer by layer gives what it gives as a whole."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx_text import onnx_model, weight
from tolerances import SAME_SUMS_ATOL

from calibration.correction.layerwise import LayerwiseRun, bytes_per_image

pytest.importorskip("openvino")
from engines.openvino import fp32_runner
from pipeline.onnx_files import save_model

GRAPH = """g (uint8[{batch},8,8,3] image) => (float[{batch},5] logits)
    {{ f = Cast<to=1>(image)
      x = Transpose<perm=[0,3,1,2]>(f)
      c = Conv<pads=[1,1,1,1]>(x, w, b)
      r = Relu(c)
      d = Conv(r, v)
      s = Add(d, r)
      t = Relu(s)
      p = GlobalAveragePool(t)
      q = Flatten(p)
      logits = Gemm(q, h) }}"""


@pytest.fixture(params=["N", 3])
def model(request):
    return onnx_model(
        GRAPH.format(batch=request.param),
        w=weight(6, 3, 3, 3) / 64,
        b=weight(6),
        v=weight(6, 6, 1, 1),
        h=weight(6, 5),
    )


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), dtype=np.uint8)


def whole(model, images, name, path):
    save_model(model, path)
    batch = model.graph.inputs[0].shape[0]
    step = batch if isinstance(batch, int) else 9
    with fp32_runner(path, [name]) as runner:
        parts = [np.array(runner.infer({"image": images[i : i + step]})[name]) for i in range(0, 9, step)]
    return np.concatenate(parts)


def test_the_same_tensors(model, images, tmp_path):
    run = LayerwiseRun(model, images, fp32_runner, tmp_path)
    for name in ("x", "c", "r", "d", "q", "logits"):
        got = run.advance(name)
        np.testing.assert_allclose(
            got, whole(model, images, name, tmp_path / "all.onnx"), rtol=0, atol=SAME_SUMS_ATOL
        )


def test_constants_changed_on_the_way_count_for_what_comes_after(model, images, tmp_path):
    run = LayerwiseRun(model, images, fp32_runner, tmp_path)
    before = run.advance("c")
    model.graph.initializers["v"].const_value = ir.tensor(2 * weight(6, 6, 1, 1).astype(np.float32), name="v")
    expected = whole(model, images, "logits", tmp_path / "all.onnx")
    np.testing.assert_allclose(run.advance("logits"), expected, rtol=0, atol=SAME_SUMS_ATOL)
    np.testing.assert_allclose(
        before, whole(model, images, "c", tmp_path / "all.onnx"), rtol=0, atol=SAME_SUMS_ATOL
    )


def test_every_node_runs_once_and_nothing_is_held_longer_than_read(model, images, tmp_path):
    ran = []

    def counting(path, extra):
        piece = ir.load(path)
        ran.extend(node.outputs[0].name for node in piece.graph)
        return fp32_runner(path, extra)

    run = LayerwiseRun(model, images, counting, tmp_path)
    for name in ("c", "d", "logits"):
        run.advance(name)
        if name == "d":
            assert set(run._held) == {"d", "r"}, "the Add reads both"
    assert sorted(ran) == sorted(node.outputs[0].name for node in model.graph)
    assert not run._held


def test_peak_is_what_is_alive_at_once(model):
    # At the Relu behind c: c and r, 6×8×8 floats each; at the Add d, r and s.
    assert bytes_per_image(model) == 3 * 6 * 8 * 8 * 4
