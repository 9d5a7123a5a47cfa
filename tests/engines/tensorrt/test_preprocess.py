"""`CudaPreprocessor` over a device in host memory that runs the real kernels' source."""

from __future__ import annotations

import dataclasses

import host_cuda
import numpy as np
import onnx.parser
import pytest
from fake_device import FakeDevice
from fake_tensorrt import FakeLibrary

from engines.tensorrt import preprocess
from engines.tensorrt.nvrtc import CompiledKernels
from engines.tensorrt.preprocess import CudaPreprocessor, DeviceFrame
from engines.tensorrt.runner import TensorRtRunner
from pipeline.artifacts import EngineOptions, PreprocessSpec
from pipeline.errors import DataError, EngineError
from pipeline.preprocess import normalize, to_network_pixels

SPEC = PreprocessSpec(
    (24, 32), "shorter", "bicubic", crop_fraction=0.9, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4)
)


@pytest.fixture
def device(monkeypatch):
    """Runs the two kernels through the host's compiler, on the addresses it is given."""
    monkeypatch.setattr(preprocess, "preprocess_kernels", lambda sm: CompiledKernels(sm, b"\x7fELF", b""))
    fake = FakeDevice()

    def kernel(name):
        def prepare(arguments, grid, block, shared_bytes):
            kinds = [type(argument) for argument in arguments]
            assert kinds == [np.uint64, np.uint64, np.int32, np.uint64, np.int32, np.uint64]
            plan, pixels, pitch, chroma, chroma_pitch, output = map(int, arguments)
            return lambda: host_cuda.run(
                name, grid, block, shared_bytes, plan, pixels, pitch, chroma, chroma_pitch, output
            )

        return prepare

    fake.kernels = {name: kernel(name) for name in ("resample_filtered", "resample_neighbours")}
    return fake


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def identity_plan(spec, dtype):
    """An engine that gives its input back, one value a channel and pixel."""
    height, width = spec.input_hw
    shape = f"1,{height},{width},3" if dtype == "uint8" or spec.layout == "NHWC" else f"1,3,{height},{width}"
    text = f'<ir_version: 9, opset_import: ["" : 18]> g ({dtype}[{shape}] x) => ({dtype}[{shape}] y) {{ y = Identity(x) }}'
    return onnx.parser.parse_model(text).SerializeToString()


def runner_of(device, spec, dtype="uint8"):
    return TensorRtRunner(identity_plan(spec, dtype), FakeLibrary(device).api, EngineOptions(), device=device)


@pytest.mark.parametrize(("antialias", "color"), [(True, "RGB"), (True, "BGR"), (False, "RGB")])
def test_frames_from_the_host_reach_the_engine(device, antialias, color):
    spec = dataclasses.replace(SPEC, antialias=antialias)
    with (
        runner_of(device, spec) as runner,
        CudaPreprocessor(spec, (60, 80), "BGR", device=device, color=color) as preprocessor,
    ):
        for seed in range(4):  # a plain run, a capture, replays
            image = noise(60, 80, 3, seed=seed)
            found = runner.infer_filled(preprocessor.from_host(image))["y"][0]
            assert np.array_equal(found, to_network_pixels(image, "BGR", spec, color))
        assert runner.cuda_graphs == "replayed"
    assert device.live == 0


def test_a_view_of_a_larger_image_is_a_frame(device):
    image = noise(90, 100, 3)[10:70, 5:85]
    with (
        runner_of(device, SPEC) as runner,
        CudaPreprocessor(SPEC, (60, 80), "BGR", device=device, color="RGB") as preprocessor,
    ):
        found = runner.infer_filled(preprocessor.from_host(image))["y"][0]
        assert np.array_equal(found, to_network_pixels(image, "BGR", SPEC, "RGB"))


def test_a_graph_without_folded_preprocessing_gets_normalized_floats(device):
    image = noise(60, 80, 3)
    with (
        runner_of(device, SPEC, "float") as runner,
        CudaPreprocessor(SPEC, (60, 80), "BGR", device=device, color="RGB", folded=False) as preprocessor,
    ):
        assert preprocessor.output_bytes == 3 * 24 * 32 * 4
        found = runner.infer_filled(preprocessor.from_host(image))["y"]
        pixels = to_network_pixels(image, "BGR", SPEC, "RGB")[np.newaxis]
        assert np.array_equal(found, normalize(pixels, SPEC, "RGB"))
    with pytest.raises(DataError, match="takes RGB, its network's order, not BGR"):
        CudaPreprocessor(SPEC, (60, 80), "BGR", device=device, color="BGR", folded=False)


@pytest.mark.parametrize("frame_hw", [(60, 80), (38, 130), (130, 38), (24, 32), (18, 400), (16, 20)])
@pytest.mark.parametrize("pixel_format", ["BGR", "BGRA", "GRAY", "NV12"])
@pytest.mark.parametrize(
    "changes",
    [
        {"interpolation": "bilinear"},
        {"interpolation": "lanczos", "crop_fraction": 0.5},
        {"interpolation": "nearest"},
        {"antialias": False},
        {"antialias": False, "interpolation": "bilinear", "crop_fraction": 0.6},
        {"resize": "stretch"},
        {"resize": "stretch", "crop_fraction": 0.7},
    ],
    ids=str,
)
def test_the_part_of_a_frame_that_is_copied_is_all_that_the_kernel_reads(
    device, frame_hw, pixel_format, changes
):
    cv2 = pytest.importorskip("cv2")
    spec = dataclasses.replace(SPEC, **changes)
    shape = {"BGR": (*frame_hw, 3), "BGRA": (*frame_hw, 4), "GRAY": frame_hw}
    image = noise(*shape.get(pixel_format, (frame_hw[0] * 3 // 2, frame_hw[1])))
    as_bgr = cv2.cvtColor(image, cv2.COLOR_YUV2BGR_NV12) if pixel_format == "NV12" else image
    reference = to_network_pixels(as_bgr, "BGR" if pixel_format == "NV12" else pixel_format, spec, "RGB")
    with (
        runner_of(device, spec) as runner,
        CudaPreprocessor(spec, frame_hw, pixel_format, device=device, color="RGB") as preprocessor,
    ):
        found = runner.infer_filled(preprocessor.from_host(image))["y"][0]
    assert np.array_equal(found, reference)


def test_of_a_wide_frame_only_the_crop_is_copied(device):
    spec = PreprocessSpec((299, 299), "shorter", "bicubic", crop_fraction=0.875)
    for pixel_format, bytes_per_pixel in (("BGR", 3.0), ("NV12", 1.5)):
        with CudaPreprocessor(spec, (1080, 1920), pixel_format, device=device, color="RGB") as preprocessor:
            side = 0.875 * 1080  # and what the outermost filters reach beyond
            assert 1.0 <= preprocessor.staged_bytes / (side * side * bytes_per_pixel) < 1.04


def test_nv12_from_the_host_and_from_the_device(device):
    cv2 = pytest.importorskip("cv2")
    image = noise(90, 80)  # 60 rows of luma, 30 of chroma
    reference = to_network_pixels(cv2.cvtColor(image, cv2.COLOR_YUV2BGR_NV12), "BGR", SPEC, "RGB")
    with (
        runner_of(device, SPEC) as runner,
        CudaPreprocessor(SPEC, (60, 80), "NV12", device=device, color="RGB") as preprocessor,
        device.current(),
    ):
        assert np.array_equal(runner.infer_filled(preprocessor.from_host(image))["y"][0], reference)
        luma, chroma = device.allocate(60 * 96), device.allocate(30 * 128)  # a decoder's pitches
        device.view(luma.address, 60 * 96).reshape(60, 96)[:, :80] = image[:60]
        device.view(chroma.address, 30 * 128).reshape(30, 128)[:, :80] = image[60:]
        frame = DeviceFrame(luma.address, 96, chroma.address, 128)
        found = runner.infer_filled(lambda address, stream: preprocessor.enqueue(frame, address, stream))[
            "y"
        ][0]
        assert np.array_equal(found, reference)
        luma.free()
        chroma.free()


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (noise(80, 60, 3), r"uint8 \(80, 60, 3\), the preprocessor was made for uint8 \(60, 80, 3\)"),
        (noise(60, 80, 4), r"\(60, 80, 4\)"),
        (noise(60, 80, 3).astype(np.uint16), "uint16"),
        ([1, 2], "list"),
    ],
)
def test_other_frames_are_refused(device, image, words):
    with (
        CudaPreprocessor(SPEC, (60, 80), "BGR", device=device, color="RGB") as preprocessor,
        pytest.raises(DataError, match=words),
    ):
        preprocessor.from_host(image)


def test_pitches_that_cannot_be(device):
    with (
        CudaPreprocessor(SPEC, (60, 80), "BGR", device=device, color="RGB") as preprocessor,
        device.current(),
    ):
        stream = device.create_stream()
        with pytest.raises(DataError, match="pitch of 239 bytes, a row takes 240"):
            preprocessor.enqueue(DeviceFrame(256, 239), 256, stream)
    with CudaPreprocessor(SPEC, (60, 80), "NV12", device=device, color="RGB") as preprocessor:
        for frame in (DeviceFrame(256, 80), DeviceFrame(256, 80, 512, 79)):
            with pytest.raises(DataError, match="NV12 frame's chroma"):
                preprocessor.enqueue(frame, 256, stream)


def test_what_fails_while_it_is_made_leaks_nothing(device):
    for call in (
        "cuMemcpyHtoDAsync",
        "cuModuleLoadData",
        "cuStreamCreate",
        "cuMemHostAlloc",
        "cuMemAlloc",
        "cuStreamSynchronize",
    ):
        device.fail(call, 2)
        before = device.live
        with pytest.raises(EngineError, match="OUT_OF_MEMORY"):
            CudaPreprocessor(SPEC, (60, 80), "BGR", device=device, color="RGB")
        assert device.live <= before


def test_a_frame_that_does_not_fit_leaks_nothing(device):
    with CudaPreprocessor(SPEC, (60, 80), "BGR", device=device, color="RGB") as preprocessor:
        for call in ("cuMemHostAlloc", "cuMemAlloc"):
            before = device.live
            device.fail(call, 2)
            with pytest.raises(EngineError, match="OUT_OF_MEMORY"):
                preprocessor.from_host(noise(60, 80, 3))
            assert device.live == before


def test_closing_twice(device):
    preprocessor = CudaPreprocessor(SPEC, (60, 80), "BGR", device=device, color="RGB")
    preprocessor.from_host(noise(60, 80, 3))
    preprocessor.close()
    preprocessor.close()
    assert device.live == 0
