"""Which frame is next: fairly over all feeds, none too old, gathered into batches.

Feeds take turns. A feed that floods has one turn a round like every other, so that under an engine too
slow for all, each is served equally often; one with nothing waiting gives its turn away.

A frame is too old when its age and what the engine takes at the moment exceed the latency budget: its
answer would come late, and would hold up one that need not. What the engine takes is the shortest of its
last answers: one slow answer must not cost frames that would have been in time. Where even that exceeds
the budget nothing would ever be inferred, and nothing learnt, so now and then a frame goes all the same;
its answer is judged like any other.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from apps.streaming.contracts import CapturedFrame, Feed
from apps.streaming.metrics import StreamMetrics

__all__ = ["TOO_OLD", "FairTaker", "LatencyBudget", "RuntimeFeed", "TakenFrame"]

TOO_OLD = "too old"
_N_RECENT = 8
_PROBE_S = 1.0


@dataclass(frozen=True, slots=True)
class RuntimeFeed:
    """A feed, and what counts its frames. The feed itself counts those it reads and those it drops."""

    feed: Feed
    metrics: StreamMetrics


@dataclass(slots=True, eq=False)
class TakenFrame:
    """A frame on its way through the runtime; counted once, and released once."""

    source: RuntimeFeed
    captured: CapturedFrame
    taken_ns: int
    prepared_ns: int = 0
    released: bool = False
    counted: bool = False

    def release(self) -> None:
        """Gives the buffer back to the source; twice is harmless."""
        if not self.released:
            self.released = True
            self.captured.release()

    def drop(self, reason: str) -> None:
        """Counts it under `reason` unless it was counted, and gives the buffer back."""
        if not self.counted:
            self.counted = True
            self.source.metrics.frame_dropped(reason)
        self.release()

    def inferred(self, correct: bool | None) -> None:
        """Counts it as answered; its buffer may still be looked at."""
        self.counted = True
        self.source.metrics.frame_inferred(correct)


class LatencyBudget:
    """Decides whether a frame can still be answered in time.

    Args:
        max_age_ms: from capture to the answer; ``None``: any age.
    """

    def __init__(self, max_age_ms: float | None) -> None:
        self._max_age_ns = None if max_age_ms is None else round(1e6 * max_age_ms)
        self._recent_ns: deque[int] = deque(maxlen=_N_RECENT)
        self._inferred_ns = 0
        self._last_answer_ns = time.monotonic_ns()

    def answered(self, took_ns: int, inferred_ns: int) -> None:
        """An answer came, so long after its frame was taken; of which the engine worked on it for so long."""
        self._recent_ns.append(took_ns)
        self._inferred_ns = inferred_ns
        self._last_answer_ns = time.monotonic_ns()

    @property
    def may_wait_for_engine(self) -> bool:
        """Whether a frame may be taken while the engine is at work on others: it will be older by what they still take.

        Twice the engine's time, and as much again for what a frame's age is when it is taken, must be within the
        budget. With a slower engine the frames that waited would come late, and the engine have worked for nothing; what
        is lost is that the next frame is prepared meanwhile, which is little beside such an engine.
        """
        return self._max_age_ns is None or 3 * self._inferred_ns <= self._max_age_ns

    def is_late(self, timestamp_ns: int) -> bool:
        """Whether an answer that is here now is past the budget."""
        return self._max_age_ns is not None and time.monotonic_ns() - timestamp_ns > self._max_age_ns

    def is_hopeless(self, timestamp_ns: int) -> bool:
        """Whether the answer would be late if the frame went to the engine now."""
        if self._max_age_ns is None:
            return False
        now_ns = time.monotonic_ns()
        age_ns = now_ns - timestamp_ns
        if age_ns > self._max_age_ns:
            return True
        expected_ns = min(self._recent_ns.copy(), default=0)
        unanswered_ns = now_ns - self._last_answer_ns
        return age_ns + expected_ns > self._max_age_ns and unanswered_ns < _PROBE_S * 1e9


class FairTaker:
    """Takes frames from the feeds in turns. One thread takes; `wake` may be called from any.

    Args:
        sources: in the order of their turns.
        budget: frames that it calls hopeless are dropped and counted as ``too old``.
    """

    def __init__(self, sources: Sequence[RuntimeFeed], budget: LatencyBudget) -> None:
        self._sources = tuple(sources)
        self._budget = budget
        self._next = 0
        self._changed = threading.Event()

    def wake(self) -> None:
        """Something may be different: a frame waits, a source ended, an answer was taken. Takes no lock
        of a caller's, so a feed may call it while it holds its own."""
        self._changed.set()

    @property
    def exhausted(self) -> bool:
        """Whether no feed will give anything any more."""
        return all(source.feed.exhausted for source in self._sources)

    def take(self, may_take: Callable[[], bool], until_s: float) -> TakenFrame | None:
        """The next frame in turn; waits for one.

        Args:
            may_take: asked before each look at the feeds.
            until_s: monotonic; when to give up. A time in the past looks once.
        """
        while True:
            # Before the look: what arrives after it sets the event again and is not missed.
            self._changed.clear()
            if may_take():
                taken = self._look()
                if taken is not None:
                    return taken
            remaining_s = until_s - time.monotonic()
            if remaining_s <= 0 or self.exhausted:
                return None
            self._changed.wait(remaining_s)

    def _look(self) -> TakenFrame | None:
        """One round over the feeds."""
        n_sources = len(self._sources)
        for offset in range(n_sources):
            position = (self._next + offset) % n_sources
            taken = self._fresh(self._sources[position])
            if taken is not None:
                self._next = (position + 1) % n_sources
                return taken
        return None

    def _fresh(self, source: RuntimeFeed) -> TakenFrame | None:
        """The first frame of the feed that can be answered in time."""
        while True:
            captured = source.feed.take()
            if captured is None:
                return None
            taken = TakenFrame(source, captured, time.monotonic_ns())
            if not self._budget.is_hopeless(captured.frame.timestamp_ns):
                return taken
            taken.drop(TOO_OLD)
