"""A calibration table used again, and each reason to refuse it."""

from __future__ import annotations

import dataclasses

import pytest
from calibration_models import DATASET, batches, make_model

from calibration.quantizer import StaticQuantizer
from calibration.reuse import Reuse, TableQuantizer, check_reuse, ranges_alone
from calibration.table import table_from_json, table_to_json
from pipeline.artifacts import PreprocessSpec
from pipeline.errors import CalibrationError, IntegrityError

pytest.importorskip("openvino")
from engines.openvino import fp32_runner

TOOLS = {"edgefold": "1.0", "numpy": "2.0", "openvino": "2026.4"}
REUSE = Reuse("'a.bundle'", TOOLS, dataset_sha256=DATASET)


def nothing(*_):
    """Tells nobody."""


def no_images():
    raise AssertionError("a table needs no image")


@pytest.fixture
def model(tmp_path):
    return make_model(tmp_path / "fp32.onnx")


def calibrate(model, out, method="percentile", corrections=()):
    quantizer = StaticQuantizer(
        method, runner_factory=fp32_runner, corrections=corrections, tools=dict(reversed(TOOLS.items()))
    )
    return quantizer.quantize(model, batches, DATASET, out, nothing)


def test_the_int8_graph_is_the_same_without_an_image(model, tmp_path):
    quantized, table, _ = calibrate(model, tmp_path / "first.onnx")
    kept = table_from_json(table_to_json(table))
    again, same, record = TableQuantizer(kept, "cpu", REUSE).quantize(
        model, no_images, DATASET, tmp_path / "second.onnx", nothing
    )
    assert again.sha256 == quantized.sha256
    assert same == table
    assert record.inputs == (model.sha256, DATASET)
    assert len(record.checks["reused_table_sha256"]) == 64


def test_the_table_says_all_it_was_made_from(model, tmp_path):
    table = calibrate(model, tmp_path / "int8.onnx", corrections=("ranges", "bias"))[1]
    assert table.tools == TOOLS
    assert table.corrections == ("ranges", "bias")
    assert table.method_options == {"percent": 99.99, "histogram_bins": 16384, "samples_per_image": 4096}
    assert table.dataset_sha256 == DATASET


def test_corrections_are_named_as_made_not_as_asked_for(model, tmp_path):
    made = calibrate(model, tmp_path / "int8.onnx", corrections=("auto",))[1].corrections
    assert made in (("bias",), ("bias", "adaround"))
    assert calibrate(model, tmp_path / "int8.onnx")[1].corrections == ()


def test_ranges_without_the_corrections_are_given_to_those_who_ask(model, tmp_path):
    plain = calibrate(model, tmp_path / "plain.onnx")[0]
    corrected, table, _ = calibrate(model, tmp_path / "first.onnx", corrections=("bias", "adaround"))

    def reuse(reuse):
        return TableQuantizer(table, "cpu", reuse).quantize(
            model, no_images, DATASET, tmp_path / "second.onnx", nothing
        )

    with pytest.raises(
        IntegrityError, match=r"corrections: bias,adaround .* --corrections none uses the ranges"
    ):
        reuse(REUSE)
    again, kept, _ = reuse(dataclasses.replace(REUSE, without_corrections=True))
    assert kept.corrections == (), "this build made none"
    assert again.sha256 == plain.sha256 != corrected.sha256


def test_a_searched_range_stays_named_where_it_is_used(model, tmp_path):
    table = calibrate(model, tmp_path / "first.onnx", corrections=("ranges", "adaround"))[1]
    assert ranges_alone(table).corrections == ("ranges",)
    assert ranges_alone(table).ranges == table.ranges


def test_ranges_of_an_equalized_model_are_refused_however_asked_for(model, tmp_path):
    table = dataclasses.replace(calibrate(model, tmp_path / "int8.onnx")[1], corrections=("equalize",))
    for without in (False, True):
        with pytest.raises(IntegrityError, match="Equalization gave the model other weights"):
            check_reuse(table, model, dataclasses.replace(REUSE, without_corrections=without))


@pytest.mark.parametrize(
    ("change", "field", "theirs", "ours"),
    [
        ({"model_sha256": "0" * 64}, "model", "0" * 64, None),
        ({"dataset_sha256": "1" * 64}, "images", "1" * 64, DATASET),
        ({"preprocess_sha256": "2" * 64}, "preprocessing", "2" * 64, None),
        ({"method": "mse"}, "method", "mse", "percentile"),
        (
            {"method_options": {"percent": 99.9, "histogram_bins": 16384, "samples_per_image": 4096}},
            "option percent of percentile",
            "99.9",
            "99.99",
        ),
        ({"method_options": {}}, "option samples_per_image of percentile", "not recorded", "4096"),
        ({"corrections": ("bias", "adaround")}, "corrections", "bias,adaround", "none"),
        ({"tools": {**TOOLS, "numpy": "1.26"}}, "version of numpy", "1.26", "2.0"),
        ({"tools": {"edgefold": "1.0", "numpy": "2.0"}}, "version of openvino", "not recorded", "2026.4"),
        ({"tools": {**TOOLS, "opencv": "5.0"}}, "version of opencv", "5.0", "not recorded"),
    ],
)
def test_each_difference_is_refused_by_name(model, tmp_path, change, field, theirs, ours):
    table = calibrate(model, tmp_path / "int8.onnx")[1]
    reuse = dataclasses.replace(REUSE, method="percentile")
    check_reuse(table, model, reuse)
    with pytest.raises(IntegrityError) as raised:
        check_reuse(dataclasses.replace(table, **change), model, reuse)
    assert f"{field}: {theirs} in the table, " in str(raised.value)
    assert f"{ours or ''} here" in str(raised.value)
    assert "'a.bundle'" in str(raised.value)
    assert raised.value.exit_code == 5


def test_every_difference_is_named_at_once(model, tmp_path):
    table = calibrate(model, tmp_path / "int8.onnx")[1]
    reuse = Reuse("'t'", {**TOOLS, "numpy": "3"}, dataset_sha256="f" * 64)
    other = dataclasses.replace(model, preprocess=PreprocessSpec(input_hw=(16, 16), color="BGR"))
    with pytest.raises(
        IntegrityError, match=r"preprocessing: .*; images: .*; version of numpy: 2.0 in the table"
    ):
        check_reuse(table, other, reuse)


def test_another_network_of_the_same_names_is_refused(model, tmp_path):
    """Its tensors have the same names, so without the digest it would be quantized, and badly."""
    table = calibrate(model, tmp_path / "int8.onnx")[1]
    other = make_model(tmp_path / "other.onnx", b=make_bias())
    with pytest.raises(IntegrityError, match=f"model: {model.sha256} in the table, {other.sha256} here"):
        TableQuantizer(table, "cpu", REUSE).quantize(other, no_images, DATASET, tmp_path / "o.onnx", nothing)
    assert not (tmp_path / "o.onnx").exists()


def make_bias():
    from onnx_text import weight

    return weight(8) * 3.0


def test_a_table_without_a_tensor_is_refused(model, tmp_path):
    table = calibrate(model, tmp_path / "int8.onnx")[1]
    ranges = dict(table.ranges)
    ranges.pop("r")
    with pytest.raises(CalibrationError, match="'r'"):
        TableQuantizer(dataclasses.replace(table, ranges=ranges), "cpu", REUSE).quantize(
            model, no_images, DATASET, tmp_path / "o.onnx", nothing
        )


def test_statistics_of_other_tools_are_not_taken_from_the_cache(model, tmp_path):
    def passes(tools):
        quantizer = StaticQuantizer(runner_factory=fp32_runner, cache_dir=tmp_path / "cache", tools=tools)
        return not quantizer.statistics(model, batches, DATASET, nothing)[1]

    assert passes(TOOLS)
    assert not passes(dict(reversed(TOOLS.items())))
    assert passes({**TOOLS, "openvino": "2026.5"})
    assert not passes(TOOLS)


def test_a_cache_file_under_another_tools_name_counts_as_absent(model, tmp_path):
    def gather(tools):
        quantizer = StaticQuantizer(runner_factory=fp32_runner, cache_dir=tmp_path, tools=tools)
        return quantizer.statistics(model, batches, DATASET, nothing)[1]

    gather(TOOLS)
    (first,) = tmp_path.glob("*.npz")
    gather({"numpy": "9"})
    (second,) = set(tmp_path.glob("*.npz")) - {first}
    second.write_bytes(first.read_bytes())
    assert not gather({"numpy": "9"})
    assert gather({"numpy": "9"})
