"""`edgefold train`: what it writes is what `edgefold build --weights` reads."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from apps.cli import main
from pipeline.models.resolve import resolve_model
from pipeline.models.weights import bundled_weights

FROZEN = """
import torch
from torch import nn

edgefold_preprocess = {"input_hw": (24, 24), "mean": (0.5, 0.5, 0.5)}


def pretrained(num_classes):
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes),
    )
    model[0].requires_grad_(False)
    return model
"""


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as done:
        main(["train", *arguments])
    assert isinstance(done.value.code, int)
    return done.value.code


def test_trained_weights_bring_labels_size_width_and_preprocessing(tmp_path: Path) -> None:
    data = ["--data", "synthetic:5:48", "--holdout", "12", "--epochs", "1", "--batch-size", "16", "--no-flip"]
    shape = ["--input-size", "32", "--width", "0.5"]
    assert run("inception_resnet_lite", "--out", str(tmp_path), *data, *shape) == 0
    model = resolve_model("inception_resnet_lite", weights=str(tmp_path / "weights.safetensors"))
    assert model.num_classes == len(model.labels) == 12
    assert model.preprocess.input_hw == (32, 32)


def test_training_goes_on_from_weights_of_another_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = ["--data", "synthetic:5:48", "--holdout", "12", "--epochs", "1", "--batch-size", "16", "--no-flip"]
    shape = ["--input-size", "32", "--width", "0.5"]
    first, second = tmp_path / "first", tmp_path / "second"
    assert run("inception_resnet_lite", "--out", str(first), *data, *shape) == 0
    # At a learning rate of nothing the weights stay those of the file.
    weights = ["--weights", str(first / "weights.safetensors"), "--lr", "1e-6"]
    assert run("inception_resnet_lite", "--out", str(second), *data, *shape, *weights) == 0
    before, after = (load_file(folder / "weights.safetensors") for folder in (first, second))
    kernel = "features.conv.weight"
    assert (before[kernel].float() - after[kernel].float()).abs().max() < 1e-3
    card = json.loads((second / "card.json").read_text())
    expected = hashlib.sha256((first / "weights.safetensors").read_bytes()).hexdigest()
    assert card["initial_weights_sha256"] == expected
    assert run("inception_resnet_lite", "--out", str(tmp_path / "third"), *data, *shape[:2], *weights) == 2
    assert "file 16, model 32" in capfd.readouterr().err, "of another width"


def test_a_bundled_name_starts_from_its_weights(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = ["--data", "synthetic:5:48", "--holdout", "12", "--epochs", "1", "--batch-size", "16", "--no-flip"]
    out = ["--out", str(tmp_path / "out")]
    # At a learning rate of nothing the weights stay those of the name.
    assert run("inception_resnet_lite.signs", *out, *data, "--lr", "1e-6") == 0
    before, card = bundled_weights("inception_resnet_lite", "signs")
    after = load_file(tmp_path / "out" / "weights.safetensors")
    kernel = "features.conv.weight"
    assert (load_file(before)[kernel].float() - after[kernel].float()).abs().max() < 1e-3
    written = json.loads((tmp_path / "out" / "card.json").read_text())
    assert written["initial_weights_sha256"] == hashlib.sha256(before.read_bytes()).hexdigest()
    assert tuple(written["preprocess"]["input_hw"]) == card.preprocess.input_hw
    trained = resolve_model("inception_resnet_lite", weights=str(tmp_path / "out" / "weights.safetensors"))
    assert trained.num_classes == 12
    assert run("inception_resnet_lite.signs", *out, *data, "--weights", str(before)) == 2
    assert "drop one of the two" in capfd.readouterr().err


def test_a_factory_of_another_class_count_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model.py").write_text(FROZEN.replace("(num_classes)", "()").replace("num_classes", "5"))
    spec = f"{tmp_path / 'model.py'}:pretrained"
    assert run(spec, "--out", str(tmp_path / "out"), "--data", "synthetic:5:48") == 2
    assert "gives 5 scores and the data has 12 classes" in capfd.readouterr().err


def test_bad_requests_are_usage_errors(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = ["--data", "synthetic:5:48", "--out", str(tmp_path)]
    for arguments, words in (
        (["inception_v9", *out], "inception_v3"),
        (["inception_v3", *out, "--width", "0.5"], "width"),
        (["inception_resnet_lite", *out, "--recipe", "ancient"], "modern"),
        (["inception_resnet_lite", *out, "--device", "gpu"], "--device gpu: PyTorch"),
    ):
        assert run(*arguments) == 2, arguments
        assert words in capfd.readouterr().err


def test_a_factory_is_trained_on_from_its_own_weights_where_it_lets_them_change(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(FROZEN)
    spec = f"{tmp_path / 'model.py'}:pretrained"
    data = ["--data", "synthetic:5:48", "--holdout", "12", "--epochs", "1", "--batch-size", "16", "--no-flip"]
    out = tmp_path / "out"
    # What `fast` prepares is not for weights that somebody has trained.
    options = ["--label-smoothing", "0", "--recipe", "fast"]
    assert run(spec, "--out", str(out), *data, *options) == 0
    before = resolve_model(spec, weights=None, num_classes=12).module
    assert before is not None
    after = load_file(out / "weights.safetensors")
    kernel = before.state_dict()["0.weight"]
    assert (after["0.weight"].float() - kernel).abs().max() < 1e-3, "frozen; half-precision in the file"
    assert (after["1.bias"] - before.state_dict()["1.bias"]).abs().max() > 1e-2
    card = json.loads((out / "card.json").read_text())
    assert card["preprocess"]["input_hw"] == [24, 24]
    assert card["recipe"]["label_smoothing"] == 0.0
    assert len(card["initial_weights_sha256"]) == 64
    trained = resolve_model(spec, weights=str(out / "weights.safetensors"), num_classes=12)
    assert trained.preprocess.input_hw == (24, 24)
