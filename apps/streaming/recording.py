"""Recording without end: segments in a folder, the oldest of which make room.

::

    main thread ──pictures──▶ encoder thread ─▶ segment, under a partial name ─rename─▶ segment
                 bounded by bytes

Encoding 1080p takes as long as a fast engine, and a disk may stall for seconds, so neither happens in the
thread that infers. What goes wrong with the disk pauses the recording, and does not end the stream.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from apps.streaming import opencv
from apps.streaming.clock import UtcAnchor, process_anchor
from apps.streaming.config import RecordConfig
from apps.streaming.predictions import Prediction
from apps.streaming.segments import SegmentFolder
from apps.streaming.sinks import Recorder
from pipeline.artifacts import Frame
from pipeline.errors import EdgefoldError, UsageError

__all__ = ["SegmentRecorder", "open_recording"]

_log = logging.getLogger(__name__)

_RESERVE_BYTES = 64 << 20
"""More than `Recorder` keeps free: a segment is completed while it still can be."""

_QUEUE_BYTES = 64 << 20
"""Ten pictures of 1080p: a third of a second."""

_CHECK_S = 2.0
_GAP_S = 5.0
_GAP_FRAMES = 3.0
_POLL_S = 0.5
_PATIENCE_S = 2.0
_PAUSE_S = (5.0, 60.0)
_CLOSE_S = 3.0
_MIN_SEGMENT_S = 1.0
_MIN_QUOTA_MB = 1.0


def open_recording(config: RecordConfig, fps: float, by_time: bool, name: str) -> Recorder | SegmentRecorder:
    """The recorder for a path: segments for a folder, or for what may become one; else a single file.

    Args:
        config: where to, and for a folder, how much.
        fps: rate at which the video plays.
        by_time: see `apps.streaming.sinks.Recorder`.
        name: of the source.

    Raises:
        UsageError, UnsupportedError: as the recorder raises them.
    """
    if config.path.is_dir() or not config.path.suffix:
        return SegmentRecorder(config, fps, by_time, name)
    return Recorder(config.path, fps, by_time)


class SegmentRecorder:
    """Records into segments of `segment_s`, each complete and playable on its own; a `Sink`.

    A segment also ends where the size of the pictures changes, where the source was silent (a gap is not
    filled with its last picture), and where what is unfinished in the folder reaches half of the quota.

    With `by_time`, a picture for which the queue has no room is dropped and counted. Without, the stream
    is of policy ``every`` and waits, two seconds at most: a disk that hangs must not hang the stream.

    Args:
        config: folder, length and quota.
        fps: rate at which a segment plays.
        by_time: as in `Recorder`.
        name: of the source; in the names of the segments.
        reserve_bytes: kept free on the disk.
        queue_bytes: of pictures that wait to be encoded.
        anchor: what UTC the frames get; by default that of the process.

    Raises:
        UsageError: the folder or a number cannot be used, or another source has this name there.
        UnsupportedError: OpenCV is missing.
    """

    needs_picture = True

    def __init__(
        self,
        config: RecordConfig,
        fps: float,
        by_time: bool,
        name: str,
        *,
        reserve_bytes: int = _RESERVE_BYTES,
        queue_bytes: int = _QUEUE_BYTES,
        anchor: UtcAnchor | None = None,
    ) -> None:
        self._cv2_error: type[Exception] = opencv.load("recording a video").error
        _check(config, fps)
        quota_bytes = int(config.quota_mb * 1e6)
        self._source = name
        self._fps = fps
        self._by_time = by_time
        self._segment_s = config.segment_s
        self._half_quota_bytes = quota_bytes // 2
        self._gap_s = max(_GAP_S, _GAP_FRAMES / fps)
        self._anchor = anchor or process_anchor()
        self._queue = _PictureQueue(queue_bytes)
        self._segment: Recorder | None = None
        self._first_ns = self._last_ns = 0
        self._size_hw = (0, 0)
        self._last_written_s = 0.0
        self._next_check_s = 0.0
        self._paused_until_s = 0.0
        self._pause_s = _PAUSE_S[0]
        self._closed = False
        self._due_s: float | None = None
        self._unfinished: str | None = None
        self._counts = dict.fromkeys(("segments", "frames", "dropped", "paused", "failures", "deleted"), 0)
        self.last_error: str | None = None
        """Why it is paused; ``None`` while it records."""
        self._folder = SegmentFolder(config.path, name, quota_bytes, reserve_bytes)
        if self._folder.n_recovered:
            _log.warning(
                "recording to %s: removed %d unfinished segment(s) that an earlier run left",
                config.path,
                self._folder.n_recovered,
            )
        self._thread = threading.Thread(target=self._encode_loop, name="recording", daemon=True)
        self._thread.start()

    def write(self, frame: Frame, prediction: Prediction, picture: NDArray[np.uint8] | None) -> None:
        """Queues the picture, which must not be changed afterwards."""
        assert picture is not None
        # Not the frame itself: its image lies in a buffer that goes back to the source.
        if not self._queue.put(
            replace(frame, image=picture, pixel_format="BGR", yuv=None), prediction, not self._by_time
        ):
            self._counts["dropped"] += 1

    def counters(self) -> dict[str, int]:
        """``segments`` complete, ``frames`` recorded, ``dropped`` for want of room in the queue, ``paused``
        those that came while recording was paused, ``failures`` that paused it, segments ``deleted``."""
        return dict(self._counts)

    def stop(self) -> None:
        """Takes no more pictures and begins to complete the last segment, for which `close` waits. Recorders
        that are stopped first and closed then have their three seconds together, not one after the other."""
        if self._due_s is None:
            self._due_s = time.monotonic() + _CLOSE_S
            self._queue.close()

    def close(self) -> None:
        """Records what is queued and completes the last segment; twice is harmless.

        Raises:
            EdgefoldError: the last segment is not whole, or the disk did not take it within three seconds.
        """
        if self._closed:
            return
        self._closed = True
        self.stop()
        assert self._due_s is not None
        self._thread.join(max(0.0, self._due_s - time.monotonic()))
        if self._thread.is_alive():
            raise EdgefoldError(
                f"the last segment of {self._source} in {self._folder.path} was not completed within "
                f"{_CLOSE_S:.0f} s: the disk does not answer. The next recording there removes it"
            )
        self._folder.close()
        if self._unfinished is not None:
            raise EdgefoldError(self._unfinished)

    # --- encoder thread ---------------------------------------------------------------------------

    def _encode_loop(self) -> None:
        while not self._queue.exhausted:
            item = self._queue.get(_POLL_S)
            try:
                if item is None:
                    self._finish_if_silent()
                elif time.monotonic() < self._paused_until_s:
                    self._counts["paused"] += 1
                else:
                    self._record(*item)
            except (EdgefoldError, OSError, self._cv2_error) as error:
                self._counts["paused"] += item is not None
                self._pause(error)
        try:
            self._finish()
        except (EdgefoldError, OSError, self._cv2_error) as error:
            self._pause(error)
            self._unfinished = str(error)

    def _record(self, frame: Frame, prediction: Prediction) -> None:
        if time.monotonic() >= self._next_check_s:
            self._next_check_s = time.monotonic() + _CHECK_S
            self._counts["deleted"] += self._folder.make_room()
            if self._folder.unfinished_bytes() >= self._half_quota_bytes:
                self._finish()
        if self._segment is not None and self._is_next_segment(frame):
            self._finish()
        if self._segment is None:
            path = self._folder.new_segment(self._anchor.utc(frame.timestamp_ns))
            self._segment = Recorder(path, self._fps, self._by_time)
            self._first_ns, self._size_hw = frame.timestamp_ns, frame.image.shape[:2]
        self._segment.write(frame, prediction, frame.image)
        self._last_ns, self._last_written_s = frame.timestamp_ns, time.monotonic()
        self._counts["frames"] += 1
        if self.last_error is not None:
            _log.warning("recording %s to %s goes on: %s", self._source, self._folder.path, self._counts)
            self.last_error = None

    def _is_next_segment(self, frame: Frame) -> bool:
        assert self._segment is not None
        if frame.image.shape[:2] != self._size_hw:
            return True
        if not self._by_time:
            return self._segment.n_written >= self._segment_s * self._fps
        silent_s = (frame.timestamp_ns - self._last_ns) / 1e9
        return silent_s > self._gap_s or frame.timestamp_ns - self._first_ns >= self._segment_s * 1e9

    def _finish_if_silent(self) -> None:
        """A camera that is away does not leave its last segment unplayable meanwhile."""
        if time.monotonic() - self._last_written_s > self._gap_s:
            self._finish()

    def _finish(self) -> None:
        segment, self._segment = self._segment, None
        if segment is not None:
            segment.close()
            self._counts["segments"] += segment.complete
            self._pause_s = _PAUSE_S[0]

    def _pause(self, error: Exception) -> None:
        """Completes the segment if it still can be, and waits: longer each time, until one was completed."""
        reason = str(error)
        self._counts["failures"] += 1
        if reason != self.last_error:
            _log.warning("recording %s to %s pauses: %s", self._source, self._folder.path, reason)
        self.last_error = reason
        segment, self._segment = self._segment, None
        if segment is not None:
            try:
                segment.close()
                self._counts["segments"] += segment.complete
            except (EdgefoldError, OSError, self._cv2_error) as second:
                _log.warning("recording %s: %s", self._source, second)
        self._paused_until_s = time.monotonic() + self._pause_s
        self._pause_s = min(2 * self._pause_s, _PAUSE_S[1])


class _PictureQueue:
    """Pictures between two threads, at most so many bytes of them; always room for one."""

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity_bytes = capacity_bytes
        self._items: deque[tuple[Frame, Prediction]] = deque()
        self._bytes = 0
        self._changed = threading.Condition()
        self._closed = False
        self._stuck = False

    @property
    def exhausted(self) -> bool:
        """Whether nothing will come any more."""
        with self._changed:
            return self._closed and not self._items

    def put(self, frame: Frame, prediction: Prediction, wait: bool) -> bool:
        """Queues a picture, or says that there is no room. A wait that was in vain is not repeated for
        every picture, but only when one has been taken since."""
        size = frame.image.nbytes

        def has_room() -> bool:
            return not self._items or self._bytes + size <= self._capacity_bytes

        with self._changed:
            if wait and not self._stuck:
                self._stuck = not self._changed.wait_for(lambda: self._closed or has_room(), _PATIENCE_S)
            if self._closed or not has_room():
                return False
            self._items.append((frame, prediction))
            self._bytes += size
            self._changed.notify_all()
            return True

    def get(self, timeout_s: float) -> tuple[Frame, Prediction] | None:
        """The oldest; ``None`` after `timeout_s` without one, or once closed and empty."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or bool(self._items), timeout_s)
            if not self._items:
                return None
            item = self._items.popleft()
            self._bytes -= item[0].image.nbytes
            self._stuck = False
            self._changed.notify_all()
            return item

    def close(self) -> None:
        """Nothing more comes; what is queued is still delivered."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


def _check(config: RecordConfig, fps: float) -> None:
    if not (math.isfinite(config.segment_s) and config.segment_s >= _MIN_SEGMENT_S):
        raise UsageError(f"recording: segments of {config.segment_s:g} s; give at least {_MIN_SEGMENT_S:g} s")
    if not (math.isfinite(config.quota_mb) and config.quota_mb >= _MIN_QUOTA_MB):
        raise UsageError(f"recording: a quota of {config.quota_mb:g} MB; give at least {_MIN_QUOTA_MB:g} MB")
    if not (math.isfinite(fps) and fps > 0.0):
        raise UsageError(
            f"recording: a video cannot play at {fps:g} FPS; the rate of the source must be known"
        )
