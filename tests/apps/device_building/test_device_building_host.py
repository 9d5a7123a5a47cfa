"""`edgefold build --target …` on real parts; TensorRT-RTX is the real compiler here."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from device_bundles import built, copy_of, quiet

from apps.cli import main
from apps.device_building import DLA_CACHE_NAME, DLA_GRAPH_NAME, DLA_REPORT_NAME
from apps.finishing import AUDIT_NAME, FinishOptions, finish
from engines.tensorrt.audit import report_from_json
from engines.tensorrt.calibration_cache import cache_from_text
from engines.tensorrt.plan import identify_plan
from engines.tensorrt.plan_file import read_plan
from pipeline.bundle import Bundle
from pipeline.errors import AccuracyGateError, UnsupportedError
from pipeline.golden_frames import read_golden
from pipeline.onnx_files import load_model
from pipeline.validation_result import ValidationResult


class TestOnTheHost:
    def test_a_jetson_bundle_is_complete_but_for_the_plan(self, for_jetson: Bundle) -> None:
        manifest = for_jetson.manifest
        deployment = manifest.deployment
        assert deployment is not None
        assert manifest.engine is None
        assert (deployment.sm, deployment.jetpack, deployment.tensorrt) == (87, "6.2", "10.3")
        (corrected,) = (stage for stage in manifest.stages if stage.stage == "correct")
        assert corrected.checks["corrections"] == ["bias", "adaround"]
        assert corrected.outputs[0] in manifest.stages[-1].inputs, "what int8 was made from"
        names = [candidate.name for candidate in deployment.candidates]
        assert names[0] == "int8"
        assert names[-1] == "fp16"
        for candidate in deployment.candidates:
            assert candidate.file in manifest.files
            assert candidate.within_budget
            assert candidate.accuracy is not None, "emulated here"
            assert candidate.accuracy.int8_top1 == 1.0
        assert {"model.onnx", "calibration.json", "report.html", AUDIT_NAME} <= set(manifest.files)
        golden = read_golden(for_jetson)
        assert golden is not None
        assert set(golden.logits) == {"model.onnx", *(candidate.file for candidate in deployment.candidates)}
        assert report_from_json(for_jetson.read_bytes(AUDIT_NAME)).source == "predicted"
        page = for_jetson.read_bytes("report.html").decode()
        section = page[page.index('<section id="device">') :]
        assert all(f">{name}<" in section for name in names)
        assert "predicted from the graph" in section

    def test_for_a_dla_it_carries_the_cache_and_the_report(self, workplace: Path) -> None:
        bundle = built(workplace, "dla", target="jetson-orin-nx", jetpack="6.2", dla=True, eval_data=None)
        cache = cache_from_text(bundle.read_bytes(DLA_CACHE_NAME).decode())
        assert cache.tensorrt == (10, 3, 0)
        graph = load_model(bundle.file(DLA_GRAPH_NAME))
        assert not [node for node in graph.graph if "Quantize" in node.op_type]
        assert {value.name for node in graph.graph for value in node.outputs[:1]} <= {
            *cache.scales,
            *(value.name for value in graph.graph.outputs),
        }
        report = json.loads(bundle.read_bytes(DLA_REPORT_NAME))
        assert report["n_dla"] > 0
        assert all(fallback["reason"] and fallback["remedy"] for fallback in report["fallbacks"])

    def test_nothing_streams_it_until_it_is_finished(
        self, for_jetson: Bundle, workplace: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as stopped:
            main(["stream", str(for_jetson.path), "--source", str(workplace / "images"), "--headless"])
        assert stopped.value.code == 4
        assert "edgefold finish" in " ".join(capfd.readouterr().err.split())

    def test_what_cannot_be_finished_here_says_why_and_stays_as_it_is(
        self, for_jetson: Bundle, tmp_path: Path
    ) -> None:
        path = copy_of(for_jetson, tmp_path)
        before = (path / "manifest.json").read_bytes()
        with pytest.raises(UnsupportedError, match=r"SM 87.*tensorrt.*on the target itself"):
            finish(path, FinishOptions(), quiet)
        assert (path / "manifest.json").read_bytes() == before
        assert [entry.name for entry in tmp_path.iterdir() if entry.name.endswith(".tmp")] == []

    def test_a_card_that_tensorrt_rtx_compiles_for_gets_a_plan_at_once(self, for_l4: Bundle) -> None:
        manifest, engine = for_l4.manifest, for_l4.manifest.ready_engine()
        assert engine.backend == "tensorrt_rtx"
        plan = read_plan(for_l4.file(engine.file), for_l4.sha256(engine.file))
        assert identify_plan(plan).sms == (89,)
        assert for_l4.file(engine.file).stat().st_size < len(plan) / 3, "most of it is source text"
        deployment = manifest.deployment
        assert deployment is not None
        assert deployment.chosen == "int8"
        assert [m.p50_ms for m in deployment.measurements] == [None], "built, not timed"
        assert any("TensorRT-RTX only" in note for note in deployment.notes)
        audit = report_from_json(for_l4.read_bytes(AUDIT_NAME))
        assert audit.source == "inspector", "its build log describes the kernels"
        assert audit.precisions["int8"] > 0
        assert manifest.stages[-1].stage == "plan"

    def test_without_a_gpu_its_plan_is_refused_by_name(
        self, for_l4: Bundle, workplace: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as stopped:
            main(["stream", str(for_l4.path), "--source", str(workplace / "images"), "--headless"])
        assert stopped.value.code == 4
        assert "driver" in capfd.readouterr().err

    def test_its_folded_model_streams_on_the_cpu_and_its_plan_on_no_other_engine(
        self, for_l4: Bundle, workplace: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        stream = ["stream", str(for_l4.path), "--source", str(workplace / "images"), "--headless"]
        with pytest.raises(SystemExit) as done:
            main([*stream, "--precision", "fp32", "--json"])
        assert done.value.code == 0
        assert json.loads(capfd.readouterr().out)["engine"] == "openvino"
        with pytest.raises(SystemExit) as stopped:
            main([*stream, "--engine", "openvino"])
        assert stopped.value.code == 2
        assert "plan of tensorrt_rtx" in " ".join(capfd.readouterr().err.split())

    def test_fp16_alone_is_one_candidate_and_needs_no_images(self, workplace: Path) -> None:
        bundle = built(
            workplace, "half", target="jetson-agx-orin-64gb", precision="fp16", calib=None, eval_data=None
        )
        deployment = bundle.manifest.deployment
        assert deployment is not None
        assert [candidate.name for candidate in deployment.candidates] == ["fp16"]
        assert "calibration.json" not in bundle.manifest.files

    @pytest.mark.parametrize("precision", ["fp16", "fp32"])
    def test_without_int8_it_compiles_too(self, workplace: Path, precision: str) -> None:
        pytest.importorskip("tensorrt_rtx")
        bundle = built(workplace, precision, target="l4", precision=precision, calib=None, eval_data=None)
        audit = report_from_json(bundle.read_bytes(AUDIT_NAME))
        assert precision in audit.precisions
        assert "int8" not in audit.precisions
        assert bundle.manifest.ready_engine().backend == "tensorrt_rtx"

    def test_no_candidate_within_the_budget_publishes_nothing(
        self, workplace: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import apps.device_building as module

        real = module.validate_subject

        def worse(*args: Any, **options: Any) -> ValidationResult:
            result = real(*args, **options)
            return dataclasses.replace(result, total=dataclasses.replace(result.total, drop_points=7.5))

        monkeypatch.setattr(module, "validate_subject", worse)
        with pytest.raises(AccuracyGateError, match=r"budget of 5 points.*7\.50.*on 20 images"):
            built(workplace, "gated", target="jetson-orin-nx", max_drop_points=5.0)
        assert not (workplace / "gated").exists()
