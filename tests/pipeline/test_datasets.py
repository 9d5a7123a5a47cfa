"""Arrays, videos, the synthetic camera; labels, and batches of any of them."""

from __future__ import annotations

import io
import json
import threading
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from picture_folders import SPEC, write_image
from PIL import Image

from pipeline.artifacts import PreprocessSpec, Sample
from pipeline.datasets import (
    batches,
    labelled_batches,
    open_dataset,
    read_labels,
    samples_after,
)
from pipeline.errors import DataError, UnsupportedError


@pytest.fixture
def by_class(tmp_path: Path) -> Path:
    """Three classes of four images; pixel value 10 × class + number."""
    for index, name in enumerate(["ant", "bee", "cat"]):
        for number in range(4):
            write_image(tmp_path / "photos" / name / f"{number}.png", 10 * index + number)
    return tmp_path / "photos"


def write_npz(path: Path, **arrays: NDArray[Any]) -> Path:
    np.savez_compressed(path, **arrays)
    return path


def some_pixels(count: int = 6) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (count, 10, 12, 3), dtype=np.uint8)


class TestNpz:
    def test_images_and_labels(self, tmp_path: Path) -> None:
        pixels, labels = some_pixels(), np.array([2, 0, 1, 1, 0, 2], np.int32)
        dataset = open_dataset(str(write_npz(tmp_path / "data.npz", labels=labels, images=pixels)))
        assert dataset.class_names == ("0", "1", "2")
        assert dataset.name == "data.npz"
        for _ in range(2):
            samples = list(dataset)
            assert [sample.label for sample in samples] == labels.tolist()
            np.testing.assert_array_equal(np.stack([sample.image for sample in samples]), pixels)

    def test_uncompressed_and_unlabelled(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "data.npz", images=some_pixels())
        dataset = open_dataset(str(tmp_path / "data.npz"), num_classes=10)
        assert dataset.class_names is None
        np.testing.assert_array_equal(np.stack([sample.image for sample in dataset]), some_pixels())

    def test_a_subset_is_the_right_images(self, tmp_path: Path) -> None:
        pixels = some_pixels(30)
        labels = np.arange(30) % 3
        dataset = open_dataset(str(write_npz(tmp_path / "d.npz", images=pixels, labels=labels)), limit=9)
        samples = list(dataset)
        assert Counter(sample.label for sample in samples) == {0: 3, 1: 3, 2: 3}
        for sample in samples:
            np.testing.assert_array_equal(sample.image, pixels[int(sample.key)])
            assert sample.label == labels[int(sample.key)]
        whole = open_dataset(str(tmp_path / "d.npz"))
        assert whole.sha256 != dataset.sha256

    def test_labels_beyond_the_classes_are_refused(self, tmp_path: Path) -> None:
        path = str(write_npz(tmp_path / "d.npz", images=some_pixels(2), labels=np.array([0, 5])))
        assert open_dataset(path, num_classes=10).class_names == tuple(map(str, range(10)))
        assert open_dataset(path, labels=list("abcdef")).class_names == tuple("abcdef")
        with pytest.raises(DataError, match=r"label 5.*5 classes"):
            open_dataset(path, num_classes=5)

    @pytest.mark.parametrize(
        ("arrays", "words"),
        [
            ({"pictures": some_pixels()}, "no array `images`; it holds pictures"),
            ({"images": some_pixels().astype(np.float32)}, "float32"),
            ({"images": some_pixels()[:, :, :, 0]}, r"\(6, 10, 12\)"),
            ({"images": some_pixels().transpose(0, 3, 1, 2)}, r"\(6, 3, 10, 12\)"),
            ({"images": np.asfortranarray(some_pixels())}, "Fortran"),
            ({"images": some_pixels()[:0]}, r"\(0, 10"),
            ({"images": some_pixels(), "labels": np.zeros(5, np.int64)}, r"`labels`.*\(5,\)"),
            ({"images": some_pixels(), "labels": np.zeros(6)}, "`labels`.*float64"),
            ({"images": some_pixels(), "labels": np.full(6, -1)}, "from 0"),
            ({"images": some_pixels(), "labels": np.zeros(100_000, np.int64)}, "larger"),
        ],
    )
    def test_other_arrays_are_refused(self, tmp_path: Path, arrays: dict[str, Any], words: str) -> None:
        with pytest.raises(DataError, match=words):
            open_dataset(str(write_npz(tmp_path / "d.npz", **arrays)))

    def test_pickled_objects_are_never_loaded(self, tmp_path: Path) -> None:
        class Trap:
            def __reduce__(self) -> tuple[Any, ...]:
                return (Path.touch, (tmp_path / "sprung",))

        trap = np.empty(6, object)
        trap[:] = [Trap() for _ in range(6)]
        write_npz(tmp_path / "images.npz", images=trap)
        write_npz(tmp_path / "labels.npz", images=some_pixels(), labels=trap)
        for name in ("images.npz", "labels.npz"):
            with pytest.raises(DataError):
                open_dataset(str(tmp_path / name))
        assert not (tmp_path / "sprung").exists()

    def test_a_damaged_archive_is_refused(self, tmp_path: Path) -> None:
        path = write_npz(tmp_path / "d.npz", images=some_pixels(50))
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        with pytest.raises(DataError, match="cannot read"):
            open_dataset(str(path))
        flipped = bytearray(content)
        flipped[len(content) // 2] ^= 0xFF
        path.write_bytes(flipped)
        with pytest.raises(DataError, match="cannot read"):
            list(open_dataset(str(path)))

    def test_a_header_that_promises_more_than_there_is(self, tmp_path: Path) -> None:
        member = io.BytesIO()
        header = {"descr": "|u1", "fortran_order": False, "shape": (1 << 40, 10, 10, 3)}
        np.lib.format.write_array_header_1_0(member, header)
        with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive:
            archive.writestr("images.npy", member.getvalue() + bytes(300))
        with pytest.raises(DataError, match="shorter"):
            open_dataset(str(tmp_path / "d.npz"))


class TestVideo:
    @pytest.fixture
    def video(self, tmp_path: Path) -> Path:
        """40 frames whose brightness is six times their number."""
        cv2 = pytest.importorskip("cv2")
        writer = cv2.VideoWriter(str(tmp_path / "clip.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 25, (64, 48))
        if not writer.isOpened():
            pytest.skip("this OpenCV cannot write a video")
        for index in range(40):
            frame = np.full((48, 64, 3), index * 6, np.uint8)
            frame[:, :, 2] = 255  # red, in OpenCV's BGR
            writer.write(frame)
        writer.release()
        return tmp_path / "clip.avi"

    def test_frames_are_evenly_spaced_and_rgb(self, video: Path) -> None:
        dataset = open_dataset(str(video), limit=4, num_classes=10)
        assert dataset.class_names is None
        assert [sample.key for sample in dataset] == ["frame 5", "frame 15", "frame 25", "frame 35"]
        for sample in dataset:
            red, _, blue = sample.image[24, 32].astype(int)
            assert abs(red - 255) < 12
            assert abs(blue - 6 * int(sample.key.split()[1])) < 12
        assert dataset.skipped == ()

    def test_a_short_video_gives_every_frame_once(self, video: Path) -> None:
        dataset = open_dataset(str(video))
        assert len(dataset) == 40
        assert len({sample.key for sample in dataset}) == 40

    def test_frames_beyond_a_cut_are_listed(self, video: Path) -> None:
        dataset = open_dataset(str(video), limit=4)
        video.write_bytes(video.read_bytes()[: video.stat().st_size // 2])
        usable = len(list(dataset))
        assert usable < 4
        assert len(dataset.skipped) == 4 - usable

    def test_what_is_no_video_is_refused(self, tmp_path: Path) -> None:
        pytest.importorskip("cv2")
        (tmp_path / "clip.mp4").write_bytes(b"no video at all")
        with pytest.raises(DataError, match="damaged"):
            open_dataset(str(tmp_path / "clip.mp4"))

    def test_without_opencv_the_remedy_is_named(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(__import__("sys").modules, "cv2", None)
        (tmp_path / "clip.mp4").touch()
        with pytest.raises(UnsupportedError, match=r"edgefold\[opencv\]"):
            open_dataset(str(tmp_path / "clip.mp4"))


class TestSpec:
    def test_the_synthetic_camera(self) -> None:
        dataset = open_dataset("synthetic:3:30", limit=24)
        assert len(dataset) == 24
        assert dataset.class_names is not None
        assert set(Counter(sample.label for sample in dataset).values()) == {24 // len(dataset.class_names)}
        assert len(open_dataset("synthetic:3")) == 2000
        assert len(open_dataset("synthetic:3", limit=5000)) == 2000

    @pytest.mark.parametrize(
        "spec",
        ["synthetic:", "synthetic:x", "synthetic:1:0", "synthetic:1:", "synthetic:-1:4", "synthetic:1:2:3"],
    )
    def test_a_malformed_synthetic_spec_is_refused(self, spec: str) -> None:
        with pytest.raises(DataError, match="SEED"):
            open_dataset(spec)

    def test_the_class_count_of_the_synthetic_camera_is_checked_too(self) -> None:
        with pytest.raises(DataError, match=r"12 classes.*model has 10"):
            open_dataset("synthetic:3:30", num_classes=10)

    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="no data at"):
            open_dataset(str(tmp_path / "gone"))
        with pytest.raises(DataError, match="no images"):
            open_dataset(str(tmp_path))
        (tmp_path / "x.heic").touch()
        with pytest.raises(DataError, match="types not supported"):
            open_dataset(str(tmp_path))
        (tmp_path / "model.onnx").touch()
        with pytest.raises(DataError, match="neither"):
            open_dataset(str(tmp_path / "model.onnx"))


class TestLabelsFile:
    def test_lines_and_json(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("\ufeffstop sign\r\n yield \r\nspeed limit 30\r\n", encoding="utf-8")
        assert read_labels(tmp_path / "a.txt") == ("stop sign", "yield", "speed limit 30")
        (tmp_path / "a.json").write_text(json.dumps(["größe", "b"]), encoding="utf-8")
        assert read_labels(tmp_path / "a.json") == ("größe", "b")

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            (b"", "one class name a line"),
            (b"a\n\nb\n", "one class name a line"),
            (b"[1, 2]", "JSON list"),
            (b"[]", "JSON list"),
            (b'["a"', "cannot read"),
            (b"\xff\xfea", "cannot read"),
            (b"a\nb\na\n", "'a' twice"),
        ],
    )
    def test_other_files_are_refused(self, tmp_path: Path, content: bytes, words: str) -> None:
        (tmp_path / "labels.txt").write_bytes(content)
        with pytest.raises(DataError, match=words):
            read_labels(tmp_path / "labels.txt")

    def test_a_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="No such file"):
            read_labels(tmp_path / "labels.txt")


class TestBatches:
    def test_shapes_order_and_a_short_last_batch(self, by_class: Path) -> None:
        start = batches(open_dataset(str(by_class)), SPEC, "BGR", 5)
        first = list(start())
        assert [pixels.shape for pixels in first] == [(5, 16, 16, 3), (5, 16, 16, 3), (2, 16, 16, 3)]
        assert first[0].dtype == np.uint8
        assert [int(pixels[i, 0, 0, 0]) for pixels in first for i in range(len(pixels))] == [
            10 * index + number for index in range(3) for number in range(4)
        ]
        np.testing.assert_array_equal(np.concatenate(list(start())), np.concatenate(first))

    def test_samples_go_with_their_pixels(self, by_class: Path) -> None:
        for samples, pixels in labelled_batches(open_dataset(str(by_class)), SPEC, "RGB", 5):
            assert [int(sample.image[0, 0, 0]) for sample in samples] == pixels[:, 0, 0, 0].tolist()

    def test_the_color_is_the_graphs(self, tmp_path: Path) -> None:
        red = np.zeros((20, 20, 3), np.uint8)
        red[:, :, 0] = 255
        Image.fromarray(red).save(tmp_path / "red.png")
        (pixels,) = batches(open_dataset(str(tmp_path)), SPEC, "BGR", 4)()
        assert pixels[0, 0, 0].tolist() == [0, 0, 255]

    def test_at_most_one_batch_is_decoded_ahead(self) -> None:
        made: list[int] = []

        class Counting:
            name = "counting"
            class_names = None
            sha256 = "0" * 64
            skipped = ()

            def __len__(self) -> int:
                return 100

            def __iter__(self) -> Iterator[Sample]:
                for index in range(100):
                    made.append(index)
                    yield Sample(np.zeros((16, 16, 3), np.uint8), None, str(index))

        passes = labelled_batches(Counting(), SPEC, "RGB", 4)
        next(passes)
        passes.close()  # type: ignore[attr-defined]  # waits for the batch under way
        assert len(made) <= 8
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("edgefold-decode")]

    def test_an_error_while_decoding_ahead_arrives(self, by_class: Path) -> None:
        spec = PreprocessSpec((16, 16), resize="none")
        with pytest.raises(DataError, match="does not resize"):
            list(labelled_batches(open_dataset(str(by_class)), spec, "RGB", 4))


class TestSamplesAfter:
    def test_a_folder_goes_on_without_decoding_what_comes_before(
        self, by_class: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (by_class / "ant" / "1.png").write_bytes(b"broken")
        whole = open_dataset(str(by_class))
        keys = [sample.key for sample in whole]
        unusable = [key for key, _ in whole.skipped]
        assert unusable == ["ant/1.png"]
        read: list[str] = []
        from pipeline import image_folders

        def spy(path: Path) -> NDArray[np.uint8]:
            read.append(path.name)
            return np.zeros((20, 24, 3), np.uint8)

        monkeypatch.setattr(image_folders, "read_image", spy)
        for done in range(len(keys) + 1):
            read.clear()
            rest = [sample.key for sample in samples_after(open_dataset(str(by_class)), done, unusable)]
            assert [key for key in rest if key not in unusable] == keys[done:]
            assert len(read) <= len(keys) - done + 1  # what could not be read may be tried again

    def test_arrays_and_other_data_go_on_too(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "a.npz", images=np.zeros((7, 4, 4, 3), np.uint8), labels=np.arange(7) % 2)
        for spec in (str(tmp_path / "a.npz"), "synthetic:3:7"):
            dataset = open_dataset(spec)
            assert [sample.key for sample in samples_after(dataset, 5, ())] == ["5", "6"]
            assert len(list(samples_after(dataset, 0, ()))) == 7
            assert list(samples_after(dataset, 7, ())) == []
