"""Planes to the network's size: each plane as Pillow filters it, and near to what the other order of steps gives."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from guard_pages import run_beside_guard_pages
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tolerances import PLANAR_MAX_LEVELS, PLANAR_MEAN_LEVELS, YUV_ROUNDING_LEVELS

from pipeline import planar, preprocess, yuv
from pipeline.artifacts import PreprocessSpec, YuvCoding
from pipeline.errors import DataError
from pipeline.kernels import kernels
from pipeline.planar import PlanarResampler
from pipeline.preprocess import crop_start, resized_hw, to_network_pixels
from pipeline.synthetic import SyntheticCamera
from pipeline.yuv import color_factors, planes_of, planes_to_bgr, rgb_to_planes

compiled = pytest.mark.skipif(kernels() is None, reason="pipeline/planar.c was not compiled (no C compiler)")

CODINGS = [
    YuvCoding(matrix, full_range, "center") for matrix in ("bt601", "bt709") for full_range in (False, True)
]
INCEPTION = PreprocessSpec((299, 299), interpolation="bicubic", crop_fraction=0.875)


def noise(height: int, width: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (height * 3 // 2, width), dtype=np.uint8)


def resampler(spec: PreprocessSpec, hw: tuple[int, int], coding: YuvCoding) -> PlanarResampler:
    resized = resized_hw(*hw, spec)
    crop = (crop_start(resized[0], spec.input_hw[0]), crop_start(resized[1], spec.input_hw[1]))
    return PlanarResampler(spec, hw, coding, resized, crop)


def by_plane(image: Any, spec: PreprocessSpec, coding: YuvCoding) -> Any:
    """With Pillow, plane by plane: down, then along, bytes in between; then the integers of the colours.

    Only for chroma in the middle, where Pillow has the pixels too, and a crop inside of the image.
    """
    height, width = image.shape[0] * 2 // 3, image.shape[1]
    resized_h, resized_w = resized_hw(height, width, spec)
    top, left = crop_start(resized_h, spec.input_hw[0]), crop_start(resized_w, spec.input_hw[1])
    method = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[spec.interpolation]
    small = []
    for plane in planes_of(image):
        # A pass of its own each, so that whatever order this Pillow has, the rows are filtered down first.
        down = Image.fromarray(plane).resize((plane.shape[1], resized_h), method)
        along = down.resize((resized_w, resized_h), method)
        small.append(np.asarray(along, np.int32)[top:, left:][: spec.input_hw[0], : spec.input_hw[1]])
    black, luma, v_red, u_green, v_green, u_blue = color_factors(coding)
    base = np.maximum(small[0] - black, 0) * luma + (1 << 19)
    u, v = small[1] - 128, small[2] - 128
    channels = (base + u_blue * u, base + u_green * u + v_green * v, base + v_red * v)
    return np.clip(np.stack(channels, axis=2) >> 20, 0, 255).astype(np.uint8)


@compiled
@pytest.mark.parametrize("coding", CODINGS, ids=str)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_each_plane_is_filtered_as_pillow_filters(interpolation: Any, coding: YuvCoding) -> None:
    for seed, hw in enumerate([(96, 128), (250, 166), (48, 40), (34, 300), (300, 32), (720, 1280)]):
        for resize, crop_fraction in (("shorter", 1.0), ("squash", 1.0), ("shorter", 0.875)):
            for input_hw in ((48, 40), (37, 53), (16, 16), (100, 90)):
                spec = PreprocessSpec(input_hw, resize, interpolation, crop_fraction=crop_fraction)  # type: ignore[arg-type]
                made = resampler(spec, hw, coding)
                if not made.fits:
                    continue
                out = np.empty((*input_hw, 3), np.uint8)
                made.resample(noise(*hw, seed), "BGR", out)
                np.testing.assert_array_equal(out, by_plane(noise(*hw, seed), spec, coding))
                made.resample(noise(*hw, seed), "RGB", out)
                np.testing.assert_array_equal(out[..., ::-1], by_plane(noise(*hw, seed), spec, coding))


@compiled
def test_a_camera_frame() -> None:
    spec = INCEPTION
    found = to_network_pixels(noise(1080, 1920), "I420", spec, "BGR", yuv=CODINGS[2])
    np.testing.assert_array_equal(found, by_plane(noise(1080, 1920), spec, CODINGS[2]))


@compiled
@settings(max_examples=100, deadline=None)
@given(
    hw=st.tuples(st.integers(1, 60), st.integers(16, 60)),
    to=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    crop_fraction=st.sampled_from([1.0, 0.8, 1.4]),
    chroma=st.sampled_from(["left", "center"]),
    seed=st.integers(0, 9),
)
def test_with_and_without_byte_products_any_size(plain_kernel, hw, to, crop_fraction, chroma, seed) -> None:
    hw = (2 * hw[0], 2 * hw[1])
    spec = PreprocessSpec(to, "squash", "bicubic", crop_fraction=crop_fraction)
    if min(resized_hw(*hw, spec)) < 1:
        return
    made = resampler(spec, hw, YuvCoding("bt709", False, chroma))
    if not made.fits:
        return
    results = []
    for library in (kernels(), plain_kernel):
        out = np.full((to[0] + 2, to[1], 3), 77, np.uint8)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(planar, "kernels", lambda library=library: library)
            made.resample(noise(*hw, seed), "RGB", out[1:-1])
        assert (out[[0, -1]] == 77).all()  # nothing is written beside it
        results.append(out[1:-1])
    np.testing.assert_array_equal(*results)


@pytest.fixture(scope="module")
def plain_kernel(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The kernels without byte products: a processor that has them would never run the other path."""
    compiler = shutil.which("cc") or pytest.skip("no C compiler")
    folder = Path(planar.__file__).parent
    library = tmp_path_factory.mktemp("plain") / "_resample.so"
    options = ["-O2", "-shared", "-fPIC", "-Wno-psabi", "-DNO_VNNI"]
    sources = [str(folder / "resample.c"), str(folder / "planar.c")]
    subprocess.run([compiler, *options, *sources, "-o", str(library)], check=True)
    plain, usual = ctypes.CDLL(str(library)), kernels()
    assert usual is not None
    plain.edgefold_resize_planes.argtypes = usual.edgefold_resize_planes.argtypes
    return plain


def photograph() -> Any:
    """What a camera sees, as far as we have it here: scenes of the synthetic camera in mosaic, 720 × 1280 RGB."""
    camera = SyntheticCamera(7)
    tiles = [camera.frame(index)[0] for index in range(16)]
    height, width = tiles[0].shape[:2]
    rows, columns = 720 // height + 1, 1280 // width + 1
    pictures = [np.concatenate([tiles[(3 * r + c) % 16] for c in range(columns)], 1) for r in range(rows)]
    return np.concatenate(pictures)[:720, :1280]


@pytest.mark.parametrize("coding", CODINGS, ids=str)
@pytest.mark.parametrize(
    "spec",
    [INCEPTION, PreprocessSpec((96, 96)), PreprocessSpec((224, 224), "squash")],
    ids=["299", "96", "224"],
)
def test_the_picture_is_that_of_the_other_order(spec: PreprocessSpec, coding: YuvCoding) -> None:
    """Resized as planes, against turned into BGR and then resized exactly as Pillow does."""
    planes = rgb_to_planes(photograph(), coding)
    found = to_network_pixels(planes, "I420", spec, "RGB", yuv=coding).astype(int)
    expected = to_network_pixels(planes_to_bgr(planes, coding), "BGR", spec, "RGB")
    off = np.abs(found - expected)
    assert off.mean() <= PLANAR_MEAN_LEVELS
    assert off.max() <= PLANAR_MAX_LEVELS
    # The bound tells what is wrong from what is only rounded otherwise.
    other = YuvCoding("bt709" if coding.matrix == "bt601" else "bt601", coding.full_range, "center")
    for wrong in (other, YuvCoding(coding.matrix, not coding.full_range, "center")):
        misread = to_network_pixels(planes, "I420", spec, "RGB", yuv=wrong)
        assert np.abs(misread.astype(int) - expected).mean() > PLANAR_MEAN_LEVELS
    assert np.abs(found[..., ::-1] - expected).mean() > 5 * PLANAR_MEAN_LEVELS


def test_without_the_kernel_it_is_that_other_order(monkeypatch: pytest.MonkeyPatch) -> None:
    planes = rgb_to_planes(photograph(), CODINGS[1])
    for module in (preprocess, yuv):
        monkeypatch.setattr(module, "kernels", lambda: None)
    preprocess._planar.cache_clear()
    preprocess._resampling.cache_clear()
    try:
        found = to_network_pixels(planes, "I420", INCEPTION, "BGR", yuv=CODINGS[1])
    finally:
        preprocess._planar.cache_clear()
        preprocess._resampling.cache_clear()
    monkeypatch.undo()
    expected = to_network_pixels(planes_to_bgr(planes, CODINGS[1]), "BGR", INCEPTION, "BGR")
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    "spec",
    [
        PreprocessSpec((48, 64), "none"),
        PreprocessSpec((24, 24), interpolation="nearest"),
        PreprocessSpec((24, 24), interpolation="lanczos"),
        PreprocessSpec((24, 24), antialias=False),
    ],
    ids=["none", "nearest", "lanczos", "not antialiased"],
)
def test_what_the_kernel_does_not_filter_goes_by_bgr(spec: PreprocessSpec) -> None:
    image = noise(48, 64)
    expected = to_network_pixels(planes_to_bgr(image, CODINGS[0]), "BGR", spec, "RGB")
    np.testing.assert_array_equal(to_network_pixels(image, "I420", spec, "RGB", yuv=CODINGS[0]), expected)


def test_a_narrow_picture_goes_by_bgr() -> None:
    image, spec = noise(300, 12), PreprocessSpec((24, 24), "squash")
    expected = to_network_pixels(planes_to_bgr(image, CODINGS[0]), "BGR", spec, "RGB")
    np.testing.assert_array_equal(to_network_pixels(image, "I420", spec, "RGB", yuv=CODINGS[0]), expected)


@compiled
def test_chroma_lies_where_its_stream_says() -> None:
    """A colour that grows to the right, sampled between the left pixels: the right reading gives the ramp back."""
    height, width, spec = 48, 64, PreprocessSpec((48, 64), "squash")
    at_left = np.broadcast_to(64 + 2 * np.arange(0, width, 2), (height // 2, width // 2))
    flat = [np.full(height * width, 128), at_left.reshape(-1), np.full(at_left.size, 128)]
    planes = np.concatenate(flat).astype(np.uint8).reshape(height * 3 // 2, width)
    ramp = 128 + 1.772 * (64 + 2 * np.arange(width) - 128)

    def off(chroma: Any) -> float:
        found = to_network_pixels(planes, "I420", spec, "BGR", yuv=YuvCoding("bt601", True, chroma))
        return float((found[24, :, 0] - ramp)[4:-4].mean())

    assert abs(off("left")) < 0.2
    assert off("center") == pytest.approx(-2 * 0.5 * 1.772, abs=0.2)  # half a pixel further left


@pytest.mark.parametrize("coding", CODINGS, ids=str)
def test_both_conversions_give_the_same_colours_and_the_standards(coding: YuvCoding) -> None:
    image = noise(96, 128)
    np.testing.assert_array_equal(planes_to_bgr(image, coding), yuv._planes_to_bgr(image, coding))
    flat = np.kron(
        np.random.default_rng(1).integers(0, 256, (24, 32, 3), np.uint8), np.ones((2, 2, 1), np.uint8)
    )
    off = np.abs(planes_to_bgr(rgb_to_planes(flat, coding), coding)[..., ::-1].astype(int) - flat)
    assert off.max() <= YUV_ROUNDING_LEVELS


def test_limited_bt601_is_opencvs_to_the_bit() -> None:
    cv2 = pytest.importorskip("cv2", reason="needs OpenCV")
    image = noise(96, 128)
    expected = cv2.cvtColor(image, cv2.COLOR_YUV2BGR_I420)
    np.testing.assert_array_equal(planes_to_bgr(image, YuvCoding()), expected)


@pytest.mark.parametrize(
    ("shape", "coding", "message"),
    [
        ((72, 64), None, "without its coding"),
        ((71, 64), YuvCoding(), r"shape \(71, 64\)"),
        ((72, 63), YuvCoding(), "both sides even"),
        ((48, 64, 3), YuvCoding(), r"1.5·height×width"),
        ((0, 64), YuvCoding(), "at least 2"),
    ],
)
def test_what_are_no_planes_is_refused(shape: Any, coding: YuvCoding | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        to_network_pixels(np.zeros(shape, np.uint8), "I420", PreprocessSpec((24, 24)), "RGB", yuv=coding)


@compiled
def test_arrays_of_another_size_are_refused() -> None:
    made = resampler(PreprocessSpec((24, 24)), (48, 64), YuvCoding())
    good, out = noise(48, 64), np.empty((24, 24, 3), np.uint8)
    for image, target in (
        (noise(50, 64), out),
        (good, out[:, :20]),
        (good[:, ::-1], out),
        (good.astype(np.int16), out),
    ):
        with pytest.raises(ValueError, match="planes of"):
            made.resample(image, "RGB", target)


BESIDE_A_GUARD_PAGE = """
from pipeline.artifacts import PreprocessSpec, YuvCoding
from pipeline.preprocess import to_network_pixels
from pipeline.yuv import planes_to_bgr

for height, width in ((2, 32), (40, 34), (300, 36), (98, 130), (64, 64)):
    for to in ((16, 16), (5, 3), (33, 70)):
        for resize, crop_fraction in (("squash", 1.0), ("shorter", 1.0), ("squash", 1.3)):
            kept, image = at_the_end((height * 3 // 2, width))
            kept_too, out = at_the_end((*to, 3))
            spec = PreprocessSpec(to, resize, "bicubic", crop_fraction=crop_fraction)
            to_network_pixels(image, "I420", spec, "RGB", out=out, yuv=YuvCoding())
            planes_to_bgr(image, YuvCoding())
"""


def test_nothing_beside_the_arrays_is_touched() -> None:
    run_beside_guard_pages(BESIDE_A_GUARD_PAGE)
