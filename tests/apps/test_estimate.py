"""``edgefold estimate``: which graph of a bundle it looks at, and what it says."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import typer
from bundle_fixtures import make_manifest
from onnx_text import onnx_model, weight
from qdq_nets import QdqNet
from typer.testing import CliRunner

from apps.console import console
from apps.estimate import estimate_command
from pipeline.bundle import BundleWriter
from pipeline.errors import IntegrityError, ModelSpecError, UnsupportedError
from pipeline.onnx_files import save_model

_APP = typer.Typer()
_APP.command()(estimate_command)


def _folded():
    return onnx_model(
        """agraph (float[N,32,28,28] x) => (float[N,64,28,28] z) {
            c = Conv <kernel_shape=[3,3], pads=[1,1,1,1]> (x, w) z = Relu (c) }""",
        w=weight(64, 32, 3, 3),
    )


def _quantized():
    net = QdqNet(channels=32, size=28)
    hidden = net.op("Relu", net.conv(net.qdq("x", 0.1), 64, 3, name="Conv_a"), name="Relu_a")
    return net.model(net.conv(net.qdq(hidden, 0.1), 64, name="Conv_b"))


def _bundle(folder: Path, target: str) -> Path:
    with BundleWriter(folder) as writer:
        save_model(_folded(), writer.path / "model.onnx")
        save_model(_quantized(), writer.path / "model.int8.onnx")
        writer.commit(dataclasses.replace(make_manifest(), target=target))
    return folder


def _run(*arguments: object) -> dict:
    result = CliRunner().invoke(_APP, [*map(str, arguments), "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_an_onnx_file_in_its_own_precision_or_an_assumed_one(tmp_path: Path) -> None:
    save_model(_folded(), tmp_path / "m.onnx")
    own = _run(tmp_path / "m.onnx", "--target", "jetson-orin-nx")
    assert own["precision"] is None
    assert [layer["precision"] for layer in own["layers"]] == ["fp32"]
    assert own["target"] == "jetson-orin-nx-16gb"
    int8 = _run(tmp_path / "m.onnx", "--target", "jetson-orin-nx", "--precision", "int8")
    assert int8["high_ms"] < own["high_ms"]
    batch = _run(tmp_path / "m.onnx", "--target", "jetson-orin-nx", "--precision", "int8", "--batch", 8)
    assert batch["batch"] == 8
    assert int8["high_ms"] < batch["high_ms"] < 8 * int8["high_ms"]
    assert batch["images_per_s_high"] == pytest.approx(8e3 / batch["low_ms"])


def test_a_bundle_for_tensorrt_is_taken_as_it_will_be_built(tmp_path: Path) -> None:
    told = _run(_bundle(tmp_path / "b", "jetson-orin-nx-16gb"), "--target", "jetson-orin-nx")
    assert told["precision"] is None
    assert [layer["kind"] for layer in told["layers"]] == ["quantize", "conv", "conv"]
    assert "Conv_a" in told["layers"][1]["name"]


def test_the_folded_graph_stands_in_where_q_dq_are_elsewhere(tmp_path: Path) -> None:
    for_cpu = _run(_bundle(tmp_path / "cpu", "cpu"), "--target", "l4")
    assert for_cpu["precision"] == "int8"
    assert [layer["kind"] for layer in for_cpu["layers"]] == ["conv"]
    bundle = _bundle(tmp_path / "b", "jetson-orin-nx-16gb")
    half = _run(bundle, "--target", "l4", "--precision", "fp16")
    assert [(layer["kind"], layer["precision"]) for layer in half["layers"]] == [("conv", "fp16")]
    dla = _run(bundle, "--target", "jetson-orin-nx", "--dla")
    assert (dla["engine"], dla["precision"]) == ("dla", "int8")
    assert [layer["kind"] for layer in dla["layers"]] == ["conv"]


def test_super_mode(tmp_path: Path) -> None:
    save_model(_folded(), tmp_path / "m.onnx")
    base = [tmp_path / "m.onnx", "--target", "jetson-orin-nano", "--precision", "int8"]
    assert _run(*base, "--super")["low_ms"] < _run(*base)["low_ms"]


def test_what_a_person_reads(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(console, "width", 100)
    save_model(_folded(), tmp_path / "m.onnx")
    arguments = [str(tmp_path / "m.onnx"), "--target", "l4", "--precision", "int8"]
    with console.capture() as captured:
        CliRunner().invoke(_APP, arguments, catch_exceptions=False)
    text = captured.get()
    told = _run(*arguments)
    assert f"{told['low_ms']:.3g} to {told['high_ms']:.3g} ms" in text
    for words in ("every layer taken for int8", "1 kernel;", "+1", "Assumed", "transfers", "300 GB/s"):
        assert words in text


def test_bad_input(tmp_path: Path) -> None:
    save_model(_folded(), tmp_path / "m.onnx")
    with pytest.raises(UnsupportedError, match="did you mean"):
        _run(tmp_path / "m.onnx", "--target", "orin")
    with pytest.raises(UnsupportedError, match="edgefold bench"):
        _run(tmp_path / "m.onnx", "--target", "cpu")
    with pytest.raises(UnsupportedError, match="no source gives"):
        _run(tmp_path / "m.onnx", "--target", "dgx-spark")
    with pytest.raises(ModelSpecError, match=r"absent\.onnx"):
        _run(tmp_path / "absent.onnx", "--target", "l4")
    damaged = _bundle(tmp_path / "b", "cpu")
    (damaged / "model.onnx").write_bytes(b"other")
    with pytest.raises(IntegrityError):
        _run(damaged, "--target", "l4")
