"""Hours of `edgefold stream` with a fault every few seconds: does it live, does it grow, does it count?

    python benchmarks/soak.py --minutes 60 [--every 20] [--bundle BUNDLE]

The real command runs as a process of its own over four sources: two cameras on loopback that can be told to
misbehave (MJPEG), a video that is played in a loop, and the synthetic camera; with the page, events, a recording
under a quota, and JSON logs. A fault is injected every `--every` seconds, in turn, and the app's own /metrics must
count it before the next. Memory, file descriptors and threads of the process are sampled every five seconds; the
slope is a least-squares line over the samples after the warm-up.

Goals: no crash, slope below 1 MB/h, descriptors and threads constant, every fault counted, exit code 0 on SIGTERM
within 5 s. Writes benchmarks/results/soak.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from harness import machine_stamp, write_results
from mjpeg_camera import MjpegCamera

SAMPLE_S = 5.0
EDGEFOLD = (sys.executable, "-c", "from apps.cli import main; main()")
EXIT_LIMIT_S = 5.0
_CONFIG = """
bundle = "{bundle}"
headless = true
log_json = true
max_age_ms = 1000

[limits]
degraded_s = 1.0
stall_s = 3.0
frozen_s = 4.0
backoff_s = [0.5, 4]
restart_budget = 1000000
lost_retry_s = 4

[events]
log = "{folder}/events.jsonl"

[serve]
port = {port}
max_clients = 8

[[source]]
name = "one"
uri = "{one}"
record = {{ path = "{folder}/recordings", segment_s = 20, quota_mb = 8 }}

[[source]]
name = "two"
uri = "{two}"

[[source]]
name = "video"
uri = "{folder}/clip.mp4#loop"
policy = "newest"

[[source]]
name = "synthetic"
uri = "synthetic:7"
fps = 5
"""


@dataclass(frozen=True)
class Fault:
    """What is done, and the counter of /metrics that must rise because of it."""

    name: str
    inject: Callable[[], None]
    counter: str
    labels: str = ""
    undo: Callable[[], None] = lambda: None


@dataclass
class Soak:
    """One run of the app, the cameras it looks at, and what was seen of both."""

    folder: Path
    bundle: Path
    port: int
    cameras: tuple[MjpegCamera, MjpegCamera]
    process: subprocess.Popen[bytes]
    samples: list[dict[str, float]] = field(default_factory=list)
    injected: dict[str, int] = field(default_factory=dict)
    counted: dict[str, int] = field(default_factory=dict)
    clients: list[socket.socket] = field(default_factory=list)

    # --- what is looked at ---

    def alive(self) -> bool:
        return self.process.poll() is None

    def metric(self, name: str, labels: str = "") -> float:
        """The sum of a metric over its labels, as the app itself says; -1 while it does not answer."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=5) as answer:
                lines = answer.read().decode().splitlines()
        except OSError:
            return -1.0
        values = [
            float(line.rsplit(" ", 1)[1])
            for line in lines
            if line.startswith((f"{name}{{", f"{name} ")) and labels in line
        ]
        return sum(values)

    def sample(self) -> None:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        values = {
            line.split(":")[0]: line.split()[1] for line in status.splitlines() if len(line.split()) > 1
        }
        self.samples.append(
            {
                "seconds": time.monotonic(),
                "rss_mb": int(values["VmRSS"]) / 1024,
                "anonymous_mb": int(values["RssAnon"]) / 1024,
                "descriptors": len(list(Path(f"/proc/{self.process.pid}/fd").iterdir())),
                "threads": int(values["Threads"]),
                "children": len(self.children()),
                "frames": self.metric("edgefold_frames_inferred_total"),
            }
        )

    def children(self) -> list[int]:
        """Capture processes: they are started by threads, so every thread's children count."""
        pids: list[int] = []
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            with contextlib.suppress(OSError):
                pids += [int(pid) for pid in (task / "children").read_text().split()]
        return pids

    # --- what is done to it ---

    def faults(self) -> tuple[Fault, ...]:
        two = self.cameras[1]

        def behave(camera: MjpegCamera, how: Any) -> Callable[[], None]:
            return lambda: setattr(camera, "behaviour", how)

        restarts, well = "edgefold_source_restarts_total", behave(two, "well")
        return (
            Fault("capture process killed", lambda: self.signal_child(signal.SIGKILL), restarts),
            Fault(
                "camera stalls", behave(two, "stalls"), "edgefold_source_stalls_total", 'source="two"', well
            ),
            Fault("camera closes", behave(two, "closes"), restarts, 'source="two"', well),
            Fault("camera answers 404", behave(two, "404"), restarts, 'source="two"', well),
            Fault(
                "corrupt pictures",
                behave(two, "corrupt"),
                "edgefold_frames_dropped_total",
                'source="two"',
                well,
            ),
            Fault("frozen pictures", behave(two, "frozen"), "edgefold_source_frozen", 'source="two"', well),
            Fault(
                "another size",
                behave(two, "other size"),
                "edgefold_frames_inferred_total",
                'source="two"',
                well,
            ),
            Fault(
                "capture process stopped",
                lambda: self.signal_child(signal.SIGSTOP),
                "edgefold_source_stalls_total",
            ),
            Fault(
                "bundle loaded anew",
                lambda: self.process.send_signal(signal.SIGHUP),
                "edgefold_engine_reloads_total",
            ),
            Fault(
                "damaged bundle loaded",
                self.load_damaged,
                "edgefold_engine_reload_failures_total",
                undo=lambda: self.point_at(self.bundle),
            ),
            Fault(
                "clients that never read",
                lambda: self.open_clients(30),
                "edgefold_page_clients_refused_total",
                undo=self.close_clients,
            ),
        )

    def signal_child(self, number: int) -> None:
        children = self.children()
        if children:
            os.kill(children[len(self.samples) % len(children)], number)

    def point_at(self, bundle: Path) -> None:
        """The app's bundle is a link, as a deployment swaps it."""
        temporary = self.folder / "next"
        temporary.symlink_to(bundle)
        temporary.replace(self.folder / "current")

    def load_damaged(self) -> None:
        self.point_at(self.folder / "damaged")
        self.process.send_signal(signal.SIGHUP)

    def open_clients(self, n: int) -> None:
        for _ in range(n):
            with contextlib.suppress(OSError):
                client = socket.create_connection(("127.0.0.1", self.port), timeout=5)
                client.sendall(b"GET /video/one HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
                self.clients.append(client)

    def close_clients(self) -> None:
        for client in self.clients:
            client.close()
        self.clients.clear()


def soak(seconds: float, every_s: float, warm_up_s: float, bundle: Path) -> dict[str, Any]:
    """Run, disturb, stop; everything that was seen, JSON-compatible."""
    with running(bundle) as app:
        began = time.monotonic()
        faults, turn, expected = app.faults(), 0, None
        next_fault, next_sample = began + min(10.0, every_s), began
        while time.monotonic() - began < seconds and app.alive():
            now = time.monotonic()
            if now >= next_sample:
                app.sample()
                next_sample = now + SAMPLE_S
            if expected is not None and app.metric(expected[0].counter, expected[0].labels) > expected[1]:
                fault = expected[0]
                app.counted[fault.name] = app.counted.get(fault.name, 0) + 1
                expected = None
                fault.undo()
            if now >= next_fault:
                if expected is not None:
                    expected[0].undo()
                fault = faults[turn % len(faults)]
                expected = (fault, app.metric(fault.counter, fault.labels))
                app.injected[fault.name] = app.injected.get(fault.name, 0) + 1
                fault.inject()
                turn, next_fault = turn + 1, now + every_s
            time.sleep(0.5)
        crashed = not app.alive()
        exit_code, exit_s = _stop(app)
        log = (app.folder / "log.jsonl").read_text().splitlines()
    return {
        "seconds": time.monotonic() - began,
        "crashes": int(crashed),
        "exit_code": exit_code,
        "seconds_to_exit": exit_s,
        "injected": app.injected,
        "counted": app.counted,
        **_growth(app.samples, warm_up_s),
        "frames_inferred": max((sample["frames"] for sample in app.samples), default=0),
        "last_log_lines": log[-5:] if crashed or exit_code else [],
    }


@contextlib.contextmanager
def running(bundle: Path) -> Iterator[Soak]:
    """The app, its cameras and its files; everything is gone afterwards."""
    with TemporaryDirectory(prefix="edgefold-soak-") as temporary:
        folder = Path(temporary)
        (folder / "recordings").mkdir()
        _write_clip(folder / "clip.mp4")
        shutil.copytree(bundle, folder / "damaged")
        with (folder / "damaged" / "model.int8.onnx").open("r+b") as file:
            file.seek(1000)
            file.write(b"damaged")
        (folder / "current").symlink_to(bundle)
        cameras = (MjpegCamera(), MjpegCamera())
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        config = folder / "cameras.toml"
        config.write_text(
            _CONFIG.format(
                bundle=folder / "current", folder=folder, port=port, one=cameras[0].url, two=cameras[1].url
            )
        )
        command = [*EDGEFOLD, "stream", "--config", str(config)]
        with (folder / "log.jsonl").open("wb") as log:
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log)
        app = Soak(folder, bundle, port, cameras, process)
        try:
            deadline = time.monotonic() + 60
            while app.metric("edgefold_frames_inferred_total") <= 0:
                if not app.alive() or time.monotonic() > deadline:
                    raise SystemExit(f"the app did not start:\n{(folder / 'log.jsonl').read_text()[-2000:]}")
                time.sleep(0.2)
            yield app
        finally:
            app.close_clients()
            if app.alive():
                process.kill()
            process.wait()
            for camera in cameras:
                camera.close()


def _stop(app: Soak) -> tuple[int | None, float]:
    began = time.monotonic()
    app.process.send_signal(signal.SIGTERM)
    try:
        return app.process.wait(timeout=4 * EXIT_LIMIT_S), time.monotonic() - began
    except subprocess.TimeoutExpired:
        return None, time.monotonic() - began


def _growth(samples: list[dict[str, float]], warm_up_s: float) -> dict[str, Any]:
    """Slope of memory, and how many descriptors and threads there were, after the warm-up."""
    if not samples:
        return {}
    kept = [s for s in samples if s["seconds"] - samples[0]["seconds"] >= warm_up_s] or samples
    hours = np.array([s["seconds"] for s in kept]) / 3600
    slopes = {
        key: float(np.polyfit(hours, [s[key] for s in kept], 1)[0]) if len(kept) > 2 else 0.0
        for key in ("rss_mb", "anonymous_mb")
    }
    settled = [s for s in kept if s["children"] == max(t["children"] for t in kept)]
    return {
        "warm_up_seconds": warm_up_s,
        "slope_mb_per_hour": slopes,
        "growth_mb": kept[-1]["rss_mb"] - kept[0]["rss_mb"],
        "rss_mb": [kept[0]["rss_mb"], kept[-1]["rss_mb"], max(s["rss_mb"] for s in kept)],
        **{key: sorted({int(s[key]) for s in settled}) for key in ("descriptors", "threads")},
        "samples": [
            [round(value, 2) for value in s.values()] for s in samples[:: max(1, len(samples) // 120)]
        ],
    }


def _write_clip(path: Path) -> None:
    import cv2

    from pipeline.synthetic import SyntheticCamera

    camera = SyntheticCamera(3)
    pictures = [np.ascontiguousarray(camera.frame(index)[0][:, :, ::-1]) for index in range(60)]
    height, width = pictures[0].shape[:2]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 10.0, (width, height))
    for picture in pictures:
        writer.write(picture)
    writer.release()


def build_bundle(folder: Path) -> Path:
    """The road signs' network, as `make demo` builds it."""
    command = [*EDGEFOLD, "build", "inception_resnet_lite.signs"]
    command += ["--calib", "synthetic:1:64", "--out", str(folder / "signs")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder / "signs"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--every", type=float, default=20.0, help="seconds between faults")
    parser.add_argument("--warm-up", type=float, default=10.0, help="minutes left out of the slope")
    parser.add_argument("--bundle", type=Path, help="instead of one built for the run")
    parser.add_argument("--name", default="soak", help="of the JSON file in benchmarks/results")
    arguments = parser.parse_args()
    stamp = machine_stamp()
    with TemporaryDirectory() as folder:
        bundle = arguments.bundle or build_bundle(Path(folder))
        found = soak(60 * arguments.minutes, arguments.every, 60 * arguments.warm_up, bundle.resolve())
    goal = {"crashes": 0, "slope_mb_per_hour": 1.0, "descriptors": "constant", "threads": "constant"}
    print(write_results(arguments.name, {"machine": stamp, "goal": goal, **found}))
    print(json.dumps({key: value for key, value in found.items() if key != "samples"}, indent=2))


if __name__ == "__main__":
    main()
