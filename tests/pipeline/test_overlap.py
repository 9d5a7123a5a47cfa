import numpy as np
from PIL import Image

from pipeline.datasets import open_dataset
from pipeline.overlap import OverlapWatch, image_digests, image_sha256


def write(folder, values, suffix=".png"):
    folder.mkdir(parents=True)
    for value in values:
        pixels = np.random.default_rng(value).integers(0, 256, (12, 16, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{value}{suffix}")
    return folder


def watched(data, known):
    watch = OverlapWatch(open_dataset(str(data)), known)
    samples = list(watch)
    return watch, samples


def test_copies_are_found_under_other_names_folders_and_lossless_formats(tmp_path):
    calibration = write(tmp_path / "calib", range(6))
    write(tmp_path / "val" / "ant", [100, 101])
    write(tmp_path / "val" / "bee", [3, 4], suffix=".bmp")
    watch, samples = watched(tmp_path / "val", image_digests(open_dataset(str(calibration))))
    assert [sample.key for sample in samples] == ["ant/100.png", "ant/101.png", "bee/3.bmp", "bee/4.bmp"]
    warning = watch.warning()
    assert warning.startswith("2 of the images judged are also among the 6 that the engine was calibrated on")
    assert "(bee/3.bmp, bee/4.bmp)" in warning
    list(watch)  # another pass counts afresh
    assert watch.warning() == warning


def test_other_images_are_no_overlap(tmp_path):
    known = image_digests(open_dataset(str(write(tmp_path / "calib", range(3)))))
    watch, _ = watched(write(tmp_path / "val", range(3, 6)), known)
    assert watch.warning() is None


def test_only_the_first_are_named(tmp_path):
    data = write(tmp_path / "calib", range(9))
    watch, _ = watched(data, image_digests(open_dataset(str(data))))
    assert watch.warning().count(".png") == 3
    assert "…" in watch.warning()


def test_a_digest_is_of_pixels_and_shape():
    pixels = np.arange(24, dtype=np.uint8)
    assert image_sha256(pixels.reshape(2, 4, 3)) != image_sha256(pixels.reshape(4, 2, 3))
    mirrored = pixels.reshape(2, 4, 3)[:, ::-1]
    assert image_sha256(mirrored) == image_sha256(mirrored.copy())


def test_it_is_the_data_set_it_watches(tmp_path):
    write(tmp_path / "val" / "ant", [1])
    dataset = open_dataset(str(tmp_path / "val"))
    watch = OverlapWatch(dataset, frozenset())
    assert (watch.name, watch.class_names, watch.sha256, len(watch), watch.skipped) == (
        dataset.name,
        dataset.class_names,
        dataset.sha256,
        1,
        (),
    )
