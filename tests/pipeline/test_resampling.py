"""The CPU kernel against Pillow: the same bytes, no byte read or written beside the arrays."""

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

from pipeline import preprocess, resampling
from pipeline.artifacts import PreprocessSpec
from pipeline.kernels import kernels
from pipeline.preprocess import to_network_pixels
from pipeline.resampling import cropped, filtered, identity, resample, rows_first

pytestmark = pytest.mark.skipif(
    kernels() is None, reason="pipeline/resample.c was not compiled (no C compiler)"
)


def noise(*shape: int, seed: int = 0) -> Any:
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return np.where(pixels > 128, 255, 0).astype(np.uint8) if seed % 2 else pixels


def by_pillow(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> Any:
    with monkeypatch.context() as patch:
        patch.setattr(preprocess, "_resampling", lambda *_: None)
        return to_network_pixels(*arguments)


def assert_pillow(monkeypatch: pytest.MonkeyPatch, image: Any, pixel_format: str, spec: Any) -> None:
    assert preprocess._resampling(spec, *image.shape[:2]) is not None
    for color in ("RGB", "BGR"):
        expected = by_pillow(monkeypatch, image, pixel_format, spec, color)
        np.testing.assert_array_equal(to_network_pixels(image, pixel_format, spec, color), expected)


@pytest.mark.parametrize("pixel_format", ["RGB", "BGR", "BGRA", "GRAY"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("resize", ["shorter", "squash"])
def test_pixels_are_pillows(monkeypatch, pixel_format, interpolation, resize) -> None:
    channels = {"BGRA": (4,), "GRAY": ()}.get(pixel_format, (3,))
    for seed, hw in enumerate([(96, 128), (251, 167), (31, 47), (48, 40), (20, 9), (2, 300), (300, 2)]):
        for crop_fraction in (1.0, 0.875, 1.3):
            for input_hw in ((48, 40), (37, 53)):
                spec = PreprocessSpec(input_hw, resize, interpolation, crop_fraction=crop_fraction)
                assert_pillow(monkeypatch, noise(*hw, *channels, seed=seed), pixel_format, spec)


def test_a_camera_frame(monkeypatch) -> None:
    for interpolation in ("bilinear", "bicubic"):
        spec = PreprocessSpec((299, 299), interpolation=interpolation, crop_fraction=0.875)
        assert_pillow(monkeypatch, noise(1080, 1920, 3), "BGR", spec)


@settings(max_examples=150, deadline=None)
@given(
    hw=st.tuples(st.integers(2, 90), st.integers(2, 90)),
    to=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    interpolation=st.sampled_from(["bilinear", "bicubic"]),
    seed=st.integers(0, 9),
)
def test_whole_images_of_any_size(hw, to, interpolation, seed) -> None:
    image = noise(*hw, 3, seed=seed)
    out = np.empty((*to, 3), np.uint8)
    make = filtered(interpolation)
    resample(
        image, make(hw[1], to[1]), make(hw[0], to[0]),
        vertical_first=rows_first(hw, to), reverse=False, out=out,
    )  # fmt: skip
    filter_ = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[interpolation]
    np.testing.assert_array_equal(out, np.asarray(Image.fromarray(image).resize(to[::-1], filter_)))


def test_without_byte_products_the_pixels_are_the_same(monkeypatch, tmp_path) -> None:
    """A processor that has them would never run the other path, nor the test above it."""
    compiler = shutil.which("cc") or pytest.skip("no C compiler")
    source = Path(resampling.__file__).with_name("resample.c")
    library = tmp_path / "_resample.so"
    options = ["-O2", "-shared", "-fPIC", "-Wno-psabi", "-DNO_VNNI"]
    subprocess.run([compiler, *options, str(source), "-o", str(library)], check=True)
    plain, usual = ctypes.CDLL(str(library)).edgefold_resample, resampling._kernel()
    plain.argtypes, plain.restype = usual.argtypes, usual.restype
    for hw, step in (((270, 480), 3), ((270, 480), 4), ((61, 700), 3)):
        image = noise(*hw, step, seed=step)[:, :, :3]
        for interpolation in ("bilinear", "bicubic"):
            make = filtered(interpolation)
            for reverse in (False, True):
                results = []
                for kernel in (plain, usual):
                    monkeypatch.setattr(resampling, "_kernel", lambda kernel=kernel: kernel)
                    out = np.empty((24, 37, 3), np.uint8)
                    resample(
                        image,
                        make(hw[1], 37),
                        make(hw[0], 24),
                        vertical_first=False,
                        reverse=reverse,
                        out=out,
                    )
                    results.append(out)
                np.testing.assert_array_equal(*results)


def test_rows_that_lie_apart_and_views_are_read_in_place(monkeypatch) -> None:
    wide = noise(60, 90, 3)
    spec = PreprocessSpec((24, 24))
    for view in (
        wide[:, 5:70],
        wide[::2],
        wide[::-1],
        wide[:, ::-1],
        wide[:, :, ::-1],
        wide.transpose(1, 0, 2),
    ):
        assert_pillow(monkeypatch, view, "BGR", spec)


def test_the_result_goes_to_its_place_in_a_batch() -> None:
    spec, image = PreprocessSpec((24, 20)), noise(50, 70, 3)
    batch = np.full((3, 24, 20, 3), 77, np.uint8)
    returned = to_network_pixels(image, "RGB", spec, "BGR", out=batch[1])
    assert np.shares_memory(returned, batch)
    np.testing.assert_array_equal(batch[1], to_network_pixels(image, "RGB", spec, "BGR"))
    assert (batch[[0, 2]] == 77).all()


def test_taps_outside_of_the_image_are_refused() -> None:
    image, out = noise(10, 10, 3), np.empty((10, 12, 3), np.uint8)
    with pytest.raises(ValueError, match="inside the image: False"):
        resample(image, identity(12), identity(10), vertical_first=False, reverse=False, out=out)
    with pytest.raises(ValueError, match="expected"):
        resample(
            image, cropped(identity(10), 0, 8), identity(10), vertical_first=False, reverse=False, out=out
        )


BESIDE_A_GUARD_PAGE = """
from pipeline.artifacts import PreprocessSpec
from pipeline.preprocess import to_network_pixels

for channels, pixel_format in ((3, "BGR"), (4, "BGRA"), (1, "GRAY")):
    for hw in ((2, 2), (3, 7), (40, 9), (300, 2), (97, 131)):
        for to in ((16, 16), (5, 3)):
            kept, image = at_the_end((*hw, channels) if channels > 1 else hw)
            kept_too, out = at_the_end((*to, 3))
            to_network_pixels(image, pixel_format, PreprocessSpec(to, "squash", "bicubic"), "RGB", out=out)
"""


def test_nothing_beside_the_arrays_is_touched() -> None:
    run_beside_guard_pages(BESIDE_A_GUARD_PAGE)
