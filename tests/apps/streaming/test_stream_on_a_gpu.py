"""The runtime of `edgefold stream` over a real GPU, around a stand-in engine (``tests/cuda_engine.py``).

In host memory with the kernel's source compiled for the CPU, and (``gpu``) on real devices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import device_kernels
import numpy as np
import pytest
from cuda_engine import N_CLASSES, engine_plan, expected_logits, open_library
from fake_tensorrt import FakeLibrary

import engines
from apps.streaming.engine_slot import EngineSlot
from apps.streaming.loading import EngineRequest, load_engine
from apps.streaming.runtime import Answer, RuntimeLimits, StreamRuntime
from engines.tensorrt import preprocess
from engines.tensorrt.feeder import DeviceFeeder
from engines.tensorrt.nvrtc import CompiledKernels
from engines.tensorrt.runner import TensorRtRunner
from pipeline.artifacts import EngineArtifact, EngineOptions, Fingerprint, PreprocessSpec, TensorSpec
from pipeline.bundle import BundleWriter, open_bundle
from pipeline.golden_frames import GOLDEN_NAME, golden_to_bytes, make_golden
from pipeline.manifest import EngineRecord
from pipeline.preprocess import to_network_pixels

SPEC = PreprocessSpec((48, 40), "shorter", "bicubic", crop_fraction=0.9)
PLAN_NAME = "model.int8.onnx"
KINDS = ["fake", *(pytest.param(name, marks=pytest.mark.gpu) for name in ("pycuda", "cuda-python"))]


class Backend:
    """Loads the bundle's file as a plan of the stand-in."""

    def __init__(self, library: FakeLibrary) -> None:
        self.library = library

    def fingerprint(self) -> Fingerprint:
        return Fingerprint("tensorrt", "10.16.2", "stand-in")

    def load(self, artifact: EngineArtifact, options: EngineOptions) -> TensorRtRunner:
        plan = artifact.path.read_bytes()
        return TensorRtRunner(plan, self.library.api, options, device=self.library.device)


@pytest.fixture(params=KINDS)
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeLibrary]:
    if request.param != "fake":
        pytest.importorskip("pycuda.driver" if request.param == "pycuda" else "cuda.bindings.driver")
    with open_library(request.param) as opened:
        if request.param == "fake":
            monkeypatch.setattr(
                preprocess, "preprocess_kernels", lambda sm: CompiledKernels(sm, b"\x7fELF", b"")
            )
            device_kernels.install(opened.device)
        else:
            opened.spin_us = 1000  # type: ignore[attr-defined]
        monkeypatch.setattr(engines, "get_backend", lambda name: Backend(opened))
        yield opened


@pytest.fixture
def plan_bundle(make_bundle: Callable[..., Path], tmp_path: Path) -> Path:
    """A bundle whose engine is the stand-in's plan, with golden frames and the answers to them."""
    (tmp_path / PLAN_NAME).write_bytes(engine_plan(SPEC.input_hw, echo=False))
    golden = make_golden(SPEC, "BGR")
    golden = dataclasses.replace(golden, logits={PLAN_NAME: expected_logits(golden.pixels)})
    labels = tuple(f"class {index}" for index in range(N_CLASSES))
    manifest = dataclasses.replace(
        open_bundle(make_bundle(tmp_path / "cpu", labels=labels)).manifest,
        inputs=(TensorSpec("pixels", "uint8", ("batch", *SPEC.input_hw, 3)),),
        outputs=(TensorSpec("logits", "float32", ("batch", N_CLASSES)),),
        preprocess=SPEC,
        engine=EngineRecord("tensorrt", PLAN_NAME, Fingerprint("tensorrt", "10.16.2", "stand-in")),
    )
    with BundleWriter(tmp_path / "plan") as writer:
        writer.add_file(PLAN_NAME, tmp_path / PLAN_NAME)
        writer.add_file(GOLDEN_NAME, golden_to_bytes(golden))
        writer.commit(manifest)
    return tmp_path / "plan"


@pytest.mark.parametrize("max_batch", [1, 4])
def test_frames_of_several_cameras_come_through_the_device(
    library: FakeLibrary,
    plan_bundle: Path,
    feeds_of: Callable[..., Any],
    list_source: Any,
    max_batch: int,
) -> None:
    rng = np.random.default_rng(0)
    sizes = [(108, 192), (96, 128), (61, 40)]
    pictures = [[rng.integers(0, 256, (*hw, 3), dtype=np.uint8) for _ in range(40)] for hw in sizes]
    engine = load_engine(plan_bundle, EngineRequest(max_batch=max_batch, streams=3))
    assert isinstance(engine.feeder, DeviceFeeder)
    assert engine.golden.startswith("verified")
    answers: list[Answer] = []
    runtime = StreamRuntime(
        feeds_of([list_source(items) for items in pictures]), EngineSlot(engine), RuntimeLimits()
    )
    runtime.run(answers.append)
    assert len(answers) == 120
    for answer in answers:
        image = pictures[int(answer.frame.source_id[-1])][answer.frame.index]
        pixels = to_network_pixels(image, "BGR", SPEC, "BGR")
        np.testing.assert_array_equal(answer.scores, expected_logits(pixels[np.newaxis])[0])
    engine.runner.close()
