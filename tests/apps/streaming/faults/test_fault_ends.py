"""How a stream ends when much is wrong: signals, answers that are no numbers, disks, clocks."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import pytest
from live_app import LiveApp

from benchmarks.mjpeg_camera import MjpegCamera

END_LIMIT_S = 5.0
"""The camera app's promise, and what a service manager is told to wait at least."""

# How dark each channel is, and NaN for one that is brighter than 200 of 255.
NAN_IN_THE_LIGHT = """
<ir_version: 10, opset_import: ["" : 18]>
no_number (uint8[batch, 16, 16, 3] input) => (float[batch, 3] logits) {
    pixels = Cast <to = 1> (input)
    axes = Constant <value = int64[2] {1, 2}> ()
    means = ReduceMean <keepdims = 0> (pixels, axes)
    bright = Constant <value = float {200.0}> ()
    below = Sub (bright, means)
    logits = Log (below)
}
"""


def n_playable(path: Path) -> int:
    video = cv2.VideoCapture(str(path))
    count = 0
    while video.read()[0]:
        count += 1
    return count


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def n_degraded(app: LiveApp) -> int:
    return sum(app.state(name) == "DEGRADED" for name in ("silent", "well", "deaf"))


@pytest.mark.keeps_time
def test_sigterm_ends_everything_in_time_whatever_hangs(
    run_app: Callable[..., LiveApp], bundle: Path, tmp_path: Path
) -> None:
    """A camera that says nothing, a capture that does not listen, a broker that accepts and is silent, a client
    that never reads, and a recording, events and predictions that must be whole all the same."""
    cameras = [MjpegCamera(rgb=(220, 40, 40)) for _ in range(3)]
    with contextlib.ExitStack() as stack:
        for camera in cameras:
            stack.callback(camera.close)
        broker = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        config = f"""
bundle = "{bundle}"
max_age_ms = 60000
predictions = "{tmp_path / "predictions.jsonl"}"
[events]
smoothing_s = 0
log = "{tmp_path / "events.jsonl"}"
[mqtt]
url = "mqtt://127.0.0.1:{broker.getsockname()[1]}"
[limits]
degraded_s = 1
stall_s = 600
[[source]]
name = "well"
uri = "{cameras[0].url}"
record = {{ path = "{tmp_path / "well.mp4"}" }}
[[source]]
name = "silent"
uri = "{cameras[1].url}#timeout=60"
[[source]]
name = "deaf"
uri = "{cameras[2].url}"
record = {{ path = "{tmp_path / "segments"}", segment_s = 1 }}
"""
        (tmp_path / "segments").mkdir()
        app = run_app(config)
        for name in ("silent", "well", "deaf"):
            app.until(lambda name=name: app.frames(name) >= 10)
        captures = app.children()
        assert len(captures) == 3
        client = stack.enter_context(socket.create_connection(("127.0.0.1", app.port)))
        client.sendall(b"GET /video HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        cameras[1].behaviour = "stalls"
        app.until_state("silent", "DEGRADED")
        for pid in sorted(captures):  # to stop that of the silent camera shows nothing
            os.kill(pid, signal.SIGSTOP)
            with contextlib.suppress(AssertionError):
                app.until(lambda: n_degraded(app) == 2, seconds=15)
                break
        app.until(lambda: n_degraded(app) == 2)
        sent_s = time.monotonic()
        status, summary = app.stop()
        seconds = time.monotonic() - sent_s
    said = app.log.read_text()
    assert status == 0, said[-3000:]
    assert seconds < END_LIMIT_S
    assert summary["ended"] == "SIGTERM"
    assert "Traceback" not in said
    assert not [pid for pid in captures if is_alive(pid)]
    sources = {one["source"]: one for one in summary["sources"]}
    for one in sources.values():
        assert one["frames_read"] == one["frames_inferred"] + sum(one["dropped"].values())
    lines = (tmp_path / "predictions.jsonl").read_text().splitlines()
    assert len([json.loads(line) for line in lines]) == summary["frames_inferred"]
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    for name in sources:
        kinds = [event["event"] for event in events if event["source"] == name]
        assert kinds[::2] == ["enter"] * (len(kinds) // 2)
        assert kinds[1::2] == ["leave"] * (len(kinds) // 2)
        assert kinds
    assert n_playable(tmp_path / "well.mp4") >= 10
    segments = sorted((tmp_path / "segments").glob("[!.]*"))
    assert segments
    assert all(segment.suffix == ".mp4" and n_playable(segment) for segment in segments)
    assert not list(tmp_path.rglob(".*.partial*"))
    with socket.create_server(("127.0.0.1", app.port)):
        pass  # the port is free again


def test_scores_that_are_no_numbers_are_an_error_and_no_label(
    run_app: Callable[..., LiveApp], make_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    camera = MjpegCamera(rgb=(60, 120, 120), other_rgb=(240, 240, 240))
    recording, predictions = tmp_path / "kept.mp4", tmp_path / "predictions.jsonl"
    config = f"""
bundle = "{make_bundle(tmp_path / "nan", NAN_IN_THE_LIGHT)}"
predictions = "{predictions}"
[[source]]
uri = "{camera.url}"
record = {{ path = "{recording}" }}
"""
    try:
        app = run_app(config)
        app.until(lambda: app.view()["sources"][0]["metrics"]["frames_inferred"] >= 10)
        camera.behaviour = "other size"
        assert app.process.wait(60) == 1
    finally:
        camera.close()
    assert "not finite" in app.log.read_text() or "NaN" in app.log.read_text()
    labels = [json.loads(line)["top"][0]["label"] for line in predictions.read_text().splitlines()]
    assert len(labels) >= 10
    assert set(labels) == {"red"}
    assert n_playable(recording) >= 5  # what was recorded before it is kept


def test_predictions_to_a_full_disk_are_an_error(
    run_app: Callable[..., LiveApp], bundle: Path, tmp_path: Path
) -> None:
    config = f"""
bundle = "{bundle}"
predictions = "/dev/full"
[[source]]
uri = "synthetic:1"
record = {{ path = "{tmp_path / "kept.mp4"}" }}
"""
    app = run_app(config, wait_for_page=False)
    assert app.process.wait(60) == 1
    assert "No space left on device" in app.log.read_text()


JUMPING_CLOCK = """
import time
true_s, true_ns, true_monotonic_s = time.time, time.time_ns, time.monotonic
began_s = true_monotonic_s()

def jump_s():  # two days back after two seconds, a year on after four
    seconds = true_monotonic_s() - began_s
    return 0 if seconds < 2 else -172_800 if seconds < 4 else 31_536_000

time.time = lambda: true_s() + jump_s()
time.time_ns = lambda: true_ns() + jump_s() * 10**9
from apps.cli import main
main()
"""


@pytest.mark.keeps_time
def test_a_clock_that_jumps_changes_nothing(
    run_app: Callable[..., LiveApp], bundle: Path, tmp_path: Path
) -> None:
    camera = MjpegCamera(rgb=(220, 40, 40))
    config = f"""
bundle = "{bundle}"
max_seconds = 6
max_age_ms = 10000
[events]
log = "{tmp_path / "events.jsonl"}"
[[source]]
name = "gate"
uri = "{camera.url}"
record = {{ path = "{tmp_path / "gate.mp4"}" }}
"""
    try:
        app = run_app(config, program=JUMPING_CLOCK, wait_for_page=False)
        assert app.process.wait(60) == 0, app.log.read_text()[-3000:]
    finally:
        camera.close()
    summary: dict[str, Any] = json.loads(app.out.read_text())
    assert (summary["ended"], summary["sources"][0]["restarts"]) == ("time limit", 0)
    assert 6 <= summary["seconds"] < 12
    assert set(summary["dropped"]) <= {"newer frame", "stopped"}
    assert summary["latency"]["age"]["max_ms"] < 10_000
    assert "DEGRADED" not in app.log.read_text()
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["enter", "leave"]
    assert 0 < events[1]["seconds"] < 12
    # By its own clock the recording is as long as the stream was.
    assert 0.5 * summary["seconds"] < n_playable(tmp_path / "gate.mp4") / 30.0 < summary["seconds"] + 1
