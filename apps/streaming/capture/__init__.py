"""Reading a source where it can be killed, and saying how it is: one `Feed` a source.

::

    capture process                     │ supervisor thread                     │ runtime
    open_source, read into a free slot ─┼▶ RING: a mapping (memfd, read-only)   │
    check, pace, time stamp            ─┼▶ FRAME: slot, shape, time ─▶ waiting ─┼▶ take
    slot is free again                ◀─┼──────────────────────────────────────◀┼─ release

What runs foreign code (FFmpeg, drivers, GStreamer) is read in a process of its own (`process`,
`supervisor`); our own code (the synthetic camera, image folders) in a thread (`threaded`).
"""

from apps.streaming.capture.opening import open_feed

__all__ = ["open_feed"]
