"""Video files as planes, through PyAV: the pictures are right, and what is not planes is read by OpenCV as before."""

from __future__ import annotations

import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tolerances import PLANAR_FILM_MAX_LEVELS, PLANAR_FILM_MEAN_LEVELS, YUV_ROUNDING_LEVELS

from apps.streaming.overlay import to_bgr
from apps.streaming.sources import Delivered, ModelClasses, Source, open_source, parse_source
from apps.streaming.sources.captures import RecordedVideo
from apps.streaming.sources.planar import PlanarVideo
from pipeline.artifacts import PreprocessSpec, YuvCoding
from pipeline.kernels import kernels
from pipeline.preprocess import to_network_pixels

av = pytest.importorskip("av", reason="needs PyAV")
pytest.importorskip("cv2", reason="needs OpenCV")
pytestmark = pytest.mark.skipif(kernels() is None, reason="pipeline/planar.c was not compiled")

ANT = ModelClasses(("ant",), 1)
BT709, BT601, BT2020 = 1, 5, 9  # AVColorSpace
CAREFUL = 0x4 | 0x2000 | 0x40000  # SWS_BICUBIC, SWS_FULL_CHR_H_INT, SWS_ACCURATE_RND


def scene(index: int, height: int, width: int) -> Any:
    """RGB: a gradient and disks that move, of colours that few pictures lack."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    image = np.stack([255 * x / width, 255 * y / height, 255 - 128 * (x / width + y / height)], 2)
    for k, color in enumerate([(230, 40, 30), (20, 200, 60), (30, 60, 220), (240, 220, 20)]):
        cx, cy = width * (0.2 + 0.2 * k), height * (0.3 + 0.4 * ((index + 3 * k) % 10) / 10)
        image[(x - cx) ** 2 + (y - cy) ** 2 < (height / 8) ** 2] = color
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def write_film(
    path: Path,
    n_frames: int = 12,
    hw: tuple[int, int] = (96, 128),
    *,
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    matrix: int | None = None,
    full_range: bool = False,
    rotation: int = 0,
    times: list[int] | None = None,
) -> Path:
    """A film of `scene`; `times` are in hundredths of a second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width = hw
        stream.pix_fmt = pixel_format
        context = stream.codec_context
        context.options = {"crf": "4"} if codec == "libx264" else {}
        context.time_base = Fraction(1, 100)
        if matrix is not None:
            context.colorspace = matrix
            context.color_range = 2 if full_range else 1
        if rotation:
            if not hasattr(stream, "set_display_rotation"):
                pytest.skip("this PyAV cannot write rotations")
            stream.set_display_rotation(rotation)
        for index in range(n_frames):
            frame = av.VideoFrame.from_ndarray(scene(index, *hw), format="rgb24")
            frame = frame.reformat(
                format=pixel_format,
                dst_colorspace=matrix or BT601,
                dst_color_range=2 if full_range else 1,
            )
            frame.pts = 4 * index if times is None else times[index]
            frame.time_base = Fraction(1, 100)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def drain(source: Source) -> list[Delivered]:
    delivered = []
    while (item := source.read()) is not None:
        delivered.append(item)
    source.close()
    return delivered


def bgr(delivered: Delivered) -> Any:
    return to_bgr(delivered.pixels, "BGR" if delivered.yuv is None else "I420", delivered.yuv)


@pytest.mark.parametrize(
    ("matrix", "full_range"),
    [(None, False), (BT601, False), (BT709, False), (BT601, True), (BT709, True)],
)
def test_colours_are_those_that_the_stream_means(
    tmp_path: Path, matrix: int | None, full_range: bool
) -> None:
    film = write_film(tmp_path / "film.mp4", matrix=matrix, full_range=full_range)
    source = open_source(parse_source(str(film)), ANT)
    assert isinstance(source, PlanarVideo)
    frames = drain(source)
    assert len(frames) == 12
    name, other = ("bt709", "bt601") if matrix == BT709 else ("bt601", "bt709")
    assert {frame.yuv for frame in frames} == {YuvCoding(name, full_range, "left")}  # type: ignore[arg-type]
    for index, frame in enumerate(frames):

        def off(coding: YuvCoding, pixels: Any = frame.pixels, index: int = index) -> float:
            seen = to_bgr(pixels, "I420", coding)[..., ::-1].astype(int)
            return float(np.percentile(np.abs(seen - scene(index, 96, 128)), 75))

        assert off(YuvCoding(name, full_range)) <= YUV_ROUNDING_LEVELS  # type: ignore[arg-type]
        assert off(YuvCoding(other, full_range)) > 2 * YUV_ROUNDING_LEVELS  # type: ignore[arg-type]
        assert off(YuvCoding(name, not full_range)) > 2 * YUV_ROUNDING_LEVELS  # type: ignore[arg-type]


@pytest.mark.parametrize("matrix", [BT601, BT709])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_network_pixels_are_those_of_a_careful_conversion(
    tmp_path: Path, matrix: int, interpolation: Any
) -> None:
    """Against FFmpeg's own conversion of the whole picture, rounded and chroma interpolated, and Pillow's resize of that."""
    film = write_film(tmp_path / "film.mp4", 6, (540, 960), matrix=matrix)
    frames = drain(open_source(parse_source(str(film)), ANT))
    spec = PreprocessSpec((224, 224), interpolation=interpolation, crop_fraction=0.875)
    with av.open(str(film)) as container:
        for frame, picture in zip(frames, container.decode(video=0), strict=True):
            full = picture.reformat(format="bgr24", interpolation=CAREFUL, src_colorspace=matrix).to_ndarray()
            expected = to_network_pixels(full, "BGR", spec, "RGB").astype(int)
            found = to_network_pixels(frame.pixels, "I420", spec, "RGB", yuv=frame.yuv)
            off = np.abs(found - expected)
            assert off.mean() <= PLANAR_FILM_MEAN_LEVELS
            assert off.max() <= PLANAR_FILM_MAX_LEVELS


def test_motion_jpeg_has_full_range_and_its_chroma_in_the_middle(tmp_path: Path) -> None:
    film = write_film(
        tmp_path / "film.avi", codec="mjpeg", pixel_format="yuvj420p", matrix=BT601, full_range=True
    )
    frames = drain(open_source(parse_source(str(film)), ANT))
    assert {frame.yuv for frame in frames} == {YuvCoding("bt601", True, "center")}


@pytest.mark.parametrize(
    "made",
    [
        {"rotation": 90},
        {"rotation": 180},
        {"pixel_format": "yuv444p"},
        {"pixel_format": "yuv422p"},
        {"pixel_format": "yuv420p10le"},
        {"matrix": BT2020},
        {"hw": (96, 126), "codec": "mjpeg", "pixel_format": "yuvj444p", "suffix": ".avi"},
        {"hw": (95, 127), "codec": "ffv1", "suffix": ".mkv"},
    ],
    ids=str,
)
def test_what_is_not_handed_on_as_planes_is_opencvs(tmp_path: Path, made: dict[str, Any]) -> None:
    film = write_film(tmp_path / f"film{made.pop('suffix', '.mp4')}", **made)
    source = open_source(parse_source(str(film)), ANT)
    assert isinstance(source, RecordedVideo)
    frames = drain(source)
    assert len(frames) == 12
    hw = made.get("hw", (96, 128))
    expected = scene(0, *hw)
    if "rotation" in made:
        assert frames[0].pixels.shape[:2] == (hw if made["rotation"] == 180 else hw[::-1])
        return  # turned; OpenCV's business, and checked to happen
    assert frames[0].pixels.shape == (*hw, 3)
    assert np.median(np.abs(frames[0].pixels[..., ::-1].astype(int) - expected)) <= 8


@pytest.mark.parametrize("missing", ["av", "kernels"])
def test_without_pyav_or_the_kernel_opencv_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    film = write_film(tmp_path / "film.mp4")
    if missing == "av":
        monkeypatch.setitem(sys.modules, "av", None)
    else:
        monkeypatch.setattr("apps.streaming.sources.planar.kernels", lambda: None)
    source = open_source(parse_source(str(film)), ANT)
    assert isinstance(source, RecordedVideo)
    assert len(drain(source)) == 12


def test_pictures_that_become_another_size_are_right_from_the_first(tmp_path: Path) -> None:
    """OpenCV's FFmpeg goes on in the first size, with wrong pixels."""
    film = tmp_path / "changes.h264"
    for number, hw in enumerate([(96, 128), (240, 320), (72, 96)]):
        part = write_film(tmp_path / f"{number}.h264", 5, hw)
        with film.open("ab") as file:
            file.write(part.read_bytes())
    frames = drain(open_source(parse_source(f"{film}#decoder=software"), ANT))
    shapes = [bgr(frame).shape[:2] for frame in frames]
    assert shapes == [(96, 128)] * 5 + [(240, 320)] * 5 + [(72, 96)] * 5
    for index, (frame, hw) in enumerate(zip(frames, shapes, strict=True)):
        off = np.abs(bgr(frame)[..., ::-1].astype(int) - scene(index % 5, *hw))
        assert np.median(off) <= YUV_ROUNDING_LEVELS


def test_pictures_that_become_another_kind_are_turned_into_bgr(tmp_path: Path) -> None:
    film = tmp_path / "changes.h264"
    parts = [write_film(tmp_path / f"{form}.h264", 5, pixel_format=form) for form in ("yuv420p", "yuv444p")]
    film.write_bytes(b"".join(part.read_bytes() for part in parts))
    frames = drain(open_source(parse_source(str(film)), ANT))
    assert [frame.yuv is None for frame in frames] == [False] * 5 + [True] * 5
    for index, frame in enumerate(frames):
        off = np.abs(bgr(frame)[..., ::-1].astype(int) - scene(index % 5, 96, 128))
        assert np.median(off) <= YUV_ROUNDING_LEVELS


def test_frames_of_uneven_length_are_cut_by_their_times(tmp_path: Path) -> None:
    times = [0, 4, 8, 40, 100, 104, 108, 112, 200, 300, 301, 302]
    film = write_film(tmp_path / "film.mp4", times=times)
    kept = drain(open_source(parse_source(f"{film}#t=0.4,2"), ANT))
    expected = [scene(index, 96, 128) for index, time in enumerate(times) if 40 <= time < 200]
    assert len(kept) == len(expected) == 5
    for frame, image in zip(kept, expected, strict=True):
        assert np.median(np.abs(bgr(frame)[..., ::-1].astype(int) - image)) <= YUV_ROUNDING_LEVELS


def damaged(data: bytes) -> bytes:
    """A tenth of the second half, zeroed: the index at the end stays."""
    middle, n = len(data) // 2, len(data) // 10
    return data[:middle] + bytes(n) + data[middle + n :]


@pytest.mark.parametrize("harm", [damaged, lambda data: data[: len(data) * 2 // 3]], ids=["damaged", "cut"])
def test_a_damaged_file_gives_what_opencv_gets_out_of_it(
    tmp_path: Path, harm: Callable[[bytes], bytes]
) -> None:
    whole = write_film(tmp_path / "whole.mkv", 200, (240, 320))
    film = tmp_path / "film.mkv"
    film.write_bytes(harm(whole.read_bytes()))
    planar = open_source(parse_source(f"{film}#decoder=software"), ANT)
    assert isinstance(planar, PlanarVideo)
    other = open_source(parse_source(f"{film}#backend=ffmpeg"), ANT)
    counts = [len(drain(source)) for source in (planar, other)]
    assert 50 < counts[0] < 200
    assert abs(counts[0] - counts[1]) <= 2
    assert planar.notes == other.notes or counts[0] != counts[1]


def test_a_file_that_is_gone_when_it_begins_again_is_an_error(tmp_path: Path) -> None:
    from pipeline.errors import DataError

    film = write_film(tmp_path / "film.mp4", 3)
    source = open_source(parse_source(f"{film}#loop"), ANT)
    assert [source.read() is not None for _ in range(3)] == [True] * 3
    film.unlink()
    with pytest.raises(DataError, match=r"film.mp4#loop cannot be opened as a video"):
        source.read()
