"""Where one segment ends and the next begins, and what they hold."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import pytest
from recorded import ANCHOR, HW, PREDICTION, frame, n_frames, picture, segments
from waiting import PATIENCE_S, eventually

from apps.streaming import recording, sinks
from apps.streaming.config import RecordConfig
from apps.streaming.naming import plain_name
from apps.streaming.recording import SegmentRecorder, open_recording
from apps.streaming.segments import SegmentFolder
from apps.streaming.sinks import Recorder
from pipeline.errors import UnsupportedError, UsageError


def test_segments_are_named_by_time_and_source_and_hold_every_frame(
    record: Callable[..., SegmentRecorder], tmp_path: Path
) -> None:
    recorder = record(name="rtsp://door:554/1")
    for index in range(25):
        recorder.write(frame(0.1 * index), PREDICTION, picture(5 * index))
    recorder.close()
    recorder.close()
    folder = tmp_path / "rec"
    assert segments(folder) == [
        "20261125T120000.000Z_rtsp_door_554_1.mp4",
        "20261125T120001.000Z_rtsp_door_554_1.mp4",
        "20261125T120002.000Z_rtsp_door_554_1.mp4",
    ]
    assert [n_frames(folder / name) for name in segments(folder)] == [10, 10, 5]
    counters = recorder.counters()
    assert counters == {"segments": 3, "frames": 25, "dropped": 0, "paused": 0, "failures": 0, "deleted": 0}
    assert [path.name for path in folder.iterdir() if path.suffix != ".mp4"] == [".rtsp_door_554_1.lock"]


def test_a_segment_is_playable_while_the_next_is_written(
    record: Callable[..., SegmentRecorder], tmp_path: Path
) -> None:
    recorder = record()
    for index in range(11):
        recorder.write(frame(0.1 * index), PREDICTION, picture())
    eventually(lambda: len(segments(tmp_path / "rec")) == 1)
    assert n_frames(tmp_path / "rec" / segments(tmp_path / "rec")[0]) == 10
    eventually(lambda: len(list((tmp_path / "rec").glob(".*.partial.mp4"))) == 1)


def test_frame_by_frame_a_segment_has_so_many_frames(
    record: Callable[..., SegmentRecorder], tmp_path: Path
) -> None:
    """Of a file that is read as fast as it goes; nothing is dropped though the queue holds one picture."""
    recorder = record(by_time=False, queue_bytes=1)
    for index in range(25):
        recorder.write(frame(0.001 * index), PREDICTION, picture())
    recorder.close()
    assert recorder.counters()["dropped"] == 0
    assert [n_frames(path) for path in sorted((tmp_path / "rec").glob("[!.]*.mp4"))] == [10, 10, 5]


def test_another_size_is_another_segment(record: Callable[..., SegmentRecorder], tmp_path: Path) -> None:
    recorder = record(segment_s=60.0)
    for index in range(6):
        recorder.write(frame(0.1 * index), PREDICTION, picture(100, HW if index < 3 else (200, 100)))
    recorder.close()
    sizes = []
    for path in sorted((tmp_path / "rec").glob("[!.]*.mp4")):
        video = cv2.VideoCapture(str(path))
        sizes.append((video.get(cv2.CAP_PROP_FRAME_WIDTH), video.get(cv2.CAP_PROP_FRAME_HEIGHT)))
    assert sizes == [(128, 96), (100, 200)]


def test_a_gap_is_not_filled_with_the_picture_before(
    record: Callable[..., SegmentRecorder], tmp_path: Path
) -> None:
    recorder = record(segment_s=600.0)
    for seconds in (0.0, 0.1, 300.0, 300.1, 300.2):
        recorder.write(frame(seconds), PREDICTION, picture())
    recorder.close()
    assert [n_frames(path) for path in sorted((tmp_path / "rec").glob("[!.]*.mp4"))] == [2, 3]


def test_a_silent_source_leaves_a_complete_segment(
    record: Callable[..., SegmentRecorder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "_GAP_S", 0.1)
    monkeypatch.setattr(recording, "_GAP_FRAMES", 1.0)
    recorder = record(segment_s=600.0)
    recorder.write(frame(0.0), PREDICTION, picture())
    eventually(lambda: recorder.counters()["segments"] == 1)
    assert n_frames(tmp_path / "rec" / segments(tmp_path / "rec")[0]) == 1


def test_the_frame_itself_is_not_kept(record: Callable[..., SegmentRecorder]) -> None:
    """Its image lies in a buffer that goes back to the source at once."""
    recorder = record()
    taken = frame(0.0)
    n_before = sys.getrefcount(taken.image)
    recorder.write(taken, PREDICTION, picture())
    n_after = sys.getrefcount(taken.image)
    assert n_after == n_before


def test_what_a_killed_recording_left_is_removed_by_the_next(
    record: Callable[..., SegmentRecorder], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "rec"
    script = f"""
import time
import numpy as np
from pathlib import Path
from types import SimpleNamespace
from apps.streaming.config import RecordConfig
from apps.streaming.predictions import Prediction, RankedClass
from apps.streaming.recording import SegmentRecorder
from pipeline.artifacts import Frame
recorders = [SegmentRecorder(RecordConfig(Path({str(folder)!r}), segment_s=1.0), 10.0, True, name) for name in ("a", "b")]
prediction = Prediction("cam", 0, 0, (RankedClass(0, "stop", 0.5),), None)
for index in range(10_000):
    for recorder in recorders:
        frame = Frame(np.zeros((2, 2, 3), np.uint8), "BGR", "cam", 0, index * 10**8)
        recorder.write(frame, prediction, np.full((96, 128, 3), index % 256, np.uint8))
    time.sleep(0.005)
"""
    app = subprocess.Popen([sys.executable, "-c", script])
    try:
        eventually(lambda: len(segments(folder)) >= 2 and len(list(folder.glob(".*.partial.mp4"))) == 2)
        with pytest.raises(UsageError, match=r"already being recorded to .* as 'a'; give 'a' another name"):
            record(name="a")
        live = record(name="c")  # does not take what the others are writing for left behind
        assert live._folder.n_recovered == 0
        eventually(lambda: len(list(folder.glob(".*.partial.mp4"))) == 2)
    finally:
        app.send_signal(signal.SIGKILL)
        app.wait(PATIENCE_S)
    left_behind = list(folder.glob(".*.partial.mp4"))
    assert left_behind
    mine = folder / ".holiday.partial.mp4"
    mine.write_bytes(b"not of this form")
    whole = segments(folder)
    record(name="a")
    assert list(folder.glob(".*.partial.mp4")) == [mine]  # b's too, whose process is dead
    assert segments(folder) == whole
    assert all(n_frames(folder / name) > 0 for name in whole)
    assert f"removed {len(left_behind)} unfinished segment(s)" in caplog.text


def test_a_moment_that_comes_twice_does_not_overwrite(tmp_path: Path) -> None:
    folder = SegmentFolder(tmp_path, "cam", 10**9, 0)
    start = ANCHOR.utc(0)
    first = folder.new_segment(start)
    first.touch()
    assert first.name == "20261125T120000.000Z_cam.mp4"
    assert folder.new_segment(start).name == "20261125T120000.001Z_cam.mp4"
    folder.close()


def test_a_file_or_a_folder(tmp_path: Path) -> None:
    (tmp_path / "dotted.d").mkdir()
    for path, kind in (("a.mp4", Recorder), ("folder", SegmentRecorder), ("dotted.d", SegmentRecorder)):
        recorder = open_recording(RecordConfig(tmp_path / path), 10.0, True, "cam")
        assert isinstance(recorder, kind)
        recorder.close()
    with pytest.raises(UsageError, match=r"name the file b\.mp4"):
        open_recording(RecordConfig(tmp_path / "b.avi"), 10.0, True, "cam")


def test_what_cannot_be_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    for config, reason in (
        (RecordConfig(tmp_path / "none" / "rec"), "No such file or directory"),
        (RecordConfig(tmp_path / "file"), "File exists"),
        (RecordConfig(tmp_path / "rec", segment_s=0.0), "segments of 0 s; give at least 1 s"),
        (RecordConfig(tmp_path / "rec", quota_mb=0.0), "a quota of 0 MB; give at least 1 MB"),
        (RecordConfig(tmp_path / "rec", quota_mb=float("nan")), "a quota of nan MB"),
    ):
        with pytest.raises(UsageError, match=reason):
            SegmentRecorder(config, 10.0, True, "cam")
    with pytest.raises(UsageError, match="cannot play at 0 FPS"):
        SegmentRecorder(RecordConfig(tmp_path / "rec"), 0.0, True, "cam")
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(UnsupportedError, match="needs OpenCV"):
        SegmentRecorder(RecordConfig(tmp_path / "rec"), 10.0, True, "cam")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]
    assert sinks._FREE_RESERVE_BYTES < recording._RESERVE_BYTES


def test_plain_names() -> None:
    assert plain_name("front door") == "front_door"
    assert plain_name("rtsp://10.0.0.5:554/door") == "rtsp_10.0.0.5_554_door"
    assert plain_name("../../etc/passwd") == "etc_passwd"
    assert plain_name("/") == plain_name("..") == "source"
    assert plain_name("Tür 1") == "Tür_1"
    assert len(plain_name("ü" * 500).encode()) <= 120
