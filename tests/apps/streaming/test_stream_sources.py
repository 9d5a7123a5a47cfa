from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from apps.streaming import opencv, sources
from apps.streaming.sources import ModelClasses, Source, open_source, parse_source
from apps.streaming.uri_options import SourceOptions
from pipeline.errors import DataError, SourceLostError, UnsupportedError, UsageError
from pipeline.synthetic import CLASS_NAMES, SyntheticCamera
from pipeline.yuv import planes_to_bgr


def classes(*names: str) -> ModelClasses:
    return ModelClasses(names, len(names))


def write_video(path: Path, n_frames: int = 12, fps: float = 25.0, hw: tuple[int, int] = (48, 64)) -> Path:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), fps, hw[::-1])
    for index in range(n_frames):
        writer.write(np.full((*hw, 3), (10 * index, 100, 200), np.uint8))
    writer.release()
    return path


@pytest.fixture(params=["av", "opencv"])
def reader(request: pytest.FixtureRequest) -> str:
    """Options that have a video file read by PyAV, which is tried first, or by OpenCV."""
    if request.param == "opencv":
        return "backend=ffmpeg"
    pytest.importorskip("av", reason="needs PyAV")
    return "decoder=software"


def bgr(delivered: sources.Delivered) -> Any:
    return delivered.pixels if delivered.yuv is None else planes_to_bgr(delivered.pixels, delivered.yuv)


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
        ("rtmp://user:secret@host/x", UsageError, "unknown source scheme 'rtmp'"),
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


def test_a_video_file_is_read_to_its_end(tmp_path: Path, reader: str) -> None:
    film = write_video(tmp_path / "film.mp4", 12, 12.5)
    source = open_source(parse_source(f"{film}#{reader}"), classes("ant"))
    assert (source.live, source.color, source.fps) == (False, "BGR", 12.5)
    frames = drain(source)
    assert len(frames) == 12
    assert all(bgr(frame).shape == (48, 64, 3) and frame.label is None for frame in frames)
    assert all((frame.yuv is not None) == (reader != "backend=ffmpeg") for frame in frames)
    assert abs(int(bgr(frames[5])[24, 32, 0]) - 50) < 12  # blue is the channel that grows: BGR
    assert source.notes == []


def test_a_cut_off_video_is_noted(tmp_path: Path, reader: str) -> None:
    whole = write_video(tmp_path / "film.avi", 60)
    data = whole.read_bytes()
    (tmp_path / "cut.avi").write_bytes(data[: len(data) // 2])
    source = open_source(parse_source(f"{tmp_path / 'cut.avi'}#{reader}"), classes("ant"))
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
        self.asked: dict[int, float] = {}
        self.grabs = [True, False, True, False, False, False, False]

    def isOpened(self) -> bool:
        return self.opens

    def set(self, name: int, value: float) -> bool:
        self.asked[name] = value
        return True

    def get(self, name: int) -> float:
        return {WIDTH: 640.0, HEIGHT: 480.0, FOURCC: float(MJPG)}.get(name, 0.0)

    def grab(self) -> bool:
        return self.grabs.pop(0)

    def retrieve(self) -> tuple[bool, object]:
        return True, np.zeros((4, 4, 3), np.uint8)

    def release(self) -> None:
        pass


WIDTH, HEIGHT, FOURCC, MJPG = 3, 4, 6, int.from_bytes(b"MJPG", "little")


@pytest.fixture
def camera(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A link by id to the fourth camera, in a folder that stands for /dev."""
    fake = SimpleNamespace(
        VideoCapture=FakeCapture,
        VideoWriter_fourcc=lambda *letters: int.from_bytes("".join(letters).encode(), "little"),
        CAP_V4L2=200,
        CAP_PROP_FPS=5,
        CAP_PROP_FRAME_WIDTH=WIDTH,
        CAP_PROP_FRAME_HEIGHT=HEIGHT,
        CAP_PROP_FOURCC=FOURCC,
    )
    monkeypatch.setattr(opencv, "load", lambda purpose: fake)
    (tmp_path / "video3").touch()
    (tmp_path / "by-id").symlink_to(tmp_path / "video3")
    return tmp_path / "by-id"


def v4l2(path: Path, **options: Any) -> sources.SourceUri:
    return sources.SourceUri("v4l2", str(path), str(path), path=path, options=SourceOptions(**options))


def test_a_camera_is_opened_by_number_with_its_backend_named(camera: Path) -> None:
    source = open_source(v4l2(camera), classes("ant"))
    assert source._capture.arguments == (3, 200)  # type: ignore[attr-defined]
    assert (source.live, source.self_paced, source.fps) == (True, True, 30.0)  # a camera that says 0 FPS


def test_a_renumbered_camera_is_found_again_by_its_id(camera: Path) -> None:
    uri = v4l2(camera)
    camera.unlink()
    with pytest.raises(SourceLostError, match="is not there") as caught:
        open_source(uri, classes("ant"))
    assert caught.value.retry == "soon"
    (camera.parent / "video7").touch()
    camera.symlink_to(camera.parent / "video7")
    source = open_source(uri, classes("ant"))
    assert source._capture.arguments == (7, 200)  # type: ignore[attr-defined]


def test_a_camera_may_fail_a_few_reads_but_not_all(camera: Path) -> None:
    source = open_source(v4l2(camera), classes("ant"))
    reads = [source.read() for _ in range(6)]
    assert [read.pixels is None for read in reads if read] == [False, True, False, True, True, True]
    with pytest.raises(SourceLostError, match="4 reads in a row"):
        source.read()


def test_a_camera_that_is_pulled_out_is_lost_at_once(camera: Path) -> None:
    source = open_source(v4l2(camera), classes("ant"))
    source.read()
    (camera.parent / "video3").unlink()
    with pytest.raises(SourceLostError, match="is gone"):
        source.read()


def test_a_camera_is_asked_for_format_size_and_rate(camera: Path) -> None:
    source = open_source(v4l2(camera, size_wh=(1280, 720), fps=25.0, format="MJPG"), classes("ant"))
    assert list(source._capture.asked.items()) == [  # type: ignore[attr-defined]
        (FOURCC, MJPG),
        (WIDTH, 1280),
        (HEIGHT, 720),
        (5, 25.0),
    ]
    assert source.notes == [
        f"{camera}: asked for size=1280x720, the camera gives 640x480",
        f"{camera}: asked for fps=25, the camera gives 0",
    ]


def test_a_camera_that_does_not_open(camera: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeCapture, "opens", False)
    with pytest.raises(SourceLostError, match="another program may hold it"):
        open_source(v4l2(camera), classes("ant"))


def test_without_opencv_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    film = write_video(tmp_path / "film.mp4", 2)
    folder = write_images(tmp_path / "data", ("ant",))
    monkeypatch.setitem(sys.modules, "cv2", None)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UnsupportedError, match=r"pip install edgefold\[opencv\].*apt install python3-opencv"):
        open_source(parse_source(str(film)), classes("ant"))
    assert len(drain(open_source(parse_source(str(folder)), classes("ant")))) == 2
    assert len(drain(open_source(parse_source("synthetic:1:1"), classes(*CLASS_NAMES)))) == 1


def numbered_film(path: Path, n_frames: int = 40, fps: float = 10.0) -> Path:
    """Frame N shows N in binary: six bars of 16 pixels, white for 1, the highest bit at the left."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), fps, (96, 48))
    for index in range(n_frames):
        bars = [255 * (index >> bit & 1) for bit in reversed(range(6))]
        writer.write(np.repeat(np.tile(np.array(bars, np.uint8).repeat(16)[None, :, None], (48, 1, 1)), 3, 2))
    writer.release()
    return path


def numbers(frames: list[sources.Delivered]) -> list[int]:
    return [int("".join(str(int(bar > 127)) for bar in bgr(frame)[24, 8::16, 0]), 2) for frame in frames]


@pytest.mark.parametrize(
    ("options", "first", "last"),
    [
        ("t=1,2", 10, 19),
        ("t=,0.5", 0, 4),
        ("t=3.5", 35, 39),
        ("t=0:02,0:02.3", 20, 22),
        ("t=0.05,0.25", 1, 2),
    ],
)
def test_a_part_of_a_video_is_cut_to_the_frame(
    tmp_path: Path, options: str, first: int, last: int, reader: str
) -> None:
    film = numbered_film(tmp_path / "film.mp4")
    source = open_source(parse_source(f"{film}#{options}&{reader}"), classes("ant"))
    assert numbers(drain(source)) == list(range(first, last + 1))
    assert source.notes == []


def test_a_part_behind_the_end_is_an_error_and_loops_do_not_spin(tmp_path: Path, reader: str) -> None:
    film = numbered_film(tmp_path / "film.mp4")
    source = open_source(parse_source(f"{film}#t=60&loop&{reader}"), classes("ant"))
    with pytest.raises(DataError, match="no frames at 60 s: it is shorter"):
        source.read()


def test_a_part_of_a_video_loops(tmp_path: Path, reader: str) -> None:
    film = numbered_film(tmp_path / "film.mp4")
    source = open_source(parse_source(f"{film}#t=1,1.3&loop&{reader}"), classes("ant"))
    assert not source.live
    assert numbers([source.read() for _ in range(8)]) == [10, 11, 12, 10, 11, 12, 10, 11]  # type: ignore[misc]
    source.close()


def test_a_video_is_decoded_into_the_array_given(tmp_path: Path, reader: str) -> None:
    film = numbered_film(tmp_path / "film.mp4")
    source = open_source(parse_source(f"{film}#{reader}"), classes("ant"))
    slot = np.zeros((48, 96, 3) if reader == "backend=ffmpeg" else (72, 96), np.uint8)
    for index in range(3):
        delivered = source.read(into=slot)
        assert delivered is not None
        assert delivered.pixels is slot
        assert numbers([delivered]) == [index]
    other = np.zeros((10, 10, 3), np.uint8)
    delivered = source.read(into=other)
    assert delivered is not None
    assert delivered.pixels is not other
    assert numbers([delivered]) == [3]


def test_a_file_whose_name_looks_like_options(tmp_path: Path) -> None:
    film = numbered_film(tmp_path / "take#loop.mp4", 5)
    assert len(drain(open_source(parse_source(str(film)), classes("ant")))) == 5
    assert len(drain(open_source(parse_source(f"{film}#t=0.2"), classes("ant")))) == 3


def test_synthetic_frames_are_rendered_once_and_come_again() -> None:
    source = open_source(parse_source("synthetic:3:4#loop"), classes(*CLASS_NAMES))
    assert not source.live
    frames = [source.read() for _ in range(9)]
    assert frames[8] is frames[4] is frames[0]
    np.testing.assert_array_equal(frames[6].pixels, SyntheticCamera(3).frame(2)[0])  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="read-only"):
        frames[0].pixels[0, 0] = 0  # type: ignore[union-attr]
    with pytest.raises(UsageError, match=r"MiB \(limit 1024\)"):
        open_source(parse_source("synthetic:3:5000#loop"), classes(*CLASS_NAMES))


def test_images_come_again_and_a_folder_without_one_ends(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "data", ("ant", "bee"), per_class=1)
    source = open_source(parse_source(f"{folder}#loop"), classes("ant", "bee"))
    assert [source.read().label for _ in range(5)] == [0, 1, 0, 1, 0]  # type: ignore[union-attr]
    broken = write_images(tmp_path / "broken", ("ant",), per_class=2)
    for image in (broken / "ant").iterdir():
        image.write_bytes(b"rubbish")
    frames = drain(open_source(parse_source(f"{broken}#loop"), classes("ant")))
    assert [frame.pixels for frame in frames] == [None, None]
