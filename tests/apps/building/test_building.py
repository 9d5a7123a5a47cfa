"""`edgefold build` on real parts: torch, the exporter, OpenVINO; small model, small images."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from build_requests import quiet, request
from PIL import Image

from apps.building import build
from apps.cli import main
from apps.publishing import print_build
from pipeline.bundle import open_bundle


def test_a_users_own_model_becomes_a_judged_bundle(model_py: str, images: Path, tmp_path: Path) -> None:
    outcome = build(request(model_py, images, tmp_path / "bundle"), quiet)
    bundle = open_bundle(tmp_path / "bundle")
    assert bundle.manifest == outcome.bundle.manifest
    assert set(bundle.manifest.files) == {
        "model.onnx",
        "model.int8.onnx",
        "calibration.json",
        "golden.npz",
        "report.html",
    }
    stages = [stage.stage for stage in bundle.manifest.stages]
    assert stages == ["export", "fold", "correct", "quantize", "engine"]
    assert bundle.manifest.labels == ("a_red", "b_blue")
    assert bundle.manifest.preprocess_folded
    assert bundle.manifest.accuracy is not None
    # The colours are told apart, which they are not if red and blue are swapped on the way.
    assert bundle.manifest.accuracy.fp32_top1 == 1.0
    assert bundle.manifest.accuracy.int8_top1 == 1.0
    assert list(tmp_path.glob(".bundle.tmp")) == []


def test_calibration_images_among_those_judged_are_counted(
    model_py: str, images: Path, tmp_path: Path
) -> None:
    outcome = build(request(model_py, images, tmp_path / "bundle"), quiet)
    assert outcome.validation is not None
    assert outcome.validation.notes[0].startswith(
        "20 of the images judged are also among the 20 that the engine was calibrated on (a_red/0.png, "
    )
    rng = np.random.default_rng(9)
    for file in (images / "a_red").iterdir():  # half of them replaced
        pixels = np.clip(rng.normal((150, 60, 60), 40, (40, 48, 3)), 0, 255).astype(np.uint8)
        (tmp_path / "others" / "a_red").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "others" / "a_red" / file.name)
    (tmp_path / "others" / "b_blue").mkdir()
    (images / "b_blue" / "0.png").rename(tmp_path / "others" / "b_blue" / "moved.png")
    (tmp_path / "others" / "b_blue" / "copy.png").write_bytes((images / "b_blue" / "1.png").read_bytes())
    apart = build(
        request(model_py, images, tmp_path / "apart", eval_data=str(tmp_path / "others")), quiet
    ).validation
    assert apart is not None
    assert apart.notes[0].startswith("1 of the images judged are also among the 19")
    assert "(b_blue/copy.png)" in apart.notes[0]


def test_each_stage_takes_what_the_one_before_made(model_py: str, images: Path, tmp_path: Path) -> None:
    stages = build(request(model_py, images, tmp_path / "bundle"), quiet).bundle.manifest.stages
    for before, after in itertools.pairwise(stages):
        assert set(before.outputs) & set(after.inputs), f"{after.stage} does not start from {before.stage}"


def test_what_was_corrected_is_printed_with_its_cost_and_can_be_switched_off(
    model_py: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = build(request(model_py, images, tmp_path / "bundle", eval_data=None), quiet)
    print_build(outcome)
    printed = " ".join(capsys.readouterr().err.split())
    (checks,) = (s.checks for s in outcome.bundle.manifest.stages if s.stage == "correct")
    left_out = dict(checks["left_out"])
    assert set(checks["corrections"]) | set(left_out) == {"equalize", "ranges", "bias", "adaround"}
    assert "bias" in checks["corrections"]
    assert f"bias+adaround {checks['seconds_of']['bias+adaround']:.1f} s" in printed
    assert ", made from 20 images" in printed
    assert " logits: from " in printed
    assert [gain["correction"] for gain in checks["gains"]] == checks["corrections"]
    assert "bias: the median of 2 layers from " in printed
    for name, reason in left_out.items():
        assert f"{name} left out: {reason}" in printed
    assert json.loads(outcome.to_json())["corrections"]["corrections"] == checks["corrections"]
    plain = build(request(model_py, images, tmp_path / "plain", eval_data=None, corrections="none"), quiet)
    assert "correct" not in {stage.stage for stage in plain.bundle.manifest.stages}
    print_build(plain)
    assert "corrections" not in capsys.readouterr().err


def test_fp32_needs_no_calibration(model_py: str, images: Path, tmp_path: Path) -> None:
    plain = request(model_py, images, tmp_path / "bundle", precision="fp32", calib=None)
    manifest = build(plain, quiet).bundle.manifest
    assert manifest.engine.file == "model.onnx"
    assert manifest.calibration is None
    assert manifest.accuracy is not None
    assert manifest.accuracy.drop_points == 0.0


def test_the_command_prints_json_and_exit_codes(
    model_py: str, images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bundle"
    arguments = ["build", model_py, "--calib", str(images), "--input-size", "32", "--out", str(out), "--json"]
    with pytest.raises(SystemExit) as done:
        main(arguments)
    assert done.value.code == 0
    printed = json.loads(capfd.readouterr().out)
    assert printed["bundle"] == str(out)
    (out / "model.int8.onnx").write_bytes(b"edited")
    for wrong, code in (
        (["validate", str(out), "--data", str(images)], 5),
        (["build", "inception_v33", "--calib", str(images), "--out", str(tmp_path / "x")], 2),
        (["build", model_py, "--target", "toaster", "--calib", str(images), "--out", str(tmp_path / "x")], 4),
    ):
        with pytest.raises(SystemExit) as raised:
            main(wrong)
        assert raised.value.code == code, wrong
    assert "inception_v3" in capfd.readouterr().err, "near names are offered"


def test_three_commands_of_a_new_user(
    model_py: str, images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out, report = tmp_path / "bundle", tmp_path / "report.html"
    for arguments in (
        ["build", model_py, "--calib", str(images), "--input-size", "32", "--out", str(out)],
        [
            "validate",
            str(out),
            "--data",
            str(images),
            "--against",
            "torch",
            "--report",
            str(report),
            "--json",
        ],
        ["stream", str(out), "--source", str(images), "--headless", "--json"],
    ):
        capfd.readouterr()
        with pytest.raises(SystemExit) as done:
            main(arguments)
        assert done.value.code == 0, arguments
        printed = capfd.readouterr().out
        if arguments[0] == "validate":
            judged = json.loads(printed)
    streamed = json.loads(printed)
    assert report.read_text().startswith("<!doctype html>")
    assert judged["n_images"] == streamed["frames_inferred"] == 20
    assert streamed["top1"] == judged["stages"][-1]["top1"] == 1.0
