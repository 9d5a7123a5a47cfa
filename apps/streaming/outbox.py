"""Events on their way to a receiver that may be away: bounded, in order, and counted."""

from __future__ import annotations

import threading
from collections import deque

__all__ = ["Outbox"]


class Outbox:
    """At most `capacity` events wait; the oldest is given up for a new one.

    What is taken stays here, in flight, until it is confirmed: a receiver that goes away in between gets
    it again, in its old place. One thread takes; any may put.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._waiting: deque[tuple[int, str, str]] = deque()
        self._in_flight: dict[int, tuple[int, str, str]] = {}
        self._changed = threading.Condition()
        self._published = self._delivered = self._dropped = self._failures = 0

    def put(self, source_id: str, line: str) -> None:
        """Queues one event as text; never blocks."""
        with self._changed:
            self._waiting.append((self._published, source_id, line))
            self._published += 1
            self._trim()
            self._changed.notify_all()

    def take(self, timeout_s: float = 0.0) -> tuple[int, str, str] | None:
        """The oldest that waits, as (number, source, text); ``None`` after `timeout_s` without one."""
        with self._changed:
            if not self._changed.wait_for(lambda: bool(self._waiting), timeout_s):
                return None
            entry = self._waiting.popleft()
            self._in_flight[entry[0]] = entry
            return entry

    def confirm(self, number: int) -> None:
        """The receiver has it."""
        with self._changed:
            del self._in_flight[number]
            self._delivered += 1

    def restore(self) -> None:
        """The receiver is gone: what was in flight waits again, before everything newer."""
        with self._changed:
            self._waiting.extendleft(reversed(self._in_flight.values()))
            self._in_flight.clear()
            self._trim()

    def failed(self) -> None:
        """Counts an attempt that did not succeed."""
        with self._changed:
            self._failures += 1

    @property
    def empty(self) -> bool:
        """Whether everything was delivered or given up."""
        with self._changed:
            return not self._waiting and not self._in_flight

    @property
    def n_in_flight(self) -> int:
        """Taken and not confirmed."""
        with self._changed:
            return len(self._in_flight)

    def counters(self) -> dict[str, int]:
        """As `apps.streaming.contracts.EventOutput` has them: published = delivered + dropped + queued."""
        with self._changed:
            return {
                "published": self._published,
                "delivered": self._delivered,
                "dropped": self._dropped,
                "queued": len(self._waiting) + len(self._in_flight),
                "failures": self._failures,
            }

    def _trim(self) -> None:
        while len(self._waiting) > self._capacity:
            self._waiting.popleft()
            self._dropped += 1
