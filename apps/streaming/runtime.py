"""Preprocessing, inference and output over any number of feeds, overlapped and bounded everywhere.

::

    feeds ──turns──▶ schedule thread ──in flight──▶ calling thread
    (own threads     take, batch,       engine       predict, draw,
     or processes)   resize, submit                  write, release

* Each feed has its drop policy: `newest` keeps the latest frame, `every` makes the source wait.
* ``in flight`` is bounded by permits, given back when the calling thread takes a result; a frame is taken
  only when there is one. With a feed of `newest` there is one more than the engine has streams: a batch
  is prepared while the engine works on the one before, and none grows old behind it. Where all are
  `every` and requests are of one image there are more, so that the engine always finds its next request waiting. Where
  what waits for the engine would be answered past the latency budget there is none more.
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

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from apps.streaming.classes import ClassMap
from apps.streaming.dispatch import STOPPED, Dispatcher, InFlight, RuntimeLimits
from apps.streaming.engine_slot import EngineSlot
from apps.streaming.loading import LoadedEngine
from apps.streaming.predictions import Prediction, predict
from apps.streaming.scheduling import LatencyBudget, RuntimeFeed, TakenFrame
from pipeline.artifacts import Frame
from pipeline.contracts import Outputs
from pipeline.errors import DeviceFaultError, EdgefoldError, EngineError

__all__ = ["END_OF_SOURCE", "FRAME_LIMIT", "LATE", "TIME_LIMIT", "Answer", "RuntimeLimits", "StreamRuntime"]

END_OF_SOURCE = "end of source"
FRAME_LIMIT = "frame limit"
TIME_LIMIT = "time limit"
LATE = "late"

_POLL_S = 0.1
_DRAIN_S = 2.0
_JOIN_S = 1.0


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


class _EngineClock:
    """How long a request waited for the engine, and how long the engine worked on it.

    Requests start in the order of submission, so one starts when it is submitted or when the request a stream's
    number before it is done, whichever is later.
    """

    def __init__(self) -> None:
        self._engine: LoadedEngine | None = None
        self._free_ns: deque[int] = deque()
        self.slowest_s = 0.0
        """The longest that it ever worked on one."""

    def read(self, item: InFlight) -> tuple[float, float]:
        """Seconds waited, and seconds of work; asked once for each, in the order of submission."""
        done_ns = item.done_ns
        if item.engine is not self._engine:
            n_streams = item.engine.runner.n_streams
            self._engine = item.engine
            self._free_ns = deque([0] * n_streams, maxlen=n_streams)
        started_ns = min(max(item.submitted_ns, self._free_ns[0]), done_ns)
        self._free_ns.append(done_ns)
        inferred_s = (done_ns - started_ns) / 1e9
        self.slowest_s = max(self.slowest_s, inferred_s)
        return (started_ns - item.submitted_ns) / 1e9, inferred_s


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
        self._limits = limits
        self._budget = LatencyBudget(limits.max_age_ms)
        self._dispatcher = Dispatcher(self._sources, slot, self._budget, limits, keep_images=keep_images)
        self._classes = ClassMap()
        self._clock = _EngineClock()
        self._stop_reason: str | None = None
        self._drain_deadline_s: float | None = None
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
            self._dispatcher.start()
            self._output_loop(started_s, on_answer, on_tick)
        finally:
            self._shut_down()
        if self._dispatcher.error is not None:
            raise self._dispatcher.error
        if self._stop_reason is not None:
            return self._stop_reason
        if self._dispatcher.reached_limit:
            return FRAME_LIMIT
        self._raise_failure_of_feeds()
        return END_OF_SOURCE

    # --- calling thread ---------------------------------------------------------------------------

    def _output_loop(
        self, started_s: float, on_answer: Callable[[Answer], None], on_tick: Callable[[], None]
    ) -> None:
        max_seconds = self._limits.max_seconds
        while self._dispatcher.error is None:
            self.last_beat_ns = time.monotonic_ns()
            on_tick()
            if max_seconds is not None and time.monotonic() - started_s >= max_seconds:
                self.request_stop(TIME_LIMIT)
            if self._stop_reason is not None and self._drain_deadline_s is None:
                self._stop_feeding()
            if self._drain_deadline_s is not None and time.monotonic() >= self._drain_deadline_s:
                return
            item = self._dispatcher.next(_POLL_S)
            if item is not None:
                try:
                    outputs = self._result_of(item)
                    self._dispatcher.give_permit_back()
                    if outputs is not None:
                        self._finish(item, outputs, on_answer)
                except BaseException:
                    item.drop(STOPPED)
                    raise
                if outputs is not None:
                    self._dispatcher.give_back(item)
            elif self._dispatcher.exhausted:
                return

    def _result_of(self, item: InFlight) -> Outputs | None:
        """Waits for the engine; ``None`` when told to stop and it does not answer in time."""
        waiting_since_s = time.monotonic()
        limit_s = self._limits.engine_stall_s
        while not wait([item.future], timeout=_POLL_S).done:
            waited_s = time.monotonic() - waiting_since_s
            if self._stop_reason is not None and self._drain_deadline_s is None:
                self._stop_feeding()
            if self._drain_deadline_s is not None and time.monotonic() >= self._drain_deadline_s:
                item.drop(STOPPED)
                self._given_up.append(item.future)
                return None
            if waited_s >= limit_s:
                self._given_up.append(item.future)
                raise DeviceFaultError(
                    f"the engine has not answered for {waited_s:.0f} s (limit {limit_s:.0f} s) "
                    f"on {item.name}; restart the process"
                )
        try:
            return item.future.result()
        except EdgefoldError:
            raise
        except Exception as error:
            raise EngineError(f"the engine failed on {item.name}: {error}") from error

    def _finish(self, item: InFlight, outputs: Outputs, on_answer: Callable[[Answer], None]) -> None:
        waited_s, inferred_s = self._clock.read(item)
        self.batches += 1
        self.batched_frames += len(item.frames)
        scores = outputs[item.engine.runner.outputs[0].name]
        self._budget.answered(time.monotonic_ns() - item.frames[0].taken_ns, round(1e9 * inferred_s))
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
        self._dispatcher.stop()

    def _shut_down(self) -> None:
        left = self._dispatcher.abort()
        for item in left:
            item.drop(STOPPED)
        # A slow engine is given its time; one that takes longer than it ever did will not answer.
        unfinished = [*self._given_up, *self._dispatcher.unclaimed, *(item.future for item in left)]
        patience_s = _DRAIN_S + 2 * len(unfinished) * self._clock.slowest_s
        self.engine_stuck = bool(wait(unfinished, timeout=patience_s).not_done)
        # A submit that an engine never accepts cannot be interrupted; the thread is a daemon.
        self.engine_stuck = not self._dispatcher.join(_JOIN_S) or self.engine_stuck
