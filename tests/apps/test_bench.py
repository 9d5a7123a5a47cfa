from __future__ import annotations

import dataclasses
import json

import pytest
import typer
from bundle_fixtures import make_manifest
from tiny_engine_models import make_fp32, make_int8
from typer.testing import CliRunner

import apps.bench as bench
from apps.bench import BenchResult, bench_command
from pipeline.bundle import BundleWriter
from pipeline.errors import EngineError, IntegrityError, UnsupportedError, UsageError

pytest.importorskip("openvino")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEFOLD_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def bundle(tmp_path):
    with BundleWriter(tmp_path / "bundle") as writer:
        make_fp32(writer.path / "model.onnx")
        make_int8(writer.path / "model.int8.onnx")
        writer.commit(make_manifest())
    return tmp_path / "bundle"


def _run(*arguments: object):
    app = typer.Typer()
    app.command()(bench_command)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_bundle_int8_against_fp32(bundle):
    result = _run(bundle, "--seconds", 0.1, "--rounds", 2, "--threads", 1, "--json")
    assert result.exit_code == 0, result.output
    tree = json.loads(result.stdout)
    assert [(row["engine"], row["precision"]) for row in tree["results"]] == [
        ("openvino", "int8"),
        ("openvino", "fp32"),
    ]
    for row in tree["results"]:
        assert 0 < row["p50_ms"] <= row["p95_ms"] <= row["p99_ms"]
        assert len(row["round_scores"]) == 2
    (ratio,) = tree["int8_speedup"]
    assert ratio["low"] <= ratio["median"] <= ratio["high"]


def test_the_power_mode_stands_beside_the_latencies(bundle, monkeypatch):
    monkeypatch.setattr("apps.power_mode.read_power_mode", lambda: "MODE_30W")
    asked = (bundle, "--seconds", 0.1, "--rounds", 1, "--precision", "int8")
    assert json.loads(_run(*asked, "--json").stdout)["power_mode"] == "MODE_30W"
    assert "power mode: MODE_30W" in " ".join(_run(*asked).stderr.split())


def test_an_onnx_file_as_it_is(tmp_path):
    make_fp32(tmp_path / "mine.onnx")
    result = _run(tmp_path / "mine.onnx", "--seconds", 0.1, "--rounds", 1, "--mode", "throughput")
    assert result.exit_code == 0, result.output
    assert "mine.onnx" in result.stderr
    assert "throughput" in result.stderr
    assert "as fast as" not in result.stderr


def test_a_precision_the_bundle_lacks(tmp_path):
    with BundleWriter(tmp_path / "bundle") as writer:
        make_fp32(writer.path / "model.onnx")
        manifest = make_manifest()
        engine = dataclasses.replace(manifest.engine, file="model.onnx")
        writer.commit(dataclasses.replace(manifest, precision="fp32", engine=engine))
    assert bench._models(tmp_path / "bundle", "both").keys() == {"fp32"}
    with pytest.raises(UsageError, match="no int8 model; it has: fp32"):
        bench._models(tmp_path / "bundle", "int8")


def test_an_altered_bundle_is_refused(bundle):
    data = bytearray((bundle / "model.onnx").read_bytes())
    data[-1] ^= 1
    (bundle / "model.onnx").write_bytes(data)
    assert isinstance(_run(bundle, "--precision", "int8").exception, IntegrityError)


def test_a_file_no_engine_reads_is_named(tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    error = _run(tmp_path / "bad.onnx", "--rounds", 1).exception
    assert isinstance(error, EngineError)
    assert "bad.onnx" in str(error)
    assert isinstance(_run(tmp_path / "absent.onnx").exception, UsageError)


def test_all_engines_leaves_out_what_is_not_installed(monkeypatch, capsys):
    import engines

    def only_openvino(name: str) -> None:
        if name != "openvino":
            raise UnsupportedError(f"{name} is not installed")

    monkeypatch.setattr(engines, "get_backend", only_openvino)
    assert bench._usable_engines("all") == ["openvino"]
    assert "onnxruntime is not installed" in capsys.readouterr().err
    with pytest.raises(UnsupportedError):
        bench._usable_engines("onnxruntime")


def _result(precision: str, *scores: float) -> BenchResult:
    return BenchResult("openvino", precision, 1, 1, 1, 1, 1, "v", scores)


def test_ratio_says_how_many_times_faster():
    pair = [_result("int8", 2.0, 4.0, 5.0), _result("fp32", 6.0, 8.0, 20.0)]
    (latency,) = bench._ratios(pair, lower_is_better=True)
    assert (latency.median, latency.low, latency.high) == (3.0, 2.0, 4.0)
    (throughput,) = bench._ratios(pair, lower_is_better=False)
    assert throughput.median == pytest.approx(1 / 3)
    assert bench._ratios([_result("onnx", 1.0)], lower_is_better=True) == []
