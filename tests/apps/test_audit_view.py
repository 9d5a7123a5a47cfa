"""The audit and the DLA report as `edgefold inspect` shows them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import typer
from bundle_fixtures import make_manifest
from onnx_text import onnx_model, weight
from qdq_nets import QdqNet
from rich.console import Console
from typer.testing import CliRunner

from apps.audit_view import print_audit, print_dla
from apps.console import console
from apps.inspect import inspect_command
from engines.tensorrt.dla import report_dla
from engines.tensorrt.predict import is_tensorrt_bound, predict_audit
from pipeline.artifacts import StageRecord
from pipeline.bundle import BundleWriter
from pipeline.errors import UsageError
from pipeline.inspection import summarize_model
from pipeline.onnx_files import save_model

_APP = typer.Typer()
_APP.command()(inspect_command)


def _net(float_type: type = np.float16) -> QdqNet:
    return QdqNet(float_type=float_type)


def _faulty() -> QdqNet:
    """A sum in float, and seven layers that stayed in float."""
    net = _net()
    y = net.op("Add", net.conv(net.qdq("x", 0.1), 16, name="Conv_a"), "x", name="Add_r")
    outputs = [net.conv(net.qdq(y, 0.2), 16)] + [net.conv("x", 16, int8=False) for _ in range(7)]
    net.op("Concat", *outputs, axis=1, name="Concat_z")
    return net


@pytest.fixture
def bound_path(tmp_path: Path) -> Path:
    save_model(_faulty().model("Concat_z_out"), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def test_a_graph_for_tensorrt_is_audited(bound_path: Path) -> None:
    with console.capture() as captured:
        result = CliRunner().invoke(_APP, [str(bound_path)])
    assert result.exit_code == 0, result.output
    text = captured.get()
    assert "predicted from the graph" in text
    assert "residual adds: 0 of 1 fused" in text
    assert "sum in float" in text
    assert "insert Q/DQ on x at" in " ".join(text.split())
    assert text.count("float layer") == 5
    assert "2 more: --json has them all" in text


def test_json_has_every_finding(bound_path: Path) -> None:
    result = CliRunner().invoke(_APP, [str(bound_path), "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)["tensorrt"]["model.onnx"]
    assert told["source"] == "predicted"
    assert [finding["kind"] for finding in told["findings"]].count("float_layer") == 7
    assert told["adds"] == {"total": 1, "clean": 0}


def test_a_clean_graph_says_so() -> None:
    net = _net()
    shown = Console(record=True, width=100)
    print_audit(predict_audit(net.model(net.conv("x", 16, int8=False))), shown)
    assert "no findings" in shown.export_text()


def test_which_graphs_are_for_tensorrt() -> None:
    half, full = _net(), _net(np.float32)
    assert is_tensorrt_bound(half.model(half.conv("x", 16, int8=False)))
    assert is_tensorrt_bound(full.model(full.qdq("x", 0.1)))
    plain = _net(np.float32)
    assert not is_tensorrt_bound(plain.model(plain.conv("x", 16, int8=False)))


def test_a_bundle_shows_both(tmp_path: Path) -> None:
    folded = onnx_model(
        "agraph (float[N,4,7,7] x) => (float[N,6,5,5] z) { z = Conv (x, w) }", w=weight(6, 4, 3, 3)
    )
    summary = summarize_model(folded).as_json()
    fold = StageRecord("fold", (), (), 0.5, {"passes": [], "before": summary, "after": summary})
    with BundleWriter(tmp_path / "bundle") as writer:
        save_model(folded, writer.path / "model.onnx")
        save_model(_faulty().model("Concat_z_out"), writer.path / "model.int8.onnx")
        writer.commit(replace(make_manifest(), stages=(fold,)))
    result = CliRunner().invoke(_APP, [str(tmp_path / "bundle"), "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert set(told["tensorrt"]) == {"model.int8.onnx"}
    assert told["graphs"]["after"]["op_counts"] == {"Conv": 1}
    dla = CliRunner().invoke(_APP, [str(tmp_path / "bundle"), "--dla", "--json"])
    assert json.loads(dla.stdout)["dla"] == {
        "precision": "int8", "batch": 1, "n_dla": 1, "fallbacks": [], "n_loadables": 1, "fits": True, "by_operator": {},
    }  # fmt: skip


def test_dla_fallbacks_are_listed_by_operator() -> None:
    chain = " ".join(f"a{n} = Erf (a{n - 1})" for n in range(1, 8))
    shown = Console(record=True, width=120)
    print_dla(
        report_dla(
            onnx_model(f"agraph (float[N,4,8,8] a0) => (float[N,4,8,8] z) {{ {chain} z = Relu (a7) }}")
        ),
        shown,
    )
    text = shown.export_text()
    assert "1 of 8 nodes, in 1 loadables" in text
    assert "the DLA has no Erf" in text
    assert "2 more: --json has them all" in text


def test_a_dla_report_needs_a_folded_graph(bound_path: Path) -> None:
    for model in (str(bound_path), "inception_v3"):
        with pytest.raises(UsageError, match="holds no folded graph without Q/DQ"):
            CliRunner().invoke(_APP, [model, "--dla"], catch_exceptions=False)
