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
from calibration.correction.rounded import RoundedWeights
from calibration.placement import PLACEMENTS
from calibration.qparams import asymmetric_uint8, dequantize, per_channel_int8, quantize
from pipeline.artifacts import QuantParams, TensorRange
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
N_JUDGING = 4
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


@pytest.mark.parametrize(("positions", "seen_at"), [(256, slice(None)), (9, slice(0, None, 3))])
@pytest.mark.parametrize("batch", ["N", 4])
def test_a_copy_is_compared_with_its_layer(images, tmp_path, monkeypatch, batch, positions, seen_at):
    """Against the convolution computed from the layer's own input, 1×1 in two groups; of 8×8 positions all, or nine."""
    monkeypatch.setattr("calibration.correction.probe._POSITIONS", positions)
    model = make(batch)
    whole = asymmetric_uint8(TensorRange(0.0, 2.0))
    steps = (whole.scale / np.array([1.0, 2.0, 0.5, 1.0, 3.0, 1.0])).astype(np.float32)
    grid = QuantParams(steps, np.full(6, whole.zero_point), "uint8", 1)
    other = weight(4, 3, 1, 1, seed=1).astype(np.float32)
    probe = LayerProbe(model)
    probe.add("d", ir.tensor(other), grid)
    probed = probe.run(images, fp32_runner, tmp_path)
    ((layer, seen),) = probed.layers
    known = tensors(model, images, ["r", "d", "logits"], tmp_path / "whole.onnx")
    np.testing.assert_allclose(probed.outputs, known["logits"], atol=SAME_SUMS_ATOL)
    read = dequantize(quantize(known["r"], grid), grid)
    halves = [
        np.einsum("nchw,oc->nohw", read[:, 3 * g : 3 * g + 3], other[2 * g : 2 * g + 2, :, 0, 0])
        for g in (0, 1)
    ]
    copy = np.concatenate(halves, axis=1) + weight(4).reshape(1, -1, 1, 1)
    assert layer == "d"
    known["d"], copy = (values[:, :, seen_at, seen_at] for values in (known["d"], copy))
    error = known["d"] - copy
    np.testing.assert_allclose(seen.error, error.mean(axis=(2, 3)), atol=TIPPED_STEP_ATOL)
    tipped = 2 * np.abs(error).max() * TIPPED_STEP_ATOL  # what a step does to a square
    np.testing.assert_allclose(seen.square_error, (error**2).mean(axis=(2, 3)), atol=tipped)
    assert seen.sqnr_db() == pytest.approx(sqnr_db(known["d"], copy), abs=0.01)


STRIDED = """g (uint8[N,19,17,3] image) => (float[N,5] logits)
    {{ f = Cast<to=1>(image)
      x = Transpose<perm=[0,3,1,2]>(f)
      c = Conv<{attributes}>(x, w, b)
      p = GlobalAveragePool(c)
      q = Flatten(p)
      logits = Gemm(q, h, k) }}"""


@pytest.mark.parametrize("channel_step", [1, 3])
@pytest.mark.parametrize("positions", [16, 1000])
@pytest.mark.parametrize(
    ("attributes", "kernel"),
    [
        ("pads=[1,1,1,1]", (3, 3)),
        ("pads=[0,3,2,1], strides=[2,1], dilations=[1,2]", (3, 5)),
        ('auto_pad="VALID", strides=[2,2]', (3, 2)),
        ('auto_pad="SAME_UPPER"', (3, 3)),
        ("pads=[2,2,2,2]", (1, 1)),
        ("strides=[2,3]", (1, 1)),
    ],
)
def test_what_is_not_looked_at_is_not_computed_and_the_rest_is_the_same(
    tmp_path, monkeypatch, attributes, kernel, positions, channel_step
):
    """A copy with the layer's own weights leaves no error; one with others that which a whole copy leaves."""
    monkeypatch.setattr("calibration.correction.probe._POSITIONS", positions)
    model = onnx_model(
        STRIDED.format(attributes=attributes),
        w=weight(7, 3, *kernel) / 64,
        b=weight(7),
        h=weight(7, 5),
        k=weight(5),
    )
    images = np.random.default_rng(1).integers(0, 256, (3, 19, 17, 3), dtype=np.uint8)
    w = model.graph.initializers["w"].const_value.numpy()
    other = w + weight(*w.shape, seed=2).astype(np.float32) / 500
    probe = LayerProbe(model)
    for copied in (w, other):
        probe.add("c", ir.tensor(np.ascontiguousarray(copied[::channel_step])), None, channel_step)
    (_, same), (_, off) = probe.run(images, fp32_runner, tmp_path).layers
    np.testing.assert_allclose(same.square_error, 0.0, atol=SAME_SUMS_ATOL)
    expected = tensors(model, images, ["c"], tmp_path / "whole.onnx")["c"]
    write(model, "w", other)
    error = (expected - tensors(model, images, ["c"], tmp_path / "whole.onnx")["c"])[:, ::channel_step]
    assert off.error.shape == error.shape[:2]
    if positions >= error[0, 0].size:
        np.testing.assert_allclose(off.error, error.mean(axis=(2, 3)), atol=SAME_SUMS_ATOL)
    else:  # of some positions: within what the channel takes on, and not the mean of all
        assert (off.error >= error.min(axis=(2, 3)) - SAME_SUMS_ATOL).all()
        assert (off.error <= error.max(axis=(2, 3)) + SAME_SUMS_ATOL).all()
        assert np.abs(off.error - error.mean(axis=(2, 3))).max() > 10 * SAME_SUMS_ATOL
    assert (off.square_error > 100 * same.square_error).all()


def test_the_original_stays_as_it_is(images, tmp_path):
    model = make()
    names = [node.outputs[0].name for node in model.graph]
    probe = LayerProbe(model)
    probe.add("c", ir.tensor(weight(6, 3, 3, 3).astype(np.float32)), None)
    probe.run(images, fp32_runner, tmp_path)
    assert [node.outputs[0].name for node in model.graph] == names
    assert [value.name for value in model.graph.outputs] == ["logits"]


def corrected(model, placement, images, folder):
    rounded = RoundedWeights(model, placement, folder)
    return correct_biases(model, placement, RANGES, rounded, images, N_JUDGING, fp32_runner, folder)


def coarse(monkeypatch):
    """Weights of 4 bits: what rounding shifts is then well above what the few images blur."""

    def four_bits(weights, point, placement, min_scale=0.0):
        params = per_channel_int8(weights, point.axis, min_scale)
        return dataclasses.replace(params, scale=(params.scale * 18).astype(np.float32))

    monkeypatch.setattr("calibration.correction.rounded.weight_params", four_bits)
    return four_bits


def test_the_mean_of_every_channel_is_restored(images, tmp_path, monkeypatch):
    model, original = make(), make()
    grids = coarse(monkeypatch)
    placement = PLACEMENTS["cpu"](model)
    records, logits = corrected(model, placement, images, tmp_path)
    expected = tensors(original, images, ["logits"], tmp_path / "original.onnx")["logits"]
    np.testing.assert_allclose(logits, expected, atol=SAME_SUMS_ATOL)
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
    fit = images[:-N_JUDGING]
    got = tensors(rounded, fit, ["c"], tmp_path / "a.onnx")["c"].mean(axis=(0, 2, 3))
    expected = tensors(original, fit, ["c"], tmp_path / "b.onnx")["c"].mean(axis=(0, 2, 3))
    np.testing.assert_allclose(got, expected, atol=SAME_SUMS_ATOL)
    write(rounded, "b", weight(6).astype(np.float32))
    before = tensors(rounded, fit, ["c"], tmp_path / "a.onnx")["c"].mean(axis=(0, 2, 3))
    assert np.abs(before - expected).max() > 100 * SAME_SUMS_ATOL, "there was something to restore"


def test_what_the_judges_disagree_with_is_undone(images, tmp_path):
    """The judging images are the negatives of the others: a shift of one kind is the opposite of the other."""
    images[-N_JUDGING:] = 0
    images[:-N_JUDGING] = 255
    model = make()
    before = model.graph.initializers["b"].const_value.numpy().copy()
    records, _ = corrected(model, PLACEMENTS["cpu"](model), images, tmp_path)
    assert not next(record for record in records if record.layer == "c").kept
    np.testing.assert_array_equal(model.graph.initializers["b"].const_value.numpy(), before)


def write(model, name, array):
    model.graph.initializers[name].const_value = ir.tensor(np.asarray(array, np.float32), name=name)
