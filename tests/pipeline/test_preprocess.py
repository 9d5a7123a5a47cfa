"""Preprocessing against Pillow, torchvision and timm themselves."""

from __future__ import annotations

import csv
import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tolerances
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from pipeline.artifacts import PreprocessSpec
from pipeline.errors import DataError
from pipeline.preprocess import affine, normalize, preprocess_sha256, to_network_pixels

SPEC = PreprocessSpec(
    (48, 48),
    crop_fraction=0.875,
    interpolation="bicubic",
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> NDArray[np.uint8]:
    """The hardest image for a resize: every error shows."""
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


class TestAgainstTorchvision:
    """`transforms.Resize` and `CenterCrop` on Pillow images: the same pixels, bit for bit."""

    @pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
    @pytest.mark.parametrize(("height", "width"), [(96, 128), (501, 333), (31, 47), (48, 48), (55, 200)])
    @pytest.mark.parametrize("crop_fraction", [1.0, 0.875, 0.95])
    def test_shorter_side_resize_gives_the_same_pixels(
        self, interpolation: Any, height: int, width: int, crop_fraction: float
    ) -> None:
        transforms = pytest.importorskip("torchvision.transforms")
        image = noise(height, width)
        spec = PreprocessSpec((48, 48), interpolation=interpolation, crop_fraction=crop_fraction)
        reference = transforms.Compose(
            [
                transforms.Resize(int(48 / crop_fraction), transforms.InterpolationMode(interpolation)),
                transforms.CenterCrop(48),
            ]
        )(Image.fromarray(image))
        np.testing.assert_array_equal(to_network_pixels(image, "RGB", spec, "RGB"), np.asarray(reference))

    @settings(max_examples=60, deadline=None)
    @given(
        height=st.integers(2, 160), width=st.integers(2, 160), side=st.integers(1, 64),
        crop_fraction=st.sampled_from([0.8, 0.875, 0.9, 1.0, 1.3]),
    )  # fmt: skip
    def test_any_size_gives_the_same_pixels(
        self, height: int, width: int, side: int, crop_fraction: float
    ) -> None:
        transforms = pytest.importorskip("torchvision.transforms")
        resized = int(side / crop_fraction + 1e-6)
        if resized < 1:
            return
        image = noise(height, width)
        # A crop fraction above 1 makes the crop larger than the image: torchvision pads it with 0.
        reference = transforms.Compose([transforms.Resize(resized), transforms.CenterCrop(side)])
        spec = PreprocessSpec((side, side), crop_fraction=crop_fraction)
        np.testing.assert_array_equal(
            to_network_pixels(image, "RGB", spec, "RGB"), np.asarray(reference(Image.fromarray(image)))
        )

    def test_resizing_the_crop_alone_would_not_be_the_same(self) -> None:
        """Why the whole image is resized: Pillow's float32 box is faster and differs."""
        image = Image.fromarray(noise(501, 333))
        whole = image.resize((341, 513), Image.Resampling.BICUBIC).crop((21, 107, 320, 406))
        step_x, step_y = 333 / 341, 501 / 513
        box = (21 * step_x, 107 * step_y, 320 * step_x, 406 * step_y)
        boxed = image.resize((299, 299), Image.Resampling.BICUBIC, box=box)
        assert np.any(np.asarray(whole) != np.asarray(boxed))

    def test_normalization_is_that_of_to_tensor_and_normalize(self) -> None:
        transforms = pytest.importorskip("torchvision.transforms")
        image = noise(60, 80)
        pixels = to_network_pixels(image, "RGB", SPEC, "BGR")
        reference = transforms.Compose(
            [
                transforms.Resize(54, transforms.InterpolationMode.BICUBIC),
                transforms.CenterCrop(48),
                transforms.ToTensor(),
                transforms.Normalize(SPEC.mean, SPEC.std),
            ]
        )(Image.fromarray(image))
        ours = normalize(pixels[np.newaxis], SPEC, "BGR")
        np.testing.assert_allclose(ours[0], reference.numpy(), atol=tolerances.NORMALIZED_PIXEL_ATOL, rtol=0)


class TestAgainstTimm:
    @pytest.mark.parametrize(
        ("input_hw", "crop_fraction", "crop_mode", "resize"),
        [
            ((75, 75), 0.875, "center", "shorter"),
            ((75, 75), 0.8975, "center", "shorter"),
            ((64, 96), 0.9, "center", "shorter"),
            ((75, 75), 0.9, "squash", "squash"),
            ((64, 96), 1.0, "squash", "squash"),
        ],
    )
    def test_gives_the_tensor_of_timms_own_transform(
        self, input_hw: tuple[int, int], crop_fraction: float, crop_mode: str, resize: Any
    ) -> None:
        data = pytest.importorskip("timm.data")
        spec = dataclasses.replace(SPEC, input_hw=input_hw, crop_fraction=crop_fraction, resize=resize)
        transform = data.create_transform(
            (3, *input_hw), is_training=False, interpolation="bicubic", mean=spec.mean, std=spec.std,
            crop_pct=crop_fraction, crop_mode=crop_mode,
        )  # fmt: skip
        for seed, (height, width) in enumerate([(120, 160), (301, 97), (50, 50)]):
            image = noise(height, width, seed=seed)
            pixels = to_network_pixels(image, "RGB", spec, "RGB")
            reference = transform(Image.fromarray(image)).numpy()
            difference = np.abs(normalize(pixels[np.newaxis], spec, "RGB")[0] - reference).max()
            assert difference <= tolerances.NORMALIZED_PIXEL_ATOL

    @pytest.mark.data
    def test_photographs_give_the_same_top_1(self) -> None:
        """Photographs through a random network: the same pixels, so the same classes."""
        folder = Path(os.environ.get("EDGEFOLD_IMAGENET200", ""))
        if not (folder / "labels.csv").is_file():
            pytest.skip("EDGEFOLD_IMAGENET200 does not name the folder of ImageNet photographs")
        torch = pytest.importorskip("torch")
        data = pytest.importorskip("timm.data")
        spec = dataclasses.replace(SPEC, input_hw=(224, 224))
        transform = data.create_transform(
            (3, 224, 224),
            is_training=False,
            interpolation="bicubic",
            mean=spec.mean,
            std=spec.std,
            crop_pct=0.875,
        )
        torch.manual_seed(0)
        network = torch.nn.Sequential(
            torch.nn.Conv2d(3, 16, 7, 8), torch.nn.ReLU(), torch.nn.Conv2d(16, 64, 5, 4), torch.nn.Flatten(),
            torch.nn.LazyLinear(1000),
        )  # fmt: skip
        with (folder / "labels.csv").open(newline="") as stream:
            files = [row["file"] for row in csv.DictReader(stream)][:24]
        with torch.no_grad():
            for file in files:
                with Image.open(folder / file) as opened:
                    photograph = opened.convert("RGB")
                reference = transform(photograph)
                pixels = to_network_pixels(np.asarray(photograph), "RGB", spec, "RGB")
                ours = torch.from_numpy(normalize(pixels[np.newaxis], spec, "RGB"))
                assert float((ours[0] - reference).abs().max()) <= tolerances.NORMALIZED_PIXEL_ATOL, file
                assert network(ours).argmax() == network(reference[None]).argmax(), file


class TestNotAntialiased:
    def test_bilinear_is_that_of_torch_on_tensors(self) -> None:
        torch = pytest.importorskip("torch")
        image = noise(120, 90)
        spec = PreprocessSpec((40, 30), resize="squash", antialias=False)
        tensor = torch.from_numpy(image).permute(2, 0, 1)[None].float()
        reference = torch.nn.functional.interpolate(tensor, (40, 30), mode="bilinear", antialias=False)
        difference = to_network_pixels(image, "RGB", spec, "RGB") - reference[0].permute(1, 2, 0).numpy()
        assert np.abs(difference).max() <= tolerances.BILINEAR_LEVELS

    def test_it_differs_from_the_antialiased_one(self) -> None:
        image = noise(120, 90)
        spec = PreprocessSpec((30, 30))
        aliased = to_network_pixels(image, "RGB", dataclasses.replace(spec, antialias=False), "RGB")
        assert np.abs(aliased.astype(int) - to_network_pixels(image, "RGB", spec, "RGB")).max() > 50

    def test_the_crop_is_centred_and_padded_like_the_antialiased_one(self) -> None:
        """On a flat image the filter does not matter, so only the geometry can differ."""
        image = np.full((40, 64, 3), 200, np.uint8)
        for crop_fraction in (0.7, 1.0, 1.5):
            spec = PreprocessSpec((33, 33), crop_fraction=crop_fraction)
            aliased = to_network_pixels(image, "RGB", dataclasses.replace(spec, antialias=False), "RGB")
            np.testing.assert_array_equal(aliased, to_network_pixels(image, "RGB", spec, "RGB"))

    def test_lanczos_is_refused(self) -> None:
        spec = PreprocessSpec((8, 8), interpolation="lanczos", antialias=False)
        with pytest.raises(DataError, match="antialias"):
            to_network_pixels(noise(20, 20), "RGB", spec, "RGB")


class TestPixelFormats:
    @pytest.mark.parametrize("color", ["RGB", "BGR"])
    def test_every_format_of_one_picture_gives_the_same_pixels(self, color: Any) -> None:
        rgb = noise(60, 80)
        alpha = noise(60, 80, 1, seed=1)[:, :, np.newaxis]  # dropped, whatever it is
        bgr = np.ascontiguousarray(rgb[:, :, ::-1])
        expected = to_network_pixels(rgb, "RGB", SPEC, color)
        np.testing.assert_array_equal(to_network_pixels(bgr, "BGR", SPEC, color), expected)
        np.testing.assert_array_equal(
            to_network_pixels(np.concatenate([rgb, alpha], 2), "RGBA", SPEC, color), expected
        )
        np.testing.assert_array_equal(
            to_network_pixels(np.concatenate([bgr, alpha], 2), "BGRA", SPEC, color), expected
        )

    def test_the_color_asked_for_is_the_color_given(self) -> None:
        red = np.zeros((50, 50, 3), np.uint8)
        red[:, :, 0] = 255
        assert to_network_pixels(red, "RGB", SPEC, "RGB")[0, 0].tolist() == [255, 0, 0]
        assert to_network_pixels(red, "RGB", SPEC, "BGR")[0, 0].tolist() == [0, 0, 255]

    @pytest.mark.parametrize("shape", [(60, 80), (60, 80, 1)])
    def test_gray_becomes_three_equal_channels(self, shape: tuple[int, ...]) -> None:
        gray = noise(60, 80, 1)
        expected = to_network_pixels(np.stack([gray] * 3, axis=2), "RGB", SPEC, "RGB")
        np.testing.assert_array_equal(to_network_pixels(gray.reshape(shape), "GRAY", SPEC, "BGR"), expected)

    def test_strides_do_not_matter(self) -> None:
        wide = noise(120, 160)
        view = wide[::2, ::-2]
        np.testing.assert_array_equal(
            to_network_pixels(view, "RGB", SPEC, "RGB"), to_network_pixels(view.copy(), "RGB", SPEC, "RGB")
        )

    def test_the_result_is_contiguous_writable_and_its_own(self) -> None:
        image = noise(48, 48)
        spec = PreprocessSpec((48, 48), resize="none")
        for color in ("RGB", "BGR"):
            pixels = to_network_pixels(image, "RGB", spec, color)
            assert pixels.flags.c_contiguous
            assert pixels.flags.writeable
            assert not np.shares_memory(pixels, image)


@pytest.mark.parametrize(
    ("image", "pixel_format", "words"),
    [
        (None, "BGR", "NoneType"),
        (np.zeros((0, 0, 3), np.uint8), "BGR", "0×0"),
        (np.zeros((640, 1, 3), np.uint8), "BGR", "1×640"),
        (np.zeros((921600, 1), np.uint8), "BGR", r"\(921600, 1\)"),
        (np.zeros((48, 48, 4), np.uint8), "BGR", r"\(48, 48, 4\)"),
        (np.zeros((48, 48), np.uint8), "RGB", r"\(48, 48\)"),
        (np.zeros((48, 48, 3), np.uint8), "GRAY", r"\(48, 48, 3\)"),
        (np.zeros((48, 48), np.uint16), "GRAY", "uint16"),
        (np.zeros((48, 48, 3), np.float32), "RGB", "float32"),
        (np.zeros((48, 48, 3), np.uint8), "NV12", "NV12"),
    ],
)
def test_what_is_no_image_is_refused(image: Any, pixel_format: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        to_network_pixels(image, pixel_format, SPEC, "RGB")


def test_an_image_of_the_wrong_size_is_refused_where_nothing_resizes() -> None:
    spec = PreprocessSpec((32, 48), resize="none")
    assert to_network_pixels(noise(32, 48), "RGB", spec, "RGB").shape == (32, 48, 3)
    with pytest.raises(DataError, match=r"80×60.*48×32"):
        to_network_pixels(noise(60, 80), "RGB", spec, "RGB")


class TestNormalization:
    @settings(max_examples=40, deadline=None)
    @given(
        pixel=st.integers(0, 255),
        mean=st.floats(-1, 1),
        std=st.floats(0.05, 4),
        low=st.floats(-2, 0),
        span=st.floats(0.5, 300),
    )
    def test_affine_is_the_formula_of_the_spec(
        self, pixel: int, mean: float, std: float, low: float, span: float
    ) -> None:
        spec = PreprocessSpec((8, 8), mean=(mean,) * 3, std=(std,) * 3, value_range=(low, low + span))
        scale, shift = affine(spec)
        expected = (pixel / 255 * ((low + span) - low) + low - mean) / std
        np.testing.assert_allclose(pixel * scale + shift, expected, rtol=1e-9, atol=1e-9)

    def test_channels_end_in_the_networks_order_and_layout(self) -> None:
        spec = PreprocessSpec((2, 2), color="BGR", value_range=(0, 255), mean=(1, 2, 3))
        red = np.zeros((1, 2, 2, 3), np.uint8)
        red[..., 0] = 100
        nchw = normalize(red, spec, "RGB")
        assert nchw.shape == (1, 3, 2, 2)
        assert nchw[0, :, 0, 0].tolist() == [-1, -2, 97]  # blue, green, red, each less its own mean
        nhwc = normalize(red, dataclasses.replace(spec, layout="NHWC"), "RGB")
        np.testing.assert_array_equal(nhwc, nchw.transpose(0, 2, 3, 1))
        np.testing.assert_array_equal(normalize(red[..., ::-1], spec, "BGR"), nchw)

    @pytest.mark.parametrize("change", [{"std": (1.0, 0.0, 1.0)}, {"mean": (float("nan"), 0.0, 0.0)}])
    def test_numbers_that_cannot_normalize_are_refused(self, change: dict[str, Any]) -> None:
        with pytest.raises(DataError, match="finite"):
            affine(dataclasses.replace(SPEC, **change))

    @pytest.mark.parametrize("pixels", [np.zeros((2, 2, 3), np.uint8), np.zeros((1, 2, 2, 3), np.float32)])
    def test_pixels_of_the_wrong_kind_are_refused(self, pixels: Any) -> None:
        with pytest.raises(DataError, match="uint8 NHWC"):
            normalize(pixels, SPEC, "RGB")


class TestDigest:
    def test_equal_specs_have_equal_digests(self) -> None:
        integers = PreprocessSpec((8, 8), mean=(0, 0, 0), std=(1, 1, 1), value_range=(0, 1), crop_fraction=1)
        assert preprocess_sha256(integers) == preprocess_sha256(PreprocessSpec((8, 8)))

    @pytest.mark.parametrize(
        "change",
        [
            {"input_hw": (8, 9)},
            {"resize": "squash"},
            {"interpolation": "nearest"},
            {"antialias": False},
            {"crop_fraction": 0.9},
            {"color": "BGR"},
            {"value_range": (-1.0, 1.0)},
            {"mean": (0.0, 0.0, 0.1)},
            {"std": (1.0, 1.0, 1.1)},
            {"layout": "NHWC"},
        ],
    )
    def test_every_field_is_in_it(self, change: dict[str, Any]) -> None:
        spec = PreprocessSpec((8, 8))
        assert preprocess_sha256(dataclasses.replace(spec, **change)) != preprocess_sha256(spec)

    def test_no_field_has_been_added_without_a_test(self) -> None:
        assert len(dataclasses.fields(PreprocessSpec)) == 10
