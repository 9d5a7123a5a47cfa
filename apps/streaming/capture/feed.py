"""What a feed over a process and one over a thread have in common: a thread of their own, and frames that wait."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable

from apps.streaming.capture.health import SourceHealth
from apps.streaming.capture.waiting import WaitingFrames
from apps.streaming.config import CaptureLimits
from apps.streaming.contracts import CapturedFrame
from apps.streaming.metrics import StreamMetrics
from apps.streaming.queues import DropPolicy
from pipeline.errors import EdgefoldError

__all__ = ["CaptureFeed"]


class CaptureFeed(ABC):
    """The part of a `Feed` that does not depend on where its source is read.

    Args:
        source_id: its name in all output.
        live: whether frames pass whether or not they are taken.
        policy: what happens to frames that come faster than they are taken.
        limits: when it is in trouble.
        metrics: counts what was read and dropped.
    """

    def __init__(
        self, source_id: str, live: bool, policy: DropPolicy, limits: CaptureLimits, metrics: StreamMetrics
    ) -> None:
        self.source_id = source_id
        self.live = live
        self.policy = policy
        self.labels: tuple[str, ...] = ()
        self.notes: list[str] = []
        self._metrics = metrics
        self._waiting = WaitingFrames(policy, metrics)
        self._lock = threading.Lock()
        self._health = SourceHealth(source_id, limits, time.monotonic_ns())
        self._failure: EdgefoldError | None = None
        self._on_ready: Callable[[], None] = lambda: None
        self._over = False
        self._thread = threading.Thread(target=self._run, name=f"capture {source_id}"[:40], daemon=True)

    def start(self, on_ready: Callable[[], None]) -> None:
        """See `Feed.start`."""
        self._on_ready = on_ready
        self._thread.start()

    def take(self) -> CapturedFrame | None:
        """See `Feed.take`."""
        return self._waiting.take()

    @property
    def exhausted(self) -> bool:
        """See `Feed.exhausted`."""
        return self._over and not len(self._waiting)

    def failure(self) -> Exception | None:
        """See `Feed.failure`."""
        return self._failure

    @abstractmethod
    def _run(self) -> None:
        """The thread: captures until the source is through, or `close`."""

    def _end(self, error: EdgefoldError | None) -> None:
        """Nothing will come any more."""
        with self._lock:
            self._health.ended(time.monotonic_ns(), None if error is None else str(error))
        self._failure = error
        self._over = True
        self._on_ready()
