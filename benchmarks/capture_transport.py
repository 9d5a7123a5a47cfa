"""CPU time that handing a 1080p frame from a capture process to the runtime costs, on both sides.

    python benchmarks/capture_transport.py [--frames N] [--json FILE]

The source writes nothing (its frame is already in the slot), so what is measured is the transport:
check, time stamp, fingerprint, message, supervisor thread, take and release. To be run on a machine
that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import threading
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from apps.streaming.capture import open_feed
from apps.streaming.config import CaptureLimits, SourceConfig
from apps.streaming.metrics import StreamMetrics
from apps.streaming.sources import Delivered, ModelClasses, SourceUri

FPS = 100.0


class IdleCamera:
    color = "BGR"
    live = True
    self_paced = False
    fps = FPS

    def __init__(self, uri: SourceUri) -> None:
        self.source_id = uri.shown
        self.labels = ("0",)
        self.notes: list[str] = []
        self._first = np.zeros((1080, 1920, 3), np.uint8)

    def read(self, into: NDArray[np.uint8] | None = None) -> Delivered:
        return Delivered(self._first if into is None else into)

    def close(self) -> None:
        pass


def open_idle(uri: SourceUri, classes: ModelClasses, fps: float | None) -> IdleCamera:
    return IdleCamera(uri)


def child_cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/schedstat").read_text().split()
    return int(fields[0]) / 1e9


def measure(n_frames: int) -> dict[str, float]:
    import capture_transport  # a capture process opens it by this name, not as __main__

    ready = threading.Event()
    uri = SourceUri("v4l2", "idle", "idle")
    feed = open_feed(
        SourceConfig("idle"),
        uri,
        ModelClasses(("0",), 1),
        CaptureLimits(frozen_s=1e9),
        StreamMetrics(),
        opener=capture_transport.open_idle,
    )
    spawned_s = time.monotonic()
    feed.start(ready.set)

    def take(count: int) -> None:
        while count:
            ready.wait()
            ready.clear()
            while (captured := feed.take()) is not None:
                captured.release()
                count -= 1

    take(1)
    first_frame_s = time.monotonic() - spawned_s
    spawn_cpu_s = child_cpu_s(feed.pid)  # type: ignore[attr-defined]
    take(int(FPS))
    child_s = child_cpu_s(feed.pid)  # type: ignore[attr-defined]
    parent_s = resource.getrusage(resource.RUSAGE_SELF)
    take(n_frames)
    child_us = 1e6 * (child_cpu_s(feed.pid) - child_s) / n_frames  # type: ignore[attr-defined]
    now = resource.getrusage(resource.RUSAGE_SELF)
    feed.close()
    used_s = now.ru_utime + now.ru_stime - parent_s.ru_utime - parent_s.ru_stime
    return {
        "frames": n_frames,
        "parent_us_per_frame": round(1e6 * used_s / n_frames, 1),
        "child_us_per_frame": round(child_us, 1),
        "first_frame_s": round(first_frame_s, 3),
        "spawn_cpu_s": round(spawn_cpu_s, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=1000)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    result = measure(arguments.frames) | {"machine": platform.machine(), "python": platform.python_version()}
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
