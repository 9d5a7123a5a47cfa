"""What a configuration must hold, whichever way it came: from the command line or from a file."""

from __future__ import annotations

from collections.abc import Iterator

from apps.streaming.config import (
    CaptureLimits,
    EventConfig,
    MqttConfig,
    RecordConfig,
    ServeConfig,
    SourceConfig,
    StreamConfig,
)
from pipeline.errors import UsageError

__all__ = ["Problem", "check_config", "check_options", "find_problem"]

_MAX_FPS = 1000.0
_MQTT_SCHEMES = ("mqtt://", "mqtts://")

Problem = tuple[tuple[str | int, ...], str]
"""Where in the configuration, by field names and indices, and what is wrong with it."""


def check_config(config: StreamConfig) -> None:
    """Raises `UsageError` for the first value that is out of range or contradicts another."""
    problem = find_problem(config)
    if problem is not None:
        where, what = problem
        raise UsageError(f"{'.'.join(map(str, where))}: {what}")


def check_options(config: StreamConfig) -> None:
    """As `check_config`, but what a command line may get wrong by the name of its option."""
    if not config.sources:
        raise UsageError("there is nothing to stream; give --source")
    counts = {"--max-frames": config.max_frames, "--streams": config.streams, "--batch": config.max_batch}
    for option, count in counts.items():
        if count is not None and count < 1:
            raise UsageError(f"{option} {count} leaves nothing to do; give at least 1")
    for option, value in (("--max-seconds", config.max_seconds), ("--max-age", config.max_age_ms)):
        if value is not None and not value > 0:
            raise UsageError(f"{option} {value:g} leaves nothing to do; give more than 0")
    check_config(config)


def find_problem(config: StreamConfig) -> Problem | None:
    """The first thing wrong with the values; their types are right already."""
    return next(_problems(config), None)


def _problems(config: StreamConfig) -> Iterator[Problem]:
    if not config.sources:
        yield ("sources",), "there is no source to stream; give at least one"
    yield from _positive(
        (),
        max_age_ms=config.max_age_ms,
        max_batch=config.max_batch,
        streams=config.streams,
        max_seconds=config.max_seconds,
        max_frames=config.max_frames,
    )
    wait_ms = config.batch_wait_ms
    if wait_ms is not None and not 0 <= wait_ms <= 1000:
        yield ("batch_wait_ms",), f"{wait_ms:g} ms is out of range; give 0 to 1000"
    if wait_ms is not None and config.max_age_ms is not None and wait_ms >= config.max_age_ms:
        yield (
            ("batch_wait_ms",),
            f"{wait_ms:g} ms of waiting leaves nothing of max_age_ms = {config.max_age_ms:g}; give less",
        )
    for index, source in enumerate(config.sources):
        yield from _source_problems(("sources", index), source)
    yield from _shared(config.sources)
    yield from _limit_problems(config.limits)
    if config.events is not None:
        yield from _event_problems(config.events)
    if config.mqtt is not None:
        yield from _mqtt_problems(config.mqtt)
        if config.events is None:
            yield ("mqtt",), "events go to the broker, and none are asked for; give [events] too"
    if config.serve is not None:
        yield from _serve_problems(config.serve)


def _source_problems(where: tuple[str | int, ...], source: SourceConfig) -> Iterator[Problem]:
    if not source.uri:
        yield (*where, "uri"), "it is empty; give a camera, a file, a folder or synthetic:SEED"
    if source.name is not None and (not source.name.strip() or not source.name.isprintable()):
        yield (*where, "name"), f"{source.name!r} names nothing; give printable text"
    if source.fps is not None and not 0 < source.fps <= _MAX_FPS:
        yield (*where, "fps"), f"{source.fps:g} is out of range; give more than 0 and at most {_MAX_FPS:g}"
    if source.record is not None:
        yield from _record_problems((*where, "record"), source.record)


def _record_problems(where: tuple[str | int, ...], record: RecordConfig) -> Iterator[Problem]:
    if record.path.suffix and record.path.suffix.lower() != ".mp4":
        yield (
            (*where, "path"),
            f"{str(record.path)!r} is no .mp4; give FILE.mp4, or a folder for segments",
        )
    yield from _positive(where, segment_s=record.segment_s, quota_mb=record.quota_mb)


def _shared(sources: tuple[SourceConfig, ...]) -> Iterator[Problem]:
    """Two sources cannot have one name, nor write one recording."""
    names: dict[str, int] = {}
    paths: dict[str, int] = {}
    for index, source in enumerate(sources):
        name = source.name or source.uri
        if name in names:
            shown = f"the name {name!r}" if source.name else "the same URI"
            yield (
                ("sources", index, "name"),
                f"source {names[name]} has {shown} already; give every source a name of its own",
            )
        names.setdefault(name, index)
        if source.record is None:
            continue
        path = str(source.record.path)
        if path in paths:
            yield (
                ("sources", index, "record", "path"),
                f"source {paths[path]} records to {path!r} already; every source needs its own",
            )
        paths.setdefault(path, index)


def _limit_problems(limits: CaptureLimits) -> Iterator[Problem]:
    where = ("limits",)
    yield from _positive(
        where,
        degraded_s=limits.degraded_s,
        stall_s=limits.stall_s,
        open_s=limits.open_s,
        frozen_s=limits.frozen_s,
        restart_budget=limits.restart_budget,
        budget_window_s=limits.budget_window_s,
        lost_retry_s=limits.lost_retry_s,
    )
    if limits.stall_s < limits.degraded_s:
        yield (
            (*where, "stall_s"),
            f"{limits.stall_s:g} s is less than degraded_s = {limits.degraded_s:g}: a source is in trouble before it is given up",
        )
    first, longest = limits.backoff_s
    if not 0 < first <= longest:
        yield (*where, "backoff_s"), f"[{first:g}, {longest:g}] must be [first, longest], both more than 0"


def _event_problems(events: EventConfig) -> Iterator[Problem]:
    where = ("events",)
    for name, value in (("enter", events.enter), ("leave", events.leave)):
        if not 0 < value <= 1:
            yield (*where, name), f"{value:g} is no confidence; give more than 0 and at most 1"
    if not events.leave < events.enter:
        yield (
            (*where, "leave"),
            f"{events.leave:g} must be lower than enter = {events.enter:g}, or labels flicker",
        )
    for name, value in (("smoothing_s", events.smoothing_s), ("hold_s", events.hold_s)):
        if value < 0:
            yield (*where, name), f"{value:g} s is negative; 0 switches it off"


def _mqtt_problems(mqtt: MqttConfig) -> Iterator[Problem]:
    if not mqtt.url.startswith(_MQTT_SCHEMES):
        yield ("mqtt", "url"), "it must begin with mqtt:// or mqtts://"
    if not mqtt.topic.strip("/") or any(character in mqtt.topic for character in "+#\0"):
        yield (
            ("mqtt", "topic"),
            f"{mqtt.topic!r} is no topic to publish on: not empty, without the wildcards + and #",
        )
    yield from _positive(("mqtt",), queue=mqtt.queue)


def _serve_problems(serve: ServeConfig) -> Iterator[Problem]:
    where = ("serve",)
    if not serve.host:
        yield (*where, "host"), "it is empty; give 127.0.0.1, or 0.0.0.0 for all networks"
    if not 0 <= serve.port <= 65535:
        yield (*where, "port"), f"{serve.port} is no port; give 1 to 65535, or 0 for any that is free"
    if serve.token is not None and not serve.token.strip():
        yield (*where, "token"), "an empty token protects nothing; leave it out to have one made up"
    yield from _positive(where, max_clients=serve.max_clients, video_fps=serve.video_fps)


def _positive(where: tuple[str | int, ...], **values: float | None) -> Iterator[Problem]:
    for name, value in values.items():
        if value is not None and not value > 0:
            yield (*where, name), f"{value:g} is out of range; give more than 0"
