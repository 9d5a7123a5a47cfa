"""What `edgefold build` refuses, and that it leaves nothing where it fails."""

from __future__ import annotations

import errno
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from build_requests import quiet, request
from PIL import Image
from tinted import FACTORY

from apps.building import build
from pipeline.bundle import open_bundle
from pipeline.errors import (
    AccuracyGateError,
    DataError,
    EdgefoldError,
    UnsupportedError,
    UsageError,
)


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
