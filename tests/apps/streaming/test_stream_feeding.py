"""Which feeder an engine gets, and the runtime and the golden frames through the one on the device."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import device_kernels
import numpy as np
import onnx.parser
import pytest
from fake_device import FakeDevice
from fake_tensorrt import FakeLibrary
from onnx.reference import ReferenceEvaluator

import engines
from apps.streaming.engine_slot import EngineSlot
from apps.streaming.feeding import HostFeeder
from apps.streaming.loading import EngineRequest, load_engine
from apps.streaming.runtime import Answer, RuntimeLimits, StreamRuntime
from engines.tensorrt import preprocess
from engines.tensorrt.feeder import DeviceFeeder
from engines.tensorrt.nvrtc import CompiledKernels
from engines.tensorrt.runner import TensorRtRunner
from pipeline.artifacts import EngineArtifact, EngineOptions, Fingerprint
from pipeline.bundle import BundleWriter, open_bundle
from pipeline.errors import IntegrityError, UnsupportedError
from pipeline.golden_frames import GOLDEN_NAME, golden_to_bytes, make_golden
from pipeline.manifest import EngineRecord


class Backend:
    """Loads the bundle's graph as a plan on a device in host memory."""

    def __init__(self, device: FakeDevice) -> None:
        self.device = device

    def fingerprint(self) -> Fingerprint:
        return Fingerprint("tensorrt", "10.16.2", "Fake GPU")

    def load(self, artifact: EngineArtifact, options: EngineOptions) -> TensorRtRunner:
        plan = artifact.path.read_bytes()
        return TensorRtRunner(plan, FakeLibrary(self.device).api, options, device=self.device)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    monkeypatch.setattr(preprocess, "preprocess_kernels", lambda sm: CompiledKernels(sm, b"\x7fELF", b""))
    fake = FakeDevice()
    device_kernels.install(fake)
    monkeypatch.setattr(engines, "get_backend", lambda name: Backend(fake))
    return fake


@pytest.fixture
def plan_bundle(bundle: Path, tmp_path: Path) -> Path:
    """The bundle of the mean colour, with golden frames, for TensorRT."""
    opened = open_bundle(bundle)
    golden = make_golden(opened.manifest.preprocess, "BGR")
    graph = opened.read_bytes("model.int8.onnx")
    logits = ReferenceEvaluator(onnx.load_from_string(graph)).run(None, {"input": golden.pixels})[0]
    golden = dataclasses.replace(golden, logits={"model.int8.onnx": logits})
    record = EngineRecord("tensorrt", "model.int8.onnx", Fingerprint("tensorrt", "10.16.2", "Fake GPU"))
    with BundleWriter(tmp_path / "plan") as writer:
        for name in opened.manifest.files:
            writer.add_file(name, opened.file(name))
        writer.add_file(GOLDEN_NAME, golden_to_bytes(golden))
        writer.commit(dataclasses.replace(opened.manifest, engine=record))
    return tmp_path / "plan"


def test_frames_of_several_cameras_are_prepared_on_the_device(
    device: FakeDevice, plan_bundle: Path, feeds_of: Callable[..., Any], list_source: Any
) -> None:
    engine = load_engine(plan_bundle, EngineRequest(max_batch=4, streams=2))
    assert isinstance(engine.feeder, DeviceFeeder)
    assert engine.golden.startswith("verified")
    assert "BGR RGB BGRA GRAY" in engine.golden
    colors = {0: (200, 0, 0), 1: (0, 200, 0), 2: (0, 0, 200)}
    pictures = [[np.full((24 + 8 * i, 40, 3), colors[i], np.uint8)] * 20 for i in colors]
    answers: list[Answer] = []
    device.log.clear()
    runtime = StreamRuntime(
        feeds_of([list_source(items) for items in pictures]), EngineSlot(engine), RuntimeLimits()
    )
    runtime.run(answers.append)
    assert len(answers) == 60
    for answer in answers:
        wanted = int(answer.frame.source_id[-1])
        assert answer.prediction.top[0].label == ("blue", "green", "red")[wanted]
    assert device.log.count("cuLaunchKernel") == 60
    engine.runner.close()
    assert device.live == 0


def test_a_kernel_with_the_colours_swapped_is_found_by_the_golden_frames(
    device: FakeDevice, plan_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = preprocess.make_plan

    def swapped(*arguments: Any, color: str, **options: Any) -> Any:
        return right(*arguments, color=color[::-1], **options)

    monkeypatch.setattr(preprocess, "make_plan", swapped)
    with pytest.raises(IntegrityError, match="channels swapped: red and blue have changed places"):
        load_engine(plan_bundle, EngineRequest())
    assert device.live == 0


def test_without_nvrtc_the_cpu_prepares_and_the_reason_is_logged_once(
    device: FakeDevice, plan_bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing(sm: int) -> CompiledKernels:
        raise UnsupportedError("NVRTC, the CUDA run-time compiler, is not installed")

    monkeypatch.setattr(preprocess, "preprocess_kernels", missing)
    with caplog.at_level(logging.WARNING):
        engine = load_engine(plan_bundle, EngineRequest())
    assert isinstance(engine.feeder, HostFeeder)
    assert engine.golden.startswith("verified")
    (record,) = caplog.records
    assert "prepared on the CPU, not on the GPU: NVRTC" in record.getMessage()
    engine.runner.close()
    assert device.live == 0
