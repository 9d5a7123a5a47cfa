"""How a source is, and when it is tried again: rules without threads, processes or clocks of their own.

Every method is told the time (monotonic nanoseconds or seconds), so the rules are tested as a table.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass

from apps.streaming.config import CaptureLimits
from apps.streaming.contracts import SourceState, SourceStatus
from pipeline.errors import Retry

__all__ = ["RestartPolicy", "SourceHealth", "Wait"]

_NS = 1e9
_SLOW_FRAMES = 3.0


@dataclass(frozen=True, slots=True)
class Wait:
    """What to do after a failure."""

    seconds: float
    lost: bool


class RestartPolicy:
    """How long to wait before a source is tried again.

    The wait doubles from failure to failure, up to the longest, each drawn from its upper half: many
    cameras behind one switch must not come back at the same instant, and none at once. It starts anew
    when frames came for as long as the longest wait. Where the budget of a window is spent, the source
    is lost, and tried seldom until a frame comes.
    """

    def __init__(self, limits: CaptureLimits, rng: random.Random | None = None) -> None:
        self._limits = limits
        self._rng = rng or random.Random()
        self._failures = 0
        self._restarts_s: deque[float] = deque()
        self._lost = False
        self._first_frame_s: float | None = None

    def frame_came(self, now_s: float) -> None:
        """The capture that was started last delivers."""
        self._lost = False
        if self._first_frame_s is None:
            self._first_frame_s = now_s

    def failed(self, now_s: float, retry: Retry) -> Wait:
        """The capture is over, and is to be started again after the wait."""
        limits = self._limits
        shortest_s, longest_s = limits.backoff_s
        if self._first_frame_s is not None and now_s - self._first_frame_s >= longest_s:
            self._failures = 0
        self._first_frame_s = None
        while self._restarts_s and now_s - self._restarts_s[0] >= limits.budget_window_s:
            self._restarts_s.popleft()
        if self._lost or retry != "soon" or len(self._restarts_s) >= limits.restart_budget:
            self._lost = True
            return Wait(limits.lost_retry_s, lost=True)
        self._restarts_s.append(now_s)
        ceiling_s = min(longest_s, shortest_s * 2.0 ** min(self._failures, 60))
        self._failures += 1
        return Wait(ceiling_s * self._rng.uniform(0.5, 1.0), lost=False)


class SourceHealth:
    """The state of one source. Not thread-safe; the feed has the lock.

    Args:
        source_id: its name.
        limits: when it is held to be in trouble.
        now_ns: the time.
    """

    def __init__(self, source_id: str, limits: CaptureLimits, now_ns: int) -> None:
        self._limits = limits
        self._source_id = source_id
        self._state = SourceState.CONNECTING
        self._since_ns = now_ns
        self._reason: str | None = "being opened"
        self._fps = 0.0
        self._size_wh: tuple[int, int] | None = None
        self._last_frame_ns: int | None = None
        self._started_ns = now_ns
        self._opened = False
        self._sign_ns = now_ns
        self._fingerprint = 0
        self._same_since_ns = now_ns
        self._frozen = False
        self._restarts = 0
        self._stalls = 0

    def started(self, now_ns: int, again: bool) -> None:
        """A capture was started."""
        self._started_ns = self._sign_ns = now_ns
        self._opened = False
        self._fingerprint = 0
        self._restarts += again

    def opened(self, now_ns: int, fps: float) -> None:
        """The source is open; frames are due."""
        self._opened = True
        self._fps = fps
        self._sign_ns = now_ns

    def alive(self, now_ns: int) -> None:
        """No frame, but not for want of one: it waits for the runtime, or found no free buffer."""
        self._sign_ns = now_ns

    def frame(self, now_ns: int, size_wh: tuple[int, int], fingerprint: int) -> None:
        """A usable frame came, captured at `now_ns`; `fingerprint` 0 where identical ones are no fault."""
        self._last_frame_ns = self._sign_ns = now_ns
        self._size_wh = size_wh
        if not fingerprint or fingerprint != self._fingerprint:
            self._fingerprint = fingerprint
            self._same_since_ns = now_ns
        same_s = (now_ns - self._same_since_ns) / _NS
        self._frozen = same_s >= self._limits.frozen_s
        if self._frozen:
            self._enter(SourceState.DEGRADED, now_ns, f"frozen: identical frames for {same_s:.0f} s")
        else:
            self._enter(SourceState.LIVE, now_ns, None)

    def failed(self, now_ns: int, reason: str, lost: bool) -> None:
        """The capture is over, and will be started again."""
        if lost:
            self._enter(SourceState.LOST, now_ns, reason)
        elif self._state in (SourceState.CONNECTING, SourceState.LOST):
            self._reason = reason
        else:
            self._enter(SourceState.DEGRADED, now_ns, reason)

    def ended(self, now_ns: int, reason: str | None) -> None:
        """Nothing will come any more."""
        self._enter(SourceState.ENDED, now_ns, reason)

    def check(self, now_ns: int) -> str | None:
        """The watchdog: why the running capture must be killed; ``None`` where it may go on."""
        limits = self._limits
        if not self._opened:
            opening_s = (now_ns - self._started_ns) / _NS
            if opening_s >= limits.open_s:
                return self._stalled(f"did not open within {opening_s:.1f} s (limit {limits.open_s:g} s)")
            return None
        stall_s = max(limits.stall_s, self._slow_s)
        silent_s = self.silent(now_ns)
        if silent_s >= stall_s:
            return self._stalled(f"no usable frame for {silent_s:.1f} s (limit {stall_s:g} s)")
        return None

    def silent(self, now_ns: int) -> float:
        """Degrades a live source that is silent for too long; returns for how long it is, in seconds."""
        silent_s = (now_ns - self._sign_ns) / _NS
        if self._state is SourceState.LIVE and silent_s >= max(self._limits.degraded_s, self._slow_s):
            self._enter(SourceState.DEGRADED, now_ns, f"no usable frame for {silent_s:.1f} s")
        return silent_s

    @property
    def _slow_s(self) -> float:
        """A source of one frame in ten seconds is not silent between them."""
        return _SLOW_FRAMES / self._fps if self._fps > 0 else 0.0

    def status(self) -> SourceStatus:
        """How it is."""
        return SourceStatus(
            source_id=self._source_id,
            state=self._state,
            since_ns=self._since_ns,
            reason=self._reason,
            fps=self._fps,
            size_wh=self._size_wh,
            last_frame_ns=self._last_frame_ns,
            restarts=self._restarts,
            stalls=self._stalls,
            frozen=self._frozen,
        )

    def _stalled(self, reason: str) -> str:
        self._stalls += 1
        return reason

    def _enter(self, state: SourceState, now_ns: int, reason: str | None) -> None:
        if state is not self._state:
            self._since_ns = now_ns
        self._state = state
        self._reason = reason
