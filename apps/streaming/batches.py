"""Input batches that are used again, so that no frame costs an allocation."""

from __future__ import annotations

import threading
from typing import Any

from numpy.typing import NDArray

from apps.streaming.loading import LoadedEngine

__all__ = ["BatchPool"]


class BatchPool:
    """Batches of the engine that infers at the moment; as many as were ever in flight at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._engine: LoadedEngine | None = None
        self._free: list[NDArray[Any]] = []

    def take(self, engine: LoadedEngine) -> NDArray[Any]:
        """Room for ``engine.max_batch`` images; what is in it is undefined."""
        with self._lock:
            if engine is not self._engine:
                self._engine, self._free = engine, []
            if self._free:
                return self._free.pop()
        return engine.new_batch()

    def give_back(self, engine: LoadedEngine, batch: NDArray[Any]) -> None:
        """The engine does not read it any more; the batch of a replaced engine is let go."""
        with self._lock:
            if engine is self._engine:
                self._free.append(batch)
