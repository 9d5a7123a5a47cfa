"""What the parts of the camera app say to one another.

::

    Source ─read─▶ Feed ─take─▶ runtime ─▶ Sink, EventOutput, PictureHub
    (a capture process,  (one a     (one, over      (per source)
     or a thread)         source)    all feeds)

    page, /metrics, /healthz, systemd ◀─ StreamView ─ session

A source is read where it can be killed; its feed lives in the main process and says how the source is.
Everything a person or a program sees of the running app comes from one `StreamView`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from apps.streaming.metrics import MetricsSnapshot
from apps.streaming.predictions import Prediction
from apps.streaming.queues import DropPolicy
from pipeline.artifacts import Frame

__all__ = [
    "CapturedFrame",
    "DeviceReading",
    "EngineView",
    "Event",
    "EventOutput",
    "Feed",
    "PictureHub",
    "SourceState",
    "SourceStatus",
    "SourceView",
    "StreamView",
]


class SourceState(str, Enum):
    """How a source is.

    ``CONNECTING``: being opened for the first time. ``LIVE``: frames come. ``DEGRADED``: they came and
    do not now (silent, frozen, or being reopened within the restart budget). ``LOST``: the restart
    budget is spent or the failure is one that trying again will not mend (401, 404, no such device); it
    is still tried, seldom. ``ENDED``: a finite source is through.
    """

    CONNECTING = "CONNECTING"
    LIVE = "LIVE"
    DEGRADED = "DEGRADED"
    LOST = "LOST"
    ENDED = "ENDED"


@dataclass(frozen=True, slots=True)
class SourceStatus:
    """A source at one moment. All times are monotonic nanoseconds."""

    source_id: str
    """Its name in all output; never holds credentials."""
    state: SourceState
    since_ns: int
    """When it entered `state`."""
    reason: str | None
    """Why it is not ``LIVE``, redacted; ``None`` when it is."""
    fps: float
    """Nominal rate of the source; 0 while unknown."""
    size_wh: tuple[int, int] | None
    """Of the last frame."""
    last_frame_ns: int | None
    """When the last usable frame was captured."""
    restarts: int
    """Times that capture was started again since the start of the app."""
    stalls: int
    """Times that the frame-age watchdog killed a capture that had gone silent."""
    frozen: bool
    """Whether the last frames are identical."""


@dataclass(slots=True)
class CapturedFrame:
    """A frame that lies in a buffer which goes back to the source with `release`.

    `release` may be called once from any thread; ``frame.image`` must not be touched after it.
    """

    frame: Frame
    release: Callable[[], None]
    capture_s: float
    """What delivering it took: decoding, or waiting for the camera."""


class Feed(Protocol):
    """One source as the runtime sees it. No method blocks, but for `close`."""

    source_id: str
    live: bool
    policy: DropPolicy
    """``newest``: of the frames that wait, `take` gives the latest and the others are counted as dropped;
    ``every``: the source waits for the runtime."""
    labels: tuple[str, ...]
    """The engine's classes by name, see `apps.streaming.sources.ModelClasses.named`; known once a frame
    came."""
    notes: list[str]
    """What the user should know about how the source was read."""

    def start(self, on_ready: Callable[[], None]) -> None:
        """Begins to capture; `on_ready` is called, from any thread, when there is something to `take`
        and when the source ends."""
        ...

    def take(self) -> CapturedFrame | None:
        """The next frame by the policy; ``None`` where none waits."""
        ...

    @property
    def exhausted(self) -> bool:
        """Whether nothing will come any more: a finite source ended, and all of it was taken."""
        ...

    def status(self) -> SourceStatus:
        """How the source is."""
        ...

    def failure(self) -> Exception | None:
        """What ended a source that may not be tried again (a file that is no video)."""
        ...

    def close(self) -> None:
        """Ends the capture within two seconds, killing it where it does not end by itself."""
        ...


@dataclass(frozen=True, slots=True)
class Event:
    """A label entered or left the view of a source."""

    kind: Literal["enter", "leave"]
    source_id: str
    label: str
    class_index: int
    confidence: float
    """Smoothed, in [0, 1]: at the moment of entering, or the highest while it was there."""
    frame_index: int
    timestamp_ns: int
    """Monotonic, of the frame."""
    time_utc: str
    """ISO 8601 with milliseconds, of the frame."""
    seconds: float | None = None
    """How long the label was there; only of ``leave``."""


class EventOutput(Protocol):
    """Takes events; never blocks the stream."""

    def publish(self, event: Event) -> None:
        """Queues the event; the oldest is given up, and counted, where the queue is full."""
        ...

    def counters(self) -> dict[str, int]:
        """``published``, ``delivered``, ``dropped``, ``queued``, ``failures``."""
        ...

    def close(self) -> None:
        """Delivers what it can within two seconds."""
        ...


class PictureHub(Protocol):
    """Where the runtime leaves pictures for the page."""

    def wanted(self, source_id: str) -> bool:
        """Whether someone watches this source now and is due a picture: where not, none is drawn."""
        ...

    def publish(self, source_id: str, picture: NDArray[np.uint8]) -> None:
        """Takes a picture (uint8 HWC BGR), overlay included; the caller does not touch it again."""
        ...


@dataclass(frozen=True, slots=True)
class DeviceReading:
    """What the machine says of itself; empty where it says nothing."""

    temperatures_c: dict[str, float] = field(default_factory=dict)
    power_mw: dict[str, float] = field(default_factory=dict)
    power_mode: str | None = None
    """nvpmodel's on a Jetson, the frequency governor elsewhere."""
    cpu_percent: float | None = None
    memory_used_bytes: int | None = None
    """Resident, of this process and its capture processes."""


@dataclass(frozen=True, slots=True)
class EngineView:
    """What infers at the moment."""

    bundle: str
    bundle_digest: str
    """First 12 hex digits of the manifest's SHA-256."""
    engine: str
    precision: str
    reloads: int
    reload_failures: int
    last_reload_error: str | None
    batches: int
    batched_frames: int
    """``batched_frames / batches`` is the mean batch."""


@dataclass(frozen=True, slots=True)
class SourceView:
    """One source: how it is, what was counted, and what it shows."""

    status: SourceStatus
    metrics: MetricsSnapshot
    latest: Prediction | None
    present: tuple[str, ...]
    """Labels that entered and have not left."""


@dataclass(frozen=True, slots=True)
class StreamView:
    """The whole app at one moment."""

    uptime_s: float
    sources: tuple[SourceView, ...]
    engine: EngineView
    device: DeviceReading
    events: dict[str, dict[str, int]]
    """Counters of every event output, by its name."""
    max_age_ms: float | None
    """The latency budget: older frames are dropped, and counted."""
    preprocessing: str
    """``verified`` and when, or what the golden frames found wrong."""

    def to_json(self) -> dict[str, Any]:
        """JSON-compatible values, for the page."""
        import dataclasses

        return dataclasses.asdict(self)
