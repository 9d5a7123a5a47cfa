"""A running camera app as its page sees it: views made of real metrics, states that a test sets."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from apps.streaming.contracts import (
    DeviceReading,
    EngineView,
    Event,
    SourceState,
    SourceStatus,
    SourceView,
    StreamView,
)
from apps.streaming.metrics import STAGES, StreamMetrics
from apps.streaming.predictions import Prediction, RankedClass
from pipeline.errors import IntegrityError

LABELS = ("ship", "aeroplane", "bird")
JETSON = DeviceReading(
    temperatures_c={"CPU": 51.5, "GPU": 49.0},
    power_mw={"VDD_IN": 7320.0},
    power_mode="15W",
    cpu_percent=38.0,
    memory_used_bytes=412 * 2**20,
)


@dataclass
class FakeSource:
    """One source; `run` lets frames pass through its metrics."""

    name: str
    state: SourceState = SourceState.LIVE
    reason: str | None = None
    last_frame_age_s: float | None = 0.05
    frozen: bool = False
    restarts: int = 0
    present: tuple[str, ...] = ()
    metrics: StreamMetrics = field(default_factory=StreamMetrics)
    n_frames: int = 0

    def run(self, n_frames: int, age_s: float = 0.04) -> None:
        for _ in range(n_frames):
            self.n_frames += 1
            self.metrics.frame_read()
            for stage in STAGES:
                self.metrics.record(stage, age_s if stage == "age" else age_s / 4)
            self.metrics.frame_inferred(None)

    def view(self, now_ns: int) -> SourceView:
        age_s = self.last_frame_age_s
        last_ns = None if age_s is None else now_ns - int(age_s * 1e9)
        status = SourceStatus(
            source_id=self.name,
            state=self.state,
            since_ns=now_ns - 90 * 10**9,
            reason=self.reason,
            fps=30.0,
            size_wh=(640, 360),
            last_frame_ns=last_ns,
            restarts=self.restarts,
            stalls=self.restarts // 2,
            frozen=self.frozen,
        )
        shares = (0.9, 0.07, 0.03)
        top = tuple(RankedClass(i, label, shares[i]) for i, label in enumerate(LABELS))
        latest = None if last_ns is None else Prediction(self.name, self.n_frames, last_ns, top, None)
        return SourceView(status, self.metrics.snapshot(), latest, self.present)


class FakeApp:
    """What a `PageServer` is given: `view`, `reload`, `check`."""

    def __init__(self, names: Sequence[str], device: DeviceReading | None = None) -> None:
        self.sources = [FakeSource(name) for name in names]
        self.device = device or DeviceReading()
        self.events: dict[str, dict[str, int]] = {}
        self.reloaded: list[Path | None] = []
        self.refuse: str | None = None
        self.hold = threading.Event()
        """Cleared, `view` and `reload` do not return until it is set."""
        self.hold.set()
        self.n_views = 0

    def view(self) -> StreamView:
        self.n_views += 1
        self.hold.wait()
        now_ns = time.monotonic_ns()
        engine = EngineView(
            bundle="harbour",
            bundle_digest="3f9a0c11d2e4",
            engine="openvino",
            precision="int8",
            reloads=len(self.reloaded),
            reload_failures=0,
            last_reload_error=None,
            batches=400,
            batched_frames=1000,
        )
        return StreamView(
            uptime_s=4000.0,
            sources=tuple(source.view(now_ns) for source in self.sources),
            engine=engine,
            device=self.device,
            events=self.events,
            max_age_ms=1000.0,
            preprocessing="verified 2026-11-25T08:00:00Z",
        )

    def reload(self, bundle: Path | None) -> None:
        self.hold.wait()
        if self.refuse is not None:
            raise IntegrityError(self.refuse)
        self.reloaded.append(bundle)

    def check(self) -> str:
        return "verified just now"


def entered(source_id: str, label: str, timestamp_ns: int = 0) -> Event:
    return Event("enter", source_id, label, 0, 0.91, 7, timestamp_ns, "2026-11-25T08:00:00.000Z")


def picture(value: int = 128, hw: tuple[int, int] = (360, 640)) -> NDArray[np.uint8]:
    """A gray picture with a bright stripe whose place depends on `value`: uint8 BGR."""
    image = np.full((*hw, 3), value % 200 + 20, np.uint8)
    column = value * 8 % hw[1]
    image[:, column : column + 24] = (90, 200, 120)
    return image
