"""Preprocessing, inference and output over any number of feeds, overlapped and bounded everywhere.

::

    feeds ──turns──▶ schedule thread ──in flight──▶ calling thread
    (own threads     take, batch,       engine       predict, draw,
     or processes)   resize, submit                  write, release

* Each feed has its drop policy: `newest` keeps the latest frame, `every` makes the source wait.
* ``in flight`` is bounded by permits, given back when the calling thread takes a result; a frame is taken
  only when there is one. With a feed of `newest` there is one more than the engine has streams: a batch
  is prepared while the engine works on the one before, and none grows old behind it. Where all are
  `every` there are more, so that the engine always finds its next request waiting.
* Slow output holds its permits, the permits hold back the schedule thread, and the drop policies decide
  what that costs.
* A batch waits for its other frames `batch_wait_ms` at most, and not at all where one image is a request.
* The latency budget is kept twice: a frame that cannot be answered in time is not inferred (``too old``),
  and an answer that came too late all the same is not shown (``late``). Both are counted.

The output runs in the calling thread because windows and signals belong to the main thread. All clocks
are monotonic. The first error of a stage stops the others and is raised by `run`; the failure of one feed
among several is a state of it and no error.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from apps.streaming.batches import BatchPool
from apps.streaming.classes import ClassMap
from apps.streaming.engine_slot import EngineSlot
from apps.streaming.feeding import InputBatch
from apps.streaming.loading import LoadedEngine
from apps.streaming.predictions import Prediction, predict
from apps.streaming.queues import StageQueue
from apps.streaming.scheduling import FairTaker, LatencyBudget, RuntimeFeed, TakenFrame
from pipeline.artifacts import Frame
from pipeline.contracts import Outputs
from pipeline.errors import DataError, DeviceFaultError, EdgefoldError, EngineError

__all__ = ["END_OF_SOURCE", "FRAME_LIMIT", "LATE", "TIME_LIMIT", "Answer", "RuntimeLimits", "StreamRuntime"]

END_OF_SOURCE = "end of source"
FRAME_LIMIT = "frame limit"
TIME_LIMIT = "time limit"
LATE = "late"

_STOPPED = "stopped"
_UNPREPARED = "not preprocessed"
_POLL_S = 0.1
_DRAIN_S = 2.0
_JOIN_S = 1.0


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


@dataclass(frozen=True, slots=True)
class Answer:
    """What the engine says about a frame, with the names of the engine that said it.

    ``frame.image`` may be read until `StreamRuntime.run`'s `on_answer` returns, and only where the runtime
    keeps images.
    """

    frame: Frame
    prediction: Prediction
    scores: NDArray[Any]
    """(C,), as the engine gave them."""
    labels: tuple[str, ...]
    """The C class names."""


@dataclass(slots=True)
class _Instant:
    """When a future was done. By itself: a future keeps its callbacks, and an item that both held the future and
    were its callback would be a cycle, which keeps frames, and through them mappings, until the next full collection."""

    ns: int = 0

    def mark(self, _: Future[Outputs]) -> None:
        self.ns = time.monotonic_ns()


@dataclass(slots=True)
class _InFlight:
    engine: LoadedEngine
    batch: InputBatch
    frames: list[TakenFrame]
    future: Future[Outputs]
    submitted_ns: int
    answered: _Instant

    def drop(self, reason: str) -> None:
        for taken in self.frames:
            taken.drop(reason)


class StreamRuntime:
    """Runs feeds through one engine slot, once.

    Args:
        sources: not started; closed by the caller after `run`.
        slot: the engine; closed by the caller.
        limits: when to end, and what to wait for.
        keep_images: whether `on_answer` looks at the pictures; where not, buffers go back to their source as
            soon as they are preprocessed.
    """

    def __init__(
        self,
        sources: Sequence[RuntimeFeed],
        slot: EngineSlot,
        limits: RuntimeLimits,
        *,
        keep_images: bool = True,
    ) -> None:
        self._sources = tuple(sources)
        self._slot = slot
        self._limits = limits
        self._keep_images = keep_images
        self._any_newest = any(source.feed.policy == "newest" for source in self._sources)
        self._budget = LatencyBudget(limits.max_age_ms)
        self._taker = FairTaker(self._sources, self._budget)
        self._pool = BatchPool()
        self._classes = ClassMap()
        self._permits_lock = threading.Lock()
        self._n_in_flight = 0
        # Bounded by the permits; this capacity is never reached.
        self._in_flight: StageQueue[_InFlight] = StageQueue(1 << 16)
        self._engine_free_ns: deque[int] = deque()
        self._timed_engine: LoadedEngine | None = None
        self._stop = threading.Event()
        self._stop_reason: str | None = None
        self._error: EdgefoldError | None = None
        self._ended = END_OF_SOURCE
        self._schedule_thread = threading.Thread(
            target=self._schedule_loop, name="stream-schedule", daemon=True
        )
        self._drain_deadline_s: float | None = None
        self._slowest_s = 0.0
        self._given_up: list[Future[Outputs]] = []
        self.batches = 0
        """Answered, and `batched_frames` in them."""
        self.batched_frames = 0
        self.last_beat_ns = time.monotonic_ns()
        """When the loop of the calling thread last went round; for a watchdog."""
        self.engine_stuck = False
        """Set by `run` when a request was never answered; the engine cannot be closed then."""

    def request_stop(self, reason: str) -> None:
        """Asks `run` to end soon. Takes no lock, so a signal handler may call it."""
        if self._stop_reason is None:
            self._stop_reason = reason

    def run(self, on_answer: Callable[[Answer], None], on_tick: Callable[[], None] = lambda: None) -> str:
        """Streams until all sources end, a limit is reached, or a stop is asked for.

        Args:
            on_answer: called in order for each source, in this thread; its time counts as postprocessing.
            on_tick: called between batches, and while none comes, in this thread.

        Returns:
            Why it ended.

        Raises:
            EdgefoldError: whatever failed first; all threads have been told to stop.
        """
        started_s = time.monotonic()
        try:
            for source in self._sources:
                source.feed.start(self._taker.wake)
            self._schedule_thread.start()
            self._output_loop(started_s, on_answer, on_tick)
        finally:
            self._shut_down()
        if self._error is not None:
            raise self._error
        if self._stop_reason is None and self._ended == END_OF_SOURCE:
            self._raise_failure_of_feeds()
        return self._stop_reason or self._ended

    # --- calling thread ---------------------------------------------------------------------------

    def _output_loop(
        self, started_s: float, on_answer: Callable[[Answer], None], on_tick: Callable[[], None]
    ) -> None:
        max_seconds = self._limits.max_seconds
        while self._error is None:
            self.last_beat_ns = time.monotonic_ns()
            on_tick()
            if max_seconds is not None and time.monotonic() - started_s >= max_seconds:
                self.request_stop(TIME_LIMIT)
            if self._stop_reason is not None and self._drain_deadline_s is None:
                self._stop_feeding()
            if self._drain_deadline_s is not None and time.monotonic() >= self._drain_deadline_s:
                return
            item = self._in_flight.get(timeout_s=_POLL_S)
            if item is not None:
                try:
                    outputs = self._result_of(item)
                    self._give_permit_back()
                    if outputs is not None:
                        self._finish(item, outputs, on_answer)
                except BaseException:
                    item.drop(_STOPPED)
                    raise
                if outputs is not None:
                    self._pool.give_back(item.engine, item.batch)
                    self._slot.give_back(item.engine)
            elif self._in_flight.exhausted:
                return

    def _result_of(self, item: _InFlight) -> Outputs | None:
        """Waits for the engine; ``None`` when told to stop and it does not answer in time."""
        waiting_since_s = time.monotonic()
        limit_s = self._limits.engine_stall_s
        while not wait([item.future], timeout=_POLL_S).done:
            waited_s = time.monotonic() - waiting_since_s
            if self._stop_reason is not None and self._drain_deadline_s is None:
                self._stop_feeding()
            if self._drain_deadline_s is not None and time.monotonic() >= self._drain_deadline_s:
                item.drop(_STOPPED)
                self._given_up.append(item.future)
                return None
            if waited_s >= limit_s:
                self._given_up.append(item.future)
                raise DeviceFaultError(
                    f"the engine has not answered for {waited_s:.0f} s (limit {limit_s:.0f} s) "
                    f"on {_named(item)}; restart the process"
                )
        try:
            return item.future.result()
        except EdgefoldError:
            raise
        except Exception as error:
            raise EngineError(f"the engine failed on {_named(item)}: {error}") from error

    def _finish(self, item: _InFlight, outputs: Outputs, on_answer: Callable[[Answer], None]) -> None:
        waited_s, inferred_s = self._engine_seconds(item)
        self.batches += 1
        self.batched_frames += len(item.frames)
        scores = outputs[item.engine.runner.outputs[0].name]
        self._budget.answered(time.monotonic_ns() - item.frames[0].taken_ns)
        for row, taken in zip(scores, item.frames, strict=False):
            started_ns = time.monotonic_ns()
            frame, metrics = taken.captured.frame, taken.source.metrics
            before_s = (taken.taken_ns - frame.timestamp_ns + item.submitted_ns - taken.prepared_ns) / 1e9
            metrics.record("queue", before_s + waited_s)
            metrics.record("infer", inferred_s)
            if self._budget.is_late(frame.timestamp_ns):
                taken.drop(LATE)
                continue
            answer = self._answer(item.engine, taken, row.reshape(-1))
            taken.inferred(answer.prediction.correct)
            if answer.prediction.truth is not None:
                metrics.frame_judged(answer.scores, answer.prediction.truth)
            on_answer(answer)
            taken.release()
            ended_ns = time.monotonic_ns()
            metrics.record("postprocess", (ended_ns - started_ns) / 1e9)
            metrics.record("age", (ended_ns - frame.timestamp_ns) / 1e9)

    def _answer(self, engine: LoadedEngine, taken: TakenFrame, scores: NDArray[Any]) -> Answer:
        labels, frame = self._classes.of(engine.classes, taken.source.feed, taken.captured.frame)
        return Answer(frame, predict(scores, labels, frame), scores, labels)

    def _raise_failure_of_feeds(self) -> None:
        """One source: its failure is the run's. Several: only where none of them worked."""
        failures = [source.feed.failure() for source in self._sources]
        first = next((failure for failure in failures if failure is not None), None)
        if first is None or None in failures:
            return
        if isinstance(first, EdgefoldError):
            raise first
        name = self._sources[0].feed.source_id
        raise EdgefoldError(f"capture of {name} failed: {type(first).__name__}: {first}") from first

    def _stop_feeding(self) -> None:
        """No new frames; what is in flight is still finished, if the engine answers soon."""
        self._drain_deadline_s = time.monotonic() + _DRAIN_S
        self._stop.set()
        self._taker.wake()

    def _shut_down(self) -> None:
        self._stop_feeding()
        unfinished = self._given_up
        for item in self._in_flight.abort():
            item.drop(_STOPPED)
            unfinished.append(item.future)
        # A slow engine is given its time; one that takes longer than it ever did will not answer.
        patience_s = _DRAIN_S + 2 * len(unfinished) * self._slowest_s
        self.engine_stuck = bool(wait(unfinished, timeout=patience_s).not_done)
        if self._schedule_thread.ident is not None:
            # A submit that an engine never accepts cannot be interrupted; the thread is a daemon.
            self._schedule_thread.join(_JOIN_S)
            self.engine_stuck = self.engine_stuck or self._schedule_thread.is_alive()

    def _engine_seconds(self, item: _InFlight) -> tuple[float, float]:
        """How long a request waited for the engine, and how long the engine worked on it.

        Requests start in the order of submission, so one starts when it is submitted or when the
        request a stream's number before it is done, whichever is later.
        """
        # The future may be ready an instant before its callback has noted the time.
        done_ns = item.answered.ns or time.monotonic_ns()
        if item.engine is not self._timed_engine:
            n_streams = item.engine.runner.n_streams
            self._timed_engine = item.engine
            self._engine_free_ns = deque([0] * n_streams, maxlen=n_streams)
        started_ns = min(max(item.submitted_ns, self._engine_free_ns[0]), done_ns)
        self._engine_free_ns.append(done_ns)
        inferred_s = (done_ns - started_ns) / 1e9
        self._slowest_s = max(self._slowest_s, inferred_s)
        return (started_ns - item.submitted_ns) / 1e9, inferred_s

    # --- schedule thread --------------------------------------------------------------------------

    def _has_permit(self) -> bool:
        n_streams = self._slot.current.runner.n_streams
        return self._n_in_flight < (n_streams + 1 if self._any_newest else 2 * n_streams + 1)

    def _give_permit_back(self) -> None:
        with self._permits_lock:
            self._n_in_flight -= 1
        self._taker.wake()

    def _schedule_loop(self) -> None:
        try:
            self._schedule()
        except Exception as error:
            if self._error is None:
                self._error = _as_edgefold(error)
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
                self._ended = FRAME_LIMIT
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
                left.drop(_STOPPED)
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
        item = _InFlight(engine, batch, frames, future, submitted_ns, answered)
        if not self._in_flight.put(item):
            item.drop(_STOPPED)
            self._given_up.append(future)


def _named(item: _InFlight) -> str:
    first = item.frames[0].captured.frame
    others = f" and {len(item.frames) - 1} more" if len(item.frames) > 1 else ""
    return f"frame {first.index} of {first.source_id}{others}"


def _as_edgefold(error: Exception) -> EdgefoldError:
    if isinstance(error, EdgefoldError):
        return error
    wrapped = EdgefoldError(f"preprocessing failed: {type(error).__name__}: {error}")
    wrapped.__cause__ = error
    return wrapped
