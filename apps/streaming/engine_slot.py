"""The engine that infers at the moment, which another may replace between two batches.

A batch leases the engine that it is prepared for, and gives it back with its answers. So every answer is
read with the labels of the engine that gave it, and a replaced engine is idle, and may be closed, once
its last lease has come back.
"""

from __future__ import annotations

import threading
from collections import Counter

from apps.streaming.loading import LoadedEngine

__all__ = ["EngineSlot"]


class EngineSlot:
    """Holds one engine; every method may be called from any thread."""

    def __init__(self, engine: LoadedEngine) -> None:
        self._engine = engine
        self._leases: Counter[int] = Counter()
        self._changed = threading.Condition()

    @property
    def current(self) -> LoadedEngine:
        """What the next batch goes to."""
        return self._engine

    def lease(self) -> LoadedEngine:
        """The current engine, which stays open until `give_back`."""
        with self._changed:
            self._leases[id(self._engine)] += 1
            return self._engine

    def give_back(self, engine: LoadedEngine) -> None:
        """The engine's answers have been taken."""
        with self._changed:
            self._leases[id(engine)] -= 1
            if self._leases[id(engine)] == 0:
                del self._leases[id(engine)]
                self._changed.notify_all()

    def swap(self, engine: LoadedEngine) -> LoadedEngine:
        """From the next batch on, `engine` infers. Returns the one before, for `close_when_idle`."""
        with self._changed:
            before, self._engine = self._engine, engine
            return before

    def close_when_idle(self, engine: LoadedEngine, timeout_s: float) -> bool:
        """Closes a replaced engine after its last answer was taken; ``False`` where that does not come."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._leases[id(engine)] == 0, timeout_s):
                return False
        engine.runner.close()
        return True
