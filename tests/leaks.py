"""What this process holds, counted so that only a leak fails a test.

Earlier tests leave garbage, whose descriptors close when the collector comes by, and threads that are about to end;
both make a count fall at a moment of their own. So garbage is collected before every count, threads are told apart one
by one, and only growth is a failure, and only growth that stays.
"""

from __future__ import annotations

import gc
import threading
from pathlib import Path

from waiting import eventually

__all__ = ["Held", "n_descriptors"]


def n_descriptors() -> int:
    """Open files of this process, after garbage was collected."""
    gc.collect()
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


class Held:
    """What is held at the moment of its creation, for comparison."""

    def __init__(self) -> None:
        self.descriptors = n_descriptors()
        self._threads = set(threading.enumerate())

    def new_threads(self) -> list[str]:
        """Names of the threads that run now and did not run then."""
        return [thread.name for thread in threading.enumerate() if thread not in self._threads]

    def has_not_grown(self, descriptors: int = 0, threads: int = 0) -> None:
        """Waits until so many more are held at most; a leak never goes away."""
        eventually(
            lambda: n_descriptors() <= self.descriptors + descriptors and len(self.new_threads()) <= threads,
            shown=lambda: (
                f"{self.descriptors} descriptors became {n_descriptors()}; new: {self.new_threads()}"
            ),
        )
