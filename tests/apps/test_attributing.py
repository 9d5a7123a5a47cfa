"""`edgefold validate --attribute` on a bundle that was really built."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image
from tinted import FACTORY, write_tinted_images
from typer.testing import CliRunner

from apps.building import build
from apps.publishing import BuildRequest
from apps.validate import validate_command
from pipeline.bundle import Bundle
from pipeline.errors import UsageError


def quiet(what: str, done: int, total: int | None) -> None:
    """A progress callback that draws nothing."""


def run(*arguments: object):  # type: ignore[no-untyped-def]
    app = typer.Typer()
    app.command()(validate_command)
    return CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_tinted_images(folder / "images")
    rng = np.random.default_rng(5)
    for name, lift in (("a_red", 3), ("b_blue", -3)):  # near ties: what int8 turns
        for i in range(10):
            pixels = rng.normal((105 + lift, 60, 105 - lift), 20, (40, 48, 3))
            image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
            image.save(folder / "images" / name / f"near{i}.png")
    # A channel of 10,000 beside channels of 10: their int8 step is 39, and the classes are under it.
    fragile = FACTORY.replace("model[5].bias.zero_()", "model[5].bias.zero_(); model[1].bias[2] = 1e4")
    (folder / "model.py").write_text(fragile)
    return folder


@pytest.fixture(scope="module")
def bundle(data: Path) -> Bundle:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEFOLD_CACHE", str(data / "cache"))
        asked = BuildRequest(
            model=f"{data / 'model.py'}:classifier",
            out=data / "bundle",
            calib=str(data / "images"),
            calibrator="minmax",
            input_size=32,
        )
        return build(asked, quiet).bundle


def test_the_layers_and_the_flips_are_named(bundle: Bundle, data: Path) -> None:
    report = data / "report.html"
    plain = json.loads(run(bundle.path, "--data", data / "images", "--json").stdout)
    assert "attribution" not in plain
    shown = run(bundle.path, "--data", data / "images", "--attribute", "--report", report).stderr
    tree = json.loads(run(bundle.path, "--data", data / "images", "--attribute", "--json").stdout)
    found = tree["attribution"]
    assert {key: value for key, value in tree.items() if key not in ("attribution", "seconds")} == {
        key: value for key, value in plain.items() if key != "seconds"
    }
    assert tree["n_flips"] > 0, "the network is meant to suffer from int8"
    assert found["n_images"] == 14  # every third of 40
    # The last layer reads the tensor with one wide channel: the loss is its.
    worst = found["layers"][0]
    assert worst["op_type"] == "Gemm"
    assert worst["logits_share"] > 0.9
    assert worst["flip_share"] > 0.9
    flipped = {flip["key"]: flip for flip in tree["flips"]}
    for flip in found["flips"]:
        assert (flip["before"], flip["after"]) == (
            flipped[flip["key"]]["before"],
            flipped[flip["key"]]["after"],
        )
        assert flip["margin_fp32"] > 0 >= flip["margin_int8"]
    assert "Layers that the int8 loss comes from" in shown
    assert worst["layer"] in " ".join(shown.split())
    page = report.read_text()
    assert 'id="layers"' in page
    assert worst["layer"] in page


def test_without_labels_too(bundle: Bundle, data: Path) -> None:
    flat = data / "flat"
    flat.mkdir()
    for file in (data / "images").rglob("*.png"):
        (flat / f"{file.parent.name}-{file.name}").write_bytes(file.read_bytes())
    tree = json.loads(run(bundle.path, "--data", flat, "--min-agreement", 0, "--attribute", "--json").stdout)
    assert tree["attribution"]["layers"][0]["op_type"] == "Gemm"


def test_what_has_no_attribution_is_refused(bundle: Bundle, data: Path) -> None:
    images, also = data / "images", ("--data", data / "images", "--attribute")
    for extra, words in (
        (("--crops", 10), "leave --crops 10 out"),
        (("--as", "jetson-orin"), "leave --as out"),
    ):
        with pytest.raises(UsageError, match=words):
            run(bundle.path, *also, *extra)
    asked = BuildRequest(
        model=f"{data / 'model.py'}:classifier", out=data / "fp32", precision="fp32", input_size=32
    )
    fp32 = build(asked, quiet).bundle
    with pytest.raises(UsageError, match="is fp32 for cpu"):
        run(fp32.path, "--data", images, "--attribute")
