"""`edgefold train`: what it writes is what `edgefold build --weights` reads."""

from __future__ import annotations

from pathlib import Path

import pytest

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


def test_bad_requests_are_usage_errors(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = ["--data", "synthetic:5:48", "--out", str(tmp_path)]
    for arguments, words in (
        (["inception_v9", *out], "inception_v3"),
        (["inception_v3", *out, "--width", "0.5"], "width"),
        (["inception_resnet_lite", *out, "--recipe", "ancient"], "modern"),
    ):
        assert run(*arguments) == 2, arguments
        assert words in capfd.readouterr().err
