"""The real command over four sources, a fault in turn, and what the app itself says of each.

`benchmarks/soak.py` runs it for an hour, ``make test-soak`` for two rounds. The app is a process of its own, with the
page, events, a recording under a quota, and JSON logs. It looks at two cameras on loopback that can be told to
misbehave (MJPEG), at a video that is played in a loop, and at the synthetic camera. Before the first fault, it is
watched for a while in peace: a reading that rises by itself proves nothing of a fault, and is reported.
"""

from __future__ import annotations

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
from mjpeg_camera import MjpegCamera

__all__ = ["EDGEFOLD", "EXIT_LIMIT_S", "Fault", "Limits", "Soak", "disturb", "running", "shortfalls", "soak"]

EDGEFOLD = (sys.executable, "-c", "from apps.cli import main; main()")
EXIT_LIMIT_S = 5.0
"""What a service manager is told to wait at least."""

GROWTH_LIMIT_MB = 5.0
"""Of a short run; an hour is judged by its slope."""

_SAMPLE_S = 5.0
_POLL_S = 0.2
_START_LIMIT_S = 120.0
_SETTLE_LIMIT_S = 60.0
_N_CLIENTS = 30
_MAX_CLIENTS = 8
_SOURCES = ("one", "two", "video", "synthetic")
_N_CAPTURES = 3  # the synthetic camera is a thread
_CONFIG = """
bundle = "{bundle}"
headless = true
log_json = true
max_age_ms = 1000

[limits]
degraded_s = {limits.degraded_s}
stall_s = {limits.stall_s}
frozen_s = {limits.frozen_s}
backoff_s = [{limits.backoff_s[0]}, {limits.backoff_s[1]}]
restart_budget = 1000000
lost_retry_s = {limits.lost_retry_s}

[events]
log = "{folder}/events.jsonl"

[serve]
port = {port}
max_clients = {max_clients}

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


@dataclass(frozen=True, slots=True)
class Limits:
    """What the app is told about silence and restarts, in seconds."""

    degraded_s: float = 1.0
    stall_s: float = 3.0
    frozen_s: float = 4.0
    backoff_s: tuple[float, float] = (0.5, 4.0)
    lost_retry_s: float = 4.0


@dataclass(frozen=True, slots=True)
class Fault:
    """What is done, and a reading of the app that rises because of it, and only because of it."""

    name: str
    inject: Callable[[], object]
    reading: Callable[[], float]
    undo: Callable[[], object] = lambda: None


@dataclass
class Soak:
    """One run of the app, the cameras it looks at, and what was seen of both."""

    folder: Path
    bundle: Path
    port: int
    cameras: tuple[MjpegCamera, MjpegCamera]
    process: subprocess.Popen[bytes]
    samples: list[dict[str, float]] = field(default_factory=list)
    clients: list[socket.socket] = field(default_factory=list)

    # --- what is looked at ---

    def alive(self) -> bool:
        return self.process.poll() is None

    def get(self, path: str) -> str:
        """A page of the app; empty while it does not answer."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as answer:
                text: str = answer.read().decode()
                return text
        except OSError:
            return ""

    def metric(self, name: str, **labels: str) -> float:
        """Summed over the labels that are not given; NaN, which is above and below nothing, without an answer."""
        lines = self.get("/metrics").splitlines()
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        values = [
            float(line.rsplit(" ", 1)[1])
            for line in lines
            if line.startswith((f"{name}{{", f"{name} ")) and all(label in line for label in wanted)
        ]
        return sum(values) if lines else float("nan")

    def status(self, source: str) -> dict[str, Any]:
        """Of a source, as the page shows it; empty while there is no answer."""
        sources = json.loads(self.get("/api/view") or '{"sources": []}')["sources"]
        found: dict[str, Any] = next((s["status"] for s in sources if s["status"]["source_id"] == source), {})
        return found

    def width(self, source: str) -> float:
        return float((self.status(source).get("size_wh") or [float("nan")])[0])

    def is_settled(self) -> bool:
        """Every source plays, and nothing that a fault left is still under way."""
        sources = json.loads(self.get("/api/view") or '{"sources": []}')["sources"]
        states = [(s["status"]["state"], s["status"]["frozen"]) for s in sources]
        return (
            states == [("LIVE", False)] * len(_SOURCES)
            and len(self.children()) == _N_CAPTURES
            and self.width("two") == 320
        )

    def sample(self) -> dict[str, float]:
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
        return self.samples[-1]

    def children(self) -> list[int]:
        """Capture processes: they are started by threads, so every thread's children count."""
        pids: list[int] = []
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            with contextlib.suppress(OSError):
                pids += [int(pid) for pid in (task / "children").read_text().split()]
        return pids

    def wait(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Whether it came about in time, while the app lived; samples are taken meanwhile."""
        deadline = time.monotonic() + seconds
        while self.alive():
            if not self.samples or time.monotonic() >= self.samples[-1]["seconds"] + _SAMPLE_S:
                self.sample()
            if condition():
                return True
            if time.monotonic() >= deadline:
                return False
            time.sleep(_POLL_S)
        return False

    # --- what is done to it ---

    def faults(self) -> tuple[Fault, ...]:
        two = self.cameras[1]

        def behave(how: Any) -> Callable[[], None]:
            return lambda: setattr(two, "behaviour", how)

        def metric(name: str, **labels: str) -> Callable[[], float]:
            return lambda: self.metric(name, **labels)

        well = behave("well")
        restarts = metric("edgefold_source_restarts_total", source="two")
        stalls = metric("edgefold_source_stalls_total", source="two")
        any_restart = metric("edgefold_source_restarts_total")
        any_stall = metric("edgefold_source_stalls_total")
        corrupt = metric("edgefold_frames_dropped_total", source="two", reason="no image")
        frozen = metric("edgefold_source_frozen", source="two")
        refused = metric("edgefold_page_clients_refused_total")
        failed = metric("edgefold_engine_reload_failures_total")
        return (
            Fault("capture process killed", lambda: self.signal_child(signal.SIGKILL), any_restart),
            Fault("camera stalls", behave("stalls"), stalls, well),
            Fault("camera closes", behave("closes"), restarts, well),
            Fault("camera answers 404", behave("404"), restarts, well),
            Fault("corrupt pictures", behave("corrupt"), corrupt, well),
            Fault("frozen pictures", behave("frozen"), frozen, well),
            Fault("another size", behave("other size"), lambda: self.width("two"), well),
            Fault("capture process stopped", lambda: self.signal_child(signal.SIGSTOP), any_stall),
            Fault(
                "bundle loaded anew",
                lambda: self.process.send_signal(signal.SIGHUP),
                metric("edgefold_engine_reloads_total"),
            ),
            Fault("damaged bundle loaded", self.load_damaged, failed, lambda: self.point_at(self.bundle)),
            Fault("clients that never read", self.open_clients, refused, self.close_clients),
        )

    def signal_child(self, number: int) -> None:
        children = sorted(self.children())
        os.kill(children[len(self.samples) % len(children)], number)

    def point_at(self, bundle: Path) -> None:
        """The app's bundle is a link, as a deployment swaps it."""
        temporary = self.folder / "next"
        temporary.symlink_to(bundle)
        temporary.replace(self.folder / "current")

    def load_damaged(self) -> None:
        self.point_at(self.folder / "damaged")
        self.process.send_signal(signal.SIGHUP)

    def open_clients(self) -> None:
        for _ in range(_N_CLIENTS):
            with contextlib.suppress(OSError):
                client = socket.create_connection(("127.0.0.1", self.port), timeout=5)
                client.sendall(b"GET /video/one HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
                self.clients.append(client)

    def close_clients(self) -> None:
        for client in self.clients:
            client.close()
        self.clients.clear()


def disturb(app: Soak, fault: Fault, patience_s: float) -> bool:
    """Injects a fault that is undone once the app counted it, or did not in time; whether it did."""
    before = fault.reading()
    fault.inject()
    counted = app.wait(lambda: fault.reading() > before, patience_s)
    fault.undo()
    return counted


def soak(
    bundle: Path,
    *,
    rounds: int,
    warm_up_rounds: int,
    every_s: float = 0.0,
    quiet_s: float = 10.0,
    patience_s: float = 30.0,
    limits: Limits = Limits(),
) -> dict[str, Any]:
    """Runs, disturbs, stops; everything that was seen, JSON-compatible.

    Args:
        bundle: what infers.
        rounds: how often each of the faults is injected.
        warm_up_rounds: after which memory, descriptors and threads are compared with those of the end.
        every_s: between the beginnings of two faults at least; the app has recovered from the one before.
        quiet_s: before the first, in which no reading may rise.
        patience_s: for the app to count a fault.
        limits: of the app.
    """
    with running(bundle, limits) as app:
        began = time.monotonic()
        faults = app.faults()
        injected: dict[str, int] = {}
        counted: dict[str, int] = {}
        app.wait(app.is_settled, _SETTLE_LIMIT_S)
        before = {fault.name: fault.reading() for fault in faults}
        app.wait(lambda: False, quiet_s)
        rising = [fault.name for fault in faults if not fault.reading() <= before[fault.name]]
        unsettled: list[str] = []
        first = app.sample()
        for turn in range(rounds * len(faults)):
            if not app.alive():
                break
            fault, due_s = faults[turn % len(faults)], time.monotonic() + every_s
            injected[fault.name] = injected.get(fault.name, 0) + 1
            counted[fault.name] = counted.get(fault.name, 0) + disturb(app, fault, patience_s)
            if not app.wait(app.is_settled, _SETTLE_LIMIT_S):
                unsettled.append(fault.name)
            app.wait(lambda due_s=due_s: time.monotonic() >= due_s, every_s)  # type: ignore[misc]
            if turn + 1 == warm_up_rounds * len(faults) and app.alive():
                first = app.sample()

        def is_as_before() -> bool:  # what is about to be closed has a while for it; a leak stays
            now = app.sample()
            return all(now[key] <= first[key] for key in ("descriptors", "threads"))

        app.wait(is_as_before, _SETTLE_LIMIT_S)
        crashed = not app.alive()
        exit_code, exit_s = _stop(app)
        log = (app.folder / "log.jsonl").read_text()
    return {
        "seconds": time.monotonic() - began,
        "crashes": int(crashed),
        "exit_code": exit_code,
        "seconds_to_exit": exit_s,
        "tracebacks": log.count("Traceback"),
        "rising_by_itself": rising,
        "injected": injected,
        "counted": counted,
        "not_recovered_from": unsettled,
        **_growth(app.samples, first),
        "frames_inferred": app.samples[-1]["frames"],
        "last_log_lines": log.splitlines()[-5:] if crashed or exit_code else [],
    }


def shortfalls(found: dict[str, Any]) -> list[str]:
    """What of a run is not as it must be, in words; memory is judged by the caller."""
    missed = {name: n - found["counted"].get(name, 0) for name, n in found["injected"].items()}
    checks = {
        "the app crashed": found["crashes"],
        f"exit code {found['exit_code']}": found["exit_code"] != 0,
        f"{found['seconds_to_exit']:.1f} s to exit": found["seconds_to_exit"] >= EXIT_LIMIT_S,
        f"{found['tracebacks']} tracebacks in the log": found["tracebacks"],
        "nothing was inferred": not found["frames_inferred"] > 0,
        "no fault was injected": not found["injected"],
        f"rose though nothing was done: {found['rising_by_itself']}": found["rising_by_itself"],
        f"not counted: { ({name: n for name, n in missed.items() if n}) }": any(missed.values()),
        f"not recovered from: {found['not_recovered_from']}": found["not_recovered_from"],
        f"descriptors grew by {found['grown']['descriptors']:g}": found["grown"]["descriptors"] > 0,
        f"threads grew by {found['grown']['threads']:g}": found["grown"]["threads"] > 0,
    }
    return [words for words, wrong in checks.items() if wrong]


@contextlib.contextmanager
def running(bundle: Path, limits: Limits = Limits()) -> Iterator[Soak]:
    """The app, its cameras and its files; everything is gone afterwards."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="edgefold-soak-")))
        (folder / "recordings").mkdir()
        _write_clip(folder / "clip.mp4")
        _write_damaged(bundle, folder / "damaged")
        (folder / "current").symlink_to(bundle)
        cameras = (MjpegCamera(), MjpegCamera())
        for camera in cameras:
            stack.callback(camera.close)
        # Held by a socket that never listens, so that it is nobody else's by the time the app asks for it.
        holder = stack.enter_context(socket.socket())
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        port = holder.getsockname()[1]
        config = folder / "cameras.toml"
        config.write_text(
            _CONFIG.format(
                bundle=folder / "current",
                folder=folder,
                port=port,
                one=cameras[0].url,
                two=cameras[1].url,
                limits=limits,
                max_clients=_MAX_CLIENTS,
            )
        )
        log = stack.enter_context((folder / "log.jsonl").open("wb"))
        command = [*EDGEFOLD, "stream", "--config", str(config)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log)
        stack.callback(process.wait)
        stack.callback(process.kill)
        app = Soak(folder, bundle, port, cameras, process)
        stack.callback(app.close_clients)
        if not app.wait(lambda: app.metric("edgefold_frames_inferred_total") > 0, _START_LIMIT_S):
            raise SystemExit(f"the app did not start:\n{(folder / 'log.jsonl').read_text()[-2000:]}")
        yield app


def _stop(app: Soak) -> tuple[int | None, float]:
    began = time.monotonic()
    app.process.send_signal(signal.SIGTERM)
    try:
        return app.process.wait(timeout=4 * EXIT_LIMIT_S), time.monotonic() - began
    except subprocess.TimeoutExpired:
        return None, time.monotonic() - began


def _growth(samples: list[dict[str, float]], first: dict[str, float]) -> dict[str, Any]:
    """What is held more at the end than at `first`, and the slope of memory between them by least squares."""
    last, kept = samples[-1], [s for s in samples if s["seconds"] >= first["seconds"]]
    hours = np.array([s["seconds"] for s in kept]) / 3600
    slopes = {
        key: float(np.polyfit(hours, [s[key] for s in kept], 1)[0]) if len(kept) > 2 else 0.0
        for key in ("rss_mb", "anonymous_mb")
    }
    return {
        "warm_up_seconds": first["seconds"] - samples[0]["seconds"],
        "slope_mb_per_hour": slopes,
        "grown": {
            key: round(last[key] - first[key], 2)
            for key in ("rss_mb", "anonymous_mb", "descriptors", "threads")
        },
        "rss_mb": [first["rss_mb"], last["rss_mb"], max(s["rss_mb"] for s in kept)],
        "descriptors": [first["descriptors"], last["descriptors"]],
        "threads": [first["threads"], last["threads"]],
        "samples": [
            [round(value, 2) for value in s.values()] for s in samples[:: max(1, len(samples) // 120)]
        ],
    }


def _write_damaged(bundle: Path, path: Path) -> None:
    """The bundle with one bit of its engine turned."""
    shutil.copytree(bundle, path)
    engine = path / "model.int8.onnx"
    content = bytearray(engine.read_bytes())
    content[len(content) // 2] ^= 1
    engine.write_bytes(content)


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
