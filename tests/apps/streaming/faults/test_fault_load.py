"""What is slower than the cameras: the engine, a reader of the events, a broker that is away."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from live_app import COMMAND, LiveApp, environment
from ports import reserved_port

from benchmarks.mjpeg_camera import MjpegCamera

MOSQUITTO = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin")

# The colour of a picture, behind products of matrices that depend on it: 7 billion of them a picture.
SLOW = """
<ir_version: 10, opset_import: ["" : 18]>
slow (uint8[batch, 16, 16, 3] input) => (float[batch, 3] logits) {
    pixels = Cast <to = 1> (input)
    axes = Constant <value = int64[2] {1, 2}> ()
    means = ReduceMean <keepdims = 0> (pixels, axes)
    tiny = Constant <value = float {1e-12}> ()
    all_axes = Constant <value = int64[2] {0, 1}> ()
    mean = ReduceMean <keepdims = 1> (means, all_axes)
    small = Mul (mean, tiny)
    size = Constant <value = int64[2] {1200, 1200}> ()
    a = Expand (small, size)
    b = MatMul (a, a)
    c = MatMul (b, a)
    d = MatMul (c, a)
    e = MatMul (d, a)
    work = ReduceMean <keepdims = 1> (e, all_axes)
    logits = Add (means, work)
}
"""


def resident_mb(app: LiveApp) -> float:
    lines = Path(f"/proc/{app.process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


@pytest.mark.keeps_time
def test_an_engine_slower_than_its_cameras_stays_in_the_budget(
    run_app: Callable[..., LiveApp], make_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    """Two cameras of 60 frames a second; what is shown is never older than the budget, what is not is counted."""
    cameras = [MjpegCamera(fps=60, rgb=(220, 40, 40)) for _ in range(2)]
    blocks = "".join(
        f'[[source]]\nname = "camera-{i}"\nuri = "{camera.url}"\n' for i, camera in enumerate(cameras)
    )
    config = f"""
bundle = "{make_bundle(tmp_path / "slow", SLOW)}"
max_age_ms = 5000
{blocks}
"""
    try:
        app = run_app(config)
        for name in ("camera-0", "camera-1"):
            app.until(lambda name=name: app.frames(name) >= 3)
        before_mb = resident_mb(app)
        before = [app.frames(name) for name in ("camera-0", "camera-1")]
        for name in ("camera-0", "camera-1"):
            app.until_more(name, 6)
        grown = [app.frames(f"camera-{i}") - before[i] for i in range(2)]
        grown_mb = resident_mb(app) - before_mb
        status, summary = app.stop()
    finally:
        for camera in cameras:
            camera.close()
    assert status == 0, app.log.read_text()
    assert grown_mb < 16  # ten seconds of the frames that were dropped would be some 300
    assert summary["latency"]["infer"]["p50_ms"] > 1000 / 60, "the engine was not slow"
    assert summary["latency"]["age"]["max_ms"] < 5500
    for one in summary["sources"]:
        assert one["frames_read"] == one["frames_inferred"] + sum(one["dropped"].values())
        assert one["dropped"]["newer frame"] > 0
        assert one["restarts"] == 0
    assert min(grown) > 0.25 * max(grown)  # the one that answers first is alone until the other does


def test_a_reader_that_never_reads_holds_up_nothing(bundle: Path, tmp_path: Path) -> None:
    """Events on standard output, into a pipe of 4 KiB that nobody empties."""
    camera = MjpegCamera(rgb=(220, 40, 40))
    camera_sees = tmp_path / "predictions.jsonl"
    read_end, write_end = os.pipe()
    try:
        fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, 4096)
        while True:  # filled to the last byte, so that the first event already does not fit
            os.set_blocking(write_end, False)
            try:
                os.write(write_end, bytes(512))
            except BlockingIOError:
                break
        os.set_blocking(write_end, True)
        process = subprocess.Popen(
            [
                *COMMAND,
                str(bundle),
                *("--source", camera.url, "--events", "-", "--predictions", str(camera_sees)),
                *("--max-frames", "30"),
            ],
            stdout=write_end,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(tmp_path),
        )
        _, said = process.communicate(timeout=60)
    finally:
        camera.close()
        os.close(read_end)
        os.close(write_end)
    assert process.returncode == 0, said
    assert camera_sees.read_text().count("\n") == 30


@pytest.fixture
def port() -> Iterator[int]:
    """Where nobody listens until the test starts a broker."""
    with reserved_port() as number:
        yield number


def test_a_broker_that_is_away_and_comes(
    run_app: Callable[..., LiveApp], bundle: Path, tmp_path: Path, port: int
) -> None:
    """The stream does not wait; what happened meanwhile is delivered when the broker is there."""
    pytest.importorskip("paho.mqtt.client")
    camera = MjpegCamera(rgb=(220, 40, 40), other_rgb=(40, 40, 220))
    config = f"""
bundle = "{bundle}"
max_age_ms = 5000
[events]
smoothing_s = 0
hold_s = 0
[mqtt]
url = "mqtt://127.0.0.1:{port}"
[[source]]
name = "gate"
uri = "{camera.url}"
"""
    broker = None
    try:
        app = run_app(config)
        app.until(lambda: "red" in app.source("gate")["present"])
        camera.behaviour = "other size"
        app.until(lambda: "blue" in app.source("gate")["present"])
        # red entered and left, blue entered.
        app.until(lambda: app.metric("edgefold_events_queued", output="mqtt") == 3)
        app.until_more("gate")
        if MOSQUITTO is not None:
            settings = tmp_path / "mosquitto.conf"
            settings.write_text(f"listener {port} 127.0.0.1\nallow_anonymous true\n")
            broker = subprocess.Popen(
                [MOSQUITTO, "-c", str(settings)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            app.until(lambda: app.metric("edgefold_events_total", output="mqtt", result="delivered") == 3)
            assert app.metric("edgefold_events_queued", output="mqtt") == 0
        status, _ = app.stop(signal.SIGINT)
        assert status == 0, app.log.read_text()
    finally:
        camera.close()
        if broker is not None:
            broker.kill()
            broker.wait()
    said = app.log.read_text()
    assert "Traceback" not in said
    assert json.loads(app.out.read_text())["sources"][0]["restarts"] == 0
