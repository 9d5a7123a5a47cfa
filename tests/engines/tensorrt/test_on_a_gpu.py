"""What only a GPU can show. Run with ``pytest -m gpu``; the device layer's part is in ``test_device_contract.py``."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import tolerances

from engines.tensorrt.api import load_api
from engines.tensorrt.device import open_device
from engines.tensorrt.nvrtc import compile_kernels
from engines.tensorrt.preprocess import CudaPreprocessor, DeviceFrame
from engines.tensorrt.runner import TensorRtRunner
from pipeline.artifacts import EngineOptions, PreprocessSpec
from pipeline.errors import UnsupportedError
from pipeline.preprocess import normalize, to_network_pixels

pytestmark = pytest.mark.gpu

MODES = [
    ("nearest", True),
    ("bilinear", True),
    ("bilinear", False),
    ("bicubic", True),
    ("bicubic", False),
    ("lanczos", True),
]
SCALE = r"""
extern "C" __global__ void scale(float *out, const float *in, int n, float factor) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = in[i] * factor;
}
"""


@pytest.fixture(params=["pycuda", "cuda-python"])
def device(request):
    if request.param == "pycuda":
        pytest.importorskip("pycuda.driver")
    opened = open_device(binding=request.param)
    yield opened
    opened.close()


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def run_kernel(device, preprocessor, fill, dtype):
    """What `fill` writes, read back."""
    with device.current():
        stream = device.create_stream()
        memory = device.allocate(preprocessor.output_bytes)
        pinned = device.allocate_pinned(preprocessor.output_bytes)
        fill(memory.address, stream)
        device.copy_to_host(pinned.array, memory.address, stream)
        stream.synchronize()
        result = pinned.array.view(dtype).copy()
        memory.free()
        pinned.free()
        stream.close()
    return result


class TestPreprocessing:
    @pytest.mark.parametrize(("interpolation", "antialias"), MODES)
    @pytest.mark.parametrize("frame_hw", [(1080, 1920), (480, 640), (601, 333), (90, 70)])
    def test_the_pixels_are_those_of_the_cpu(self, device, interpolation, antialias, frame_hw):
        spec = PreprocessSpec((299, 299), "shorter", interpolation, antialias=antialias, crop_fraction=0.875)
        image = noise(*frame_hw, 3)
        with CudaPreprocessor(spec, frame_hw, "BGR", device=device, color="RGB") as preprocessor:
            found = run_kernel(device, preprocessor, preprocessor.from_host(image), np.uint8)
        reference = to_network_pixels(image, "BGR", spec, "RGB")
        assert (
            np.abs(found.reshape(reference.shape).astype(int) - reference).max()
            <= tolerances.CUDA_PREPROCESS_LEVELS
        )

    def test_normalized_floats_are_those_of_the_cpu(self, device):
        spec = PreprocessSpec((224, 224), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
        image = noise(480, 640, 3)
        with CudaPreprocessor(
            spec, (480, 640), "BGR", device=device, color="RGB", folded=False
        ) as preprocessor:
            found = run_kernel(device, preprocessor, preprocessor.from_host(image), np.float32)
        reference = normalize(to_network_pixels(image, "BGR", spec, "RGB")[np.newaxis], spec, "RGB")
        np.testing.assert_allclose(
            found.reshape(reference.shape), reference, atol=tolerances.NORMALIZED_PIXEL_ATOL, rtol=0
        )

    def test_nv12_with_pitches_of_a_decoder(self, device):
        cv2 = pytest.importorskip("cv2")
        spec = PreprocessSpec((299, 299), "shorter", "bicubic")
        image = noise(1620, 1920)
        with device.current():
            staged, memory = device.allocate_pinned(1620 * 2048), device.allocate(1620 * 2048)
            staged.array.reshape(1620, 2048)[:, :1920] = image
        frame = DeviceFrame(memory.address, 2048, memory.address + 1080 * 2048, 2048)
        with CudaPreprocessor(spec, (1080, 1920), "NV12", device=device, color="RGB") as preprocessor:

            def fill(address, stream):
                device.copy_to_device(memory.address, staged.array, stream)
                preprocessor.enqueue(frame, address, stream)

            found = run_kernel(device, preprocessor, fill, np.uint8)
        with device.current():
            staged.free()
            memory.free()
        reference = to_network_pixels(cv2.cvtColor(image, cv2.COLOR_YUV2BGR_NV12), "BGR", spec, "RGB")
        assert (
            np.abs(found.reshape(reference.shape).astype(int) - reference).max()
            <= tolerances.CUDA_PREPROCESS_LEVELS
        )


def test_streams_side_by_side_with_pinned_copies_and_replay(device):
    """A stand-in for an engine on several streams, each with its graph, from threads of their own."""
    n, wrong, finished = 1 << 20, [], []
    with device.current():
        kernel = device.load_kernel(compile_kernels(SCALE, "scale.cu", device.identity.sm).cubin, "scale")

    def work(factor):
        with device.current():
            stream = device.create_stream()
            pinned, memory = device.allocate_pinned(8 * n), device.allocate(8 * n)
            source, target = pinned.array[: 4 * n].view(np.float32), pinned.array[4 * n :].view(np.float32)
            arguments = [
                np.uint64(memory.address + 4 * n), np.uint64(memory.address), np.int32(n), np.float32(factor),
            ]  # fmt: skip
            stream.begin_capture()
            device.copy_to_device(memory.address, source, stream)
            kernel.launch((n // 256, 1, 1), (256, 1, 1), 0, arguments, stream)
            device.copy_to_host(target, memory.address + 4 * n, stream)
            graph = stream.end_capture()
            for turn in range(20):
                source[:] = turn
                graph.launch(stream)
                stream.synchronize()
                if not (target == np.float32(turn) * np.float32(factor)).all():
                    wrong.append((factor, turn))
            graph.close()
            stream.close()
            pinned.free()
            memory.free()
        finished.append(factor)

    threads = [threading.Thread(target=work, args=(factor,)) for factor in (2, 3, 5, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert wrong == []
    assert sorted(finished) == [2, 3, 5, 7]


@pytest.mark.parametrize("flavour", ["tensorrt", "tensorrt_rtx"])
def test_a_real_engine(device, make_tiny, flavour):
    """The tiny model built here, run on shapes in turn, with replay, from submit and filled on the device."""
    try:
        api = load_api(flavour)
    except UnsupportedError as error:
        pytest.skip(str(error))
    tiny = make_tiny("fp32")
    with device.current():
        plan = _built(api, tiny.artifact.path.read_bytes())
    for options in (EngineOptions(), EngineOptions(mode="throughput", threads=3)):
        with TensorRtRunner(plan, api, options, device=device) as runner:
            samples = [tiny.sample(batch, seed) for seed, batch in enumerate([1, 1, 1, 4, 4, 4, 2, 1, 1, 1])]
            for sample in samples:
                logits = runner.infer(sample)["logits"]
                np.testing.assert_allclose(
                    logits, tiny.expected(sample["input"]), atol=tolerances.ENGINE_TF32_ATOL, rtol=0
                )
            futures = [runner.submit(sample) for sample in samples]
            for sample, future in zip(samples, futures, strict=True):
                logits = future.result(timeout=30)["logits"]
                np.testing.assert_allclose(
                    logits, tiny.expected(sample["input"]), atol=tolerances.ENGINE_TF32_ATOL, rtol=0
                )
            assert runner.cuda_graphs in ("replayed", "left to TensorRT-RTX")


def _built(api, onnx_bytes):
    trt = api.module
    logger = trt.Logger(trt.Logger.WARNING)
    trt_builder = trt.Builder(logger)
    network = trt_builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(onnx_bytes)
    config = trt_builder.create_builder_config()
    profile = trt_builder.create_optimization_profile()
    profile.set_shape("input", (1, 3, 12, 12), (4, 3, 12, 12), (8, 3, 12, 12))
    config.add_optimization_profile(profile)
    return bytes(trt_builder.build_serialized_network(network, config))
