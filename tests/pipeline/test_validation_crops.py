import numpy as np
import pytest
from PIL import Image, ImageOps

from pipeline.artifacts import PreprocessSpec, Sample
from pipeline.errors import DataError, UsageError
from pipeline.preprocess import to_network_pixels
from pipeline.validation_crops import CROP_COUNTS, View, check_crops, crops_of, pixels_a_call, seen_batches

SPEC = PreprocessSpec((224, 224), interpolation="bilinear", crop_fraction=0.875)


def photograph(height, width, seed=0):
    small = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3)).astype(np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def section_7(image, scales=(256, 288, 320, 352)):
    """The 144 crops of arXiv 1409.4842, section 7, in the paper's own words and numbers, with Pillow alone."""
    picture = Image.fromarray(image)
    for scale in scales:
        if picture.width >= picture.height:
            size = (int(scale * picture.width / picture.height), scale)
        else:
            size = (scale, int(scale * picture.height / picture.width))
        resized = picture.resize(size, Image.Resampling.BILINEAR)
        longer = max(size)
        for start in (0, round((longer - scale) / 2), longer - scale):
            left, top = (start, 0) if size[0] >= size[1] else (0, start)
            square = resized.crop((left, top, left + scale, top + scale))
            room = scale - 224
            places = [(0, 0), (room, 0), (0, room), (room, room), (round(room / 2), round(room / 2))]
            parts = [square.crop((x, y, x + 224, y + 224)) for x, y in places]
            for part in (*parts, square.resize((224, 224), Image.Resampling.BILINEAR)):
                yield np.asarray(part)
                yield np.asarray(ImageOps.mirror(part))


def as_set(crops):
    return sorted(np.ascontiguousarray(crop).tobytes() for crop in crops)


@pytest.mark.parametrize("hw", [(300, 420), (420, 300), (256, 256), (120, 333)])
def test_144_are_the_papers(hw):
    image = photograph(*hw)
    crops = list(crops_of(image, View(SPEC, "RGB"), 144))
    assert len(crops) == 144
    assert {crop.shape for crop in crops} == {(224, 224, 3)}
    assert as_set(crops) == as_set(section_7(image))


def test_12_are_of_the_central_square_of_the_first_scale():
    image = photograph(300, 420)
    expected = list(section_7(image, (256,)))[12:24]
    assert as_set(crops_of(image, View(SPEC, "RGB"), 12)) == as_set(expected)


def test_10_are_corners_and_center_of_256_mirrored():
    # Krizhevsky et al. 2012: no whole square among them; the center is the one crop of `crop_fraction` 0.875.
    image = photograph(300, 420)
    crops = list(crops_of(image, View(SPEC, "RGB"), 10))
    assert as_set(crops) == as_set(list(section_7(image, (256,)))[12:22])
    (one,) = crops_of(image, View(SPEC, "RGB"), 1)
    assert any(np.array_equal(one, crop) for crop in crops)
    np.testing.assert_array_equal(one, to_network_pixels(image, "RGB", SPEC, "RGB"))


@pytest.mark.parametrize("crops", CROP_COUNTS)
def test_another_channel_order_is_the_same_crops(crops):
    image = photograph(260, 300)
    rgb, bgr = (list(crops_of(image, View(SPEC, color), crops)) for color in ("RGB", "BGR"))
    assert len(rgb) == crops
    assert all(np.array_equal(a, b[..., ::-1]) for a, b in zip(rgb, bgr, strict=True))


def test_scales_keep_their_ratio_to_the_input():
    # 299: 342, 384, 427 and 470; a ramp shows the width that a crop sees through its step.
    spec = PreprocessSpec((299, 299))
    ramp = np.broadcast_to(np.linspace(0, 255, 600)[None, :, None], (600, 600, 3)).astype(np.uint8)
    spans = []
    for index, crop in enumerate(crops_of(np.ascontiguousarray(ramp), View(spec, "RGB"), 144)):
        if index % 12 == 8:  # the center of each square
            spans.append(int(crop[0, -1, 0]) - int(crop[0, 0, 0]))
    seen = [255 * 299 / side for side in (342, 384, 427, 470)]
    np.testing.assert_allclose(spans[::3], seen, atol=2)


def test_what_cannot_be_cropped_is_refused():
    assert [check_crops(crops, SPEC) for crops in CROP_COUNTS] == [1, 10, 12, 144]
    with pytest.raises(UsageError, match="one of 1, 10, 12, 144, got 5"):
        check_crops(5, SPEC)
    with pytest.raises(UsageError, match="takes 320×240 pixels"):
        check_crops(10, PreprocessSpec((240, 320)))
    with pytest.raises(UsageError, match=r"resizes images to 36 pixels and more, but .* does not resize"):
        check_crops(12, PreprocessSpec((32, 32), resize="none"))
    assert check_crops(1, PreprocessSpec((240, 320), resize="none")) == 1


@pytest.mark.parametrize(
    ("batch_size", "crops", "expected"),
    [
        (16, 1, 16),
        (16, 10, 10),
        (16, 12, 12),
        (32, 12, 24),
        (16, 144, 16),
        (10, 144, 9),
        (1, 144, 1),
        (7, 10, 5),
    ],
)
def test_whole_images_fill_the_batches(batch_size, crops, expected):
    assert pixels_a_call(batch_size, crops) == expected


def test_batches_hold_every_view_of_the_same_samples():
    samples = [Sample(photograph(64, 80, seed), seed, str(seed)) for seed in range(3)]
    small, large = View(PreprocessSpec((16, 16)), "RGB"), View(PreprocessSpec((24, 24)), "BGR")
    found = list(seen_batches(samples, [small, large], 12, 2))
    assert [[sample.key for sample in batch] for batch, _ in found] == [["0", "1"], ["2"]]
    assert [pixels[small].shape for _, pixels in found] == [(24, 16, 16, 3), (12, 16, 16, 3)]
    assert [pixels[large].shape for _, pixels in found] == [(24, 24, 24, 3), (12, 24, 24, 3)]
    own = np.stack(list(crops_of(samples[1].image, small, 12)))
    np.testing.assert_array_equal(found[0][1][small][12:], own)


def test_an_image_that_does_not_fit_is_named():
    samples = [Sample(photograph(64, 80), 0, "photo.png")]
    with pytest.raises(DataError, match=r"photo\.png: an image is 80×64, the network takes 16×16"):
        list(seen_batches(samples, [View(PreprocessSpec((16, 16), resize="none"), "RGB")], 1, 4))
