"""The last events, for the page."""

from __future__ import annotations

import threading
from collections import deque

from apps.streaming.contracts import Event

__all__ = ["RecentEvents"]

_CAPACITY = 50


class RecentEvents:
    """An `EventOutput` that keeps the last 50 events; older ones are forgotten, as a display does."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._events: deque[Event] = deque(maxlen=_CAPACITY)
        self._published = 0

    def publish(self, event: Event) -> None:
        """Keeps the event."""
        with self._lock:
            self._events.append(event)
            self._published += 1

    def latest(self) -> tuple[Event, ...]:
        """What is kept, newest first."""
        with self._lock:
            return tuple(reversed(self._events))

    def counters(self) -> dict[str, int]:
        """See `EventOutput.counters`; every event is delivered by being kept."""
        with self._lock:
            return {
                "published": self._published,
                "delivered": self._published,
                "dropped": 0,
                "queued": 0,
                "failures": 0,
            }

    def close(self) -> None:
        """Nothing is left to deliver."""
