from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from apps.streaming import sinks
from apps.streaming.predictions import Prediction, RankedClass
from apps.streaming.sinks import PredictionLog, Recorder, window_obstacle
from pipeline.artifacts import Frame
from pipeline.errors import EdgefoldError, UnsupportedError, UsageError

PREDICTION = Prediction("cam", 0, 0, (RankedClass(0, "stop", 0.5),), None)


def frame(seconds: float = 0.0) -> Frame:
    return Frame(np.zeros((2, 2, 3), np.uint8), "BGR", "cam", 0, 5_000_000_000 + round(seconds * 1e9))


def picture(value: int = 100, hw: tuple[int, int] = (96, 128)) -> np.ndarray:
    return np.full((*hw, 3), value, np.uint8)


def read_video(path: Path) -> tuple[float, list[np.ndarray]]:
    video = cv2.VideoCapture(str(path))
    assert video.isOpened()
    frames = []
    while True:
        ok, pixels = video.read()
        if not ok:
            return video.get(cv2.CAP_PROP_FPS), frames
        frames.append(pixels)


@pytest.mark.parametrize("fps", [25.0, 30.0, 30000 / 1001, 12.5])
def test_a_recording_has_the_right_rate_and_every_frame(tmp_path: Path, fps: float) -> None:
    recorder = Recorder(tmp_path / "out.mp4", fps, by_time=False)
    for index in range(20):
        recorder.write(frame(), PREDICTION, picture(10 * index))
    assert not (tmp_path / "out.mp4").exists()  # only under a temporary name until it is whole
    recorder.close()
    recorder.close()
    found_fps, frames = read_video(tmp_path / "out.mp4")
    assert found_fps == pytest.approx(fps, rel=1e-3)
    assert len(frames) == 20
    assert abs(int(frames[7].mean()) - 70) < 4
    assert list(tmp_path.iterdir()) == [tmp_path / "out.mp4"]


def test_uneven_frames_play_in_real_time(tmp_path: Path) -> None:
    """Frames at 0, 0.1, 0.11 and 1 s at 10 FPS: eleven slots, the gap repeats, the surplus is left out."""
    recorder = Recorder(tmp_path / "out.mp4", 10.0, by_time=True)
    for seconds, value in ((0.0, 10), (0.1, 80), (0.11, 150), (1.0, 220)):
        recorder.write(frame(seconds), PREDICTION, picture(value))
    recorder.close()
    _, frames = read_video(tmp_path / "out.mp4")
    values = [int(f.mean()) for f in frames]
    assert len(values) == 11
    for found, expected in zip(values, [10, 80] + [150] * 8 + [220], strict=True):
        assert abs(found - expected) < 6


def test_another_size_is_fitted_into_the_video(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "out.mp4", 10.0, by_time=False)
    recorder.write(frame(), PREDICTION, picture(100, (96, 128)))
    recorder.write(frame(), PREDICTION, picture(200, (200, 100)))  # now upright
    recorder.close()
    _, frames = read_video(tmp_path / "out.mp4")
    assert [f.shape for f in frames] == [(96, 128, 3)] * 2
    assert frames[1][48, 64, 0] > 180
    assert frames[1][48, 4, 0] < 20  # black beside it, not stretched


def test_nothing_written_leaves_nothing(tmp_path: Path) -> None:
    Recorder(tmp_path / "out.mp4", 10.0, by_time=False).close()
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_recording_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    out = tmp_path / "out.mp4"
    out.write_bytes(b"earlier")
    recorder = Recorder(out, 10.0, by_time=False)
    recorder.write(frame(), PREDICTION, picture())
    assert out.read_bytes() == b"earlier"
    recorder.close()
    assert len(read_video(out)[1]) == 1


def test_where_nothing_can_be_recorded(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"name the file out\.mp4"):
        Recorder(tmp_path / "out.avi", 10.0, by_time=False)
    with pytest.raises(UsageError, match="no folder that can be written to"):
        Recorder(tmp_path / "none" / "out.mp4", 10.0, by_time=False)
    (tmp_path / "dir.mp4").mkdir()
    with pytest.raises(UsageError, match="it is a folder"):
        Recorder(tmp_path / "dir.mp4", 10.0, by_time=False)


def test_a_disk_that_fills_up_ends_the_recording(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(tmp_path / "out.mp4", 10.0, by_time=False)
    recorder.write(frame(), PREDICTION, picture())
    monkeypatch.setattr(sinks.shutil, "disk_usage", lambda _: SimpleNamespace(free=5 << 20))
    monkeypatch.setattr(recorder, "_next_free_check_s", 0.0)
    with pytest.raises(EdgefoldError, match="5 MiB free on its disk, 16 MiB are kept free"):
        recorder.write(frame(), PREDICTION, picture())
    recorder.close()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(EdgefoldError, match="MiB free"):
        Recorder(tmp_path / "out.mp4", 10.0, by_time=False)


def test_a_file_that_could_not_be_written_is_not_passed_off_as_whole(tmp_path: Path) -> None:
    """OpenCV's writer reports no error; a limit on file sizes stands in for the full disk."""
    script = f"""
import resource, sys
import numpy as np
from pathlib import Path
from apps.streaming.predictions import Prediction, RankedClass
from apps.streaming.sinks import Recorder
from pipeline.artifacts import Frame
from pipeline.errors import EdgefoldError
recorder = Recorder(Path({str(tmp_path)!r}) / "out.mp4", 10.0, by_time=False)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
random = np.random.default_rng(0)
for _ in range(10):
    frame = Frame(np.zeros((2, 2, 3), np.uint8), "BGR", "cam", 0, 0)
    prediction = Prediction("cam", 0, 0, (RankedClass(0, "stop", 0.5),), None)
    recorder.write(frame, prediction, random.integers(0, 255, (240, 320, 3), np.uint8))
try:
    recorder.close()
except EdgefoldError as error:
    sys.exit(str(error))
"""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)  # the platform has the limit
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "is not whole" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_predictions_are_lines_that_can_be_followed(tmp_path: Path) -> None:
    log = PredictionLog(tmp_path / "p.jsonl")
    log.write(frame(), PREDICTION, None)
    log.write(frame(), PREDICTION, None)
    lines = (tmp_path / "p.jsonl").read_text().splitlines()  # before the end
    assert [json.loads(line)["top"][0]["label"] for line in lines] == ["stop", "stop"]
    log.close()
    log.close()


def test_a_full_disk_is_said_and_not_swallowed(tmp_path: Path) -> None:
    log = PredictionLog(Path("/dev/full"))
    with pytest.raises(EdgefoldError, match=r"writing predictions to /dev/full failed \(No space left"):
        log.write(frame(), PREDICTION, None)
    log.close()
    with pytest.raises(UsageError, match="cannot write predictions"):
        PredictionLog(tmp_path / "none" / "p.jsonl")


def test_no_display_is_an_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    assert window_obstacle() == "no display"


def test_a_display_that_is_not_there_is_an_obstacle_and_not_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISPLAY", ":97")
    assert window_obstacle() == "the display cannot be opened"


def test_without_opencv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    monkeypatch.setenv("DISPLAY", ":0")
    assert window_obstacle() == "OpenCV is missing"
    with pytest.raises(UnsupportedError, match="recording a video needs OpenCV"):
        Recorder(tmp_path / "out.mp4", 10.0, by_time=False)
    assert os.listdir(tmp_path) == []  # noqa: PTH208
