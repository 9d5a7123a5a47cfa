"""Builds on the ranges of an earlier bundle."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from build_requests import quiet, request

from apps.building import build
from pipeline.errors import (
    IntegrityError,
    UsageError,
)


def test_ranges_of_an_earlier_bundle_are_used_without_images(
    model_py: str, images: Path, tmp_path: Path
) -> None:
    plain = request(model_py, images, tmp_path / "first", calibrator="mse", corrections="none")
    first = build(plain, quiet).bundle
    for source in (first.path, first.file("calibration.json")):
        again = build(
            request(model_py, images, tmp_path / "again", calib=None, calibration=source), quiet
        ).bundle
        assert again.sha256("model.int8.onnx") == first.sha256("model.int8.onnx")
        assert again.sha256("calibration.json") == first.sha256("calibration.json")
        summary = again.manifest.calibration
        assert summary is not None
        assert first.manifest.calibration is not None
        assert (summary.method, summary.dataset_sha256) == ("mse", first.manifest.calibration.dataset_sha256)
    jetson = request(
        model_py, images, tmp_path / "jetson", calib=None, calibration=first.path, target="jetson-orin-nx"
    )
    table = build(jetson, quiet).bundle.sha256("calibration.json")
    assert table == first.sha256("calibration.json")


def test_the_table_of_a_corrected_build_gives_its_ranges_to_those_who_ask(
    model_py: str, images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    corrected = request(model_py, images, tmp_path / "first", corrections="bias,adaround")
    first = build(corrected, quiet).bundle
    plain = build(request(model_py, images, tmp_path / "plain", corrections="none"), quiet).bundle
    reused = request(model_py, images, tmp_path / "again", calib=None, calibration=first.path)
    with pytest.raises(IntegrityError, match="corrections: bias,adaround in the table, none here"):
        build(reused, quiet)
    capfd.readouterr()
    again = build(dataclasses.replace(reused, corrections="none"), quiet).bundle
    assert "was corrected (bias, adaround)" in " ".join(capfd.readouterr().err.split())
    for name in ("model.int8.onnx", "calibration.json"):
        assert again.sha256(name) == plain.sha256(name)
    assert again.sha256("calibration.json") != first.sha256("calibration.json")
    device = dataclasses.replace(reused, target="jetson-orin-nx")
    with pytest.raises(IntegrityError, match="corrections: bias,adaround"):
        build(device, quiet)
    device = dataclasses.replace(device, corrections="none")
    assert build(device, quiet).bundle.sha256("calibration.json") == plain.sha256("calibration.json")


def test_a_calibration_that_does_not_fit_is_refused_by_name(
    model_py: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build(
        request(model_py, images, tmp_path / "first", calibrator="mse", corrections="none"), quiet
    ).bundle
    plain = build(request(model_py, images, tmp_path / "fp32", precision="fp32", calib=None), quiet).bundle
    (images / "a_red" / "0.png").unlink()  # other images than those of the table

    def reuse(**changes: object) -> None:
        settings = {"calib": None, "calibration": first.path, "eval_data": None, **changes}
        build(request(model_py, images, tmp_path / "again", **settings), quiet)

    reuse()
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps({"input_hw": [32, 32], "mean": [0.5, 0.5, 0.5]}))
    table = tmp_path / "calibration.json"
    table.write_text("{}")
    for changes, error, words in (
        ({"calib": str(images)}, IntegrityError, "images: "),
        ({"calibrator": "minmax"}, IntegrityError, "method: mse in the table, minmax here"),
        ({"preprocess": spec}, IntegrityError, "preprocessing: "),
        ({"target": "jetson-orin-nx", "calibrator": "minmax"}, IntegrityError, "method: mse"),
        ({"calibration": plain.path}, UsageError, "never calibrated"),
        ({"calibration": table}, IntegrityError, "not a calibration table"),
        ({"calibration": tmp_path / "absent"}, UsageError, "cannot be read"),
        ({"corrections": "bias"}, UsageError, "--corrections bias"),
        ({"precision": "fp32"}, UsageError, "--calibration is for int8"),
        (
            {"meet_budget": True, "min_agreement_percent": 90.0, "eval_data": str(images)},
            UsageError,
            "--meet-budget",
        ),
    ):
        with pytest.raises(error, match=words):
            reuse(**changes)
    monkeypatch.setattr("apps.calibrating.calibration_tools", lambda: {"numpy": "0.1"})
    with pytest.raises(IntegrityError, match=r"version of numpy: .* in the table, 0\.1 here"):
        reuse()
