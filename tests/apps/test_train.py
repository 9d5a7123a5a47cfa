"""`edgefold train`: what it writes is what `edgefold build --weights` reads."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from apps.cli import main
from pipeline.models.resolve import resolve_model


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


def test_bad_requests_are_usage_errors(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = ["--data", "synthetic:5:48", "--out", str(tmp_path)]
    for arguments, words in (
        (["inception_v9", *out], "inception_v3"),
        (["inception_v3", *out, "--width", "0.5"], "width"),
        (["inception_resnet_lite", *out, "--recipe", "ancient"], "modern"),
    ):
        assert run(*arguments) == 2, arguments
        assert words in capfd.readouterr().err
