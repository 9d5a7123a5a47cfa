"""Quotas, and disks that are slow, hang, and fill up."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from recorded import PREDICTION, frame, n_frames, noise, picture, segments
from small_disk import fill
from waiting import PATIENCE_S, SLACK_S, eventually

from apps.streaming import recording
from apps.streaming import segments as segments_module
from apps.streaming.recording import SegmentRecorder
from apps.streaming.sinks import Recorder
from pipeline.errors import EdgefoldError


def test_the_oldest_segments_make_room_and_nothing_else_does(
    record: Callable[..., SegmentRecorder], tmp_path: Path
) -> None:
    """Two sources in one folder; the quota is over both, and files of others are left alone."""
    folder = tmp_path / "rec"
    folder.mkdir()
    others = [
        "holiday.mp4",
        "20200101T000000.000Z_cam (keep).mp4",
        "20200101T000000.000Z_cam.mp4.txt",
        "20200101T000000.000Z.mp4",
        "2020_cam.mp4",
    ]
    for name in others:
        (folder / name).write_bytes(bytes(900_000))
    (folder / "20200101T000000.000Z_dir.mp4").mkdir()
    outside = tmp_path / "outside.mp4"
    outside.write_bytes(bytes(900_000))
    (folder / "20200101T000000.000Z_link.mp4").symlink_to(outside)
    (folder / "20200102T000000.000Z_gone.mp4").write_bytes(bytes(900_000))  # of a source that is no more
    left, right = record(name="left", quota_mb=1.0), record(name="right", quota_mb=1.0)
    pixels = noise()
    for index in range(200):
        for recorder in (left, right):
            recorder.write(frame(0.1 * index), PREDICTION, next(pixels))
        eventually(
            lambda index=index: left.counters()["frames"] + right.counters()["frames"] == 2 * index + 2
        )
        kept = [
            p for p in folder.iterdir() if re.fullmatch(r"\.?\d{8}T.*_(left|right)(\.partial)?\.mp4", p.name)
        ]
        # Both can write a picture or two, and an index, between one check and the next.
        assert sum(p.stat().st_size for p in kept) < 1_150_000
    left.close()
    right.close()
    assert left.counters()["deleted"] + right.counters()["deleted"] > 3
    own = [name for name in segments(folder) if name.endswith(("left.mp4", "right.mp4"))]
    assert own
    assert max(own) >= "20261125T120019.000Z"
    assert "20261125T120000.000Z_left.mp4" not in own  # the oldest went, the newest stayed
    assert all(n_frames(folder / name) > 0 for name in own)
    assert not (folder / "20200102T000000.000Z_gone.mp4").exists()
    assert all((folder / name).stat().st_size == 900_000 for name in others)
    assert outside.exists()
    assert (folder / "20200101T000000.000Z_link.mp4").is_symlink()
    assert (folder / "20200101T000000.000Z_dir.mp4").is_dir()


def test_one_segment_cannot_eat_the_quota(record: Callable[..., SegmentRecorder], tmp_path: Path) -> None:
    recorder = record(segment_s=3600.0, quota_mb=1.0)
    pixels = noise()
    for index in range(200):
        recorder.write(frame(0.1 * index), PREDICTION, next(pixels))
        eventually(lambda index=index: recorder.counters()["frames"] == index + 1)
    recorder.close()
    assert recorder.counters()["segments"] > 1
    sizes = [path.stat().st_size for path in (tmp_path / "rec").glob("[!.]*.mp4")]
    assert sizes
    assert sum(sizes) < 1_100_000


def test_a_slow_disk_does_not_hold_up_a_live_stream(
    record: Callable[..., SegmentRecorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    original, goes_on = Recorder.write, threading.Event()

    def slow(self: Recorder, *arguments: object) -> None:
        assert goes_on.wait(PATIENCE_S)
        original(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Recorder, "write", slow)
    recorder = record(queue_bytes=3 * picture().nbytes)
    for index in range(50):
        recorder.write(frame(0.02 * index), PREDICTION, picture())
    assert recorder.counters()["dropped"] >= 50 - 4  # three in the queue, one under the encoder's hands
    goes_on.set()
    recorder.close()
    counters = recorder.counters()
    assert counters["frames"] + counters["dropped"] == 50


def test_a_disk_that_hangs_holds_up_a_file_once_and_not_for_every_frame(
    record: Callable[..., SegmentRecorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "_PATIENCE_S", 0.2)
    monkeypatch.setattr(recording, "_CLOSE_S", 0.1)
    release = threading.Event()
    monkeypatch.setattr(Recorder, "write", lambda *_: release.wait(PATIENCE_S))
    recorder = record(by_time=False, queue_bytes=1)
    started_s = time.monotonic()
    for index in range(50):
        recorder.write(frame(0.02 * index), PREDICTION, picture())
    assert 0.15 < time.monotonic() - started_s < 0.2 * 45  # waiting each time, it would be 10
    with pytest.raises(EdgefoldError, match="the disk does not answer"):
        recorder.close()
    release.set()
    recorder.close()


def test_recorders_on_a_disk_that_hangs_are_waited_for_together(
    record: Callable[..., SegmentRecorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "_CLOSE_S", 1.0)
    release = threading.Event()
    monkeypatch.setattr(Recorder, "write", lambda *_: release.wait(PATIENCE_S))
    recorders = [record(name=f"cam{index}") for index in range(20)]
    for recorder in recorders:
        recorder.write(frame(0.0), PREDICTION, picture())
    started_s = time.monotonic()
    for recorder in recorders:
        recorder.stop()
    for recorder in recorders:
        recorder.write(frame(0.1), PREDICTION, picture())  # too late: counted, not queued
        assert recorder.counters()["dropped"] == 1
        with pytest.raises(EdgefoldError, match="the disk does not answer"):
            recorder.close()
    assert 1.0 <= time.monotonic() - started_s < 1.0 + SLACK_S  # one after the other, it would be 20
    release.set()


def test_a_full_disk_pauses_and_goes_on(
    record: Callable[..., SegmentRecorder],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    free = [1 << 30]
    monkeypatch.setattr(segments_module.shutil, "disk_usage", lambda _: SimpleNamespace(free=free[0]))
    recorder = record(segment_s=600.0)
    for index in range(5):
        recorder.write(frame(0.1 * index), PREDICTION, picture())
    eventually(lambda: recorder.counters()["frames"] == 5)
    free[0] = 10 << 20
    recorder.write(frame(0.5), PREDICTION, picture())
    eventually(lambda: recorder.last_error is not None)
    assert "10 MiB free on the disk" in str(recorder.last_error)
    eventually(lambda: recorder.counters()["segments"] == 1)  # what was recorded is complete
    for index in range(20):  # it is tried again, in vain: the segment that was complete made room
        recorder.write(frame(0.6 + 0.1 * index), PREDICTION, picture())
        time.sleep(0.02)
    eventually(lambda: recorder.counters()["failures"] >= 2)
    free[0] = 1 << 30
    frames_before = recorder.counters()["frames"]

    def goes_on() -> bool:
        recorder.write(frame(3.0), PREDICTION, picture())
        return recorder.counters()["frames"] > frames_before

    eventually(goes_on)
    recorder.close()
    assert recorder.last_error is None
    assert recorder.counters()["paused"] > 0
    said = [record.getMessage() for record in caplog.records]
    assert sum(" pauses: " in message for message in said) == 1  # once, not for every attempt
    assert sum(" goes on: " in message for message in said) == 1


def test_a_real_disk_that_fills_up(record: Callable[..., SegmentRecorder], disk: Path) -> None:
    """A quota that the disk does not have: the oldest go at the reserve, and the recording never pauses.
    Then something else takes the disk: it pauses, and goes on once there is room."""
    recorder = record(path=disk / "rec", quota_mb=1000.0, reserve_bytes=24 << 20)
    pixels = noise((480, 640))

    n_played = 0

    def all_taken() -> bool:
        return sum(recorder.counters()[key] for key in ("frames", "paused", "dropped")) == n_played

    def play(count: int) -> None:
        nonlocal n_played
        for _ in range(count):
            recorder.write(frame(0.1 * n_played), PREDICTION, next(pixels))
            n_played += 1
            eventually(all_taken)

    play(150)  # 18 MB, of which 8 fit
    counters = recorder.counters()
    assert counters["failures"] == 0
    assert counters["deleted"] >= 3
    assert os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize > 20 << 20
    other = fill(disk)
    play(20)
    eventually(lambda: recorder.last_error is not None)
    assert "MiB free" in str(recorder.last_error)
    other.unlink()
    frames_before = recorder.counters()["frames"]
    deadline_s = time.monotonic() + PATIENCE_S
    while recorder.counters()["frames"] < frames_before + 15:
        assert time.monotonic() < deadline_s
        play(1)
    recorder.close()
    whole = list((disk / "rec").glob("[!.]*.mp4"))
    assert whole
    assert all(n_frames(path) > 0 for path in whole)
    assert not list((disk / "rec").glob(".*.partial.mp4"))


def test_a_segment_that_could_not_be_written_is_removed_and_the_next_is_tried(tmp_path: Path) -> None:
    """OpenCV reports no error; a limit on file sizes stands in for a disk that takes no more."""
    script = f"""
import resource, sys, time
import numpy as np
from pathlib import Path
from types import SimpleNamespace
from apps.streaming import recording
from apps.streaming.config import RecordConfig
from apps.streaming.predictions import Prediction, RankedClass
from pipeline.artifacts import Frame
recording._PAUSE_S = (0.05, 0.05)
recorder = recording.SegmentRecorder(RecordConfig(Path({str(tmp_path)!r}), segment_s=1.0), 10.0, True, "cam")
prediction = Prediction("cam", 0, 0, (RankedClass(0, "stop", 0.5),), None)
random = np.random.default_rng(0)
def play(start, count):
    for index in range(count):
        frame = Frame(np.zeros((2, 2, 3), np.uint8), "BGR", "cam", 0, round((start + 0.1 * index) * 1e9))
        recorder.write(frame, prediction, random.integers(0, 255, (240, 320, 3), np.uint8))
        time.sleep(0.01)
unlimited = resource.RLIM_INFINITY
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, unlimited))
play(0, 11)
while recorder.last_error is None:
    time.sleep(0.01)
assert "is not whole" in recorder.last_error, recorder.last_error
resource.setrlimit(resource.RLIMIT_FSIZE, (unlimited, unlimited))
time.sleep(0.1)
play(100, 10)
recorder.close()
assert recorder.last_error is None
print(recorder.counters())
"""
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=PATIENCE_S
    )
    assert result.returncode == 0, result.stderr
    (kept,) = tmp_path.glob("[!.]*.mp4")
    assert n_frames(kept) == 10
    assert not list(tmp_path.glob(".*.partial.mp4"))
