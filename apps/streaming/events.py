"""When a label enters the view of a source, and when it leaves.

::

    confidence, smoothed
    enter  ─ ─ ─ ─ ─ ─ ╱‾‾╲ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─
                      ╱    ╲      ╱╲
    leave  ─ ─ ─ ─ ─ ╱─ ─ ─ ╲─ ─ ╱  ╲─ ─ ─ ─ ─ ─ ─ ─
                    ╱        ╲__╱    ╲_____________
                       ▲      hold_s      hold_s  ▲
                     enter   not over            leave

A label enters at the first frame with `enter` or more, and leaves once it has been below `leave` for
`hold_s` on end. Between the two it stays what it was, so that noise around one threshold makes no events.
Everything is decided by the monotonic times of the frames; `apps.streaming.clock` says what UTC they get.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from apps.streaming.clock import UtcAnchor, process_anchor
from apps.streaming.config import EventConfig
from apps.streaming.contracts import Event
from apps.streaming.event_log import EventLog
from apps.streaming.predictions import TOP_K, RankedClass
from apps.streaming.smoothing import ProbabilityAverage
from pipeline.artifacts import Frame
from pipeline.errors import UsageError

__all__ = ["SILENCE_S", "EventLog", "EventTracker", "check_event_config"]

SILENCE_S = 2.0
"""Without a frame for so long nothing is known to be in view; the app calls such a source DEGRADED."""

_N_NEAR = 3
_NEVER = -1


class EventTracker:
    """The labels in view of one source. Not thread-safe: one thread updates, ticks and closes.

    Args:
        config: thresholds and times.
        labels: the C class names. Classes that share a name have a state each.
        source_id: for the events.
        silence_s: without a frame for so long every label leaves.
        anchor: what UTC the frames get; by default that of the process.

    Raises:
        UsageError: a threshold or time that makes no sense, or a label to ignore that does not exist.
    """

    def __init__(
        self,
        config: EventConfig,
        labels: Sequence[str],
        source_id: str,
        *,
        silence_s: float = SILENCE_S,
        anchor: UtcAnchor | None = None,
    ) -> None:
        check_event_config(config)
        _check_ignored(config.ignore, labels)
        self._config = config
        self._labels = tuple(labels)
        self._source_id = source_id
        self._silence_ns = round(silence_s * 1e9)
        self._hold_ns = round(config.hold_s * 1e9)
        self._anchor = anchor or process_anchor()
        self._average = ProbabilityAverage(config.smoothing_s, silence_s)
        self._watched = np.array([label not in config.ignore for label in labels])
        n_classes = len(self._labels)
        self._present = np.zeros(n_classes, np.bool_)
        self._entered_ns = np.zeros(n_classes, np.int64)
        self._below_since_ns = np.full(n_classes, _NEVER, np.int64)
        self._peak = np.zeros(n_classes)
        self._last_ns: int | None = None
        self._last_index = 0

    @property
    def present(self) -> tuple[str, ...]:
        """The labels that entered and have not left, by class index."""
        return tuple(self._labels[index] for index in np.flatnonzero(self._present))

    def top(self, k: int = TOP_K) -> tuple[RankedClass, ...]:
        """The `k` classes of the highest smoothed confidence, for the overlay; none before a frame."""
        smoothed = self._average.value
        if smoothed is None:
            return ()
        order = np.argsort(-smoothed, kind="stable")[:k]
        return tuple(RankedClass(int(i), self._labels[i], float(smoothed[i])) for i in order)

    def update(self, frame: Frame, probabilities: NDArray[np.float64]) -> list[Event]:
        """Takes a frame; what left comes before what entered.

        Args:
            frame: later than the one before; one from the past changes nothing.
            probabilities: float64 (C,), in [0, 1], as the network gave them: smoothed here.
        """
        now_ns = frame.timestamp_ns
        if self._last_ns is not None and now_ns < self._last_ns:
            return []
        events = self.tick(now_ns)
        smoothed = self._average.update(now_ns, probabilities)
        self._last_ns, self._last_index = now_ns, frame.index

        self._peak = np.where(self._present, np.maximum(self._peak, smoothed), self._peak)
        low = self._present & (smoothed < self._config.leave)
        falling = low & (self._below_since_ns == _NEVER)
        self._below_since_ns = np.where(low, np.where(falling, now_ns, self._below_since_ns), _NEVER)
        leaving = low & (now_ns - self._below_since_ns >= self._hold_ns)
        events += self._leave(leaving, now_ns)

        entering = ~self._present & self._watched & (smoothed >= self._config.enter)
        for index in np.flatnonzero(entering):
            self._present[index] = True
            self._entered_ns[index] = now_ns
            self._below_since_ns[index] = _NEVER
            self._peak[index] = smoothed[index]
            events.append(self._event("enter", int(index), float(smoothed[index]), now_ns, None))
        return events

    def tick(self, now_ns: int) -> list[Event]:
        """Looks at the clock: of a source that fell silent everything leaves, as of its last frame.

        Args:
            now_ns: monotonic.
        """
        if self._last_ns is None or now_ns - self._last_ns <= self._silence_ns:
            return []
        return self._clear(self._last_ns)

    def close(self, timestamp_ns: int) -> list[Event]:
        """The source has ended: everything leaves.

        Args:
            timestamp_ns: monotonic; of the end.
        """
        # A source that had been silent is held to the same rule as by `tick`.
        return self.tick(timestamp_ns) or self._clear(timestamp_ns)

    def _clear(self, timestamp_ns: int) -> list[Event]:
        self._average.reset()
        return self._leave(self._present.copy(), timestamp_ns)

    def _leave(self, leaving: NDArray[np.bool_], timestamp_ns: int) -> list[Event]:
        events = []
        for index in np.flatnonzero(leaving):
            self._present[index] = False
            seconds = (timestamp_ns - int(self._entered_ns[index])) / 1e9
            events.append(self._event("leave", int(index), float(self._peak[index]), timestamp_ns, seconds))
        return events

    def _event(
        self,
        kind: Literal["enter", "leave"],
        class_index: int,
        confidence: float,
        timestamp_ns: int,
        seconds: float | None,
    ) -> Event:
        return Event(
            kind=kind,
            source_id=self._source_id,
            label=self._labels[class_index],
            class_index=class_index,
            confidence=min(1.0, max(0.0, confidence)),
            frame_index=self._last_index,
            timestamp_ns=timestamp_ns,
            time_utc=self._anchor.iso(timestamp_ns),
            seconds=seconds,
        )


def check_event_config(config: EventConfig) -> None:
    """Checks what does not depend on the bundle.

    Raises:
        UsageError: a threshold or a time that makes no sense.
    """
    if not 0.0 < config.leave < config.enter <= 1.0:
        raise UsageError(
            f"events: enter {config.enter:g} and leave {config.leave:g} do not fit; confidences need "
            "0 < leave < enter <= 1, for instance enter 0.7 and leave 0.4"
        )
    for name, seconds in (("smoothing_s", config.smoothing_s), ("hold_s", config.hold_s)):
        if not (math.isfinite(seconds) and seconds >= 0.0):
            raise UsageError(f"events: {name} {seconds:g} is no time; give 0 or more seconds")


def _check_ignored(ignore: Sequence[str], labels: Sequence[str]) -> None:
    for name in ignore:
        if name not in labels:
            near = difflib.get_close_matches(name, labels, n=_N_NEAR, cutoff=0.5)
            hint = (
                f"; near: {', '.join(near)}"
                if near
                else f"; it has {len(labels)}, the first is {labels[0]!r}"
            )
            raise UsageError(f"events: the bundle has no label {name!r} to ignore{hint}")
