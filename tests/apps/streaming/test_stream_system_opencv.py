"""The GStreamer back-end for real: the system's Python, with its OpenCV and its NumPy.

The wheel's OpenCV has no GStreamer. What reads a camera here is this repository's code, run by the
interpreter that Debian's (and JetPack's) ``python3-opencv`` belongs to, without anything else installed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import rtsp_server
from gstreamer import SYSTEM_PYTHON, needs_rtsp, needs_system_opencv

ROOT = Path(__file__).parents[3]

READER = """
import json, sys
import numpy as np
from apps.streaming.sources import ModelClasses, open_source, parse_source
from pipeline.errors import EdgefoldError
uri, n_frames, height, width = sys.argv[1], *map(int, sys.argv[2:])
slot, report = np.zeros((height, width, 3), np.uint8), {"shapes": [], "in_place": [], "bars": [], "center": None}
try:
    source = open_source(parse_source(uri), ModelClasses(("ant",), 1))
    report["live"], report["fps"] = source.live, source.fps
    for _ in range(n_frames):
        delivered = source.read(slot)
        if delivered is None:
            break
        pixels = delivered.pixels
        report["shapes"].append(pixels.shape)
        report["in_place"].append(pixels is slot)
        report["bars"].append([int(bar > 127) for bar in pixels[24, 8:96:16, 0]])
        report["center"] = pixels[pixels.shape[0] // 2, pixels.shape[1] // 2].tolist()
    source.close()
except EdgefoldError as error:
    report["error"], report["message"] = type(error).__name__, str(error)
print(json.dumps(report))
"""


pytestmark = needs_system_opencv()


def read(uri: str, n_frames: int, hw: tuple[int, int]) -> dict[str, Any]:
    """What the system's Python reads from a source, into an array of `hw`."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        [SYSTEM_PYTHON, "-c", READER, uri, str(n_frames), *map(str, hw)],
        env={**environment, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


@pytest.mark.parametrize("backend", ["gstreamer", "ffmpeg"])
def test_every_frame_of_a_file_in_order_and_in_place(tmp_path: Path, backend: str) -> None:
    film = tmp_path / "bars of ! film.mp4"
    writer = cv2.VideoWriter(str(film), cv2.VideoWriter_fourcc(*"mp4v"), 10.0, (96, 48))
    for index in range(20):
        bars = np.array([255 * (index >> bit & 1) for bit in reversed(range(6))], np.uint8).repeat(16)
        writer.write(np.repeat(np.tile(bars[None, :, None], (48, 1, 1)), 3, 2))
    writer.release()
    report = read(f"{film}#backend={backend}", 99, (48, 96))
    assert [int("".join(map(str, bars)), 2) for bars in report["bars"]] == list(range(20))
    assert all(report["in_place"])
    assert (report["live"], report["fps"]) == (False, 10.0)


@pytest.mark.parametrize("caps", ["", " ! video/x-raw,width=128,height=64,format=BGRx"])
def test_a_pipeline_and_its_padding_byte(caps: str) -> None:
    hw = (64, 128) if caps else (240, 320)
    report = read(f"gst:videotestsrc pattern=blue num-buffers=4{caps}", 9, hw)
    assert report["shapes"] == [[*hw, 3]] * 4
    assert all(report["in_place"])
    assert report["center"] == [255, 0, 0]  # BGR


@needs_rtsp
def test_rtsp_with_a_password() -> None:
    with rtsp_server.rtsp_server(password="s3cr:et") as server:
        uri = server.url(userinfo="camera:s3cr%3Aet") + "#backend=gstreamer&latency=50"
        report = read(uri, 5, (240, 320))
        assert report["shapes"] == [[240, 320, 3]] * 5, report
        assert all(report["in_place"])
        assert report["live"]
        report = read(server.url(userinfo="camera:hunter22") + "#backend=gstreamer", 5, (240, 320))
        assert report["error"] == "SourceLostError"
        assert "401" in report["message"]


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="no ffmpeg command to make the video with")
def test_a_change_of_resolution(tmp_path: Path) -> None:
    film = tmp_path / "changes.h264"
    for size in ("320x240", "480x360"):
        make = f"ffmpeg -v error -f lavfi -i testsrc2=size={size}:rate=25:duration=0.4 -c:v libx264 -bf 0 -pix_fmt yuv420p -f h264 -"
        with film.open("ab") as file:
            subprocess.run(make.split(), stdout=file, check=True)
    report = read(f"{film}#backend=gstreamer", 99, (240, 320))
    assert report["shapes"] == [[240, 320, 3]] * 10 + [[360, 480, 3]] * 10
    assert report["in_place"] == [True] * 10 + [False] * 10


@pytest.mark.skipif(Path("/proc/device-tree/model").exists(), reason="may be a Jetson")
def test_a_csi_camera_needs_a_jetson() -> None:
    report = read("csi:0", 1, (48, 96))
    assert report["error"] == "UnsupportedError"
    assert "nvarguscamerasrc, nvvidconv" in report["message"]
