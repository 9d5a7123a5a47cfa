from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from waiting import PATIENCE_S, eventually

from apps.streaming import recording, sinks
from apps.streaming import segments as segments_module
from apps.streaming.clock import UtcAnchor
from apps.streaming.config import RecordConfig
from apps.streaming.naming import plain_name
from apps.streaming.predictions import Prediction, RankedClass
from apps.streaming.recording import SegmentRecorder, open_recording
from apps.streaming.segments import SegmentFolder
from apps.streaming.sinks import Recorder
from pipeline.artifacts import Frame
from pipeline.errors import EdgefoldError, UnsupportedError, UsageError

ANCHOR = UtcAnchor(monotonic_ns=0, utc_ns=1_795_608_000 * 10**9)  # 2026-11-25T12:00:00Z
PREDICTION = Prediction("cam", 0, 0, (RankedClass(0, "stop", 0.5),), None)
HW = (96, 128)


def frame(seconds: float) -> Frame:
    return Frame(np.zeros((2, 2, 3), np.uint8), "BGR", "cam", 0, round(seconds * 1e9))


def picture(value: int = 100, hw: tuple[int, int] = HW) -> np.ndarray:
    return np.full((*hw, 3), value, np.uint8)


def noise(hw: tuple[int, int] = HW) -> Iterator[np.ndarray]:
    """Pictures without end that cannot be compressed."""
    random = np.random.default_rng(0)
    return itertools.cycle([random.integers(0, 255, (*hw, 3), np.uint8) for _ in range(7)])


def segments(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("[!.]*.mp4"))


def n_frames(path: Path) -> int:
    """By decoding every one of them."""
    video, count = cv2.VideoCapture(str(path)), 0
    while video.read()[0]:
        count += 1
    return count


@pytest.fixture
def record(tmp_path: Path) -> Iterator[Callable[..., SegmentRecorder]]:
    """Opens recorders that wait for nothing; all are closed after the test."""
    opened: list[SegmentRecorder] = []

    def start(
        by_time: bool = True, name: str = "cam", fps: float = 10.0, **options: object
    ) -> SegmentRecorder:
        config = RecordConfig(tmp_path / "rec", segment_s=1.0)
        config = replace(
            config, **{key: options.pop(key) for key in ("segment_s", "quota_mb", "path") if key in options}
        )
        opened.append(SegmentRecorder(config, fps, by_time, name, anchor=ANCHOR, **options))  # type: ignore[arg-type]
        return opened[-1]

    yield start
    for recorder in opened:
        recorder.close()


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "_PAUSE_S", (0.1, 0.2))
    monkeypatch.setattr(recording, "_CHECK_S", 0.0)
    monkeypatch.setattr(recording, "_POLL_S", 0.02)


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


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """32 MiB, of which `Recorder` keeps 16 free."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=32m", "none", str(path)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.decode().strip()}")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def test_a_real_disk_that_fills_up(record: Callable[..., SegmentRecorder], small_disk: Path) -> None:
    """A quota that the disk does not have: the oldest go at the reserve, and the recording never pauses.
    Then something else takes the disk: it pauses, and goes on once there is room."""
    recorder = record(path=small_disk / "rec", quota_mb=1000.0, reserve_bytes=24 << 20)
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
    assert os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize > 20 << 20
    other = small_disk / "other"
    other.write_bytes(bytes((os.statvfs(small_disk).f_bavail - 1) * os.statvfs(small_disk).f_frsize))
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
    whole = list((small_disk / "rec").glob("[!.]*.mp4"))
    assert whole
    assert all(n_frames(path) > 0 for path in whole)
    assert not list((small_disk / "rec").glob(".*.partial.mp4"))


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
