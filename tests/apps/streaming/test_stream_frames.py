import numpy as np
import pytest

from apps.streaming.frames import as_image, defect
from pipeline.artifacts import PreprocessSpec
from pipeline.preprocess import to_network_pixels

SPEC = PreprocessSpec(input_hw=(4, 4), resize="none")


@pytest.mark.parametrize(
    ("pixels", "reason"),
    [
        (None, "no image"),
        ("frame", "not an array"),
        (np.zeros((0, 0, 3), np.uint8), "empty image"),
        (np.zeros((0,), np.uint8), "empty image"),
        (np.zeros((4, 4, 3), np.uint16), "uint16 samples"),
        (np.zeros((4, 4, 3), np.float32), "float32 samples"),
        (np.zeros((4, 4), np.int8), "int8 samples"),
        (np.zeros((640, 1), np.uint8), "bad shape"),
        (np.zeros((1, 640, 3), np.uint8), "bad shape"),
        (np.zeros((4, 1, 3), np.uint8), "bad shape"),
        (np.zeros(640, np.uint8), "bad shape"),
        (np.zeros((4, 4, 2), np.uint8), "bad shape"),
        (np.zeros((4, 4, 5), np.uint8), "bad shape"),
        (np.zeros((2, 4, 4, 3), np.uint8), "bad shape"),
    ],
)
def test_what_is_no_frame_is_named(pixels: object, reason: str) -> None:
    assert defect(pixels) == reason


@pytest.mark.parametrize("shape", [(2, 2), (4, 4, 1), (4, 4, 3), (4, 4, 4), (2, 4000, 3)])
def test_frames_pass(shape: tuple[int, ...]) -> None:
    assert defect(np.zeros(shape, np.uint8)) is None


GOLDEN_RGB = np.arange(48, dtype=np.uint8).reshape(4, 4, 3) * 5
GOLDEN_GRAY = np.arange(16, dtype=np.uint8).reshape(4, 4) * 16
ALPHA = np.full((4, 4, 1), 7, np.uint8)


@pytest.mark.parametrize(
    ("pixels", "color", "pixel_format", "network_rgb"),
    [
        (GOLDEN_RGB, "RGB", "RGB", GOLDEN_RGB),
        (GOLDEN_RGB[:, :, ::-1], "BGR", "BGR", GOLDEN_RGB),
        (np.concatenate([GOLDEN_RGB[:, :, ::-1], ALPHA], axis=2), "BGR", "BGRA", GOLDEN_RGB),
        (np.concatenate([GOLDEN_RGB, ALPHA], axis=2), "RGB", "RGBA", GOLDEN_RGB),
        (GOLDEN_GRAY, "BGR", "GRAY", np.repeat(GOLDEN_GRAY[:, :, None], 3, 2)),
        (GOLDEN_GRAY[:, :, None], "BGR", "GRAY", np.repeat(GOLDEN_GRAY[:, :, None], 3, 2)),
    ],
    ids=["rgb", "bgr", "bgra", "rgba", "gray", "gray-hw1"],
)
def test_formats_reach_the_network_exactly(pixels, color, pixel_format, network_rgb) -> None:
    image, found = as_image(pixels, color)
    assert found == pixel_format
    assert image.flags.c_contiguous
    np.testing.assert_array_equal(to_network_pixels(image, found, SPEC, "RGB"), network_rgb)
    np.testing.assert_array_equal(to_network_pixels(image, found, SPEC, "BGR"), network_rgb[:, :, ::-1])


def test_strided_views_keep_their_values() -> None:
    wide = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    image, _ = as_image(wide[::2, ::-2], "RGB")
    np.testing.assert_array_equal(image, wide[::2, ::-2].copy())


def test_a_wrong_channel_order_would_be_noticed() -> None:
    image, _ = as_image(GOLDEN_RGB[:, :, ::-1], "BGR")
    assert not np.array_equal(to_network_pixels(image, "RGB", SPEC, "RGB"), GOLDEN_RGB)
