"""Frames between a capture and the runtime, with the policy for when it does not take them."""

from __future__ import annotations

import threading
from collections import deque

from apps.streaming.contracts import CapturedFrame
from apps.streaming.metrics import StreamMetrics
from apps.streaming.queues import DropPolicy

__all__ = ["WaitingFrames"]


class WaitingFrames:
    """Under ``newest`` one frame, the latest; under ``every`` all, which the buffers of the source bound.

    Every method may be called from any thread. What is given up is released and counted.
    """

    def __init__(self, policy: DropPolicy, metrics: StreamMetrics) -> None:
        self._policy = policy
        self._metrics = metrics
        self._lock = threading.Lock()
        self._frames: deque[CapturedFrame] = deque()
        self._closed = False

    def put(self, frame: CapturedFrame) -> None:
        """Queues a frame; gives up the one that waits, under ``newest``."""
        with self._lock:
            given_up = [frame] if self._closed else []
            if not self._closed:
                if self._policy == "newest":
                    given_up = list(self._frames)
                    self._frames.clear()
                self._frames.append(frame)
            reason = "stopped" if self._closed else "newer frame"
        self._give_up(given_up, reason)

    def take(self) -> CapturedFrame | None:
        """The oldest frame that waits; ``None`` where none does."""
        with self._lock:
            return self._frames.popleft() if self._frames else None

    def close(self) -> None:
        """Gives up whatever waits, and whatever still comes, as ``stopped``."""
        with self._lock:
            self._closed = True
            given_up = list(self._frames)
            self._frames.clear()
        self._give_up(given_up, "stopped")

    def __len__(self) -> int:
        with self._lock:
            return len(self._frames)

    def _give_up(self, frames: list[CapturedFrame], reason: str) -> None:
        for frame in frames:
            frame.release()
            self._metrics.frame_dropped(reason)
