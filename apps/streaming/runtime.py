"""Capture, preprocessing, inference and output of one source, overlapped and bounded everywhere.

::

    capture thread ──frames──▶ prepare thread ──in flight──▶ calling thread
    source.read, check         resize, submit   engine        predict, draw, write

* ``frames`` has the drop policy: `newest` keeps one frame, the latest; `every` makes the source wait.
* ``in flight`` is bounded by permits, given back when the calling thread takes a result. Under
  `newest` there are as many as the engine has streams: a frame is prepared while the engine works on
  the one before, and none grows old behind it. Under `every` there are more, so that the engine
  always finds its next request waiting.
* Slow output holds its permits, the permits hold back the prepare thread, and the drop policy
  decides what that costs.

The output runs in the calling thread because windows and signals belong to the main thread. All
clocks are monotonic. The first error in any thread stops the others and is raised by `run`.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apps.streaming.frames import as_image, defect
from apps.streaming.metrics import StreamMetrics
from apps.streaming.predictions import Prediction, predict
from apps.streaming.queues import DropPolicy, StageQueue
from apps.streaming.sources import Source
from pipeline.artifacts import Frame
from pipeline.contracts import Outputs, Runner
from pipeline.errors import DeviceFaultError, EdgefoldError, EngineError

__all__ = ["END_OF_SOURCE", "FRAME_LIMIT", "TIME_LIMIT", "StreamRuntime"]

END_OF_SOURCE = "end of source"
FRAME_LIMIT = "frame limit"
TIME_LIMIT = "time limit"

_EVERY_CAPACITY = 4
_POLL_S = 0.1
_DRAIN_S = 2.0
_JOIN_S = 1.0
_NO_IMAGE_PAUSE_S = 0.01


@dataclass(slots=True)
class _InFlight:
    frame: Frame
    future: Future[Outputs]
    waited_s: float
    """Before submission, between stages."""
    submitted_ns: int
    done_ns: int = 0

    def mark_done(self, _: Future[Outputs]) -> None:
        self.done_ns = time.monotonic_ns()


class StreamRuntime:
    """Runs one source through one engine, once.

    Args:
        source: open; read by the capture thread, closed by the caller after `run`.
        runner: a loaded engine with one image input; closed by the caller.
        prepare: frame to the engine's input array, batch dimension included.
        labels: class names, as many as the engine has scores.
        policy: what happens to frames that come faster than they are inferred.
        metrics: counts and times everything.
        pace_fps: deliver at this rate; ``None``: as fast as the source and the policy allow.
        max_frames: infer this many, then end.
        max_seconds: end after this time.
        source_stall_s: a source that delivers nothing usable for so long has failed.
        engine_stall_s: an engine that has not answered for so long has failed.
    """

    def __init__(
        self,
        source: Source,
        runner: Runner,
        prepare: Callable[[Frame], NDArray[Any]],
        labels: Sequence[str],
        policy: DropPolicy,
        metrics: StreamMetrics,
        *,
        pace_fps: float | None = None,
        max_frames: int | None = None,
        max_seconds: float | None = None,
        source_stall_s: float = 10.0,
        engine_stall_s: float = 60.0,
    ) -> None:
        self._source = source
        self._runner = runner
        self._prepare = prepare
        self._labels = labels
        self._metrics = metrics
        self._pace_s = 0.0 if pace_fps is None else 1.0 / pace_fps
        self._max_frames = max_frames
        self._max_seconds = max_seconds
        self._source_stall_s = source_stall_s
        self._engine_stall_s = engine_stall_s
        self._frames: StageQueue[Frame] = StageQueue(
            1 if policy == "newest" else _EVERY_CAPACITY,
            policy,
            on_drop=lambda _: metrics.frame_dropped("newer frame"),
        )
        n_permits = runner.n_streams if policy == "newest" else 2 * runner.n_streams + 1
        self._permits = threading.Semaphore(n_permits)
        self._in_flight: StageQueue[_InFlight] = StageQueue(n_permits)
        self._engine_free_ns = deque([0] * runner.n_streams, maxlen=runner.n_streams)
        self._stop = threading.Event()
        self._stop_reason: str | None = None
        self._error: EdgefoldError | None = None
        self._reading_since_ns: int | None = None
        self._ended = END_OF_SOURCE
        self._capture_thread = self._thread(self._capture_loop)
        self._prepare_thread = self._thread(self._prepare_loop)
        self._abandoned = threading.Event()
        self._drain_deadline_s: float | None = None
        self._slowest_s = 0.0
        self._given_up: list[Future[Outputs]] = []
        self.engine_stuck = False
        """Set by `run` when a request was never answered; the engine cannot be closed then."""

    def request_stop(self, reason: str) -> None:
        """Asks `run` to end soon. Takes no lock, so a signal handler may call it."""
        if self._stop_reason is None:
            self._stop_reason = reason

    @property
    def capturing(self) -> bool:
        """Whether the source is being read; after `run` only if a read never returned."""
        return self._capture_thread.is_alive()

    def run(
        self, on_prediction: Callable[[Frame, Prediction], None], on_tick: Callable[[], None] = lambda: None
    ) -> str:
        """Streams until the source ends, a limit is reached, or a stop is asked for.

        Args:
            on_prediction: called in order, in this thread; its time counts as postprocessing.
            on_tick: called between frames, and while none comes, in this thread.

        Returns:
            Why it ended.

        Raises:
            EdgefoldError: whatever failed first; all threads have been told to stop.
        """
        started_s = time.monotonic()
        self._capture_thread.start()
        self._prepare_thread.start()
        try:
            self._output_loop(started_s, on_prediction, on_tick)
        finally:
            self._shut_down()
        if self._error is not None:
            raise self._error
        return self._stop_reason or self._ended

    def _thread(self, target: Callable[[], None]) -> threading.Thread:
        name = f"stream{target.__name__.replace('_', '-')}"
        return threading.Thread(target=target, name=name, daemon=True)

    # --- calling thread ---------------------------------------------------------------------------

    def _output_loop(
        self,
        started_s: float,
        on_prediction: Callable[[Frame, Prediction], None],
        on_tick: Callable[[], None],
    ) -> None:
        while self._error is None:
            on_tick()
            if self._max_seconds is not None and time.monotonic() - started_s >= self._max_seconds:
                self.request_stop(TIME_LIMIT)
            if self._stop_reason is not None and self._drain_deadline_s is None:
                self._stop_feeding()
            self._check_source()
            if self._drain_deadline_s is not None and time.monotonic() >= self._drain_deadline_s:
                return
            item = self._in_flight.get(timeout_s=_POLL_S)
            if item is not None:
                outputs = self._result_of(item)
                self._permits.release()
                if outputs is not None:
                    self._finish(item, outputs, on_prediction)
            elif self._in_flight.exhausted:
                return

    def _result_of(self, item: _InFlight) -> Outputs | None:
        """Waits for the engine; ``None`` when told to stop and it does not answer in time."""
        waiting_since_s = time.monotonic()
        while not wait([item.future], timeout=_POLL_S).done:
            waited_s = time.monotonic() - waiting_since_s
            if self._stop_reason is not None and self._drain_deadline_s is None:
                self._stop_feeding()
            if self._drain_deadline_s is not None and time.monotonic() >= self._drain_deadline_s:
                self._metrics.frame_dropped("stopped")
                self._given_up.append(item.future)
                return None
            if waited_s >= self._engine_stall_s:
                self._given_up.append(item.future)
                raise DeviceFaultError(
                    f"the engine has not answered for {waited_s:.0f} s (limit {self._engine_stall_s:.0f} s) "
                    f"on frame {item.frame.index}; restart the process"
                )
        try:
            return item.future.result()
        except EdgefoldError:
            raise
        except Exception as error:
            raise EngineError(f"the engine failed on frame {item.frame.index}: {error}") from error

    def _finish(
        self, item: _InFlight, outputs: Outputs, on_prediction: Callable[[Frame, Prediction], None]
    ) -> None:
        frame, metrics = item.frame, self._metrics
        started_ns = time.monotonic_ns()
        waited_s, inferred_s = self._engine_seconds(item)
        metrics.record("queue", item.waited_s + waited_s)
        metrics.record("infer", inferred_s)
        scores = outputs[self._runner.outputs[0].name]
        prediction = predict(scores, self._labels, frame)
        metrics.frame_inferred(prediction.correct)
        if frame.label is not None:
            metrics.frame_judged(scores.reshape(-1), frame.label)
        on_prediction(frame, prediction)
        ended_ns = time.monotonic_ns()
        metrics.record("postprocess", (ended_ns - started_ns) / 1e9)
        metrics.record("age", (ended_ns - frame.timestamp_ns) / 1e9)

    def _check_source(self) -> None:
        since_ns = self._reading_since_ns
        if since_ns is None or self._stop.is_set():
            return
        silent_s = (time.monotonic_ns() - since_ns) / 1e9
        if silent_s >= self._source_stall_s:
            raise DeviceFaultError(
                f"{self._source.source_id} has delivered no usable frame for {silent_s:.0f} s "
                f"(limit {self._source_stall_s:.0f} s); check the device and start the stream again"
            )

    def _stop_feeding(self) -> None:
        """No new frames; what is in flight is still finished, if the engine answers soon."""
        self._drain_deadline_s = time.monotonic() + _DRAIN_S
        self._stop.set()
        for _ in self._frames.abort():
            self._metrics.frame_dropped("stopped")

    def _shut_down(self) -> None:
        self._stop_feeding()
        self._abandoned.set()
        unfinished = self._given_up
        for item in self._in_flight.abort():
            self._metrics.frame_dropped("stopped")
            unfinished.append(item.future)
        # A slow engine is given its time; one that takes longer than it ever did will not answer.
        patience_s = _DRAIN_S + 2 * len(unfinished) * self._slowest_s
        self.engine_stuck = bool(wait(unfinished, timeout=patience_s).not_done)
        for thread in (self._capture_thread, self._prepare_thread):
            # A read that never returns cannot be interrupted; the threads are daemons.
            thread.join(_JOIN_S)

    def _engine_seconds(self, item: _InFlight) -> tuple[float, float]:
        """How long a request waited for the engine, and how long the engine worked on it.

        Requests start in the order of submission, so one starts when it is submitted or when the
        request a stream's number before it is done, whichever is later.
        """
        # The future may be ready an instant before its callback has noted the time.
        done_ns = item.done_ns or time.monotonic_ns()
        started_ns = min(max(item.submitted_ns, self._engine_free_ns[0]), done_ns)
        self._engine_free_ns.append(done_ns)
        inferred_s = (done_ns - started_ns) / 1e9
        self._slowest_s = max(self._slowest_s, inferred_s)
        return (started_ns - item.submitted_ns) / 1e9, inferred_s

    # --- worker threads ---------------------------------------------------------------------------

    def _fail(self, stage: str, error: Exception) -> None:
        if self._error is None:
            if not isinstance(error, EdgefoldError):
                wrapped = EdgefoldError(
                    f"{stage} of {self._source.source_id} failed: {type(error).__name__}: {error}"
                )
                wrapped.__cause__ = error
                error = wrapped
            self._error = error

    def _capture_loop(self) -> None:
        try:
            self._capture()
        except Exception as error:
            self._fail("capture", error)
        finally:
            self._reading_since_ns = None
            self._frames.close()

    def _capture(self) -> None:
        source, metrics = self._source, self._metrics
        index = 0
        due_s = time.monotonic()
        while not self._stop.is_set():
            self._reading_since_ns = self._reading_since_ns or time.monotonic_ns()
            read_s = time.monotonic()
            delivered = source.read()
            if delivered is None:
                return
            metrics.frame_read()
            reason = defect(delivered.pixels)
            if reason is not None:
                metrics.frame_dropped(reason)
                if source.live:
                    self._stop.wait(_NO_IMAGE_PAUSE_S)  # a camera that fails at once would spin
                else:
                    self._reading_since_ns = None
                index += 1
                continue
            self._reading_since_ns = None
            metrics.record("capture", time.monotonic() - read_s)
            if self._pace_s:
                # Sleep to the schedule, but do not catch up in a burst after falling behind it.
                due_s = max(due_s + self._pace_s, time.monotonic() - self._pace_s)
                self._stop.wait(max(0.0, due_s - time.monotonic()))
            image, pixel_format = as_image(delivered.pixels, source.color)
            frame = Frame(image, pixel_format, source.source_id, index, time.monotonic_ns(), delivered.label)
            index += 1
            if not self._frames.put(frame):
                metrics.frame_dropped("stopped")
                return

    def _prepare_loop(self) -> None:
        try:
            self._prepare_and_submit()
        except Exception as error:
            self._fail("preprocessing", error)
        finally:
            self._in_flight.close()

    def _prepare_and_submit(self) -> None:
        metrics = self._metrics
        input_name = self._runner.inputs[0].name
        n_submitted = 0
        while self._max_frames is None or n_submitted < self._max_frames:
            frame = self._frames.get()
            if frame is None:
                return
            taken_ns = time.monotonic_ns()
            pixels = np.ascontiguousarray(self._prepare(frame))
            prepared_ns = time.monotonic_ns()
            metrics.record("preprocess", (prepared_ns - taken_ns) / 1e9)
            while not self._permits.acquire(timeout=_POLL_S):
                if self._abandoned.is_set():
                    metrics.frame_dropped("stopped")
                    return
            submitted_ns = time.monotonic_ns()
            waited_ns = taken_ns - frame.timestamp_ns + submitted_ns - prepared_ns
            future = self._runner.submit({input_name: pixels})
            item = _InFlight(frame, future, waited_ns / 1e9, submitted_ns)
            future.add_done_callback(item.mark_done)
            n_submitted += 1
            if not self._in_flight.put(item):
                metrics.frame_dropped("stopped")
                return
        self._ended = FRAME_LIMIT
        self._stop.set()
        for _ in self._frames.abort():
            metrics.frame_dropped("stopped")
