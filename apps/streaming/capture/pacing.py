"""The rate at which a source that could deliver at once is made to deliver."""

from __future__ import annotations

from apps.streaming.queues import DropPolicy
from apps.streaming.sources import Source

__all__ = ["Pacer", "pace_fps"]


def pace_fps(source: Source, policy: DropPolicy, asked_fps: float | None) -> float | None:
    """Frames a second to hold `source` to; ``None``: as fast as it goes.

    A camera sets its own pace. What is to look live is played at its rate; the rest runs as fast as
    the engine takes it, unless a rate was asked for.
    """
    if source.self_paced:
        return None
    return source.fps if source.live or policy == "newest" or asked_fps is not None else None


class Pacer:
    """When the next frame is due. Times are seconds of any one monotonic clock."""

    def __init__(self, fps: float | None, now_s: float) -> None:
        self._interval_s = 0.0 if fps is None else 1.0 / fps
        self._due_s = now_s

    def delay_s(self, now_s: float) -> float:
        """How long the frame that was just read is to be held back; 0 without a rate.

        The schedule is kept, but what fell behind it is not made up for in a burst.
        """
        if not self._interval_s:
            return 0.0
        self._due_s = max(self._due_s + self._interval_s, now_s - self._interval_s)
        return max(0.0, self._due_s - now_s)
