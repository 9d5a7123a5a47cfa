"""Disks of the real command: full while it records, and one that hangs when it ends."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from live_app import LiveApp
from small_disk import fill, small_disk

END_LIMIT_S = 5.0
"""The camera app's promise, and what a service manager is told to wait at least."""

LIMIT_BYTES = 400_000
"""More than the log of a short run, less than a segment."""


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """What is undone after the app has ended: a disk is not taken from under it."""
    with ExitStack() as opened:
        yield opened


def goes_on_without_its_recording(
    app: LiveApp, fill_up: Callable[[], object], make_room: Callable[[], object]
) -> None:
    app.until(lambda: app.frames("self-test") >= 10)
    fill_up()
    app.until(lambda: " pauses: " in app.log.read_text())
    app.until_more("self-test", 10)
    make_room()
    app.until(lambda: " goes on: " in app.log.read_text())
    status, summary = app.stop()
    assert status == 0, app.log.read_text()
    assert summary["ended"] == "SIGTERM"
    assert "Traceback" not in app.log.read_text()


def config(bundle: Path, folder: Path, segment_s: float) -> str:
    return f"""
bundle = "{bundle}"
[[source]]
name = "self-test"
uri = "synthetic:1"
record = {{ path = "{folder}", segment_s = {segment_s}, quota_mb = 1000 }}
"""


def segments(folder: Path) -> list[Path]:
    return sorted(folder.glob("[!.]*.mp4"))


def test_a_full_disk_pauses_the_recording_and_not_the_stream(
    stack: ExitStack, run_app: Callable[..., LiveApp], bundle: Path, tmp_path: Path
) -> None:
    """96 MiB, of which the recording leaves 64 free; then somebody else takes the rest."""
    disk = stack.enter_context(small_disk(tmp_path / "disk", 96))
    app = run_app(config(bundle, disk / "recorded", 1.0))
    app.until(lambda: segments(disk / "recorded"))
    others: list[Path] = []
    goes_on_without_its_recording(app, lambda: others.append(fill(disk)), lambda: others.pop().unlink())
    assert segments(disk / "recorded")
    assert not list((disk / "recorded").glob(".*.partial.mp4"))


def test_files_that_may_not_grow_pause_the_recording_and_not_the_stream(
    run_app: Callable[..., LiveApp], bundle: Path, tmp_path: Path
) -> None:
    """The limit on the size of files, set from outside while it runs, is met in the middle of a segment: OpenCV says
    nothing of it, so the segment is found not to be whole when it ends."""
    app = run_app(config(bundle, tmp_path / "recorded", 3.0))
    unlimited = resource.RLIM_INFINITY

    def limit(size_bytes: int) -> None:
        resource.prlimit(app.process.pid, resource.RLIMIT_FSIZE, (size_bytes, unlimited))

    goes_on_without_its_recording(app, lambda: limit(LIMIT_BYTES), lambda: limit(unlimited))
    assert "is not whole" in app.log.read_text()
    assert not list((tmp_path / "recorded").glob(".*.partial.mp4"))


HANGS_AFTER_FIVE = """
import threading
from apps.streaming.sinks import Recorder
write = Recorder.write
def hang(self, *arguments):
    if self.n_written >= 5:
        threading.Event().wait()
    write(self, *arguments)
Recorder.write = hang
from apps.cli import main
main()
"""


@pytest.mark.keeps_time
def test_a_disk_that_hangs_under_three_recordings_is_given_up_in_time(
    run_app: Callable[..., LiveApp], bundle: Path, tmp_path: Path
) -> None:
    """Three seconds for all of them: one after the other they would take nine."""
    sources = "".join(
        f'[[source]]\nname = "camera-{index}"\nuri = "synthetic:{index}"\n'
        f'record = {{ path = "{tmp_path / str(index)}" }}\n'
        for index in range(3)
    )
    app = run_app(f'bundle = "{bundle}"\n{sources}', program=HANGS_AFTER_FIVE)
    for index in range(3):
        app.until(lambda name=f"camera-{index}": app.frames(name) >= 20)
    sent_s = time.monotonic()
    status, _ = app.stop()
    assert time.monotonic() - sent_s < END_LIMIT_S
    assert status == 1
    assert "the disk does not answer" in app.log.read_text()
