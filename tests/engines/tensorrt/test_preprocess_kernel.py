"""The CUDA kernels, compiled for the CPU, against `pipeline.preprocess`.

The code is the one that NVRTC compiles; what only a GPU can show is that its hardware runs it the same.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import host_cuda
import numpy as np
import pytest
import tolerances
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from engines.tensorrt.preprocess_plan import make_plan
from pipeline import resampling
from pipeline.artifacts import PreprocessSpec
from pipeline.errors import DataError
from pipeline.preprocess import normalize, to_network_pixels

MODES = [
    ("nearest", True), ("nearest", False), ("bilinear", True), ("bilinear", False),
    ("bicubic", True), ("bicubic", False), ("lanczos", True),
]  # fmt: skip
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def noise(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def on_gpu(image, pixel_format, spec, color="RGB", *, folded=True, extra=5, **options):
    """What the kernel makes of `image`, whose rows lie `extra` bytes apart."""
    plan = make_plan(spec, image.shape[:2], pixel_format, color=color, folded=folded, yuv="bt601")
    pixels, pitch = host_cuda.padded(image, pixel_format, extra, seed=1)
    written = host_cuda.launch(plan, pixels, pitch=pitch, **options)
    return written.reshape(*spec.input_hw, 3) if folded else written.view(np.float32)


def assert_same_pixels(image, pixel_format, spec, color="RGB"):
    reference = to_network_pixels(image, pixel_format, spec, color)
    found = on_gpu(image, pixel_format, spec, color)
    assert np.abs(found.astype(int) - reference).max() <= tolerances.CUDA_PREPROCESS_LEVELS


@pytest.mark.parametrize(("interpolation", "antialias"), MODES)
class TestGeometry:
    @pytest.mark.parametrize("crop_fraction", [1.0, 0.875, 1.3])
    @pytest.mark.parametrize("resize", ["shorter", "squash"])
    def test_up_and_down_to_even_and_odd_sizes(self, interpolation, antialias, crop_fraction, resize):
        for seed, (height, width) in enumerate(
            [(96, 128), (501, 333), (31, 47), (48, 40), (20, 9), (2, 300)]
        ):
            for input_hw in ((48, 40), (37, 53)):
                spec = PreprocessSpec(
                    input_hw, resize, interpolation, antialias=antialias, crop_fraction=crop_fraction
                )
                assert_same_pixels(noise(height, width, 3, seed=seed), "BGR", spec)

    def test_a_camera_into_a_network(self, interpolation, antialias):
        spec = PreprocessSpec((299, 299), "shorter", interpolation, antialias=antialias, crop_fraction=0.875)
        assert_same_pixels(noise(480, 640, 3), "BGR", spec)

    def test_flat_and_saturated_images_stay_what_they_are(self, interpolation, antialias):
        """Where rounding has no excuse, and where a filter overshoots."""
        spec = PreprocessSpec((48, 48), "shorter", interpolation, antialias=antialias)
        for value in (0, 1, 127, 200, 255):
            assert (on_gpu(np.full((90, 120, 3), value, np.uint8), "BGR", spec) == value).all()
        steps = np.zeros((100, 100, 3), np.uint8)
        steps[:, 50:] = 255
        assert_same_pixels(steps, "BGR", spec)

    @settings(max_examples=40, deadline=None)
    @given(
        height=st.integers(2, 130), width=st.integers(2, 130), target_h=st.integers(1, 70),
        target_w=st.integers(1, 70), crop_fraction=st.sampled_from([0.8, 0.95, 1.0, 1.3]),
    )  # fmt: skip
    def test_any_size(self, interpolation, antialias, height, width, target_h, target_w, crop_fraction):
        assume(min(target_h, target_w) >= crop_fraction)
        spec = PreprocessSpec(
            (target_h, target_w), "squash", interpolation, antialias=antialias, crop_fraction=crop_fraction
        )
        assert_same_pixels(noise(height, width, 3, seed=height), "RGB", spec)


@pytest.mark.parametrize("pixel_format", ["RGB", "BGR", "RGBA", "BGRA", "GRAY"])
@pytest.mark.parametrize("color", ["RGB", "BGR"])
def test_formats_and_channel_orders(pixel_format, color):
    channels = {"GRAY": 1, "RGBA": 4, "BGRA": 4}.get(pixel_format, 3)
    shape = (50, 70) if channels == 1 else (50, 70, channels)
    for antialias in (True, False):
        assert_same_pixels(noise(*shape), pixel_format, PreprocessSpec((32, 32), antialias=antialias), color)


def test_a_frame_of_the_networks_size():
    spec = PreprocessSpec((33, 40), "none", antialias=False)
    image = noise(33, 40, 3)
    assert np.array_equal(on_gpu(image, "BGR", spec), image[:, :, ::-1])


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("color", ["RGB", "BGR"])
def test_normalization_and_layout_where_the_graph_has_neither(layout, color):
    spec = PreprocessSpec((40, 48), "squash", "bicubic", color=color, layout=layout, **IMAGENET)
    image = noise(101, 77, 3)
    reference = normalize(to_network_pixels(image, "BGR", spec, color)[np.newaxis], spec, color)
    found = on_gpu(image, "BGR", spec, color, folded=False).reshape(reference.shape)
    np.testing.assert_allclose(found, reference, atol=tolerances.NORMALIZED_PIXEL_ATOL, rtol=0)


class TestNv12:
    """Conversion and resize in one, against OpenCV's conversion and then ours."""

    @staticmethod
    def frame(height: int, width: int, seed: int = 0) -> Any:
        """Noise in both planes, beyond the limited range too."""
        return noise(height, width, seed=seed), noise(height // 2, width, seed=seed + 1)

    def kernel(self, luma, chroma, spec, color="RGB", yuv="bt601"):
        plan = make_plan(spec, luma.shape, "NV12", color=color, folded=True, yuv=yuv)
        pixels, pitch = host_cuda.padded(luma, "NV12", 7, seed=2)
        pairs, chroma_pitch = host_cuda.padded(chroma, "NV12", 12, seed=3)
        written = host_cuda.launch(plan, pixels, pitch=pitch, chroma=pairs, chroma_pitch=chroma_pitch)
        return written.reshape(*spec.input_hw, 3)

    @pytest.mark.parametrize(("interpolation", "antialias"), MODES)
    @pytest.mark.parametrize("color", ["RGB", "BGR"])
    def test_bt601_is_opencvs(self, interpolation, antialias, color):
        cv2 = pytest.importorskip("cv2")
        for height, width in ((96, 128), (30, 46)):
            luma, chroma = self.frame(height, width)
            bgr = cv2.cvtColor(np.concatenate([luma, chroma]), cv2.COLOR_YUV2BGR_NV12)
            for input_hw in ((48, 48), (61, 99)):
                spec = PreprocessSpec(input_hw, "squash", interpolation, antialias=antialias)
                reference = to_network_pixels(bgr, "BGR", spec, color)
                found = self.kernel(luma, chroma, spec, color)
                assert np.abs(found.astype(int) - reference).max() <= tolerances.CUDA_PREPROCESS_LEVELS

    @pytest.mark.parametrize(("yuv", "kr", "kb"), [("bt601", 0.299, 0.114), ("bt709", 0.2126, 0.0722)])
    def test_the_standards_own_formula(self, yuv, kr, kb):
        """``Y = Kr R + Kg G + Kb B``, ``Pb = (B - Y) / (2 (1 - Kb))``, 219 and 224 levels."""
        rgb = np.random.default_rng(0).random((64, 1, 3)) * np.ones((64, 2, 1))
        y = rgb @ np.array([kr, 1 - kr - kb, kb])
        pb, pr = (rgb[..., 2] - y) / (2 * (1 - kb)), (rgb[..., 0] - y) / (2 * (1 - kr))
        luma = np.repeat(np.round(16 + 219 * y), 2, axis=0).astype(np.uint8)
        chroma = np.round(128 + 224 * np.stack([pb[:, 0], pr[:, 0]], axis=1)).astype(np.uint8)
        found = self.kernel(luma, chroma, PreprocessSpec(luma.shape, "none"), yuv=yuv)
        error = np.abs(found - np.repeat(rgb, 2, axis=0) * 255).max()
        assert error <= tolerances.YUV_ROUNDING_LEVELS
        other = self.kernel(
            luma, chroma, PreprocessSpec(luma.shape, "none"), yuv="bt601" if yuv == "bt709" else "bt709"
        )
        assert np.abs(other - np.repeat(rgb, 2, axis=0) * 255).max() > 5 * tolerances.YUV_ROUNDING_LEVELS

    def test_odd_sides_cannot_be(self):
        with pytest.raises(DataError, match="NV12 frame of 31×20 cannot be"):
            make_plan(PreprocessSpec((8, 8)), (20, 31), "NV12", color="RGB", folded=True, yuv="bt601")


class TestOrderOfThePasses:
    """Pillow 13 filters vertically first where that is less work; older ones never do."""

    SIZES = ((200, 100, 20, 20), (30, 30, 20, 60), (200, 190, 40, 150))

    def test_the_plan_follows_the_pillow_there_is(self):
        for height, width, target_h, target_w in self.SIZES:
            spec = PreprocessSpec((target_h, target_w), "squash", "lanczos")
            assert_same_pixels(noise(height, width, 3), "BGR", spec)

    def test_the_other_order_gives_other_pixels(self, monkeypatch):
        """So the test above can fail: with either order assumed everywhere, one of the two is wrong."""
        height, width, target_h, target_w = self.SIZES[1]
        spec = PreprocessSpec((target_h, target_w), "squash", "lanczos")
        image = noise(height, width, 3)
        found = []
        for by_size in (False, True):
            monkeypatch.setattr(resampling, "_pillow_orders_by_size", lambda by_size=by_size: by_size)
            found.append(on_gpu(image, "BGR", spec))
        assert np.abs(found[0].astype(int) - found[1]).max() > 5


class TestThreads:
    """That the shared memory is filled before it is read, whatever the order of the threads."""

    SPEC = PreprocessSpec((50, 70), "squash", "bicubic")

    def test_the_order_of_threads_does_not_matter(self):
        image = noise(123, 97, 3)
        assert np.array_equal(
            on_gpu(image, "BGR", self.SPEC), on_gpu(image, "BGR", self.SPEC, descending=True)
        )

    def test_without_the_barrier_it_would(self):
        image = noise(123, 97, 3)
        orders = [
            on_gpu(image, "BGR", self.SPEC, descending=order, defines=("NO_BARRIER",))
            for order in (False, True)
        ]
        assert not np.array_equal(*orders)


class TestPlans:
    def test_far_shrunk_frames_get_smaller_tiles(self):
        spec = PreprocessSpec((32, 32), "squash", "lanczos")
        image = noise(1500, 1500, 3)
        plan = make_plan(spec, image.shape[:2], "BGR", color="RGB", folded=True, yuv="bt601")
        wide = make_plan(spec, (300, 300), "BGR", color="RGB", folded=True, yuv="bt601")
        assert plan.grid[1] > wide.grid[1]
        assert plan.shared_bytes <= 48 << 10
        assert_same_pixels(image, "BGR", spec)

    def test_a_frame_that_cannot_be_shrunk_in_one_step(self):
        with pytest.raises(DataError, match=r"90000×90000 cannot be shrunk to 4×4.*smaller size"):
            make_plan(
                PreprocessSpec((4, 4), "squash"), (90000, 90000), "BGR", color="RGB", folded=True, yuv="bt601"
            )

    @pytest.mark.parametrize(
        ("change", "frame_hw", "pixel_format", "words"),
        [
            ({"resize": "none"}, (20, 30), "BGR", "a frame is 30×20, the network takes 16×16"),
            ({"interpolation": "lanczos", "antialias": False}, (20, 30), "BGR", "only with antialias=true"),
            ({}, (1, 300), "BGR", "300×1 pixels is no image"),
            ({}, (20, 30), "YUYV", "unknown pixel format 'YUYV'"),
            ({"input_hw": (1, 1), "crop_fraction": 1.3}, (20, 30), "BGR", "would be resized to 0×0"),
            ({"std": (0.0, 1.0, 1.0)}, (20, 30), "BGR", "no std zero"),
        ],
    )
    def test_what_cannot_be(self, change, frame_hw, pixel_format, words):
        spec = dataclasses.replace(PreprocessSpec((16, 16)), **change)
        with pytest.raises(DataError, match=words):
            make_plan(spec, frame_hw, pixel_format, color="RGB", folded=True, yuv="bt601")
