"""Camera frames through the real preprocessing kernel into a stand-in engine's input, which the engine gives back.

In host memory with the kernel's source compiled for the CPU, and (``gpu``) on real devices.
"""

from __future__ import annotations

import device_kernels
import numpy as np
import pytest
import tolerances
from cuda_engine import engine_plan, expected_logits, open_library

from engines.tensorrt import preprocess
from engines.tensorrt.feeder import DeviceFeeder
from engines.tensorrt.nvrtc import CompiledKernels
from engines.tensorrt.preprocess import CudaPreprocessor, DeviceFrame
from engines.tensorrt.runner import TensorRtRunner
from pipeline.artifacts import EngineOptions, Frame, PreprocessSpec
from pipeline.preprocess import to_network_pixels

SPEC = PreprocessSpec((32, 40), "shorter", "bicubic", crop_fraction=0.9)
LATENCY = EngineOptions()


@pytest.fixture(params=["fake", *(pytest.param(name, marks=pytest.mark.gpu) for name in ("pycuda", "cuda-python"))])  # fmt: skip
def library(request, monkeypatch):
    if request.param != "fake":
        pytest.importorskip("pycuda.driver" if request.param == "pycuda" else "cuda.bindings.driver")
    with open_library(request.param) as opened:
        opened.spin_us = 2000
        if request.param == "fake":
            monkeypatch.setattr(
                preprocess, "preprocess_kernels", lambda sm: CompiledKernels(sm, b"\x7fELF", b"")
            )
            device_kernels.install(opened.device)
        yield opened


def runner_of(library, options=LATENCY):
    return TensorRtRunner(engine_plan(SPEC.input_hw), library.api, options, device=library.device)


def frame_of(seed, hw=(60, 80), pixel_format="BGR"):
    channels = {"GRAY": (), "BGRA": (4,)}.get(pixel_format, (3,))
    image = np.random.default_rng(seed).integers(0, 256, (*hw, *channels), dtype=np.uint8)
    return Frame(image, pixel_format, "test", seed, 0)


def reference(frame):
    return to_network_pixels(frame.image, frame.pixel_format, SPEC, "RGB")


def check(outputs, references):
    """The pixels are the CPU's, and the logits those of the pixels; another frame's are far away."""
    echo, wanted = outputs["echo"], np.stack(references)
    assert np.abs(echo.astype(int) - wanted).max() <= tolerances.CUDA_FRAME_LEVELS
    assert np.array_equal(outputs["logits"], expected_logits(echo))


def test_batches_of_all_sizes_and_formats(library):
    kinds = [((60, 80), "BGR"), ((90, 120), "BGRA"), ((40, 50), "GRAY"), ((60, 80), "RGB")]
    with runner_of(library) as runner:
        batch = DeviceFeeder(runner, SPEC, "RGB", max_batch=4).new_batch()
        for n_images in (4, 4, 4, 2, 1, 1, 1):  # plain, captured, replayed, and other sizes
            frames = [frame_of(10 * n_images + i, *kinds[i]) for i in range(n_images)]
            for index, frame in enumerate(frames):
                batch.put(index, frame)
            wanted = [reference(frame) for frame in frames]
            for frame in frames:
                frame.image[...] = 0  # the camera has its buffer back
            check(batch.submit(n_images).result(timeout=30), wanted)
        assert runner.cuda_graphs == "replayed"


def test_batches_filled_again_as_soon_as_their_future_is_done(library):
    """Two lanes, three batches: a frame is put while the others' copies, kernels and engines run."""
    with runner_of(library, EngineOptions(streams=2)) as runner:
        feeder = DeviceFeeder(runner, SPEC, "RGB", max_batch=2)
        batches, under_way = [feeder.new_batch() for _ in range(3)], {}
        for turn in range(24):
            which = turn % 3
            if which in under_way:
                future, wanted = under_way.pop(which)
                check(future.result(timeout=30), wanted)
            frames = [frame_of(2 * turn + index) for index in range(2)]
            for index, frame in enumerate(frames):
                batches[which].put(index, frame)
            under_way[which] = batches[which].submit(2), [reference(frame) for frame in frames]
        for future, wanted in under_way.values():
            check(future.result(timeout=30), wanted)


def test_the_engines_input_read_back(library):
    with runner_of(library) as runner:
        feeder = DeviceFeeder(runner, SPEC, "RGB", max_batch=1)
        for seed in range(3):
            frame = frame_of(seed)
            found = feeder.engine_input(frame)[0]
            assert np.abs(found.astype(int) - reference(frame)).max() <= tolerances.CUDA_FRAME_LEVELS


def test_a_full_hd_frame(library):
    with runner_of(library) as runner:
        batch = DeviceFeeder(runner, SPEC, "RGB", max_batch=1).new_batch()
        for seed in range(3):
            frame = frame_of(seed, (1080, 1920))
            batch.put(0, frame)
            check(batch.submit(1).result(timeout=30), [reference(frame)])


def test_nv12_from_the_host_and_on_the_device_with_pitches(library):
    cv2 = pytest.importorskip("cv2")
    device, (height, width), pitch = library.device, (90, 120), 128
    with (
        runner_of(library) as runner,
        CudaPreprocessor(SPEC, (height, width), "NV12", device=device, color="RGB") as preprocessor,
    ):
        with device.current():
            staged = device.allocate_pinned(height * 3 // 2 * pitch)
            memory = device.allocate(height * 3 // 2 * pitch)
        frame = DeviceFrame(memory.address, pitch, memory.address + height * pitch, pitch)

        def decoded(address, stream):
            device.copy_to_device(memory.address, staged.array, stream)
            preprocessor.enqueue(frame, address, stream)

        for seed in range(3):  # plain, captured, replayed
            image = np.random.default_rng(seed).integers(0, 256, (height * 3 // 2, width), dtype=np.uint8)
            bgr = cv2.cvtColor(image, cv2.COLOR_YUV2BGR_NV12)
            wanted = [to_network_pixels(bgr, "BGR", SPEC, "RGB")]
            check(runner.infer_filled(preprocessor.from_host(image)), wanted)
            staged.array.reshape(-1, pitch)[:, :width] = image
            check(runner.submit_filled([decoded]).result(timeout=30), wanted)
        with device.current():
            staged.free()
            memory.free()
