"""The app of the soak as a process of its own: how it is started, looked at and stopped."""

from __future__ import annotations

import contextlib
import json
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

__all__ = ["EDGEFOLD", "EXIT_LIMIT_S", "USUAL", "Limits", "SoakApp", "running"]

EDGEFOLD = (sys.executable, "-c", "from apps.cli import main; main()")
EXIT_LIMIT_S = 5.0
"""What a service manager is told to wait at least."""

_SAMPLE_S = 5.0
_POLL_S = 0.2
_START_LIMIT_S = 120.0
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


USUAL = Limits()


@dataclass
class SoakApp:
    """One run of the app, the cameras it looks at, and what was seen of both."""

    folder: Path
    bundle: Path
    port: int
    cameras: tuple[MjpegCamera, MjpegCamera]
    process: subprocess.Popen[bytes]
    samples: list[dict[str, float]] = field(default_factory=list)

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

    def stop(self) -> tuple[int | None, float]:
        """Asks it to end; its exit code, ``None`` where it is still there, and the seconds that took."""
        began = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout=4 * EXIT_LIMIT_S), time.monotonic() - began
        except subprocess.TimeoutExpired:
            return None, time.monotonic() - began


@contextlib.contextmanager
def running(bundle: Path, limits: Limits) -> Iterator[SoakApp]:
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
        app = SoakApp(folder, bundle, port, cameras, process)
        if not app.wait(lambda: app.metric("edgefold_frames_inferred_total") > 0, _START_LIMIT_S):
            raise SystemExit(f"the app did not start:\n{(folder / 'log.jsonl').read_text()[-2000:]}")
        yield app


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
