"""Frames handed to the device: the real kernels' source, the real lanes, over a device in host memory."""

from __future__ import annotations

import threading

import device_kernels
import numpy as np
import onnx.parser
import pytest
from fake_device import FakeDevice
from fake_tensorrt import FakeLibrary

from engines.tensorrt import feeder as feeder_module
from engines.tensorrt import preprocess
from engines.tensorrt.feeder import DeviceFeeder
from engines.tensorrt.nvrtc import CompiledKernels
from engines.tensorrt.runner import TensorRtRunner
from pipeline.artifacts import EngineOptions, Frame, PreprocessSpec
from pipeline.errors import DataError, DeviceFaultError, EngineError
from pipeline.preprocess import normalize, to_network_pixels

SPEC = PreprocessSpec((24, 32), "shorter", "bicubic", crop_fraction=0.9)


@pytest.fixture
def device(monkeypatch):
    monkeypatch.setattr(preprocess, "preprocess_kernels", lambda sm: CompiledKernels(sm, b"\x7fELF", b""))
    fake = FakeDevice()
    device_kernels.install(fake)
    return fake


def runner_of(device, dtype="uint8", streams=1):
    """An engine that gives its input back."""
    shape = "batch,24,32,3" if dtype == "uint8" else "batch,3,24,32"
    text = f"g ({dtype}[{shape}] x) => ({dtype}[{shape}] y) {{ y = Identity(x) }}"
    plan = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : 18]> {text}').SerializeToString()
    return TensorRtRunner(plan, FakeLibrary(device).api, EngineOptions(streams=streams), device=device)


def feeder_of(runner, max_batch=1):
    return DeviceFeeder(runner, SPEC, "RGB", max_batch=max_batch)


def frame_of(seed, hw=(60, 80), pixel_format="BGR"):
    channels = {"GRAY": (), "BGRA": (4,)}.get(pixel_format, (3,))
    image = np.random.default_rng(seed).integers(0, 256, (*hw, *channels), dtype=np.uint8)
    return Frame(image, pixel_format, "test", seed, 0)


def reference(frame):
    return to_network_pixels(frame.image, frame.pixel_format, SPEC, "RGB")


def test_each_image_of_a_batch_lands_at_its_place_whatever_its_size_and_format(device):
    kinds = [((60, 80), "BGR"), ((90, 120), "BGRA"), ((40, 50), "GRAY"), ((60, 80), "RGB")]
    with runner_of(device) as runner:
        batch = feeder_of(runner, 4).new_batch()
        for n_images in (4, 4, 4, 2, 1):  # plain, captured, replayed, and other sizes
            frames = [frame_of(n_images + i, *kinds[i]) for i in range(n_images)]
            for index, frame in enumerate(frames):
                batch.put(index, frame)
            wanted = [reference(frame) for frame in frames]
            for frame in frames:
                frame.image[...] = 0  # the camera has its buffer back
            assert np.array_equal(batch.submit(n_images).result(timeout=30)["y"], np.stack(wanted))
    assert device.live == 0


def test_normalized_floats_in_a_batch(device):
    with runner_of(device, "float") as runner:
        batch = feeder_of(runner, 2).new_batch()
        frames = [frame_of(0), frame_of(1)]
        for index, frame in enumerate(frames):
            batch.put(index, frame)
        wanted = normalize(np.stack([reference(frame) for frame in frames]), SPEC, "RGB")
        assert np.array_equal(batch.submit(2).result(timeout=30)["y"], wanted)


def test_one_requests_kernel_runs_while_another_ones_does(device):
    """The kernels wait for each other: with one lane, or one lock around a run, the barrier breaks."""
    barrier = threading.Barrier(2)
    device_kernels.install(device, lambda: barrier.wait(timeout=10) and None)
    with runner_of(device, streams=2) as runner:
        feeder = feeder_of(runner)
        batches = [feeder.new_batch() for _ in range(4)]
        frames = [frame_of(seed) for seed in range(4)]
        for batch, frame in zip(batches, frames, strict=True):
            batch.put(0, frame)
        futures = [batch.submit(1) for batch in batches]
        for future, frame in zip(futures, frames, strict=True):
            assert np.array_equal(future.result(timeout=30)["y"][0], reference(frame))


def test_submitting_is_bounded_and_closing_waits(device):
    gate = threading.Event()
    device_kernels.install(device, lambda: gate.wait(10) and None)
    runner = runner_of(device)
    feeder = feeder_of(runner)
    batches = [feeder.new_batch() for _ in range(3)]
    for batch in batches:
        batch.put(0, frame_of(1))
    futures = [batch.submit(1) for batch in batches[:2]]
    third = threading.Thread(target=lambda: futures.append(batches[2].submit(1)))
    third.start()
    third.join(0.2)
    assert third.is_alive()
    gate.set()
    third.join(10)
    runner.close()
    assert all(future.done() for future in futures)
    assert device.live == 0
    for late in (lambda: batches[0].put(0, frame_of(1)), feeder.new_batch):
        with pytest.raises(EngineError, match="this engine is closed"):
            late()


def test_the_engines_input_is_read_back_and_leaves_nothing(device):
    with runner_of(device) as runner:
        feeder = feeder_of(runner)
        feeder.engine_input(frame_of(0))
        live = device.live
        for seed in range(3):
            frame = frame_of(seed)
            assert np.array_equal(feeder.engine_input(frame)[0], reference(frame))
        assert device.live == live


def test_plans_of_sizes_long_gone_are_freed_and_kernels_loaded_once(device, monkeypatch):
    monkeypatch.setattr(feeder_module, "_MAX_PREPROCESSORS", 2)
    with runner_of(device) as runner:
        batch = feeder_of(runner).new_batch()
        lives = []
        for side in range(90, 30, -6):
            frame = frame_of(side, (side, side + 10))
            batch.put(0, frame)
            assert np.array_equal(batch.submit(1).result(timeout=30)["y"][0], reference(frame))
            lives.append(device.live)
        assert lives[2:] == lives[2:3] * len(lives[2:])
        assert device.log.count("cuModuleLoadData") == 1


@pytest.mark.parametrize("image", [np.zeros((60, 80, 3), np.uint16), np.zeros((60, 80), np.uint8), None])
def test_what_is_no_frame_is_refused_and_the_next_one_is_taken(device, image):
    with runner_of(device) as runner:
        batch = feeder_of(runner).new_batch()
        with pytest.raises(DataError):
            batch.put(0, Frame(image, "BGR", "test", 0, 0))
        batch.put(0, frame_of(3))
        assert np.array_equal(batch.submit(1).result(timeout=30)["y"][0], reference(frame_of(3)))


def test_a_sticky_fault_is_the_futures_exception(device):
    with runner_of(device) as runner:
        batch = feeder_of(runner).new_batch()
        batch.put(0, frame_of(0))
        device.fail("cuLaunchKernel", 700)
        assert isinstance(batch.submit(1).exception(timeout=30), DeviceFaultError)
