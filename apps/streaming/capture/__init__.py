"""Reading a source where it can be killed, and saying how it is: one `Feed` a source.

::

    capture process                     │ supervisor thread                     │ runtime
    open_source, read into a free slot ─┼▶ RING: a mapping (memfd, read-only)   │
    check, pace, time stamp            ─┼▶ FRAME: slot, shape, time ─▶ waiting ─┼▶ take
    slot is free again                ◀─┼──────────────────────────────────────◀┼─ release

What runs foreign code (FFmpeg, drivers, GStreamer) is read in a process of its own (`process`,
`supervisor`); our own code (the synthetic camera, image folders) in a thread (`threaded`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from apps.streaming.capture.opening import open_feed

__all__ = ["open_feed"]


def __getattr__(name: str) -> Any:
    # A capture process imports this package too, and has no use for the supervisor.
    if name == "open_feed":
        from apps.streaming.capture.opening import open_feed

        return open_feed
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
