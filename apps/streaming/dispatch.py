"""The schedule thread of the runtime: frames out of the feeds in turns, batched, preprocessed, submitted.

How much is under way is bounded by permits: one is taken with a batch and given back with its answer, and no frame
is taken from a feed while there is none. So a slow engine, or a slow output, holds the feeds back, and their drop
policies decide what that costs.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from apps.streaming.batches import BatchPool
from apps.streaming.engine_slot import EngineSlot
from apps.streaming.feeding import InputBatch
from apps.streaming.loading import LoadedEngine
from apps.streaming.queues import StageQueue
from apps.streaming.scheduling import FairTaker, LatencyBudget, RuntimeFeed, TakenFrame
from pipeline.contracts import Outputs
from pipeline.errors import DataError, EdgefoldError

__all__ = ["STOPPED", "Dispatcher", "InFlight", "RuntimeLimits"]

STOPPED = "stopped"

_UNPREPARED = "not preprocessed"
_POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class RuntimeLimits:
    """When the runtime ends, and what it waits for.

    Attributes:
        max_age_ms: the latency budget; ``None``: any age.
        batch_wait_ms: how long the first frame of a batch waits for others.
        max_frames: infer this many, over all feeds, then end.
        max_seconds: end after this time.
        engine_stall_s: an engine that has not answered for so long has failed.
    """

    max_age_ms: float | None = None
    batch_wait_ms: float = 5.0
    max_frames: int | None = None
    max_seconds: float | None = None
    engine_stall_s: float = 60.0


@dataclass(slots=True)
class _Instant:
    """When a future was done. By itself: a future keeps its callbacks, and an item that both held the future and
    were its callback would be a cycle, which keeps frames, and through them mappings, until the next full collection."""

    ns: int = 0

    def mark(self, _: Future[Outputs]) -> None:
        self.ns = time.monotonic_ns()


@dataclass(slots=True)
class InFlight:
    """A batch that the engine has, and what is needed to read its answer."""

    engine: LoadedEngine
    batch: InputBatch
    frames: list[TakenFrame]
    future: Future[Outputs]
    submitted_ns: int
    answered: _Instant

    @property
    def name(self) -> str:
        """For messages: its first frame, and how many more."""
        first = self.frames[0].captured.frame
        others = f" and {len(self.frames) - 1} more" if len(self.frames) > 1 else ""
        return f"frame {first.index} of {first.source_id}{others}"

    @property
    def done_ns(self) -> int:
        """When the engine was done with it; now, where its future is ready an instant before the callback that
        notes the time."""
        return self.answered.ns or time.monotonic_ns()

    def drop(self, reason: str) -> None:
        """Counts its frames under `reason`, and gives their buffers back."""
        for taken in self.frames:
            taken.drop(reason)


class Dispatcher:
    """Keeps the engine supplied, from a thread of its own; one other thread takes what is in flight.

    Args:
        sources: the feeds, in the order of their turns.
        slot: the engine.
        budget: which frames are too old to be tried, and whether they may wait for the engine.
        limits: how long a batch waits, and after how many frames it is over.
        keep_images: whether pictures are looked at later; where not, buffers go back to their source as soon as
            they are preprocessed.
    """

    def __init__(
        self,
        sources: Sequence[RuntimeFeed],
        slot: EngineSlot,
        budget: LatencyBudget,
        limits: RuntimeLimits,
        *,
        keep_images: bool,
    ) -> None:
        self._sources = tuple(sources)
        self._slot = slot
        self._limits = limits
        self._keep_images = keep_images
        self._any_newest = any(source.feed.policy == "newest" for source in self._sources)
        self._budget = budget
        self._taker = FairTaker(self._sources, budget)
        self._pool = BatchPool()
        self._permits_lock = threading.Lock()
        self._n_in_flight = 0
        # Bounded by the permits; this capacity is never reached.
        self._in_flight: StageQueue[InFlight] = StageQueue(1 << 16)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="stream-schedule", daemon=True)
        self.error: EdgefoldError | None = None
        """What ended it, if something did."""
        self.reached_limit = False
        """Whether ``limits.max_frames`` were submitted."""
        self.unclaimed: list[Future[Outputs]] = []
        """Submitted, but too late for anyone to take."""

    def start(self) -> None:
        """Starts the feeds, then the thread."""
        for source in self._sources:
            source.feed.start(self._taker.wake)
        self._thread.start()

    # --- the thread that takes --------------------------------------------------------------------

    def next(self, timeout_s: float) -> InFlight | None:
        """The oldest batch in flight, answered or not; ``None`` where none came in time."""
        return self._in_flight.get(timeout_s)

    @property
    def exhausted(self) -> bool:
        """Whether nothing will be in flight any more."""
        return self._in_flight.exhausted

    def give_permit_back(self) -> None:
        """A batch was answered: another may be submitted."""
        with self._permits_lock:
            self._n_in_flight -= 1
        self._taker.wake()

    def give_back(self, item: InFlight) -> None:
        """The answer of a batch was used: its buffers and its engine are free."""
        self._pool.give_back(item.engine, item.batch)
        self._slot.give_back(item.engine)

    def stop(self) -> None:
        """No new frames; what is in flight may still be taken."""
        self._stop.set()
        self._taker.wake()

    def abort(self) -> list[InFlight]:
        """Stops, and returns what nobody took."""
        self.stop()
        return self._in_flight.abort()

    def join(self, timeout_s: float) -> bool:
        """Waits for the thread; ``False`` where it hangs, in a submit that the engine never accepts."""
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # --- the schedule thread ----------------------------------------------------------------------

    def _has_permit(self) -> bool:
        engine = self._slot.current
        # Of batches one that waits is enough; and with 20 frames in the queues, answers come half a second late.
        hurried = self._any_newest or engine.max_batch > 1
        n_streams = engine.runner.n_streams
        if not self._budget.may_wait_for_engine:
            return self._n_in_flight < n_streams
        return self._n_in_flight < (n_streams + 1 if hurried else 2 * n_streams + 1)

    def _loop(self) -> None:
        try:
            self._schedule()
        except Exception as error:
            self.error = _as_edgefold(error)
        finally:
            self._stop.set()
            self._in_flight.close()

    def _schedule(self) -> None:
        n_left = self._limits.max_frames
        while not self._stop.is_set():
            first = self._taker.take(
                lambda: not self._stop.is_set() and self._has_permit(), time.monotonic() + _POLL_S
            )
            if first is None:
                if self._taker.exhausted:
                    return
                continue
            n_left = self._dispatch(first, n_left)
            if n_left == 0:
                self.reached_limit = True
                return

    def _dispatch(self, first: TakenFrame, n_left: int | None) -> int | None:
        """Gathers, prepares and submits one batch; returns how many frames may still be inferred."""
        engine = self._slot.lease()
        batch = self._pool.take(engine)
        most = engine.max_batch if n_left is None else min(engine.max_batch, n_left)
        until_s = time.monotonic() + self._limits.batch_wait_ms / 1e3
        frames: list[TakenFrame] = []
        taken: TakenFrame | None = first
        try:
            while taken is not None:
                if self._prepare(taken, batch, len(frames)):
                    frames.append(taken)
                # A batch of one waits for nobody; and others are looked for before any waiting.
                full = len(frames) >= most
                taken = None if full else self._taker.take(lambda: not self._stop.is_set(), until_s)
            if not frames:
                self._pool.give_back(engine, batch)
                self._slot.give_back(engine)
                return n_left
            self._submit(engine, batch, frames)
        except BaseException:
            for left in [*frames, *([taken] if taken is not None and taken not in frames else [])]:
                left.drop(STOPPED)
            self._slot.give_back(engine)
            raise
        return None if n_left is None else n_left - len(frames)

    def _prepare(self, taken: TakenFrame, batch: InputBatch, index: int) -> bool:
        """Puts the frame into its place; with several sources, what cannot be is one source's loss."""
        started_ns = time.monotonic_ns()
        try:
            batch.put(index, taken.captured.frame)
        except DataError:
            if len(self._sources) == 1:
                raise
            taken.drop(_UNPREPARED)
            return False
        taken.prepared_ns = time.monotonic_ns()
        metrics = taken.source.metrics
        metrics.record("capture", taken.captured.capture_s)
        metrics.record("preprocess", (taken.prepared_ns - started_ns) / 1e9)
        if not self._keep_images:
            taken.release()
        return True

    def _submit(self, engine: LoadedEngine, batch: InputBatch, frames: list[TakenFrame]) -> None:
        with self._permits_lock:
            self._n_in_flight += 1
        submitted_ns = time.monotonic_ns()
        future = batch.submit(len(frames))
        answered = _Instant()
        future.add_done_callback(answered.mark)
        item = InFlight(engine, batch, frames, future, submitted_ns, answered)
        if not self._in_flight.put(item):
            item.drop(STOPPED)
            self.unclaimed.append(future)


def _as_edgefold(error: Exception) -> EdgefoldError:
    if isinstance(error, EdgefoldError):
        return error
    wrapped = EdgefoldError(f"preprocessing failed: {type(error).__name__}: {error}")
    wrapped.__cause__ = error
    return wrapped
