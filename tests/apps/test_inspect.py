"""``edgefold inspect``: what a person reads, and what a program reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from onnx_text import batch_norm, onnx_model, weight
from typer.testing import CliRunner

from apps.console import console
from apps.inspect import inspect_command
from pipeline.errors import EdgefoldError, UsageError
from pipeline.onnx_files import save_model

_APP = typer.Typer()
_APP.command()(inspect_command)


@pytest.fixture
def model_path(tmp_path: Path) -> Path:
    model = onnx_model(
        """agraph (float[N,4,7,7] x) => (float[N,6,5,5] z) {
            c = Conv (x, w) y = BatchNormalization (c, gamma, beta, mean, var) r = Relu (y) z = Mul (r, s) }""",
        w=weight(6, 4, 3, 3),
        s=weight(6, 1, 1),
        **batch_norm(6),
    )
    save_model(model, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def test_json(model_path: Path) -> None:
    result = CliRunner().invoke(_APP, [str(model_path), "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["graphs"]["before"]["op_counts"] == {"BatchNormalization": 1, "Conv": 1, "Mul": 1, "Relu": 1}
    assert told["graphs"]["after"]["op_counts"] == {"Conv": 1, "Mul": 1, "Relu": 1}
    affine = next(entry for entry in told["passes"] if entry["name"] == "affine_into_linear")
    assert affine["n_rewrites"] == 0
    assert affine["skipped"] == [["Mul 'z'", "its input comes from Relu 'r', which is not a linear layer"]]


def test_tables(model_path: Path) -> None:
    with console.capture() as captured:
        result = CliRunner().invoke(_APP, [str(model_path)])
    assert result.exit_code == 0, result.output
    text = captured.get()
    assert "batch_norm_into_linear" in text
    assert "Mul 'z'" in text
    assert "comes from Relu 'r'" in text
    counts = [line.split("│") for line in text.splitlines() if "│ BatchNormalization" in line]
    assert [cell.strip() for cell in counts[0][1:4]] == ["BatchNormalization", "1", "0"]


def test_what_is_neither_bundle_nor_model(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no bundle"):
        CliRunner().invoke(_APP, [str(tmp_path)], catch_exceptions=False)
    with pytest.raises(EdgefoldError, match=r"absent\.onnx"):
        CliRunner().invoke(_APP, [str(tmp_path / "absent.onnx")], catch_exceptions=False)
