"""`edgefold build` on real parts: torch, the exporter, OpenVINO; small model, small images."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tinted import FACTORY, write_tinted_images

from apps.building import build
from apps.cli import main
from apps.publishing import BuildRequest, print_build
from pipeline.bundle import open_bundle
from pipeline.errors import (
    AccuracyGateError,
    DataError,
    EdgefoldError,
    IntegrityError,
    UnsupportedError,
    UsageError,
)


@pytest.fixture
def model_py(tmp_path: Path) -> str:
    path = tmp_path / "model.py"
    path.write_text(FACTORY)
    return f"{path}:classifier"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_tinted_images(tmp_path / "images")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEFOLD_CACHE", str(tmp_path / "cache"))


def quiet(what: str, done: int, total: int | None) -> None:
    """A progress callback that draws nothing."""


def request(model_py: str, images: Path, out: Path, **changes: object) -> BuildRequest:
    settings: dict[str, object] = {
        "model": model_py,
        "out": out,
        "calib": str(images),
        "eval_data": str(images),
        "input_size": 32,
        **changes,
    }
    return BuildRequest(**settings)  # type: ignore[arg-type]


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


def test_past_the_budget_nothing_is_published(images: Path, tmp_path: Path) -> None:
    # A channel of 10,000 beside channels of 10: their int8 step is 39, and the classes are under it.
    (tmp_path / "fragile.py").write_text(
        FACTORY.replace("model[5].bias.zero_()", "model[5].bias.zero_(); model[1].bias[2] = 1e4")
    )
    before = build(request(f"{tmp_path / 'fragile.py'}:classifier", images, tmp_path / "bundle"), quiet)
    assert before.validation is not None
    assert before.validation.total.drop_points > 0.5, "the model is meant to suffer from int8"
    previous = (tmp_path / "bundle" / "manifest.json").read_bytes()
    with pytest.raises(AccuracyGateError, match="past the budget") as raised:
        build(
            request(
                f"{tmp_path / 'fragile.py'}:classifier", images, tmp_path / "bundle", max_drop_points=0.5
            ),
            quiet,
        )
    assert raised.value.exit_code == 3
    assert (tmp_path / "bundle" / "manifest.json").read_bytes() == previous
    open_bundle(tmp_path / "bundle")


def test_bad_requests_are_refused_before_any_work(model_py: str, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    for changes, error, words in (
        ({"calib": None}, UsageError, "--calib"),
        ({"target": "jetson-orin-nx", "jetpack": "7.1"}, UnsupportedError, "sm_87"),
        ({"target": "jetson-orin-nx", "engine": "openvino"}, UsageError, "TensorRT plan"),
        ({"corrections": "bias,smooth"}, UsageError, "no correction 'smooth'"),
        ({"target": "jetson-xavier-nx"}, UnsupportedError, "JetPack"),
        ({"target": "jetson-orin-nx", "dla": True, "precision": "fp16"}, UsageError, "--dla"),
        ({"precision": "fp16"}, UnsupportedError, "fp16"),
        ({"eval_data": None, "max_drop_points": 0.5}, UsageError, "--eval"),
        ({"engine": "tensorrt-9"}, UnsupportedError, "openvino"),
    ):
        with pytest.raises(error, match=words):
            build(request(model_py, images, out, **changes), quiet)
    assert not out.exists()


def test_too_few_images_are_refused_and_listed(model_py: str, tmp_path: Path) -> None:
    folder = tmp_path / "few"
    folder.mkdir()
    for i in range(7):
        Image.new("RGB", (40, 40), (i, i, i)).save(folder / f"{i}.png")
    for i in range(5):
        (folder / f"broken{i}.png").write_bytes(b"not an image")
    few = request(model_py, folder, tmp_path / "bundle", eval_data=None)
    with pytest.raises(DataError, match=r"broken0\.png"):
        build(few, quiet)
    assert not (tmp_path / "bundle").exists()


def test_labels_that_do_not_fit_are_refused(model_py: str, images: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("red\ngreen\nblue\n")
    with pytest.raises(DataError, match="3 classes"):
        build(request(model_py, images, tmp_path / "bundle", labels=labels), quiet)


@pytest.mark.parametrize("stage", ["export", "calibrate", "judging"])
def test_an_interrupt_leaves_nothing(model_py: str, images: Path, tmp_path: Path, stage: str) -> None:
    def interrupt(what: str, done: int, total: int | None) -> None:
        if what == stage or (stage == "export" and what == "stages"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(request(model_py, images, tmp_path / "bundle"), interrupt)
    assert not (tmp_path / "bundle").exists()
    assert [path.name for path in tmp_path.iterdir() if "tmp" in path.name] == []


def test_a_full_disk_leaves_the_old_bundle(
    model_py: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(request(model_py, images, tmp_path / "bundle"), quiet)

    def full(path: Path, *_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr("apps.report.render_report", full)
    with pytest.raises(EdgefoldError, match="No space left"):
        build(request(model_py, images, tmp_path / "bundle"), quiet)
    open_bundle(tmp_path / "bundle")


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


def test_model_optimizer_is_refused_where_it_cannot_be(
    model_py: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("calibration.modelopt.installed_version", lambda name: "0.47.0")
    for changes, words in (
        ({"corrections": "bias"}, "--corrections change"),
        ({"meet_budget": True, "min_agreement_percent": 90.0}, "--meet-budget needs"),
        ({"calibration": tmp_path}, "--calibration has"),
    ):
        with pytest.raises(UsageError, match=words):
            build(request(model_py, images, tmp_path / "b", calibrator="modelopt", **changes), quiet)

    def absent(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("calibration.modelopt.installed_version", absent)
    with pytest.raises(UnsupportedError, match=r"pip install 'edgefold\[modelopt\]'"):
        build(request(model_py, images, tmp_path / "b", calibrator="modelopt"), quiet)
    assert not (tmp_path / "b").exists()
