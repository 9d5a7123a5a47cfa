"""Model Optimizer as a quantizer: by a stand-in with its interface, and itself where it is installed."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
from calibration_models import DATASET, batches, images, logits, make_model
from tolerances import CALIBRATED_INT8_SQNR_DB

from calibration import modelopt
from calibration.modelopt import ModelOptQuantizer
from calibration.table import table_from_json, table_to_json
from pipeline.errors import CalibrationError, UnsupportedError, UsageError

pytest.importorskip("openvino")
from engines.openvino import fp32_runner


class FakeHistogramCalibrator:
    """What `modelopt.torch.quantization.calib.HistogramCalibrator` 0.47 takes and gives; its choice: 99% of the maximum."""

    SHARE = 0.99

    def __init__(
        self,
        num_bits=8,
        axis=None,
        unsigned=False,
        num_bins=2048,
        grow_method=None,
        skip_zeros=False,
        torch_hist=True,
    ):
        assert (num_bits, axis, unsigned, num_bins) == (8, None, False, 2048)
        self._largest = None

    def collect(self, x):
        largest = float(x.abs().max())
        self._largest = largest if self._largest is None else max(largest, self._largest)

    def compute_amax(self, method, *, stride=1, start_bin=128, percentile=99.99):
        import torch

        assert (method, percentile) == ("percentile", 99.99)
        return torch.tensor(self._largest * self.SHARE)


@pytest.fixture
def stand_in(monkeypatch):
    pytest.importorskip("torch")
    module = types.ModuleType("modelopt.torch.quantization.calib")
    module.HistogramCalibrator = FakeHistogramCalibrator
    for name in ("modelopt", "modelopt.torch", "modelopt.torch.quantization"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(modelopt, "installed_version", {"nvidia-modelopt": "0.47.0"}.__getitem__)


@pytest.fixture
def model(tmp_path):
    return make_model(tmp_path / "fp32.onnx")


def quiet(*_):
    """Tells nobody."""


def quantize(model, out, data=batches):
    quantizer = ModelOptQuantizer(runner_factory=fp32_runner, tools={"numpy": "2"})
    return quantizer.quantize(model, data, DATASET, out, quiet)


def sqnr_db(expected, got):
    signal = expected - expected.mean(axis=0)
    return 10 * np.log10(np.sum(signal**2) / np.sum((got - expected) ** 2))


def quality_db(model, quantized):
    pixels = images(16, seed=2)
    return sqnr_db(logits(model.path, pixels), logits(quantized.path, pixels))


@pytest.mark.usefixtures("stand_in")
def test_ranges_are_theirs_and_the_rest_is_ours(model, tmp_path):
    quantized, table, record = quantize(model, tmp_path / "int8.onnx")
    with fp32_runner(model.path, ["c", "r"]) as runner:
        seen = runner.infer({"image": np.concatenate(list(batches()))})
        largest = float(seen["r"].max())
    assert table.ranges["r"].low == 0.0
    assert table.ranges["r"].high == pytest.approx(0.99 * largest, rel=1e-5)
    assert (table.method, table.n_samples, table.dataset_sha256) == ("modelopt", 20, DATASET)
    assert table.tools == {"numpy": "2", "nvidia-modelopt": "0.47.0"}
    assert table_from_json(table_to_json(table)) == table
    assert quality_db(model, quantized) > CALIBRATED_INT8_SQNR_DB
    assert (record.stage, record.checks["algorithm"]) == ("quantize", "percentile")
    assert record.checks["n_quantized_layers"] == 3


@pytest.mark.usefixtures("stand_in")
def test_a_bad_choice_of_theirs_is_seen(model, tmp_path, monkeypatch):
    """The floor above can fail."""
    monkeypatch.setattr(FakeHistogramCalibrator, "SHARE", 0.1)
    assert quality_db(model, quantize(model, tmp_path / "int8.onnx")[0]) < CALIBRATED_INT8_SQNR_DB
    for wrong in (0.0, float("nan")):
        monkeypatch.setattr(FakeHistogramCalibrator, "SHARE", wrong)
        with pytest.raises(CalibrationError, match="Model Optimizer found the largest magnitude"):
            quantize(model, tmp_path / "int8.onnx")


@pytest.mark.usefixtures("stand_in")
def test_without_images_nothing_is_made_up(model, tmp_path):
    with pytest.raises(CalibrationError, match="no calibration image"):
        quantize(model, tmp_path / "int8.onnx", data=lambda: iter(()))
    assert not (tmp_path / "int8.onnx").exists()


@pytest.mark.usefixtures("stand_in")
def test_nan_names_the_tensor(tmp_path):
    broken = make_model(tmp_path / "nan.onnx", b=np.full(8, np.nan, np.float32))
    with pytest.raises(CalibrationError, match="holds NaN or Inf"):
        quantize(broken, tmp_path / "int8.onnx")


@pytest.mark.usefixtures("stand_in")
def test_an_unknown_placement_is_refused():
    with pytest.raises(UsageError, match="no placement 'abacus'"):
        ModelOptQuantizer("abacus", runner_factory=fp32_runner)


def test_it_is_not_installed(monkeypatch):
    def absent(name):
        raise modelopt.PackageNotFoundError(name)

    monkeypatch.setattr(modelopt, "installed_version", absent)
    with pytest.raises(UnsupportedError, match=r"pip install 'edgefold\[modelopt\]'") as raised:
        ModelOptQuantizer(runner_factory=fp32_runner)
    assert raised.value.exit_code == 4


def test_it_does_not_import(monkeypatch):
    monkeypatch.setattr(modelopt, "installed_version", lambda name: "0.47.0")
    monkeypatch.setitem(sys.modules, "modelopt", None)
    pytest.importorskip("torch")
    with pytest.raises(UnsupportedError, match=r"nvidia-modelopt 0\.47\.0 cannot be imported"):
        ModelOptQuantizer(runner_factory=fp32_runner)


def test_the_real_one(model, tmp_path):
    """``make test-modelopt`` installs it; what the stand-in imitates must be there."""
    pytest.importorskip("modelopt.torch.quantization.calib", exc_type=ImportError)
    quantized, table, _ = quantize(model, tmp_path / "int8.onnx")
    assert quality_db(model, quantized) > CALIBRATED_INT8_SQNR_DB
    with fp32_runner(model.path, ["r"]) as runner:
        largest = float(runner.infer({"image": np.concatenate(list(batches()))})["r"].max())
    assert 0.1 * largest < table.ranges["r"].high <= 1.01 * largest
