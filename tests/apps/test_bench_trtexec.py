"""``edgefold bench --trtexec``: the lines for a bundle, a model or a plan, and what a run of them shows."""

from __future__ import annotations

import dataclasses
import json
import stat
import sys
from pathlib import Path

import pytest
import typer
from bundle_fixtures import make_manifest, write_bundle
from onnx_text import onnx_model, weight
from typer.testing import CliRunner

from apps.bench import bench_command
from apps.console import console
from engines.tensorrt import trtexec
from pipeline.bundle import BundleWriter
from pipeline.errors import EngineError, UnsupportedError, UsageError
from pipeline.onnx_files import save_model

_APP = typer.Typer()
_APP.command()(bench_command)

_FAKE = """#!{python}
import sys
print("&&&& RUNNING TensorRT.trtexec [TensorRT v100300] # " + " ".join(sys.argv))
if sys.argv[1:] == ["--help"]:
    sys.exit(0)
if "--onnx={model}" not in sys.argv:
    print("[E] no such model")
    sys.exit(1)
ms = 1.0 if "--noDataTransfers" in sys.argv else 1.5
times = "min = %g ms, max = %g ms, mean = %g ms, median = %g ms, percentile(99%%) = %g ms" % (ms, ms, ms, ms, 2 * ms)
none = times.replace("%g" % ms, "0").replace("%g" % (2 * ms), "0")
print("[I] === Performance summary ===")
print("[I] Throughput: %g qps" % (1000 / ms))
print("[I] Latency: " + times)
print("[I] Enqueue Time: " + none)
print("[I] H2D Latency: " + none)
print("[I] GPU Compute Time: " + times.replace("1.5", "1"))
print("[I] D2H Latency: " + none)
print("[W] * GPU compute time is unstable, with coefficient of variance = 3%.")
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    graph = onnx_model(
        "agraph (float[N,4,7,7] x) => (float[N,6,5,5] z) { z = Conv (x, w) }", w=weight(6, 4, 3, 3)
    )
    save_model(graph, tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


@pytest.fixture
def fake(tmp_path: Path, monkeypatch, model: Path) -> Path:
    binary = tmp_path / "bin" / "trtexec"
    binary.parent.mkdir()
    binary.write_text(_FAKE.replace("{python}", sys.executable).replace("{model}", str(model)))
    binary.chmod(binary.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(binary.parent))
    return binary


def _run(*arguments: object, json_output: bool = True):
    given = [*map(str, arguments), *(["--json"] if json_output else [])]
    result = CliRunner().invoke(_APP, given, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout) if json_output else result.stdout


def _gpu_bundle(folder: Path, *files: str) -> Path:
    with BundleWriter(folder) as writer:
        for name in ("model.onnx", "model.int8.onnx", *files):
            writer.add_file(name, b"bytes of " + name.encode())
        writer.commit(dataclasses.replace(make_manifest(), target="jetson-orin-nx-16gb"))
    return folder


def test_lines_of_a_model_for_both_versions(model: Path) -> None:
    ten, eleven = _run(model, "--trtexec", "print", "--batch", 2)
    assert (ten["tensorrt"], eleven["tensorrt"]) == (10, 11)
    assert f"--onnx={model}" in ten["without_copies"]
    assert "--shapes=x:2x4x7x7" in ten["without_copies"]
    assert "--noDataTransfers" in ten["without_copies"]
    assert "--noDataTransfers" not in ten["with_copies"]
    assert "--includeDataTransfers" in eleven["with_copies"]


def test_lines_can_be_piped(tmp_path: Path) -> None:
    plan = tmp_path / "my engine.plan"
    plan.write_bytes(b"plan")
    text = _run(plan, "--trtexec", "print", json_output=False)
    commands = [line for line in text.splitlines() if not line.startswith("#")]
    assert len(commands) == 4
    assert all(f"'--loadEngine={plan}'" in command for command in commands), (
        "a shell must keep the name whole"
    )


def test_a_bundle_gives_its_plan_else_its_int8_graph(tmp_path: Path) -> None:
    ten, _ = _run(_gpu_bundle(tmp_path / "a"), "--trtexec", "print")
    assert "model.int8.onnx" in ten["without_copies"]
    assert "--shapes=input:1x75x75x3" in ten["without_copies"]
    ten, _ = _run(_gpu_bundle(tmp_path / "b", "engine.plan"), "--trtexec", "print")
    assert "--loadEngine=" in ten["without_copies"]
    assert "engine.plan" in ten["without_copies"]


def test_a_cpu_bundle_is_not_for_trtexec(tmp_path: Path) -> None:
    write_bundle(tmp_path / "cpu")
    with pytest.raises(UsageError, match="is for the CPU"):
        _run(tmp_path / "cpu", "--trtexec", "print")
    with pytest.raises(UsageError, match="no file"):
        _run(tmp_path / "absent.plan", "--trtexec", "print")


def test_running_both(model: Path, fake: Path) -> None:
    without, copies = _run(model, "--trtexec", "run", "--batch", 4, "--seconds", 0.5)
    assert (without["copies"], copies["copies"]) == (False, True)
    assert without["version"] == "10.3.0"
    assert (without["latency"]["median_ms"], copies["latency"]["median_ms"]) == (1.0, 1.5)
    assert copies["gpu_compute"]["median_ms"] == 1.0
    assert copies["latency"]["p99_ms"] == 3.0
    assert "--duration=0.5" in without["command"]
    assert without["command"][0] == str(fake)


def test_what_a_person_reads(model: Path, fake: Path, monkeypatch) -> None:
    monkeypatch.setattr(console, "width", 120)
    with console.capture() as captured:
        _run(model, "--trtexec", "run", "--batch", 4, json_output=False)
    text = captured.get()
    for words in ("trtexec 10.3.0, batch 4", "without", "1.500", "4,000", "unstable", "--noDataTransfers"):
        assert words in text


def test_a_run_that_fails(tmp_path: Path, fake: Path) -> None:
    with pytest.raises(EngineError, match=r"exit code 1: \[E\] no such model"):
        _run(_gpu_bundle(tmp_path / "b"), "--trtexec", "run")


def test_without_trtexec(model: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    monkeypatch.setattr(trtexec, "_PLACES", (str(tmp_path / "nowhere"),))
    with pytest.raises(UnsupportedError, match="--trtexec print"):
        _run(model, "--trtexec", "run")
