from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from PIL import Image

from apps.streaming import sources
from apps.streaming.sources import ModelClasses, Source, open_source, parse_source
from pipeline.errors import DataError, DeviceFaultError, UnsupportedError, UsageError
from pipeline.synthetic import CLASS_NAMES, SyntheticCamera


def classes(*names: str) -> ModelClasses:
    return ModelClasses(names, len(names))


def write_video(path: Path, n_frames: int = 12, fps: float = 25.0, hw: tuple[int, int] = (48, 64)) -> Path:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), fps, hw[::-1])
    for index in range(n_frames):
        writer.write(np.full((*hw, 3), (10 * index, 100, 200), np.uint8))
    writer.release()
    return path


def write_images(folder: Path, classes: tuple[str, ...], per_class: int = 2) -> Path:
    for value, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for index in range(per_class):
            pixels = np.full((20, 24, 3), 40 * value + index, np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
    return folder


def drain(source: Source) -> list[sources.Delivered]:
    delivered = []
    while (item := source.read()) is not None:
        delivered.append(item)
    source.close()
    return delivered


@pytest.mark.parametrize(
    ("uri", "error", "message"),
    [
        ("synthetic:", UsageError, "not synthetic:SEED"),
        ("synthetic:x", UsageError, "not synthetic:SEED"),
        ("synthetic:-1", UsageError, "not synthetic:SEED"),
        ("synthetic:1:2:3", UsageError, "not synthetic:SEED"),
        ("synthetic:1:0", UsageError, "asks for no frames"),
        ("rtsp://user:secret@host/x", UsageError, "unknown source scheme 'rtsp'"),
        ("webcam:0", UsageError, "unknown source scheme 'webcam'"),
        ("/no/such/film.mp4", DataError, "no such file or folder"),
        ("", DataError, "not a video|no such file|holds"),
        ("/dev/video97", UnsupportedError, "no such device: /dev/video97; cameras here:"),
        ("/dev/null", DataError, "not a video capture device"),
        ("/dev/stdin", DataError, "not a video capture device"),
    ],
)
def test_what_is_no_source_is_said_before_anything_is_opened(
    uri: str, error: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if uri == "":
        with pytest.raises(DataError):
            open_source(parse_source(uri), classes("ant"))
        return
    with pytest.raises(error, match=message) as caught:
        parse_source(uri)
    assert "secret" not in str(caught.value)


def test_files_that_cannot_be_streamed(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    with pytest.raises(DataError, match="empty file"):
        parse_source(str(tmp_path / "empty.mp4"))
    Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
    with pytest.raises(DataError, match="single image"):
        parse_source(str(tmp_path / "one.png"))
    (tmp_path / "text.mp4").write_text("this is no video " * 100)
    with pytest.raises(DataError, match=r"text.mp4 holds no video"):
        open_source(parse_source(str(tmp_path / "text.mp4")), classes("ant"))
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="no images"):
        open_source(parse_source(str(tmp_path / "folder")), classes("ant"))


@pytest.mark.parametrize("fps", [0, -5, 1e9, float("nan")])
def test_rates_out_of_range_are_refused(fps: float) -> None:
    with pytest.raises(UsageError, match="--fps"):
        open_source(parse_source("synthetic:1"), classes("ant"), fps)


def test_a_video_keeps_its_own_rate(tmp_path: Path) -> None:
    uri = parse_source(str(write_video(tmp_path / "film.mp4")))
    with pytest.raises(UsageError, match="has its own"):
        open_source(uri, classes("ant"), fps=10)


def test_a_video_file_is_read_to_its_end(tmp_path: Path) -> None:
    source = open_source(parse_source(str(write_video(tmp_path / "film.mp4", 12, 12.5))), classes("ant"))
    assert (source.live, source.color, source.fps) == (False, "BGR", 12.5)
    frames = drain(source)
    assert len(frames) == 12
    assert all(frame.pixels.shape == (48, 64, 3) and frame.label is None for frame in frames)
    assert abs(int(frames[5].pixels[24, 32, 0]) - 50) < 12  # blue is the channel that grows: BGR
    assert source.notes == []


def test_a_cut_off_video_is_noted(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "film.avi", 60)
    data = whole.read_bytes()
    (tmp_path / "cut.avi").write_bytes(data[: len(data) // 2])
    source = open_source(parse_source(str(tmp_path / "cut.avi")), classes("ant"))
    assert len(drain(source)) < 58
    assert "damaged or cut off" in source.notes[0]


def test_the_synthetic_camera_knows_the_truth() -> None:
    source = open_source(parse_source("synthetic:3:4"), classes(*CLASS_NAMES))
    frames = drain(source)
    camera = SyntheticCamera(3)
    assert [f.label for f in frames] == [camera.label(i) for i in range(4)]
    np.testing.assert_array_equal(frames[2].pixels, camera.frame(2)[0])
    assert not source.live
    assert open_source(parse_source("synthetic:3"), classes(*CLASS_NAMES), fps=5).live


def test_truth_of_other_classes_is_not_taken_for_the_bundles() -> None:
    source = open_source(parse_source("synthetic:3:2"), classes("cat", "dog"))
    assert [f.label for f in drain(source)] == [None, None]
    assert "accuracy is not measured" in source.notes[0]


def test_folder_labels_are_in_the_bundles_indices(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "data", ("ant", "bee"))
    source = open_source(parse_source(str(folder)), classes("wasp", "bee", "ant"))
    assert [f.label for f in drain(source)] == [2, 2, 1, 1]
    assert source.color == "RGB"
    foreign = open_source(parse_source(str(folder)), classes("cat", "dog", "ant"))
    assert {f.label for f in drain(foreign)} == {None}
    assert "accuracy is not measured" in foreign.notes[0]


def test_a_model_without_names_takes_the_sources_or_numbers(tmp_path: Path) -> None:
    source = open_source(parse_source("synthetic:3:2"), ModelClasses((), 12))
    assert source.labels == CLASS_NAMES
    assert [f.label for f in drain(source)] == [SyntheticCamera(3).label(i) for i in range(2)]
    source = open_source(parse_source("synthetic:3:2"), ModelClasses((), 3))
    assert source.labels == ("0", "1", "2")
    assert {f.label for f in drain(source)} == {None}
    assert "names no classes" in source.notes[0]
    film = open_source(parse_source(str(write_video(tmp_path / "film.mp4", 2))), ModelClasses((), 2))
    assert film.labels == ("0", "1")


def test_a_flat_folder_has_no_labels_and_no_complaint(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    source = open_source(parse_source(str(tmp_path)), classes("ant"))
    assert [f.label for f in drain(source)] == [None]
    assert source.notes == []


def test_corrupt_images_are_delivered_as_missing_and_listed(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "data", ("ant",), per_class=3)
    (folder / "ant" / "1.png").write_bytes(b"\x89PNG rubbish")
    (folder / "ant" / "9.png").write_bytes(b"")
    source = open_source(parse_source(str(folder)), classes("ant"))
    frames = drain(source)
    assert sum(frame.pixels is None for frame in frames) == 2
    assert [frame.label for frame in frames if frame.pixels is not None] == [0, 0]
    assert sum("skipped ant/" in note for note in source.notes) == 2


def test_npz(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 255, (3, 10, 12, 3), np.uint8)
    np.savez(tmp_path / "data.npz", images=images, labels=np.array([1, 0, 1]))
    frames = drain(open_source(parse_source(str(tmp_path / "data.npz")), classes("ant", "bee")))
    assert [f.label for f in frames] == [1, 0, 1]
    np.testing.assert_array_equal(frames[1].pixels, images[1])


class FakeCapture:
    """Stands in for ``cv2.VideoCapture`` where no camera is at hand."""

    opens = True

    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments
        self.replies = [(True, np.zeros((4, 4, 3), np.uint8)), (False, None)]

    def isOpened(self) -> bool:
        return self.opens

    def get(self, _: int) -> float:
        return 0.0

    def read(self) -> tuple[bool, object]:
        return self.replies.pop(0)

    def release(self) -> None:
        pass


def test_a_camera_is_opened_by_number_with_its_backend_named(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = SimpleNamespace(VideoCapture=FakeCapture, CAP_V4L2=200, CAP_PROP_FPS=5)
    monkeypatch.setattr(sources.opencv, "load", lambda purpose: fake)
    uri = sources.SourceUri("v4l2", "/dev/v4l/by-id/cam", Path("/dev/video3"))
    source = open_source(uri, classes("ant"))
    assert source._capture.arguments == (3, 200)  # type: ignore[attr-defined]
    assert (source.live, source.self_paced, source.fps) == (True, True, 30.0)  # a camera that says 0 FPS
    assert source.read().pixels is not None  # type: ignore[union-attr]
    assert source.read().pixels is None  # type: ignore[union-attr]
    monkeypatch.setattr(FakeCapture, "opens", False)
    with pytest.raises(DeviceFaultError, match="another program may hold it"):
        open_source(uri, classes("ant"))


def test_without_opencv_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    film = write_video(tmp_path / "film.mp4", 2)
    folder = write_images(tmp_path / "data", ("ant",))
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(UnsupportedError, match=r"pip install edgefold\[opencv\].*apt install python3-opencv"):
        open_source(parse_source(str(film)), classes("ant"))
    assert len(drain(open_source(parse_source(str(folder)), classes("ant")))) == 2
    assert len(drain(open_source(parse_source("synthetic:1:1"), classes(*CLASS_NAMES)))) == 1
