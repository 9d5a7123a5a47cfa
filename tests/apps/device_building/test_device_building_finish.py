"""`edgefold finish`: the plan by TensorRT-RTX, and the choice among timed candidates on a stand-in."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
from device_bundles import built, copy_of, quiet

from apps.emulation import EMULATOR, emulated
from apps.finishing import FinishOptions, finish, model_of_candidate
from apps.plans import Builder, find_builder
from apps.power_mode import read_power_mode
from engines.base import portable_artifact
from engines.tensorrt.api import TensorRtApi
from engines.tensorrt.device import DeviceIdentity
from pipeline.artifacts import EngineArtifact, Fingerprint
from pipeline.bundle import Bundle, open_bundle
from pipeline.errors import EngineError, IntegrityError, UnsupportedError, UsageError


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


class TestOnTheDevice:
    """The choice among timed candidates. The device is a stand-in; what is built and timed is recorded."""

    @pytest.fixture
    def latency_ms(
        self, for_jetson: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> dict[str, float]:
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

        class Loader:
            """What the plan's graph answers, emulated; with a key ``as:nothing`` nonsense."""

            def load(self, artifact: EngineArtifact, options: Any) -> Any:
                name = artifact.path.read_bytes().removeprefix(b"ftrt").decode()
                name = next((key[3:] for key in latencies if key.startswith("as:")), name)
                deployment = for_jetson.manifest.deployment
                assert deployment is not None
                if name == "nothing":
                    model = dataclasses.replace(
                        model_of_candidate(for_jetson, deployment.candidates[0]), path=self.blind()
                    )
                    model = dataclasses.replace(
                        model, sha256=hashlib.sha256(model.path.read_bytes()).hexdigest()
                    )
                else:
                    (record,) = (c for c in deployment.candidates if c.name == name)
                    model = emulated(model_of_candidate(for_jetson, record), tmp_path)
                found = portable_artifact(model, EMULATOR.name, EMULATOR.fingerprint())
                return EMULATOR.load(found, options)

            def blind(self) -> Path:
                """The folded graph with its scores negated."""
                proto = onnx.load(for_jetson.file("model.onnx"))
                name = proto.graph.output[0].name
                for node in proto.graph.node:
                    for index, output in enumerate(node.output):
                        if output == name:
                            node.output[index] = "straight"
                proto.graph.node.append(onnx.helper.make_node("Neg", ["straight"], [name]))
                onnx.save(proto, tmp_path / "blind.onnx")
                return tmp_path / "blind.onnx"

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
        monkeypatch.setattr("engines.get_backend", lambda name: Loader())
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

    def test_a_plan_that_answers_otherwise_is_not_published(
        self, for_jetson: Bundle, tmp_path: Path, latency_ms: dict[str, float]
    ) -> None:
        latency_ms.update({"int8": 1.2})
        path = copy_of(for_jetson, tmp_path)
        finished = finish(path, FinishOptions(), quiet)
        assert finished.bundle.manifest.stages[-1].checks["golden"].startswith("verified 20")
        latency_ms["as:nothing"] = 0.0
        before = (path / "manifest.json").read_bytes()
        with pytest.raises(IntegrityError, match=r"'model.plan'.* answers otherwise than at the build"):
            finish(path, FinishOptions(), quiet)
        assert (path / "manifest.json").read_bytes() == before

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
