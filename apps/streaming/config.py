"""What `edgefold stream` is asked to do, as values; from the command line or from a TOML file."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from apps.streaming.queues import DropPolicy

__all__ = [
    "CaptureLimits",
    "EventConfig",
    "MqttConfig",
    "RecordConfig",
    "ServeConfig",
    "SourceConfig",
    "StreamConfig",
    "StreamPrecision",
]

StreamPrecision = Literal["int8", "fp16", "bf16", "fp32"]
_STRICT: dict[str, Any] = {"extra": "forbid", "allow_inf_nan": False}
"""For pydantic, where the values come from a file (`apps.streaming.config_file`)."""


@dataclass(frozen=True, slots=True)
class RecordConfig:
    """Video of the pictures with the overlay.

    Attributes:
        path: an ``.mp4``; or a folder, for segments that are rotated.
        segment_s: length of a segment in a folder.
        quota_mb: all segments in the folder together; the oldest go first.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    path: Path
    segment_s: float = 300.0
    quota_mb: float = 2048.0


@dataclass(frozen=True, slots=True)
class SourceConfig:
    """One source; see `apps.streaming.uris` for `uri`.

    Attributes:
        name: of the source in all output; by default the URI without its credentials.
        policy: by default ``newest`` for live sources, else ``every``.
        fps: rate of a synthetic camera or an image folder.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    uri: str
    name: str | None = None
    policy: DropPolicy | None = None
    fps: float | None = None
    record: RecordConfig | None = None

    def policy_for(self, live: bool) -> DropPolicy:
        """The policy, by default that of a source which is `live` or not."""
        return self.policy or ("newest" if live else "every")


@dataclass(frozen=True, slots=True)
class CaptureLimits:
    """When a source is held to be in trouble, and how often it is tried again.

    Attributes:
        degraded_s: without a frame for so long it is DEGRADED.
        stall_s: without a frame for so long its capture is killed and started again.
        open_s: opening may take this long.
        frozen_s: identical frames for so long are flagged.
        backoff_s: first and longest wait before a restart; doubled each time, with jitter.
        restart_budget: restarts within `budget_window_s` after which the source is LOST.
        lost_retry_s: a LOST source is tried again after this time.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    degraded_s: float = 2.0
    stall_s: float = 5.0
    open_s: float = 15.0
    frozen_s: float = 10.0
    backoff_s: tuple[float, float] = (1.0, 30.0)
    restart_budget: int = 10
    budget_window_s: float = 600.0
    lost_retry_s: float = 120.0


@dataclass(frozen=True, slots=True)
class EventConfig:
    """When a label is in view.

    Attributes:
        smoothing_s: time constant of the running average of the confidences; 0 takes every frame as it is.
        enter: smoothed confidence from which a label enters.
        leave: and below which it leaves; lower than `enter`, so that it does not flicker.
        hold_s: it must stay below `leave` for so long.
        ignore: labels that make no events (``background``).
        log: JSON-lines file; ``-`` is standard output.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    smoothing_s: float = 0.5
    enter: float = 0.7
    leave: float = 0.4
    hold_s: float = 0.5
    ignore: tuple[str, ...] = ()
    log: str | None = None


@dataclass(frozen=True, slots=True)
class MqttConfig:
    """Events to a broker, on ``TOPIC/SOURCE/events``.

    Attributes:
        url: ``mqtt://[user:password@]host[:1883]`` or ``mqtts://…``.
        queue: events kept while the broker is away; the oldest are given up.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    url: str
    topic: str = "edgefold"
    qos: Literal[0, 1] = 1
    queue: int = 10_000


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """The page, ``/metrics``, ``/healthz``, ``/readyz``.

    Attributes:
        host: loopback unless told otherwise.
        token: asked of every client; made up, and printed, where `host` is not loopback.
        max_clients: video clients at the same time.
        video_fps: pictures a second and client, at most.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    host: str = "127.0.0.1"
    port: int = 8080
    token: str | None = None
    max_clients: int = 16
    video_fps: float = 15.0


@dataclass(frozen=True, slots=True)
class StreamConfig:
    """One run of the camera app.

    Attributes:
        max_age_ms: the latency budget; frames that would be answered later are dropped and counted. By
            default there is none where every source is of policy ``every``, else 1000.
        max_batch: images a request; more than 1 needs an engine with a dynamic batch. By default 1, or 4 to 8 on a CPU
            where every source is of policy ``every`` and neither are pictures looked at nor is there a
            latency budget.
        batch_wait_ms: how long the first frame of a batch waits for others. By default 5, or 100 where
            batches are the default and no source is live.
        streams: requests that the engine works on at the same time; by default the engine's choice.
        predictions: JSON-lines file of every prediction.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    bundle: Path
    sources: tuple[SourceConfig, ...]
    engine: str | None = None
    precision: StreamPrecision | None = None
    max_age_ms: float | None = None
    max_batch: int | None = None
    batch_wait_ms: float | None = None
    streams: int | None = None
    headless: bool = False
    predictions: Path | None = None
    max_seconds: float | None = None
    max_frames: int | None = None
    limits: CaptureLimits = field(default_factory=CaptureLimits)
    events: EventConfig | None = None
    mqtt: MqttConfig | None = None
    serve: ServeConfig | None = None
    log_json: bool = False
