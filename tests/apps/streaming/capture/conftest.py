"""Feeds over scripted sources in real capture processes, with limits of milliseconds."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import capture_sources
import pytest
from waiting import PATIENCE_S, eventually

from apps.streaming.capture import open_feed
from apps.streaming.capture.supervisor import ProcessFeed
from apps.streaming.config import CaptureLimits, SourceConfig
from apps.streaming.contracts import CapturedFrame
from apps.streaming.metrics import StreamMetrics
from apps.streaming.sources import ModelClasses, SourceUri

LIMITS = CaptureLimits(
    degraded_s=0.3, stall_s=0.8, open_s=10.0, frozen_s=0.2, backoff_s=(0.01, 0.05), lost_retry_s=0.3
)
CLASSES = ModelClasses(("blue", "green", "red"), 3)


class Harness:
    """A feed, its metrics, and a consumer that checks the books."""

    def __init__(self, feed: ProcessFeed, metrics: StreamMetrics, script: Path) -> None:
        self.feed = feed
        self.metrics = metrics
        self.script = script
        self.taken: list[tuple[int, tuple[int, ...], int]] = []
        self.started = False

    def start(self) -> Harness:
        self.feed.start(lambda: None)
        self.started = True
        return self

    def openings(self) -> int:
        counter = Path(f"{self.script}.count")
        return int(counter.read_text() or 0) if counter.exists() else 0

    def next(self) -> CapturedFrame:
        """The next frame, not released."""
        taken: list[CapturedFrame] = []

        def take() -> bool:
            captured = self.feed.take()
            taken.extend([] if captured is None else [captured])
            return bool(taken)

        eventually(take, shown=self.feed.status)
        return taken[0]

    def pump(self) -> int:
        """Takes what waits; notes index, shape and value of each frame."""
        n = 0
        while (captured := self.feed.take()) is not None:
            image = captured.frame.image
            self.taken.append((captured.frame.index, image.shape, int(image.flat[0])))
            assert (image == image.flat[0]).all()
            self.metrics.frame_inferred(None)
            captured.release()
            n += 1
        return n

    def until(self, condition: Callable[[], Any], seconds: float = PATIENCE_S) -> float:
        """Pumps until `condition`; returns the seconds it took."""
        start_s = time.monotonic()
        while not condition():
            self.pump()
            waited_s = time.monotonic() - start_s
            assert waited_s < seconds, (self.feed.status(), self.metrics.snapshot().dropped, len(self.taken))
            time.sleep(0.002)
        self.pump()
        return time.monotonic() - start_s

    def close(self) -> None:
        if self.started:
            self.started = False
            self.feed.close()

    def books(self) -> None:
        """After `close`: whatever was read was inferred or dropped."""
        snapshot = self.metrics.snapshot()
        assert snapshot.frames_read == snapshot.frames_inferred + sum(snapshot.dropped.values())


@pytest.fixture
def scripted(tmp_path: Path) -> Iterator[Callable[..., Harness]]:
    made: list[Harness] = []

    def make(
        *scripts: list[str], live: bool = True, name: str = "script", policy: Any = None, **limits: Any
    ) -> Harness:
        path = tmp_path / f"{name}{len(made)}.json"
        path.write_text(json.dumps(scripts))
        uri = SourceUri("v4l2" if live else "video", str(path), str(path), path=path)
        metrics = StreamMetrics()
        feed = open_feed(
            SourceConfig(str(path), name=f"{name}{len(made)}", policy=policy),
            uri,
            CLASSES,
            replace(LIMITS, **limits),
            metrics,
            opener=capture_sources.open_scripted,
        )
        assert isinstance(feed, ProcessFeed)
        made.append(Harness(feed, metrics, path))
        return made[-1]

    yield make
    for harness in made:
        harness.close()
