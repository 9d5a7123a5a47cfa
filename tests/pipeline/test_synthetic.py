from __future__ import annotations

import hashlib
import subprocess
import sys

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipeline.contracts import Dataset
from pipeline.errors import UsageError
from pipeline.synthetic import CLASS_NAMES, SyntheticCamera, SyntheticDataset
from pipeline.synthetic_signs import Matrix, plate_homography, project_sign, sign_pyramid

# Of the first frames of seed 2026; they belong to RENDERER_VERSION and change with it only.
FIRST_LABELS = [5, 10, 11, 7, 8, 6, 1, 4, 9, 2, 0, 3]
QUADRANT_MEANS = [
    [121.4, 160.6, 105.8, 98.6],
    [60.9, 96.5, 52.0, 76.9],
    [131.2, 139.6, 96.7, 105.2],
    [36.8, 38.2, 34.2, 39.2],
]
QUADRANT_MEAN_ATOL = 1.0  # grey levels: JPEG decoders and resampling kernels differ by less than half of one


def _central(image: NDArray[np.uint8], side: int = 24) -> NDArray[np.float64]:
    """The centred square, resized and standardized: what a classifier sees, without its brightness."""
    edge = min(image.shape[:2])
    top, left = (image.shape[0] - edge) // 2, (image.shape[1] - edge) // 2
    square = Image.fromarray(image[top : top + edge, left : left + edge]).resize((side, side))
    pixels = np.asarray(square, np.float64)
    return (pixels - pixels.mean()) / (pixels.std() + 1e-9)


def _rendered(label: int) -> NDArray[np.uint8]:
    """The sign on grey."""
    sign = sign_pyramid(label)[1]
    return np.asarray(
        Image.alpha_composite(Image.new("RGBA", sign.size, (128, 128, 128, 255)), sign).convert("RGB")
    )


def test_frame_is_a_pure_function_of_seed_and_index() -> None:
    forwards = [SyntheticCamera(7).frame(i) for i in range(6)]
    camera = SyntheticCamera(7)
    backwards = [camera.frame(i) for i in reversed(range(6))][::-1]
    for (image, label), (again, label_again) in zip(forwards, backwards, strict=True):
        assert label == label_again
        np.testing.assert_array_equal(image, again)


def test_frames_of_another_process_are_the_same_bytes() -> None:
    program = (
        "import hashlib; from pipeline.synthetic import SyntheticCamera; c = SyntheticCamera(11);"
        "print(*[hashlib.sha256(c.frame(i)[0].tobytes()).hexdigest() for i in (4, 1)])"
    )
    run = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    camera = SyntheticCamera(11)
    assert run.stdout.split() == [hashlib.sha256(camera.frame(i)[0].tobytes()).hexdigest() for i in (4, 1)]


def test_other_indices_and_seeds_give_other_frames_and_label_orders() -> None:
    camera, other = SyntheticCamera(0), SyntheticCamera(1)
    frames = [camera.frame(i)[0] for i in range(6)] + [other.frame(i)[0] for i in range(6)]
    assert len({frame.tobytes() for frame in frames}) == len(frames)
    assert [camera.label(i) for i in range(24)] != [other.label(i) for i in range(24)]
    assert [camera.label(i) for i in range(12)] != [camera.label(i) for i in range(12, 24)]


@pytest.mark.parametrize("frame_hw", [(240, 320), (96, 96), (120, 60), (720, 1280)])
def test_shape_dtype_and_a_label_that_does_not_depend_on_the_frame_size(frame_hw: tuple[int, int]) -> None:
    image, label = SyntheticCamera(5, frame_hw).frame(3)
    assert image.shape == (*frame_hw, 3)
    assert image.dtype == np.uint8
    assert image.flags.c_contiguous
    assert image.flags.writeable
    assert label == SyntheticCamera(5).label(3)


def test_every_block_of_twelve_shows_every_class_once() -> None:
    camera = SyntheticCamera(3)
    for block in range(20):
        labels = [camera.label(12 * block + i) for i in range(12)]
        assert sorted(labels) == list(range(12))


def test_class_names_are_twelve_in_alphabetical_order() -> None:
    assert len(set(CLASS_NAMES)) == 12
    assert list(CLASS_NAMES) == sorted(CLASS_NAMES)


def test_frames_keep_their_coarse_statistics() -> None:
    """Pillow versions may differ in the last bits; a changed renderer moves these numbers by far more."""
    camera = SyntheticCamera(2026)
    thumbnails = [camera.frame(i)[0].reshape(2, 120, 2, 160, 3).mean(axis=(1, 3, 4)) for i in range(4)]
    np.testing.assert_allclose(np.array(thumbnails).reshape(4, 4), QUADRANT_MEANS, atol=QUADRANT_MEAN_ATOL)
    assert [camera.label(i) for i in range(12)] == FIRST_LABELS


def test_light_and_noise_vary_between_frames() -> None:
    camera = SyntheticCamera(0)
    frames = [camera.frame(i)[0].astype(np.float64) for i in range(48)]
    brightness = [frame.mean() for frame in frames]
    assert min(brightness) < 45
    assert max(brightness) > 130
    sharpness = [np.abs(np.diff(frame, axis=1)).mean() / (frame.std() + 1) for frame in frames]
    assert max(sharpness) > 3 * min(sharpness)


def test_the_sign_is_the_label_and_stands_in_the_central_square() -> None:
    """Frames that differ in nothing but the class differ inside the central square."""
    camera = SyntheticCamera(0)
    image, label = camera.frame(8)

    class OtherClass(SyntheticCamera):
        def label(self, index: int) -> int:
            return (super().label(index) + 5) % 12

    changed, other_label = OtherClass(0).frame(8)
    assert other_label != label
    difference = np.abs(image.astype(int) - changed.astype(int)).max(axis=2) > 40
    columns = np.flatnonzero(difference.any(axis=0))
    assert len(columns) > 10
    assert columns.min() >= 40
    assert columns.max() < 280


def test_clean_signs_are_told_apart_by_their_nearest_template() -> None:
    """Small turned copies of the drawn signs are nearest to their own class, left and right included."""
    templates = np.stack([_central(_rendered(label)) for label in range(12)])
    for label in range(12):
        for turn_deg in (-6, 6):
            turned = Image.fromarray(_rendered(label)).rotate(
                turn_deg, Image.Resampling.BILINEAR, fillcolor=(128,) * 3
            )
            distances = ((templates - _central(np.asarray(turned))) ** 2).mean(axis=(1, 2, 3))
            assert int(distances.argmin()) == label, CLASS_NAMES[label]


def test_left_and_right_are_mirror_images_and_differ() -> None:
    left, right = (_rendered(CLASS_NAMES.index(name)).astype(int) for name in ("turn_left", "turn_right"))
    assert (np.abs(left - right).max(axis=2) > 60).mean() > 0.1
    assert (np.abs(left[:, ::-1] - right).max(axis=2) > 60).mean() < 0.01


def test_speed_signs_differ_only_in_their_first_digit() -> None:
    thirty, fifty, eighty = (_rendered(CLASS_NAMES.index(f"speed_{n}")).astype(int) for n in (30, 50, 80))
    middle = thirty.shape[1] // 2
    for a, b in ((thirty, fifty), (fifty, eighty), (thirty, eighty)):
        assert (np.abs(a - b).max(axis=2) > 60).mean() > 0.005
        np.testing.assert_array_equal(a[:, middle + 4 :], b[:, middle + 4 :])


def _through(homography: Matrix, u: float, v: float) -> NDArray[np.float64]:
    x, y, w = np.asarray(homography) @ (u, v, 1.0)
    return np.array([x / w, y / w])


def test_projection_seen_from_the_front_is_the_sign_itself() -> None:
    homography = plate_homography((50.0, 60.0), 48.0, 0.0, 0.0, 0.0, 4.0)
    np.testing.assert_allclose(_through(homography, -1, -1), (2, 12))
    np.testing.assert_allclose(_through(homography, 1, 1), (98, 108))
    patch, corner = project_sign(0, homography, 48.0)
    assert corner == (2, 12)
    assert patch.size == (96, 96)
    expected = np.asarray(sign_pyramid(0)[2], int)
    assert np.abs(np.asarray(patch, int) - expected).mean() < 1


def test_projection_puts_the_plate_where_the_homography_says() -> None:
    """The no-entry bar's centre stays white where the homography sends it, for a turned plate."""
    homography = plate_homography((120.0, 90.0), 70.0, 0.7, -0.4, 0.2, 3.0)
    patch, (left, top) = project_sign(CLASS_NAMES.index("no_entry"), homography, 70.0)
    for u, white in ((-0.55, True), (0.0, True), (0.55, True), (-0.8, False), (0.8, False)):
        x, y = _through(homography, u, 0.0)
        red, green, _, alpha = patch.getpixel((int(x) - left, int(y) - top))
        assert alpha == 255
        assert (green > 200) == white, u
        assert red > 150


def test_near_side_of_a_turned_plate_is_larger() -> None:
    homography = plate_homography((0.0, 0.0), 50.0, 0.6, 0.0, 0.0, 3.0)
    left_edge = np.linalg.norm(_through(homography, -1, 1) - _through(homography, -1, -1))
    right_edge = np.linalg.norm(_through(homography, 1, 1) - _through(homography, 1, -1))
    assert right_edge > 1.2 * left_edge


def test_dataset_is_the_cameras_first_frames() -> None:
    dataset = SyntheticDataset(4, 5)
    checked: Dataset = dataset
    assert len(checked) == 5
    assert checked.class_names == CLASS_NAMES
    assert checked.skipped == ()
    assert checked.name == "synthetic:4:5"
    camera = SyntheticCamera(4)
    for _ in range(2):  # a second pass is the same
        samples = list(dataset)
        assert [sample.key for sample in samples] == ["0", "1", "2", "3", "4"]
        for index, sample in enumerate(samples):
            image, label = camera.frame(index)
            assert sample.label == label
            np.testing.assert_array_equal(sample.image, image)


def test_dataset_digest_names_everything_the_frames_depend_on(monkeypatch: pytest.MonkeyPatch) -> None:
    digest = SyntheticDataset(0, 10).sha256
    assert digest == SyntheticDataset(0, 10).sha256
    assert len(digest) == 64
    others = {SyntheticDataset(1, 10).sha256, SyntheticDataset(0, 11).sha256}
    others.add(SyntheticDataset(0, 10, (240, 240)).sha256)
    monkeypatch.setattr("pipeline.synthetic.RENDERER_VERSION", 10**6)
    others.add(SyntheticDataset(0, 10).sha256)
    assert len(others - {digest}) == 4


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seed_out_of_range_is_refused(seed: int) -> None:
    with pytest.raises(UsageError, match=f"seed is {seed}"):
        SyntheticCamera(seed)


def test_frame_too_small_is_refused() -> None:
    with pytest.raises(UsageError, match="31x320"):
        SyntheticCamera(0, (31, 320))


def test_empty_dataset_is_refused() -> None:
    with pytest.raises(UsageError, match="0 frames"):
        SyntheticDataset(0, 0)


def test_negative_index_is_refused() -> None:
    with pytest.raises(IndexError, match="frame -1"):
        SyntheticCamera(0).frame(-1)


def test_importing_the_camera_loads_neither_torch_nor_opencv() -> None:
    program = "import sys, pipeline.synthetic; print(*{'torch', 'cv2', 'onnx'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert run.stdout.split() == []
