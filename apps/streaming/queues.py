"""A bounded queue between two threads, with a stated policy for when it is full."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, Literal, TypeVar

__all__ = ["DropPolicy", "StageQueue"]

DropPolicy = Literal["newest", "every"]
"""``newest``: a full queue gives up its oldest item for the new one, so what is read is fresh;
``every``: the producer waits, so nothing is lost."""

T = TypeVar("T")


class StageQueue(Generic[T]):
    """At most `capacity` items between one producer and one consumer.

    The producer ends it with `close` (what is queued is still delivered); either side ends it with
    `abort` (what is queued is discarded). No call blocks once the queue has ended.
    """

    def __init__(
        self, capacity: int, policy: DropPolicy = "every", on_drop: Callable[[T], None] | None = None
    ) -> None:
        self._items: deque[T] = deque()
        self._capacity = capacity
        self._policy = policy
        self._on_drop = on_drop
        self._changed = threading.Condition()
        self._closed = False

    def put(self, item: T) -> bool:
        """Queues `item`; waits for room under ``every``. Returns ``False`` if the queue has ended."""
        dropped: T | None = None
        with self._changed:
            if self._policy == "every":
                self._changed.wait_for(lambda: self._closed or len(self._items) < self._capacity)
            if self._closed:
                return False
            if len(self._items) >= self._capacity:
                dropped = self._items.popleft()
            self._items.append(item)
            self._changed.notify_all()
        if dropped is not None and self._on_drop is not None:
            self._on_drop(dropped)
        return True

    def get(self, timeout_s: float | None = None) -> T | None:
        """Takes the oldest item; ``None`` after `timeout_s` without one, or once `exhausted`."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or bool(self._items), timeout_s)
            if not self._items:
                return None
            item = self._items.popleft()
            self._changed.notify_all()
            return item

    def close(self) -> None:
        """The producer is done; the consumer still gets what is queued."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def abort(self) -> list[T]:
        """Ends the queue at once and returns what was in it."""
        with self._changed:
            self._closed = True
            left = list(self._items)
            self._items.clear()
            self._changed.notify_all()
            return left

    @property
    def exhausted(self) -> bool:
        """Whether nothing will come any more."""
        with self._changed:
            return self._closed and not self._items
