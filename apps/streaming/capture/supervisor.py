"""A source in a process of its own, watched, killed and started again: one thread a source.

The thread starts the process, takes its messages, and is its parent as the kernel sees it. It is the
only one that changes how the source is; the runtime takes frames and gives them back meanwhile.

A frame counts as read when its message is taken, and its memory lives on without the process, so none
that was counted is lost with a capture that is killed. A recording goes on behind the last
frame it delivered.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import random
import select
import time

import numpy as np
from numpy.typing import NDArray

from apps.streaming.capture.child import CaptureTask
from apps.streaming.capture.feed import CaptureFeed
from apps.streaming.capture.health import RestartPolicy
from apps.streaming.capture.messages import (
    Alive,
    Dropped,
    Ended,
    Failed,
    FrameReady,
    Labels,
    Message,
    Opened,
)
from apps.streaming.capture.process import CaptureProcess
from apps.streaming.config import CaptureLimits
from apps.streaming.contracts import CapturedFrame, SourceStatus
from apps.streaming.metrics import StreamMetrics
from pipeline.artifacts import Frame
from pipeline.errors import (
    DataError,
    DeviceFaultError,
    EdgefoldError,
    Retry,
    SourceLostError,
    UnsupportedError,
    UsageError,
)

__all__ = ["ProcessFeed"]

_MAX_TICK_S = 0.25
_JOIN_S = 1.9
_SAME_PLACE = 3
"""A recording whose capture dies so often without one more frame is itself at fault."""
_ERRORS: dict[str, type[EdgefoldError]] = {
    kind.__name__: kind for kind in (UsageError, DataError, UnsupportedError, DeviceFaultError)
}


@dataclasses.dataclass(frozen=True, slots=True)
class _Failure:
    error: EdgefoldError
    retry: Retry


class ProcessFeed(CaptureFeed):
    """A `Feed` over capture processes.

    Args:
        task: what they are to read; `task.skip` is set here.
        source_id: its name in all output.
        live: whether it is tried again when it ends.
        limits: when it is in trouble, and how often it is tried again.
        metrics: counts what was read and dropped.
        resumes: whether a new capture passes over the frames that were delivered before.
        rng: draws the jitter of the waits.
    """

    def __init__(
        self,
        task: CaptureTask,
        source_id: str,
        live: bool,
        limits: CaptureLimits,
        metrics: StreamMetrics,
        *,
        resumes: bool,
        rng: random.Random | None = None,
    ) -> None:
        super().__init__(source_id, live, task.policy, limits, metrics)
        self._task = task
        self._limits = limits
        self._resumes = resumes
        self._restarts = RestartPolicy(limits, rng)
        self._index = 0
        self._names: list[str] = []
        self._process: CaptureProcess | None = None
        self._closing = False
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    # --- the runtime's side -----------------------------------------------------------------------

    def status(self) -> SourceStatus:
        """See `Feed.status`."""
        with self._lock:
            return self._health.status()

    @property
    def pid(self) -> int | None:
        """Of the capture process, for readings of what it uses; ``None`` while there is none."""
        process = self._process
        return None if process is None else process.pid

    def close(self) -> None:
        """See `Feed.close`. Called once."""
        self._closing = True
        os.eventfd_write(self._wake_fd, 1)
        if self._thread.ident is not None:
            self._thread.join(_JOIN_S)
        self._over = True
        self._waiting.close()
        if not self._thread.is_alive():
            os.close(self._wake_fd)

    # --- the thread -------------------------------------------------------------------------------

    def _run(self) -> None:
        again, failed_at, same_place = False, -1, 0
        try:
            while not self._closing:
                failure = self._capture_once(again)
                if self._closing:
                    return
                if failure is None:
                    self._end(None)
                    return
                same_place = same_place + 1 if self._index == failed_at else 1
                failed_at, again = self._index, True
                wait = self._restarts.failed(time.monotonic(), failure.retry)
                if failure.retry == "never" or (not self.live and (wait.lost or same_place >= _SAME_PLACE)):
                    self._end(failure.error)
                    return
                with self._lock:
                    self._health.failed(time.monotonic_ns(), str(failure.error), wait.lost)
                self._sleep(wait.seconds)
        except Exception as error:
            self._end(EdgefoldError(f"capture of {self.source_id} failed: {type(error).__name__}: {error}"))

    def _sleep(self, seconds: float) -> None:
        poll = select.poll()
        poll.register(self._wake_fd, select.POLLIN)
        poll.poll(1e3 * seconds)

    def _capture_once(self, again: bool) -> _Failure | None:
        """One capture process from its start to its end; ``None`` where the source is through."""
        self._names = []
        with self._lock:
            self._health.started(time.monotonic_ns(), again)
        try:
            task = dataclasses.replace(self._task, skip=self._index if self._resumes else 0)
            process = CaptureProcess(task, self._wake_fd)
        except OSError as error:
            return self._lost(f"its capture process cannot be started: {error}")
        self._process = process
        grace_s = 0.0
        try:
            outcome = self._follow(process)
            grace_s = 1.0
        except ValueError as error:
            outcome = self._lost(f"its capture process speaks nonsense ({error}) and was killed")
        except TimeoutError as error:
            outcome = self._lost(f"{error}; its capture was killed", process)
        finally:
            self._process = None
            exit_code = process.close(grace_s)
        if outcome is not None or self._closing:
            return outcome if isinstance(outcome, _Failure) else None
        how = f"was killed by signal {-exit_code}" if exit_code < 0 else f"ended with status {exit_code}"
        return self._lost(f"its capture process {how}", process)

    def _follow(self, process: CaptureProcess) -> _Failure | Ended | None:
        """Takes what the process says; ``None`` where it died without a word, or is to be closed."""
        tick_s = min(_MAX_TICK_S, self._limits.degraded_s / 4, self._limits.stall_s / 4)
        while not self._closing:
            process.wait(tick_s)
            for message, pixels in process.receive():
                if self._closing:
                    return None
                if isinstance(message, Failed):
                    return self._failed(message)
                if isinstance(message, Ended):
                    self._note(message.notes)
                    return self._lost("the stream ended", process) if self.live else message
                self._heed(process, message, pixels)
            if process.ended:
                return None
            with self._lock:
                now_ns = time.monotonic_ns()
                if self.policy == "every" and process.all_slots_held:
                    self._health.alive(now_ns)
                verdict = self._health.check(now_ns)
            if verdict is not None:
                raise TimeoutError(verdict)
        return None

    def _heed(self, process: CaptureProcess, message: Message, pixels: NDArray[np.uint8] | None) -> None:
        now_ns = time.monotonic_ns()
        if isinstance(message, FrameReady):
            assert pixels is not None
            self._frame(process, message, pixels)
        elif isinstance(message, Dropped):
            for _ in range(message.count):
                self._metrics.frame_read()
                self._metrics.frame_dropped(message.reason)
            self._index += message.count
            if message.reason == "no free buffer":
                with self._lock:
                    self._health.alive(now_ns)
        elif isinstance(message, Labels):
            self._names += message.names
        elif isinstance(message, Opened):
            self.labels = tuple(self._names) or self._task.classes.labels
            self._note(message.notes)
            with self._lock:
                self._health.opened(now_ns, message.fps)
        elif isinstance(message, Alive):
            with self._lock:
                self._health.alive(now_ns)

    def _frame(self, process: CaptureProcess, message: FrameReady, pixels: NDArray[np.uint8]) -> None:
        timestamp_ns = message.timestamp_ns
        frame = Frame(
            pixels,
            message.pixel_format,
            self.source_id,
            self._index,
            timestamp_ns,
            message.label,
            message.yuv,
        )
        self._index += 1
        self._metrics.frame_read()
        with self._lock:
            self._health.frame(timestamp_ns, (message.width, message.height), message.fingerprint)
        self._restarts.frame_came(timestamp_ns / 1e9)
        release = functools.partial(process.release, message.generation, message.slot)
        self._waiting.put(CapturedFrame(frame, release, message.capture_s))
        self._on_ready()

    def _note(self, notes: tuple[str, ...]) -> None:
        self.notes += [note for note in notes if note not in self.notes]

    def _lost(self, what: str, process: CaptureProcess | None = None) -> _Failure:
        """Something that may be over when it is tried again."""
        words = "" if process is None else process.last_words()
        return _Failure(DeviceFaultError(f"{self.source_id}: {what}{f' ({words})' if words else ''}"), "soon")

    def _failed(self, message: Failed) -> _Failure:
        """What the source itself said. A recording that cannot be read is no better a minute later; a
        camera may be plugged in, or its password corrected."""
        text = self._task.uri.redact(message.message)
        if message.error == SourceLostError.__name__:
            retry: Retry = message.retry or "soon"
            if retry == "never" or (retry == "seldom" and not self.live):
                # What answers is no video: no fault of a device, which a restarted app would find mended.
                return _Failure(DataError(text), "never")
            return _Failure(SourceLostError(text, retry), retry)
        error = _ERRORS.get(message.error, EdgefoldError)(text)
        if isinstance(error, (UsageError, DataError, UnsupportedError)):
            return _Failure(error, "seldom" if self.live else "never")
        return _Failure(error, "soon")
