"""`edgefold build --target …` and `edgefold finish` on real parts; TensorRT-RTX is the real compiler here."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tinted import FACTORY, write_tinted_images

from apps.building import build
from apps.cli import main
from apps.device_building import DLA_CACHE_NAME, DLA_GRAPH_NAME, DLA_REPORT_NAME
from apps.finishing import AUDIT_NAME, FinishOptions, finish
from apps.plans import Builder, find_builder
from apps.power_mode import read_power_mode
from apps.publishing import BuildRequest
from engines.tensorrt.api import TensorRtApi
from engines.tensorrt.audit import report_from_json
from engines.tensorrt.calibration_cache import cache_from_text
from engines.tensorrt.device import DeviceIdentity
from engines.tensorrt.plan import identify_plan
from pipeline.artifacts import EngineArtifact, Fingerprint
from pipeline.bundle import Bundle, open_bundle
from pipeline.errors import AccuracyGateError, EngineError, UnsupportedError, UsageError
from pipeline.golden_frames import read_golden
from pipeline.onnx_files import load_model
from pipeline.validation_result import ValidationResult


def quiet(what: str, done: int, total: int | None) -> None:
    """A progress callback that draws nothing."""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("device")
    (folder / "model.py").write_text(FACTORY)
    write_tinted_images(folder / "images")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEFOLD_CACHE", str(folder / "cache"))
        yield folder


def built(workplace: Path, out: str, **changes: Any) -> Bundle:
    settings = {
        "model": f"{workplace / 'model.py'}:classifier",
        "out": workplace / out,
        "calib": str(workplace / "images"),
        "eval_data": str(workplace / "images"),
        "input_size": 32,
        **changes,
    }
    return build(BuildRequest(**settings), quiet).bundle


@pytest.fixture(scope="module")
def for_jetson(workplace: Path) -> Bundle:
    return built(workplace, "jetson", target="jetson-orin-nx", jetpack="6.2", max_drop_points=5.0)


@pytest.fixture(scope="module")
def for_l4(workplace: Path) -> Bundle:
    pytest.importorskip("tensorrt_rtx")
    return built(workplace, "l4", target="l4")


def copy_of(bundle: Bundle, folder: Path) -> Path:
    return Path(shutil.copytree(bundle.path, folder / "bundle"))


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
        assert identify_plan(for_l4.read_bytes(engine.file)).sms == (89,)
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


class TestFinish:
    def test_without_pytorch_it_builds_audits_and_records_the_plan(
        self, for_l4: Bundle, tmp_path: Path
    ) -> None:
        path = copy_of(for_l4, tmp_path)
        program = (
            "import sys; sys.modules['torch'] = None; sys.modules['timm'] = None\n"
            "from apps.cli import main; main(sys.argv[1:])"
        )
        done = subprocess.run(
            [sys.executable, "-c", program, "finish", str(path), "--json"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        printed = json.loads(done.stdout)
        assert printed["chosen"] == "int8"
        finished = open_bundle(path)
        assert finished.manifest.ready_engine().file in finished.manifest.files
        (plan,) = (s for s in finished.manifest.stages if s.stage == "plan")
        assert plan.checks["power_mode"] == read_power_mode(), "beside the latencies that were measured in it"
        untouched = {"model.onnx", "model.int8.onnx", "calibration.json", "golden.npz", "report.html"}
        assert all(finished.sha256(name) == for_l4.sha256(name) for name in untouched)

    def test_a_bundle_for_a_cpu_has_nothing_to_finish(self, workplace: Path) -> None:
        bundle = built(workplace, "cpu", eval_data=None)
        with pytest.raises(UsageError, match="for cpu: nothing is left"):
            finish(bundle.path, FinishOptions(), quiet)

    def test_a_candidate_that_is_not_there_is_named(self, for_l4: Bundle, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=r"no candidate 'int4'; it has int8"):
            finish(copy_of(for_l4, tmp_path), FinishOptions(candidates=("int4",)), quiet)


class TestValidate:
    def validated(self, capfd: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as done:
            main(["validate", *map(str, arguments), "--json"])
        printed = capfd.readouterr()
        assert done.value.code == 0, printed.err
        return dict(json.loads(printed.out))

    def test_a_bundle_for_a_device_that_is_not_here_is_emulated_and_says_so(
        self, for_jetson: Bundle, workplace: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        tree = self.validated(capfd, for_jetson.path, "--data", workplace / "images")
        assert tree["stages"][-1]["name"] == "jetson-orin-nx int8, emulated"
        assert tree["stages"][-1]["top1"] == 1.0
        assert any("emulated" in note and "no plan yet" in note for note in tree["notes"])

    def test_a_plan_that_cannot_run_here_is_emulated_too(
        self, for_l4: Bundle, workplace: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        tree = self.validated(capfd, for_l4.path, "--data", workplace / "images")
        assert tree["stages"][-1]["name"] == "l4 int8, emulated"
        assert any("driver" in note for note in tree["notes"])

    def test_a_cpu_bundle_shows_what_it_would_be_worth_on_a_jetson(
        self, workplace: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        bundle = built(workplace, "cpu", eval_data=None)
        tree = self.validated(capfd, bundle.path, "--data", workplace / "images", "--as", "jetson-orin")
        assert tree["stages"][-1]["name"] == "jetson-orin int8, emulated"
        assert tree["stages"][-1]["top1"] == 1.0
        # Symmetric int8 is another graph than the CPU's: its logits are not the same.
        plain = self.validated(capfd, bundle.path, "--data", workplace / "images")
        assert tree["total"]["sqnr_db"] != plain["total"]["sqnr_db"]

    @pytest.mark.parametrize(
        ("precision", "target", "code", "words"),
        [
            ("int8", "cpu", 2, "needs no emulation"),
            ("int8", "jetson-nona", 4, "jetson-nano"),
            ("fp32", "l4", 2, "no calibration table"),
        ],
    )
    def test_what_cannot_be_emulated_says_why(
        self,
        workplace: Path,
        capfd: pytest.CaptureFixture[str],
        precision: str,
        target: str,
        code: int,
        words: str,
    ) -> None:
        bundle = built(workplace, f"cpu-{precision}", precision=precision, eval_data=None)
        with pytest.raises(SystemExit) as stopped:
            main(["validate", str(bundle.path), "--data", str(workplace / "images"), "--as", target])
        assert stopped.value.code == code
        assert words in " ".join(capfd.readouterr().err.split())


class TestOnTheDevice:
    """The choice among timed candidates. The device is a stand-in; what is built and timed is recorded."""

    @pytest.fixture
    def latency_ms(self, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
        """Candidate to the latency it will be measured at; one that is missing cannot be built."""
        latencies: dict[str, float] = {}

        class Backend:
            def __init__(self, flavour: str, options: Any, progress: Any) -> None:
                self.name = flavour

            def build(self, model: Any, out_dir: Path, options: Any) -> EngineArtifact:
                if out_dir.name not in latencies:
                    raise EngineError(f"no kernel for {out_dir.name}")
                plan = b"ftrt" + out_dir.name.encode()
                (out_dir / "model.plan").write_bytes(plan)
                record = {"size_bytes": len(plan), "seconds": 1.5}
                (out_dir / "plan.json").write_text(json.dumps(record))
                fingerprint = Fingerprint("tensorrt", "10.3.0", "Orin", ("sm_87",))
                digest = hashlib.sha256(plan).hexdigest()
                return EngineArtifact(
                    out_dir / "model.plan", digest, model.sha256, "tensorrt", fingerprint, portable=False
                )

        class Record:
            def __init__(self, folder: Path) -> None:
                self.__dict__.update(json.loads((folder / "plan.json").read_text()))

        def run(commands: Any, rounds: int, on_result: Any) -> dict[str, list[dict[str, float]]]:
            return {
                name: [{"p50_ms": latencies[name], "p99_ms": 2 * latencies[name]}] * rounds
                for name in commands
            }

        device = DeviceIdentity("Orin", 87, "540.4", "12.6")
        api = TensorRtApi("tensorrt", None, (10, 3, 0), "10.3.0")
        monkeypatch.setattr("apps.plans.TensorRtBackend", Backend)
        monkeypatch.setattr("apps.plans.read_build_record", Record)
        monkeypatch.setattr("apps.plans.run_alternating", run)
        monkeypatch.setattr("apps.finishing.find_builder", lambda sm, flavour: Builder(api, sm, device))
        return latencies

    def test_the_fastest_is_kept_and_all_are_recorded(
        self, for_jetson: Bundle, tmp_path: Path, latency_ms: dict[str, float]
    ) -> None:
        latency_ms.update({"int8": 1.2, "fp16": 1.9})
        finished = finish(copy_of(for_jetson, tmp_path), FinishOptions(), quiet)
        deployment = finished.bundle.manifest.deployment
        assert deployment is not None
        assert deployment.chosen == "int8"
        assert {m.candidate: (m.p50_ms, m.p99_ms) for m in deployment.measurements} == {
            "int8": (1.2, 2.4),
            "fp16": (1.9, 3.8),
        }
        assert finished.bundle.read_bytes("model.plan") == b"ftrtint8"
        assert finished.bundle.manifest.stages[-1].checks["timed"] is True

    def test_int8_that_is_no_faster_than_fp16_is_not_published_in_silence(
        self, for_jetson: Bundle, tmp_path: Path, latency_ms: dict[str, float]
    ) -> None:
        latency_ms.update({"int8": 2.0, "fp16": 1.9})
        path = copy_of(for_jetson, tmp_path)
        with pytest.raises(EngineError, match=r"int8 takes 2\.000 ms and fp16 1\.900 ms"):
            finish(path, FinishOptions(), quiet)
        assert open_bundle(path).manifest.engine is None
        finished = finish(path, FinishOptions(on_fallback="warn"), quiet)
        assert finished.plans.chosen.name == "fp16"
        assert finished.bundle.manifest.precision == "fp16"
        assert len(finished.plans.problems) == 1

    def test_a_candidate_that_does_not_compile_leaves_the_choice_among_the_others(
        self, for_jetson: Bundle, tmp_path: Path, latency_ms: dict[str, float]
    ) -> None:
        latency_ms.update({"fp16": 1.9})
        finished = finish(copy_of(for_jetson, tmp_path), FinishOptions(), quiet)
        assert finished.plans.chosen.name == "fp16"
        deployment = finished.bundle.manifest.deployment
        assert deployment is not None
        assert any("no kernel for int8" in note for note in deployment.notes)

    def test_an_inspector_that_cannot_be_read_costs_the_audit_and_not_the_plan(
        self,
        for_jetson: Bundle,
        tmp_path: Path,
        latency_ms: dict[str, float],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        latency_ms.update({"int8": 1.2})
        monkeypatch.setattr("apps.plans.INSPECTOR_NAME", "plan.json")  # a file that is no inspector's
        finished = finish(copy_of(for_jetson, tmp_path), FinishOptions(), quiet)
        assert finished.plans.audit.source == "predicted"
        assert any("the audit is predicted" in note for note in finished.plans.notes)

    def test_where_none_compiles_the_first_reason_is_the_error(
        self, for_jetson: Bundle, tmp_path: Path, latency_ms: dict[str, float]
    ) -> None:
        with pytest.raises(EngineError, match="no kernel for int8"):
            finish(copy_of(for_jetson, tmp_path), FinishOptions(), quiet)


class TestFindBuilder:
    def test_another_gpu_than_the_bundles_is_refused_by_both_names(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        api = TensorRtApi("tensorrt", type("module", (), {}), (10, 3, 0), "10.3.0")
        monkeypatch.setattr("apps.plans.load_api", lambda flavour: api)
        monkeypatch.setattr("apps.plans.find_device", lambda: DeviceIdentity("Orin", 87, "540.4", "12.6"))
        with pytest.raises(UnsupportedError, match=r"Orin, SM 87; the bundle is for SM 110"):
            find_builder(110, "tensorrt")
        assert find_builder(87, "tensorrt").device is not None
