"""The pipelines of a Jetson to the letter, since no Jetson is here to run them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from apps.streaming import opencv
from apps.streaming.gst_syntax import element_names
from apps.streaming.sources import ModelClasses, open_source, opening, parse_source, pipelines
from pipeline.errors import SourceLostError, UnsupportedError, UsageError

ANT = ModelClasses(("ant",), 1)
LIVE = "appsink drop=true max-buffers=1 sync=false"


def test_csi() -> None:
    assert pipelines.csi_pipeline(parse_source("csi:1#size=1280x720&fps=60")) == (
        "nvarguscamerasrc sensor-id=1 ! video/x-raw(memory:NVMM),width=1280,height=720,framerate=60/1,format=NV12 "
        f"! nvvidconv ! video/x-raw,format=BGRx ! {LIVE}"
    )
    assert "framerate=29970/1000" in pipelines.csi_pipeline(parse_source("csi:0#fps=29.97"))
    assert "width=1920,height=1080,framerate=30/1" in pipelines.csi_pipeline(parse_source("csi:0"))


def test_rtsp() -> None:
    uri = parse_source("rtsp://u:p%40@h/s#transport=udp&latency=80&timeout=2")
    head = (
        'rtspsrc location="rtsp://u:p%40@h/s" protocols=udp latency=80 drop-on-latency=true '
        "tcp-timeout=2000000 timeout=2000000"
    )
    assert pipelines.rtsp_pipeline(uri, "H265", "hardware") == (
        f"{head} ! rtph265depay ! h265parse ! nvv4l2decoder ! nvvidconv ! video/x-raw,format=BGRx ! {LIVE}"
    )
    assert pipelines.rtsp_pipeline(uri, "H264", "software") == (
        f"{head} ! rtph264depay ! h264parse ! avdec_h264 ! videoconvert ! video/x-raw,format=BGR ! {LIVE}"
    )
    assert "jpegdec" in pipelines.rtsp_pipeline(uri, "JPEG", "hardware")
    with pytest.raises(UnsupportedError, match="sends VP9"):
        pipelines.rtsp_pipeline(uri, "VP9", "software")
    secure = parse_source("rtsps://h/s#tls=unverified")
    assert " tls-validation-flags=0 !" in pipelines.rtsp_pipeline(secure, "H264", "software")


def test_files_deliver_every_frame() -> None:
    assert pipelines.file_pipeline(Path("/v/my clip!.mp4"), "hardware") == (
        'filesrc location="/v/my clip!.mp4" ! parsebin ! nvv4l2decoder ! nvvidconv ! video/x-raw,format=BGRx '
        "! appsink drop=false max-buffers=4 sync=false"
    )
    with pytest.raises(UsageError, match="double quote"):
        pipelines.file_pipeline(Path('/v/a" ! filesink location="b'), "software")


@pytest.mark.parametrize(
    ("pipeline", "expected"),
    [
        ("v4l2src device=/dev/video0", f"videoconvert ! video/x-raw,format=BGR ! {LIVE}"),
        ("v4l2src ! nvvidconv ! video/x-raw,format=BGRx", LIVE),
        ("v4l2src ! video/x-raw, format=(string)GRAY8", LIVE),
        ("v4l2src ! video/x-raw,format=NV12", f"videoconvert ! video/x-raw,format=BGR ! {LIVE}"),
        (
            "videotestsrc num-buffers=3 ! video/x-raw,format=BGR",
            "appsink drop=false max-buffers=4 sync=false",
        ),
    ],
)
def test_the_sink_is_ours(pipeline: str, expected: str) -> None:
    assert pipelines.user_pipeline(parse_source(f"gst:{pipeline}")) == f"{pipeline} ! {expected}"


def test_elements_of_a_pipeline_are_found() -> None:
    pipeline = pipelines.file_pipeline(Path("/v/my ! clip.mp4"), "hardware")
    assert element_names(pipeline) == ["filesrc", "parsebin", "nvv4l2decoder", "nvvidconv", "appsink"]


class FakeCapture:
    opened: list[tuple[Any, ...]] = []  # noqa: RUF012 - the fixture gives every test its own
    opens = True
    picture = np.zeros((4, 6, 4), np.uint8)

    def __init__(self, *arguments: Any) -> None:
        self.opened.append(arguments)

    def isOpened(self) -> bool:
        return self.opens

    def get(self, _: int) -> float:
        return 0.0

    def set(self, name: int, value: float) -> bool:
        return True

    def grab(self) -> bool:
        return True

    def retrieve(self, _: object = None) -> tuple[bool, Any]:
        return True, self.picture

    def release(self) -> None:
        pass


@pytest.fixture
def jetson(monkeypatch: pytest.MonkeyPatch) -> type[FakeCapture]:
    """An OpenCV with both back-ends, on a machine with all of NVIDIA's elements."""
    fake = SimpleNamespace(
        VideoCapture=FakeCapture,
        CAP_FFMPEG=1900,
        CAP_GSTREAMER=1800,
        CAP_PROP_FPS=5,
        CAP_PROP_FRAME_COUNT=7,
        CAP_PROP_POS_MSEC=0,
        CAP_PROP_OPEN_TIMEOUT_MSEC=53,
        CAP_PROP_READ_TIMEOUT_MSEC=54,
        __version__="4.10.0",
        getBuildInformation=lambda: "    FFMPEG:   YES\n    GStreamer:   YES (1.20.3)\n",
    )
    monkeypatch.setattr(opencv, "load", lambda purpose: fake)
    monkeypatch.setattr(pipelines, "has_element", lambda name: True)
    monkeypatch.setattr(FakeCapture, "opened", [])
    monkeypatch.setattr(opening.time, "sleep", lambda seconds: None)
    return FakeCapture


def test_a_jetson_decodes_files_in_hardware_unless_told_otherwise(
    jetson: type[FakeCapture], tmp_path: Path
) -> None:
    (tmp_path / "a.mp4").write_bytes(b"x")
    for options, backend in (
        ("", 1800),
        ("#backend=ffmpeg", 1900),
        ("#decoder=software", 1900),
        ("#t=1", 1900),
    ):
        open_source(parse_source(f"{tmp_path}/a.mp4{options}"), ANT)
        assert jetson.opened[-1][1] == backend, options
    assert "nvv4l2decoder" in jetson.opened[0][0]


def test_the_fourth_channel_is_dropped_exactly(jetson: type[FakeCapture]) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (4, 6, 4), np.uint8)
    jetson.picture = picture
    source = open_source(parse_source("csi:0"), ANT)
    slot = np.zeros((4, 6, 3), np.uint8)
    for into in (None, slot, slot):
        delivered = source.read(into)
        assert delivered is not None
        assert (delivered.pixels is slot) == (into is slot)
        np.testing.assert_array_equal(delivered.pixels, picture[:, :, :3])
        assert not np.shares_memory(delivered.pixels, picture)


def test_a_stuck_csi_daemon_is_named_after_three_tries(
    jetson: type[FakeCapture], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jetson, "opens", False)
    with pytest.raises(SourceLostError, match="systemctl restart nvargus-daemon") as caught:
        open_source(parse_source("csi:0"), ANT)
    assert caught.value.retry == "seldom"
    assert len(jetson.opened) == 3


def test_missing_elements_are_named(jetson: type[FakeCapture], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipelines, "has_element", lambda name: not name.startswith("nv"))
    with pytest.raises(
        UnsupportedError, match="elements nvarguscamerasrc, nvvidconv, which this machine lacks"
    ):
        open_source(parse_source("csi:0"), ANT)
    with pytest.raises(UnsupportedError, match="decoder=hardware needs"):
        open_source(parse_source(f"{__file__}#decoder=hardware"), ANT)
    assert not jetson.opened


def test_the_wheel_has_no_gstreamer_whatever_its_registry_lists() -> None:
    pytest.importorskip("cv2")
    with pytest.raises(UnsupportedError, match="needs an OpenCV with GStreamer, which this one"):
        open_source(parse_source("gst:videotestsrc"), ANT)
