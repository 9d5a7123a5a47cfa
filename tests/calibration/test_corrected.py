"""A model corrected once: every form made of it has the corrected constants in int8 and its own in float."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import pytest
from calibration_models import DATASET, GRAPH, batches, images, logits, make_model
from onnx_text import weight

from calibration.candidates import tensorrt_candidates
from calibration.quantizer import StaticQuantizer, apply_table
from calibration.tensorrt_form import TensorRTForms
from pipeline.errors import UsageError
from pipeline.metrics import sqnr_db

pytest.importorskip("openvino")
from engines.openvino import fp32_runner

CORRECTIONS = ("bias", "adaround")


def quiet(what, done, total):
    pass


def constants(path):
    return {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


def wide_model(path):
    """Of 16 channels and more: TensorRT leaves narrower layers in float."""
    wide = {
        "w": weight(16, 3, 3, 3) / 64.0,
        "b": weight(16),
        "v": weight(24, 16, 3, 3),
        "u": weight(24, 24, 1, 1),
        "h": weight(24, 5),
    }
    return make_model(
        path, graph=GRAPH.replace("s = Relu(d)", "t = Relu(d) e = Conv(t, u) s = Relu(e)"), **wide
    )


def corrected(tmp_path, placement="cpu", corrections=CORRECTIONS):
    model = wide_model(tmp_path / "fp32.onnx")
    folder = tmp_path / placement
    folder.mkdir()
    quantizer = StaticQuantizer(
        "minmax", placement, runner_factory=fp32_runner, corrections=corrections, work_dir=folder
    )
    return model, quantizer, quantizer.correct(model, batches, DATASET, quiet)


def test_a_layer_in_float_gets_its_own_weights_back(tmp_path):
    model, _, made = corrected(tmp_path)
    before, after = constants(model.path), constants(made.model.path)
    assert not np.array_equal(before["v"], after["v"]), "else there is nothing to restore"
    mixed, _ = apply_table(
        made.original, made.table, "cpu", tmp_path / "mixed.onnx", frozenset({"d"}), made.model
    )
    whole, _ = apply_table(made.original, made.table, "cpu", tmp_path / "whole.onnx", corrected=made.model)
    stored, all_int8 = constants(mixed.path), constants(whole.path)
    np.testing.assert_array_equal(stored["v"], before["v"])
    np.testing.assert_array_equal(stored["w_int8"], all_int8["w_int8"])
    np.testing.assert_allclose(
        all_int8["v_int8"] * all_int8["v_scale"].reshape(-1, 1, 1, 1), after["v"], rtol=1e-6
    )


def test_it_is_corrected_once(tmp_path, monkeypatch):
    model, quantizer, made = corrected(tmp_path)

    def refuse(*_):
        raise AssertionError("another run of the network")

    monkeypatch.setattr(quantizer, "runner_factory", refuse)
    assert quantizer.correct(model, batches, DATASET, quiet) is made
    quantized, table, _ = quantizer.quantize(model, batches, DATASET, tmp_path / "int8.onnx", quiet)
    again, _ = apply_table(made.original, table, "cpu", tmp_path / "again.onnx", corrected=made.model)
    assert quantized.sha256 == again.sha256
    assert [record.stage for record in quantized.history] == ["correct", "quantize"]


def test_without_a_folder_nothing_can_be_kept(tmp_path):
    model = make_model(tmp_path / "fp32.onnx")
    with pytest.raises(UsageError, match="work_dir"):
        StaticQuantizer(runner_factory=fp32_runner).correct(model, batches, DATASET, quiet)


def test_candidates_are_corrected_in_int8_and_untouched_in_half_precision(tmp_path):
    _, _, made = corrected(tmp_path, "tensorrt")
    sha256 = {}
    for name, weights in (("plain", None), ("corrected", made.model)):
        folder = tmp_path / name
        folder.mkdir()
        found = tensorrt_candidates(
            made.original, made.table, folder, statistics=made.statistics, corrected=weights
        )
        sha256[name] = {candidate.name: candidate.model.sha256 for candidate in found}
    assert sha256["plain"].keys() == sha256["corrected"].keys()
    assert sha256["plain"]["fp16"] == sha256["corrected"]["fp16"]
    assert sha256["plain"]["int8"] != sha256["corrected"]["int8"]


def test_the_tensorrt_form_gains_and_its_float_layers_are_their_own(tmp_path):
    ort = pytest.importorskip("onnxruntime")
    model, _, made = corrected(tmp_path, "tensorrt")
    pixels = images(24, seed=5)
    expected = logits(model.path, pixels)
    db = {}
    for name, weights in (("plain", None), ("corrected", made.model)):
        forms = TensorRTForms(made.original, made.table, corrected=weights)
        form, record = forms.int8(forms.placement(), tmp_path / f"{name}.onnx")
        assert record.inputs[0] == (weights or made.original).sha256
        session = ort.InferenceSession(str(form.path), providers=["CPUExecutionProvider"])
        db[name] = sqnr_db(expected, session.run(None, {"image": pixels})[0])
    assert db["corrected"] > db["plain"]
    forms = TensorRTForms(made.original, made.table, corrected=made.model)
    mixed, _ = forms.int8(forms.placement(float_layers=frozenset({"d"})), tmp_path / "mixed.onnx")
    np.testing.assert_array_equal(
        constants(mixed.path)["v"].astype(np.float32),
        constants(model.path)["v"].astype(np.float16).astype(np.float32),
    )


def test_an_equalized_model_is_the_original_of_its_forms(tmp_path):
    model, _, made = corrected(tmp_path, corrections=("equalize", "bias"))
    assert made.table.model_sha256 == made.original.sha256
    assert made.original.history[-1].inputs == (model.sha256, DATASET)
    assert made.original.history[-1].outputs == (made.model.sha256,)
    plan, _ = apply_table(
        made.original, made.table, "cpu", tmp_path / "plan.onnx", frozenset({"d"}), made.model
    )
    np.testing.assert_array_equal(constants(plan.path)["v"], constants(made.original.path)["v"])
    assert dataclasses.replace(model, history=()) == model
