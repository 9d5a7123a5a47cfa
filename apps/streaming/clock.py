"""The UTC of what happened in a stream, without the jumps of the system's clock.

Frames carry monotonic times, and everything is decided by these. UTC is for the reader: it is the monotonic
time, moved by the difference of the two clocks at one moment. Were the system's clock asked again for
every event, setting it back (by NTP, by hand, on a device that boots in 1970) would give a later event an
earlier time. The price: a clock that is set after the start is not followed. A service should therefore
start after ``time-sync.target``; slow corrections are followed, since NTP slews the monotonic clock too.
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone

__all__ = ["UtcAnchor", "process_anchor"]

_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)


@dataclass(frozen=True, slots=True)
class UtcAnchor:
    """Both clocks at one moment, in nanoseconds."""

    monotonic_ns: int
    utc_ns: int

    @classmethod
    def take(cls) -> UtcAnchor:
        """The clocks now."""
        return cls(time.monotonic_ns(), time.time_ns())

    def utc(self, timestamp_ns: int) -> datetime:
        """The UTC of a monotonic time, to the microsecond."""
        return _EPOCH + timedelta(microseconds=(self.utc_ns + timestamp_ns - self.monotonic_ns) // 1000)

    def iso(self, timestamp_ns: int) -> str:
        """The UTC of a monotonic time as ISO 8601: ``2026-11-25T12:00:00.123Z``."""
        return self.utc(timestamp_ns).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


@functools.cache
def process_anchor() -> UtcAnchor:
    """The one anchor of this process: the same for all sources, taken when it is first asked for."""
    return UtcAnchor.take()
