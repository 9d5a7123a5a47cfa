"""`StaticQuantizer` from a folded fp32 model and images to an int8 one."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from calibration_models import DATASET, HW, batches, images, logits, make_model
from onnx_text import onnx_model, weight
from tolerances import CALIBRATED_INT8_SQNR_DB

from calibration.qparams import dequantize
from calibration.quantizer import StaticQuantizer, apply_table
from calibration.ranges import METHODS
from calibration.table import table_from_json, table_sha256, table_to_json
from pipeline.artifacts import PreprocessSpec, QuantParams, TensorRange
from pipeline.errors import CalibrationError, IntegrityError, UsageError

pytest.importorskip("openvino")
from engines.openvino import fp32_runner


class CountingFactory:
    """Makes fp32 runners and counts them: one for each pass over the images."""

    def __init__(self):
        self.n_passes = 0

    def __call__(self, path, extra_outputs):
        self.n_passes += 1
        return fp32_runner(path, extra_outputs)


@pytest.fixture
def factory():
    return CountingFactory()


@pytest.fixture
def model(tmp_path):
    return make_model(tmp_path / "fp32.onnx")


def run(model, factory, out, method="minmax", cache=None, dataset=DATASET, data=batches):
    told = []
    # Corrections have tests of their own; here passes are counted.
    quantizer = StaticQuantizer(method, runner_factory=factory, cache_dir=cache, corrections=())
    result = quantizer.quantize(model, data, dataset, out, lambda *event: told.append(event))
    return *result, told


def sqnr_db(expected, got):
    signal = expected - expected.mean(axis=0)  # what tells images apart; a shared offset is no signal
    return 10 * np.log10(np.sum(signal**2) / np.sum((got - expected) ** 2))


def quality_db(model, quantized):
    pixels = images(16, seed=2)  # not those of the calibration
    return sqnr_db(logits(model.path, pixels), logits(quantized.path, pixels))


@pytest.mark.parametrize("method", sorted(METHODS))
def test_int8_logits_are_close_to_fp32(model, factory, tmp_path, method):
    quantized, table, record, told = run(model, factory, tmp_path / "int8.onnx", method)
    assert quality_db(model, quantized) > CALIBRATED_INT8_SQNR_DB
    assert table.method == method
    assert (table.model_sha256, table.dataset_sha256) == (model.sha256, DATASET)
    assert table.n_samples == 20  # the filled-up last batch is not counted twice
    assert [done for _, done, _ in told] == [8, 16, 20]
    assert record.stage == "quantize"
    assert record.checks["n_quantized_layers"] == 3
    assert record.checks["left_in_float"] == []
    assert quantized.history[-1] == record
    assert quantized.sha256 == hashlib.sha256((tmp_path / "int8.onnx").read_bytes()).hexdigest()
    assert quantized.inputs == model.inputs


@pytest.mark.parametrize(
    ("tensor", "factor"), [("p", 10.0), ("r", 10.0), ("s", 10.0), ("r", 0.1), ("s", 0.1)]
)
def test_a_wrong_scale_falls_below_the_floor(model, factory, tmp_path, tensor, factor):
    """The floor above can fail: one range of four, ten times too wide or too narrow."""
    _, table, _, _ = run(model, factory, tmp_path / "int8.onnx")
    right = table.ranges[tensor]
    wrong = dataclasses.replace(
        table, ranges={**table.ranges, tensor: TensorRange(factor * right.low, factor * right.high)}
    )
    quantized, _ = apply_table(model, wrong, "cpu", tmp_path / "wrong.onnx")
    assert quality_db(model, quantized) < CALIBRATED_INT8_SQNR_DB


def test_weights_are_stored_as_int8_and_close_to_the_float_ones(model, factory, tmp_path):
    run(model, factory, tmp_path / "int8.onnx")
    before = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(model.path).graph.initializer}
    after = {
        t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(tmp_path / "int8.onnx").graph.initializer
    }
    for name, axis in {"w": 0, "v": 0, "h": 1}.items():
        assert name not in after
        stored, scale = after[f"{name}_int8"], after[f"{name}_scale"]
        assert stored.dtype == np.int8
        restored = dequantize(stored, QuantParams(scale, after[f"{name}_zero_point"], "int8", axis))
        shape = [-1 if i == axis else 1 for i in range(stored.ndim)]
        assert (np.abs(restored - before[name]) <= 0.501 * scale.reshape(shape)).all()
    assert after["b_int32"].dtype == after["k_int32"].dtype == np.int32


def test_statistics_of_the_whole_pass_are_exact(model, factory, tmp_path):
    """minmax against the activation itself, read out of the engine."""
    _, table, _, _ = run(model, factory, tmp_path / "int8.onnx")
    with fp32_runner(model.path, ["r", "p"]) as runner:
        outputs = runner.infer({"image": np.concatenate(list(batches()))})
        for name in ("r", "p"):
            # A Relu's smallest value is taken as 0, which every grid holds anyway.
            assert table.ranges[name].high == pytest.approx(float(outputs[name].max()), rel=1e-5)
            assert table.ranges[name].low == 0.0


def test_a_fixed_batch_size_gives_the_same_table(model, factory, tmp_path):
    fixed = make_model(tmp_path / "fixed.onnx", batch=4)
    _, free_table, _, _ = run(model, factory, tmp_path / "a.onnx", "mse")
    _, fixed_table, _, _ = run(fixed, factory, tmp_path / "b.onnx", "mse")
    assert fixed_table.n_samples == free_table.n_samples
    for name, found in free_table.ranges.items():
        assert fixed_table.ranges[name].high == pytest.approx(found.high, rel=0.01)


def test_a_cache_hit_costs_no_pass_and_gives_the_same_model(model, factory, tmp_path):
    cache = tmp_path / "cache"
    first, first_table, record, _ = run(model, factory, tmp_path / "a.onnx", cache=cache)
    assert record.checks["statistics_from_cache"] is False
    second, second_table, record, told = run(model, factory, tmp_path / "b.onnx", cache=cache)
    assert record.checks["statistics_from_cache"] is True
    assert factory.n_passes == 1
    assert told == []
    assert second.sha256 == first.sha256
    assert table_to_json(second_table) == table_to_json(first_table)


def test_every_other_method_costs_no_pass(model, factory, tmp_path):
    tables = [
        run(model, factory, tmp_path / f"{method}.onnx", method, cache=tmp_path / "cache")[1]
        for method in METHODS
    ]
    assert factory.n_passes == 1
    assert len({table.statistics_sha256 for table in tables}) == 1
    assert len({table_sha256(table) for table in tables}) == len(METHODS)


def test_without_a_cache_every_run_is_a_pass(model, factory, tmp_path):
    for name in ("a", "b"):
        run(model, factory, tmp_path / f"{name}.onnx")
    assert factory.n_passes == 2


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "one byte"])
def test_a_damaged_cache_file_is_rebuilt(model, factory, tmp_path, damage):
    cache = tmp_path / "cache"
    first = run(model, factory, tmp_path / "a.onnx", cache=cache)[0]
    (file,) = cache.glob("*.npz")
    good = file.read_bytes()
    middle = len(good) // 2
    file.write_bytes(
        {
            "truncated": good[:middle],
            "garbage": b"no archive",
            "empty": b"",
            "one byte": good[:middle] + bytes([good[middle] ^ 0xFF]) + good[middle + 1 :],
        }[damage]
    )
    second = run(model, factory, tmp_path / "b.onnx", cache=cache)[0]
    assert factory.n_passes == 2
    assert second.sha256 == first.sha256
    run(model, factory, tmp_path / "c.onnx", cache=cache)
    assert factory.n_passes == 2, "the rebuilt file must be usable"


def test_other_images_or_another_model_do_not_reuse_it(model, factory, tmp_path):
    cache = tmp_path / "cache"
    run(model, factory, tmp_path / "a.onnx", cache=cache)
    run(model, factory, tmp_path / "b.onnx", cache=cache, dataset="e" * 64)
    assert factory.n_passes == 2
    other = make_model(tmp_path / "other.onnx", k=weight(5, seed=1))
    run(other, factory, tmp_path / "c.onnx", cache=cache)
    assert factory.n_passes == 3
    changed = dataclasses.replace(model, preprocess=PreprocessSpec(input_hw=(HW, HW), resize="squash"))
    run(changed, factory, tmp_path / "d.onnx", cache=cache)
    assert factory.n_passes == 4


def test_no_images_are_refused(model, factory, tmp_path):
    with pytest.raises(CalibrationError, match="no calibration image"):
        run(model, factory, tmp_path / "int8.onnx", data=lambda: iter(()), cache=tmp_path / "cache")
    assert not (tmp_path / "int8.onnx").exists()
    assert not list((tmp_path / "cache").glob("*.npz"))


def test_nan_names_the_activation(factory, tmp_path):
    broken = make_model(tmp_path / "nan.onnx", v=np.full((12, 8, 3, 3), 1e38))
    with pytest.raises(CalibrationError, match=r"tensor '[sp]' holds NaN or Inf"):
        run(broken, factory, tmp_path / "int8.onnx")
    assert not (tmp_path / "int8.onnx").exists()


def test_a_model_without_layers_is_refused(factory, tmp_path, model):
    bare = onnx_model("g (uint8[N,4] image) => (float[N,4] y) { y = Cast<to=1>(image) }")
    path = tmp_path / "bare.onnx"
    path.write_bytes(ir.serde.serialize_model(bare).SerializeToString())
    with pytest.raises(CalibrationError, match="no layer that can be quantized: no Conv, Gemm or MatMul"):
        run(dataclasses.replace(model, path=path), factory, tmp_path / "int8.onnx")
    assert factory.n_passes == 0


def test_a_table_survives_json_and_gives_the_same_model(model, factory, tmp_path):
    quantized, table, _, _ = run(model, factory, tmp_path / "a.onnx", "entropy")
    data = table_to_json(table)
    again = table_from_json(data)
    assert again == table
    assert table_sha256(again) == hashlib.sha256(data).hexdigest()
    assert apply_table(model, again, "cpu", tmp_path / "b.onnx")[0].sha256 == quantized.sha256
    wider = dataclasses.replace(table, ranges={**table.ranges, "r": TensorRange(0.0, 99.0)})
    assert table_sha256(wider) != table_sha256(table)


@pytest.mark.parametrize("data", [b"", b"{}", b'{"ranges": 1}', b"\xff"])
def test_what_is_no_table_is_refused(data):
    with pytest.raises(IntegrityError, match="not a calibration table"):
        table_from_json(data)


def test_a_table_of_another_model_is_refused(model, factory, tmp_path):
    table = run(model, factory, tmp_path / "a.onnx")[1]
    other = make_model(tmp_path / "other.onnx", k=weight(5, seed=1))
    with pytest.raises(IntegrityError, match=f"{model.sha256}.*{other.sha256}"):
        apply_table(other, table, "cpu", tmp_path / "b.onnx")
    assert not (tmp_path / "b.onnx").exists()


@pytest.mark.parametrize("wrong", [{"method": "median"}, {"placement": "tpu"}])
def test_unknown_choices_are_refused_with_the_known_ones(factory, wrong):
    with pytest.raises(UsageError, match="minmax, percentile" if "method" in wrong else "cpu"):
        StaticQuantizer(**wrong, runner_factory=factory)
