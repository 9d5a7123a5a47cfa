"""Layers beside copies of themselves, and the biases that follow from it."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir
import pytest
from onnx_text import onnx_model, weight
from tolerances import SAME_SUMS_ATOL, TIPPED_STEP_ATOL

from calibration.correction.bias import correct_biases
from calibration.correction.probe import LayerProbe
from calibration.correction.records import judging
from calibration.placement import PLACEMENTS
from calibration.qparams import asymmetric_uint8, dequantize, per_channel_int8, quantize
from pipeline.artifacts import TensorRange
from pipeline.metrics import sqnr_db

pytest.importorskip("openvino")
from engines.openvino import fp32_runner
from pipeline.onnx_files import save_model

GRAPH = """g (uint8[{batch},8,8,3] image) => (float[{batch},5] logits)
    {{ f = Cast<to=1>(image)
      x = Transpose<perm=[0,3,1,2]>(f)
      c = Conv<pads=[1,1,1,1]>(x, w, b)
      r = Relu(c)
      d = Conv<group=2>(r, v, e)
      s = Relu(d)
      p = GlobalAveragePool(s)
      q = Flatten(p)
      logits = Gemm(q, h, k) }}"""
RANGES = {name: TensorRange(0.0, 3.0) for name in ("r", "s", "p")}


def make(batch="N"):
    return onnx_model(
        GRAPH.format(batch=batch),
        w=weight(6, 3, 3, 3) / 128,
        b=weight(6),
        v=weight(4, 3, 1, 1),
        e=weight(4),
        h=weight(4, 5),
        k=weight(5),
    )


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)


def tensors(model, images, names, path):
    save_model(model, path)
    batch = model.graph.inputs[0].shape[0]
    step = batch if isinstance(batch, int) else len(images)
    with fp32_runner(path, names) as runner:
        parts = []
        for start in range(0, len(images), step):
            outputs = runner.infer({"image": images[start : start + step]})
            parts.append({name: np.array(outputs[name]) for name in names})
    return {name: np.concatenate([part[name] for part in parts]) for name in names}


@pytest.mark.parametrize(("positions", "seen_at"), [(256, slice(None)), (9, slice(1, None, 3))])
@pytest.mark.parametrize("batch", ["N", 4])
def test_a_copy_is_compared_with_its_layer(images, tmp_path, monkeypatch, batch, positions, seen_at):
    """Against the convolution computed from the layer's own input, 1×1 in two groups; of 8×8 positions all, or nine."""
    monkeypatch.setattr("calibration.correction.probe._POSITIONS", positions)
    model = make(batch)
    grid = asymmetric_uint8(TensorRange(0.0, 2.0))
    other = weight(4, 3, 1, 1, seed=1).astype(np.float32)
    scale = np.array([1.0, 2.0, 0.5, 1.0, 3.0, 1.0])
    probe = LayerProbe(model)
    probe.add("d", other, grid, scale)
    ((layer, seen),) = probe.run(images, fp32_runner, tmp_path)
    known = tensors(model, images, ["r", "d"], tmp_path / "whole.onnx")
    read = dequantize(quantize(known["r"] * scale.astype(np.float32).reshape(1, -1, 1, 1), grid), grid)
    halves = [
        np.einsum("nchw,oc->nohw", read[:, 3 * g : 3 * g + 3], other[2 * g : 2 * g + 2, :, 0, 0])
        for g in (0, 1)
    ]
    copy = np.concatenate(halves, axis=1) + weight(4).reshape(1, -1, 1, 1)
    assert layer == "d"
    known["d"], copy = (values[:, :, seen_at, seen_at] for values in (known["d"], copy))
    error = known["d"] - copy
    np.testing.assert_allclose(seen.error, error.mean(axis=(2, 3)), atol=TIPPED_STEP_ATOL)
    np.testing.assert_allclose(seen.square_error, (error**2).mean(axis=(2, 3)), atol=TIPPED_STEP_ATOL)
    assert seen.sqnr_db() == pytest.approx(sqnr_db(known["d"], copy), abs=0.01)


def test_the_original_stays_as_it_is(images, tmp_path):
    model = make()
    names = [node.outputs[0].name for node in model.graph]
    probe = LayerProbe(model)
    probe.add("c", weight(6, 3, 3, 3).astype(np.float32), None)
    probe.run(images, fp32_runner, tmp_path)
    assert [node.outputs[0].name for node in model.graph] == names
    assert [value.name for value in model.graph.outputs] == ["logits"]


def coarse(monkeypatch):
    """Weights of 4 bits: what rounding shifts is then well above what the few images blur."""

    def four_bits(weights, point, placement, min_scale=0.0):
        params = per_channel_int8(weights, point.axis, min_scale)
        return dataclasses.replace(params, scale=(params.scale * 18).astype(np.float32))

    monkeypatch.setattr("calibration.correction.bias.weight_params", four_bits)
    return four_bits


def test_the_mean_of_every_channel_is_restored(images, tmp_path, monkeypatch):
    model, original = make(), make()
    grids = coarse(monkeypatch)
    placement = PLACEMENTS["cpu"](model)
    records = correct_biases(model, placement, RANGES, images, fp32_runner, tmp_path)
    assert [record.layer for record in records] == ["c", "d", "logits"]
    kept = {record.layer for record in records if record.kept}
    assert {"c", "d"} <= kept
    assert all(record.after_db >= record.before_db for record in records if record.kept)
    # The first layer's input is exact: rounding its weights is all that happens to it.
    (point,) = (point for point in placement.weights if point.consumer.node == "c")
    w = model.graph.initializers["w"]
    rounded = make()
    params = grids(w.const_value.numpy(), point, placement)
    write(rounded, "w", dequantize(quantize(w.const_value.numpy(), params), params))
    write(rounded, "b", model.graph.initializers["b"].const_value.numpy())
    fit = images[~judging(len(images))]
    got = tensors(rounded, fit, ["c"], tmp_path / "a.onnx")["c"].mean(axis=(0, 2, 3))
    expected = tensors(original, fit, ["c"], tmp_path / "b.onnx")["c"].mean(axis=(0, 2, 3))
    np.testing.assert_allclose(got, expected, atol=SAME_SUMS_ATOL)
    write(rounded, "b", weight(6).astype(np.float32))
    before = tensors(rounded, fit, ["c"], tmp_path / "a.onnx")["c"].mean(axis=(0, 2, 3))
    assert np.abs(before - expected).max() > 100 * SAME_SUMS_ATOL, "there was something to restore"


def test_what_the_judges_disagree_with_is_undone(images, tmp_path):
    """The judging images are the negatives of the others: a shift of one kind is the opposite of the other."""
    images[judging(len(images))] = 0
    images[~judging(len(images))] = 255
    model = make()
    before = model.graph.initializers["b"].const_value.numpy().copy()
    records = correct_biases(model, PLACEMENTS["cpu"](model), RANGES, images, fp32_runner, tmp_path)
    assert not next(record for record in records if record.layer == "c").kept
    np.testing.assert_array_equal(model.graph.initializers["b"].const_value.numpy(), before)


def write(model, name, array):
    model.graph.initializers[name].const_value = ir.tensor(np.asarray(array, np.float32), name=name)
