"""A source of our own code, read in a thread: it cannot hang in a driver, and needs no process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from apps.streaming.capture.feed import CaptureFeed
from apps.streaming.capture.pacing import Pacer, pace_fps
from apps.streaming.config import CaptureLimits
from apps.streaming.contracts import CapturedFrame, SourceStatus
from apps.streaming.frames import as_image, defect, picture_hw
from apps.streaming.metrics import StreamMetrics
from apps.streaming.queues import DropPolicy
from apps.streaming.sources import Delivered, Source
from pipeline.artifacts import Frame
from pipeline.errors import EdgefoldError

__all__ = ["ThreadFeed"]

_JOIN_S = 1.9
_NO_IMAGE_PAUSE_S = 0.01


class ThreadFeed(CaptureFeed):
    """A `Feed` over a source that is opened and read in one thread.

    What fails ends it: our own code does not fail differently when it is tried again. Identical
    frames are no fault here, and a read that does not return can only be seen, not ended.

    Args:
        opener: opens the source, in the thread.
        source_id: its name in all output.
        live: whether frames pass whether or not they are taken.
        policy: what happens to frames that come faster than they are taken.
        fps: the rate that was asked for.
        limits: when it is in trouble.
        metrics: counts what was read and dropped.
        n_buffers: frames out at the same time, under ``every``: the source waits for one to be released.
    """

    def __init__(
        self,
        opener: Callable[[], Source],
        source_id: str,
        live: bool,
        policy: DropPolicy,
        fps: float | None,
        limits: CaptureLimits,
        metrics: StreamMetrics,
        n_buffers: int,
    ) -> None:
        super().__init__(source_id, live, policy, limits, metrics)
        self._opener = opener
        self._fps = fps
        self._buffers = threading.Semaphore(n_buffers) if policy == "every" else None
        self._closing = threading.Event()
        self._reading = False

    def status(self) -> SourceStatus:
        """See `Feed.status`."""
        with self._lock:
            now_ns = time.monotonic_ns()
            if not self._reading:
                self._health.alive(now_ns)
            elif not self._over:
                self._health.silent(now_ns)
            return self._health.status()

    def close(self) -> None:
        """See `Feed.close`. Called once."""
        self._closing.set()
        if self._buffers is not None:
            self._buffers.release()
        if self._thread.ident is not None:
            self._thread.join(_JOIN_S)
        self._over = True
        self._waiting.close()

    def _run(self) -> None:
        failure: EdgefoldError | None = None
        try:
            self._reading = True
            source = self._opener()
            try:
                self._read(source)
            finally:
                source.close()
                self.notes = list(source.notes)
        except EdgefoldError as error:
            failure = error
        except Exception as error:
            failure = EdgefoldError(f"reading {self.source_id} failed: {type(error).__name__}: {error}")
        finally:
            self._end(failure)

    def _read(self, source: Source) -> None:
        self.labels = source.labels
        self.notes = list(source.notes)
        with self._lock:
            self._health.opened(time.monotonic_ns(), source.fps)
        pacer = Pacer(pace_fps(source, self.policy, self._fps), time.monotonic())
        index = 0
        while not self._closing.is_set():
            self._reading = False
            if self._buffers is not None:
                self._buffers.acquire()
                if self._closing.is_set():
                    return
            self._reading = True
            with self._lock:
                self._health.alive(time.monotonic_ns())
            started_s = time.monotonic()
            delivered = source.read()
            if delivered is None:
                return
            self._deliver(source, delivered, index, time.monotonic() - started_s, pacer)
            index += 1

    def _deliver(
        self, source: Source, delivered: Delivered, index: int, capture_s: float, pacer: Pacer
    ) -> None:
        self._metrics.frame_read()
        reason = defect(delivered.pixels)
        if reason is not None:
            self._metrics.frame_dropped(reason)
            self._give_back()
            if source.live:
                self._closing.wait(_NO_IMAGE_PAUSE_S)  # one that fails at once would spin
            return
        self._closing.wait(pacer.delay_s(time.monotonic()))
        image, pixel_format = as_image(delivered.pixels, source.color, delivered.yuv)
        now_ns = time.monotonic_ns()
        frame = Frame(image, pixel_format, self.source_id, index, now_ns, delivered.label, delivered.yuv)
        height, width = picture_hw(image, pixel_format)
        with self._lock:
            self._health.frame(now_ns, (width, height), 0)
        self._waiting.put(CapturedFrame(frame, self._give_back, capture_s))
        self._on_ready()

    def _give_back(self) -> None:
        if self._buffers is not None:
            self._buffers.release()
