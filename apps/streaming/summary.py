"""What a stream did, as values."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from apps.streaming.config import SourceConfig, StreamConfig, StreamPrecision
from apps.streaming.contracts import EngineView
from apps.streaming.metrics import LatencySummary, total_latency
from apps.streaming.queues import DropPolicy
from apps.streaming.scheduling import RuntimeFeed
from pipeline.validation_meter import AccuracyFigures

__all__ = ["FrameCounts", "SourceSummary", "StreamSummary", "summarize"]


@dataclass(frozen=True, slots=True)
class FrameCounts:
    """What became of frames, of one source or of all. ``frames_read = frames_inferred + sum(dropped)``."""

    fps: float
    """Inferred frames a second, over the whole run."""
    frames_read: int
    frames_inferred: int
    dropped: dict[str, int]
    """By reason."""
    labelled: int
    correct: int
    accuracy: AccuracyFigures | None
    """Of the labelled frames: top-1 with its interval, top-k, calibration of confidence. Of one source; ``None`` over
    several."""
    latency: dict[str, LatencySummary]
    """By stage, see `apps.streaming.metrics.STAGES`."""

    @property
    def top1(self) -> float | None:
        """Share of labelled frames classified right, in [0, 1]; ``None`` without labels."""
        return self.correct / self.labelled if self.labelled else None


@dataclass(frozen=True, slots=True)
class SourceSummary(FrameCounts):
    """One source."""

    source: str
    policy: DropPolicy
    state: str
    """At the end, see `apps.streaming.contracts.SourceState`."""
    reason: str | None
    """Why it was not live."""
    restarts: int
    recording: str | None
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StreamSummary(FrameCounts):
    """All sources of a stream."""

    bundle: str
    """That inferred last."""
    source: str
    """Its name; of several, all names."""
    engine: str
    precision: StreamPrecision
    policy: DropPolicy
    """``newest`` where one source has it."""
    ended: str
    """``end of source``, ``time limit``, ``frame limit``, ``window closed``, or a signal's name."""
    seconds: float
    recording: str | None
    """Of a single source."""
    predictions: str | None
    max_age_ms: float | None
    mean_batch: float
    """Images a request."""
    reloads: int
    reload_failures: int
    preprocessing: str
    """What the golden frames found."""
    sources: tuple[SourceSummary, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """JSON-compatible values."""
        return {**dataclasses.asdict(self), "top1": self.top1}


def summarize(
    config: StreamConfig,
    sources: Sequence[RuntimeFeed],
    engine: EngineView,
    ended: str,
    seconds: float,
    *,
    max_age_ms: float | None,
    preprocessing: str,
    notes: Sequence[str],
) -> StreamSummary:
    """The summary of a stream whose sources are closed.

    Args:
        config: what was asked for; its sources in the order of `sources`.
        sources: with what was counted.
        engine: what inferred last.
        ended: why it ended.
        seconds: how long it ran.
        max_age_ms: the latency budget that was kept.
        preprocessing: what the golden frames found.
        notes: of the run, besides those of the sources.
    """
    each = tuple(
        _of_source(asked, source, seconds) for asked, source in zip(config.sources, sources, strict=True)
    )
    only = each[0] if len(each) == 1 else None
    dropped: Counter[str] = Counter()
    for one in each:
        dropped.update(one.dropped)
    n_inferred = sum(one.frames_inferred for one in each)
    return StreamSummary(
        bundle=engine.bundle,
        source=", ".join(one.source for one in each),
        engine=engine.engine,
        precision=_precision(engine.precision),
        policy="newest" if any(one.policy == "newest" for one in each) else "every",
        ended=ended,
        seconds=seconds,
        fps=n_inferred / seconds,
        frames_read=sum(one.frames_read for one in each),
        frames_inferred=n_inferred,
        dropped=dict(sorted(dropped.items())),
        labelled=sum(one.labelled for one in each),
        correct=sum(one.correct for one in each),
        accuracy=None if only is None else only.accuracy,
        latency=total_latency(source.metrics for source in sources),
        recording=None if only is None else only.recording,
        predictions=None if config.predictions is None else str(config.predictions),
        max_age_ms=max_age_ms,
        mean_batch=engine.batched_frames / engine.batches if engine.batches else 0.0,
        reloads=engine.reloads,
        reload_failures=engine.reload_failures,
        preprocessing=preprocessing,
        sources=each,
        notes=(*_notes(each), *notes),
    )


def _of_source(asked: SourceConfig, source: RuntimeFeed, seconds: float) -> SourceSummary:
    counted, status = source.metrics.snapshot(), source.feed.status()
    recorded = asked.record is not None and counted.frames_inferred > 0
    return SourceSummary(
        source=source.feed.source_id,
        policy=source.feed.policy,
        state=status.state.value,
        reason=status.reason,
        restarts=status.restarts,
        fps=counted.frames_inferred / seconds,
        frames_read=counted.frames_read,
        frames_inferred=counted.frames_inferred,
        dropped=counted.dropped,
        labelled=counted.labelled,
        correct=counted.correct,
        accuracy=counted.accuracy,
        latency=counted.latency,
        recording=str(asked.record.path) if asked.record is not None and recorded else None,
        notes=tuple(source.feed.notes),
    )


def _notes(each: Sequence[SourceSummary]) -> list[str]:
    """Of a single source as they are; of several with the name of the source."""
    if len(each) == 1:
        return list(each[0].notes)
    return [f"{one.source}: {note}" for one in each for note in one.notes]


def _precision(name: str) -> StreamPrecision:
    precisions: dict[str, StreamPrecision] = {"int8": "int8", "fp16": "fp16", "bf16": "bf16", "fp32": "fp32"}
    return precisions[name]
