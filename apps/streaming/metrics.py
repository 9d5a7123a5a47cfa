"""What a stream counts and times, in memory that does not grow with its length."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pipeline.validation_meter import AccuracyFigures, AccuracyMeter

__all__ = [
    "BUCKET_EDGES_S",
    "STAGES",
    "LatencyBuckets",
    "LatencyHistogram",
    "LatencySummary",
    "MetricsSnapshot",
    "StreamMetrics",
    "total_latency",
]

STAGES = ("capture", "queue", "preprocess", "infer", "postprocess", "age")
"""In the order a frame passes them. *capture*: the source delivering the frame (decoding, or waiting
for the camera); *queue*: waiting between stages, for the engine included; *preprocess*: resize and
crop; *infer*: the engine; *postprocess*: top-k, drawing, writing; *age*: from capture to the end."""

BUCKET_EDGES_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.035, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
"""For ``/metrics``: a stage on a GPU is told from one on a CPU, and an alert can stand at a frame interval
of 30 FPS or at the default latency budget of a second."""

_FPS_WINDOW_S = 2.0
_FPS_MAX_SAMPLES = 512


@dataclass(frozen=True, slots=True)
class LatencySummary:
    """Percentiles of one stage, in milliseconds."""

    p50_ms: float
    p95_ms: float
    p99_ms: float
    mean_ms: float
    max_ms: float
    count: int


@dataclass(frozen=True, slots=True)
class LatencyBuckets:
    """One stage as Prometheus has histograms."""

    cumulative: tuple[int, ...]
    """Durations up to each of `BUCKET_EDGES_S`, see `LatencyHistogram.cumulative`."""
    count: int
    """All durations, exact."""
    total_s: float
    """Their sum."""


class LatencyHistogram:
    """Durations from 1 µs to 1000 s in logarithmic bins: 1,040 counters, whatever is recorded.

    Neighbouring bin edges differ by `GROWTH`, and a percentile is given as the geometric middle of
    its bin, so it is within `RELATIVE_ERROR` of the order statistic it stands for. Values outside
    the range count in the first or last bin; `max_s` is exact.
    """

    LOW_S: Final = 1e-6
    HIGH_S: Final = 1e3
    GROWTH: Final = 1.0202
    RELATIVE_ERROR: Final = math.sqrt(GROWTH) - 1.0
    """Half a bin, in ratio: one per cent."""

    def __init__(self) -> None:
        self._log_growth = math.log(self.GROWTH)
        n_bins = math.ceil(math.log(self.HIGH_S / self.LOW_S) / self._log_growth)
        self._counts = np.zeros(n_bins, np.int64)
        self.count = 0
        self.total_s = 0.0
        self.max_s = 0.0

    def add(self, other: LatencyHistogram) -> None:
        """Adds all durations of another histogram."""
        self._counts += other._counts
        self.count += other.count
        self.total_s += other.total_s
        self.max_s = max(self.max_s, other.max_s)

    def record(self, seconds: float) -> None:
        """Adds one duration."""
        clipped = min(max(seconds, self.LOW_S), self.HIGH_S)
        bin_index = int(math.log(clipped / self.LOW_S) / self._log_growth)
        self._counts[min(bin_index, len(self._counts) - 1)] += 1
        self.count += 1
        self.total_s += seconds
        self.max_s = max(self.max_s, seconds)

    def percentile_s(self, percent: float) -> float:
        """The smallest recorded duration that at least `percent` % do not exceed (nearest rank),
        within `RELATIVE_ERROR`; 0 when nothing was recorded."""
        return self._percentile_s(percent, np.cumsum(self._counts))

    def _percentile_s(self, percent: float, cumulative: NDArray[np.int64]) -> float:
        if self.count == 0:
            return 0.0
        rank = max(1, math.ceil(percent / 100.0 * self.count))
        bin_index = int(np.searchsorted(cumulative, rank))
        middle = self.LOW_S * math.pow(self.GROWTH, bin_index + 0.5)
        return min(middle, self.max_s)

    def cumulative(self, edges_s: Sequence[float]) -> tuple[int, ...]:
        """How many durations do not exceed each edge.

        A bin counts as a whole, by its geometric middle, so that the answer is exact for an edge that is
        off by `RELATIVE_ERROR` at most.

        Args:
            edges_s: ascending, from `LOW_S` up to below `HIGH_S`.
        """
        # The middle of bin i is LOW_S * GROWTH ** (i + 0.5).
        n_bins = np.floor(np.log(np.asarray(edges_s) / self.LOW_S) / self._log_growth + 0.5).astype(np.int64)
        sums = np.concatenate(([0], np.cumsum(self._counts)))
        return tuple(sums[n_bins].tolist())

    def buckets(self) -> LatencyBuckets:
        """What ``/metrics`` shows of the stage."""
        return LatencyBuckets(self.cumulative(BUCKET_EDGES_S), self.count, self.total_s)

    def summary(self) -> LatencySummary:
        """The percentiles a person reads, in milliseconds."""
        cumulative = np.cumsum(self._counts)
        p50_s, p95_s, p99_s = (self._percentile_s(percent, cumulative) for percent in (50, 95, 99))
        return LatencySummary(
            p50_ms=1e3 * p50_s,
            p95_ms=1e3 * p95_s,
            p99_ms=1e3 * p99_s,
            mean_ms=1e3 * self.total_s / max(self.count, 1),
            max_ms=1e3 * self.max_s,
            count=self.count,
        )


@dataclass(frozen=True, slots=True)
class MetricsSnapshot:
    """The state of a stream at one moment. ``frames_read = frames_inferred + dropped + in flight``."""

    frames_read: int
    frames_inferred: int
    dropped: dict[str, int]
    """By reason."""
    fps: float
    """Inferred frames a second, over the last two seconds."""
    labelled: int
    correct: int
    accuracy: AccuracyFigures | None
    """Of the labelled frames, as `edgefold validate` has them; ``None`` without labels."""
    latency: dict[str, LatencySummary]
    """By stage, see `STAGES`."""
    buckets: dict[str, LatencyBuckets] = field(default_factory=dict)
    """The same durations for ``/metrics``, by stage."""

    @property
    def top1(self) -> float | None:
        """Share of labelled frames whose first prediction was right; ``None`` without labels."""
        return self.correct / self.labelled if self.labelled else None


class StreamMetrics:
    """Counters and histograms of one source; every method may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stages = {stage: LatencyHistogram() for stage in STAGES}
        self._dropped: Counter[str] = Counter()
        self._frames_read = 0
        self._frames_inferred = 0
        self._labelled = 0
        self._correct = 0
        self._meter: AccuracyMeter | None = None
        self._recent_s: deque[float] = deque(maxlen=_FPS_MAX_SAMPLES)

    def record(self, stage: str, seconds: float) -> None:
        """Adds one duration to a stage of `STAGES`."""
        with self._lock:
            self._stages[stage].record(seconds)

    def frame_read(self) -> None:
        """The source delivered something, usable or not."""
        with self._lock:
            self._frames_read += 1

    def frame_dropped(self, reason: str) -> None:
        """A frame that was read will not be inferred."""
        with self._lock:
            self._dropped[reason] += 1

    def frame_inferred(self, correct: bool | None) -> None:
        """A prediction was made; `correct` is ``None`` where the truth is unknown."""
        with self._lock:
            self._frames_inferred += 1
            self._recent_s.append(time.monotonic())
            if correct is not None:
                self._labelled += 1
                self._correct += correct

    def frame_judged(self, scores: NDArray[Any], truth: int) -> None:
        """The scores (C,) of a labelled frame, and its true class."""
        with self._lock:
            if self._meter is None or self._meter.n_classes != scores.size:
                self._meter = AccuracyMeter(scores.size)
            self._meter.update(scores, truth)

    def engine_changed(self) -> None:
        """Another engine infers: its accuracy is not mixed with that of the one before."""
        with self._lock:
            self._labelled = self._correct = 0
            self._meter = None

    def fps(self) -> float:
        """Inferred frames a second over the last two seconds (or the last 512 frames)."""
        with self._lock:
            return self._fps()

    def _fps(self) -> float:
        now = time.monotonic()
        recent = [t for t in self._recent_s if now - t <= _FPS_WINDOW_S]
        if len(recent) < 2:
            return 0.0
        # To the last arrival, not to now: the frame in progress would read as a slowdown.
        return (len(recent) - 1) / max(recent[-1] - recent[0], 1e-9)

    def snapshot(self) -> MetricsSnapshot:
        """Everything, consistent at one moment."""
        with self._lock:
            return MetricsSnapshot(
                frames_read=self._frames_read,
                frames_inferred=self._frames_inferred,
                dropped=dict(sorted(self._dropped.items())),
                fps=self._fps(),
                labelled=self._labelled,
                correct=self._correct,
                accuracy=self._meter.figures() if self._meter else None,
                latency={stage: histogram.summary() for stage, histogram in self._stages.items()},
                buckets={stage: histogram.buckets() for stage, histogram in self._stages.items()},
            )

    def add_latency_to(self, totals: dict[str, LatencyHistogram]) -> None:
        """Adds the durations of every stage to `totals`."""
        with self._lock:
            for stage, histogram in self._stages.items():
                totals[stage].add(histogram)


def total_latency(sources: Iterable[StreamMetrics]) -> dict[str, LatencySummary]:
    """The latencies over several sources, by stage: every frame counts the same."""
    totals = {stage: LatencyHistogram() for stage in STAGES}
    for metrics in sources:
        metrics.add_latency_to(totals)
    return {stage: histogram.summary() for stage, histogram in totals.items()}
