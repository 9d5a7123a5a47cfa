import math
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apps.streaming.metrics import BUCKET_EDGES_S, STAGES, LatencyHistogram, StreamMetrics
from pipeline.validation_meter import AccuracyMeter

seconds = st.floats(LatencyHistogram.LOW_S, LatencyHistogram.HIGH_S)


@settings(max_examples=200, deadline=None)
@given(st.lists(seconds, min_size=1, max_size=300), st.sampled_from([1, 50, 90, 95, 99, 100]))
def test_percentiles_are_within_half_a_bin_of_nearest_rank(values: list[float], percent: int) -> None:
    histogram = LatencyHistogram()
    for value in values:
        histogram.record(value)
    exact = sorted(values)[max(1, math.ceil(percent / 100 * len(values))) - 1]
    ratio = histogram.percentile_s(percent) / exact
    # A hair more than the bound: the last bin reaches past HIGH_S, and logarithms round.
    assert abs(math.log(ratio)) <= math.log(1 + LatencyHistogram.RELATIVE_ERROR) * (1 + 1e-6)


def test_the_bound_is_not_met_by_a_neighbouring_rank() -> None:
    histogram = LatencyHistogram()
    for value in (0.010, 0.011, 0.100):
        histogram.record(value)
    assert histogram.percentile_s(50) == pytest.approx(0.011, rel=LatencyHistogram.RELATIVE_ERROR)
    assert histogram.percentile_s(50) != pytest.approx(0.010, rel=LatencyHistogram.RELATIVE_ERROR)


def test_memory_is_constant() -> None:
    histogram = LatencyHistogram()
    before = sys.getsizeof(histogram._counts)
    for value in np.random.default_rng(0).lognormal(-5, 2, 20_000):
        histogram.record(float(value))
    assert sys.getsizeof(histogram._counts) == before < 16_384


def test_out_of_range_durations_are_kept_and_the_maximum_is_exact() -> None:
    histogram = LatencyHistogram()
    for value in (0.0, -1e-9, 5000.0):
        histogram.record(value)
    summary = histogram.summary()
    assert summary.count == 3
    assert summary.max_ms == 5_000_000.0
    assert summary.p50_ms <= 0.0011


def test_an_empty_histogram_is_zero() -> None:
    summary = LatencyHistogram().summary()
    assert (summary.p50_ms, summary.p99_ms, summary.mean_ms, summary.count) == (0, 0, 0, 0)


def test_counters_and_accuracy() -> None:
    metrics = StreamMetrics()
    for correct in (True, True, False, None):
        metrics.frame_read()
        metrics.frame_inferred(correct)
    metrics.frame_read()
    metrics.frame_dropped("empty image")
    metrics.record("infer", 0.002)
    state = metrics.snapshot()
    assert (state.frames_read, state.frames_inferred, state.dropped) == (5, 4, {"empty image": 1})
    assert (state.labelled, state.correct, state.top1) == (3, 2, 2 / 3)
    assert tuple(state.latency) == STAGES
    assert state.latency["infer"].count == 1


def test_labelled_frames_give_the_figures_of_validation() -> None:
    rng = np.random.default_rng(0)
    scores, truth = rng.normal(size=(40, 6)).astype(np.float32), rng.integers(0, 6, 40)
    metrics = StreamMetrics()
    assert metrics.snapshot().accuracy is None
    for row, label in zip(scores, truth.tolist(), strict=True):
        metrics.frame_judged(row, label)
    meter = AccuracyMeter(6)
    meter.update(scores, truth)
    found = metrics.snapshot().accuracy
    assert found is not None
    assert (found.top1, found.top1_interval) == (meter.figures().top1, meter.figures().top1_interval)
    assert found.confidence.ece == pytest.approx(meter.figures().confidence.ece)


def test_fps_is_over_the_last_two_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("apps.streaming.metrics.time.monotonic", lambda: now)
    metrics = StreamMetrics()
    assert metrics.fps() == 0
    for _ in range(100):
        now += 0.01
        metrics.frame_inferred(None)
    for _ in range(60):
        now += 0.05
        metrics.frame_inferred(None)
    assert metrics.fps() == pytest.approx(20, rel=0.03)
    now += 10
    assert metrics.fps() == 0


@settings(max_examples=100, deadline=None)
@given(st.lists(seconds, max_size=200), st.lists(seconds.filter(lambda s: s < 999), min_size=1, max_size=8))
def test_cumulative_counts_are_exact_for_an_edge_within_the_error(
    values: list[float], edges: list[float]
) -> None:
    histogram = LatencyHistogram()
    for value in values:
        histogram.record(value)
    edges = sorted(edges)
    error = (1 + LatencyHistogram.RELATIVE_ERROR) * (1 + 1e-9)
    counts = histogram.cumulative(edges)
    assert list(counts) == sorted(counts)
    for edge, count in zip(edges, counts, strict=True):
        assert (
            sum(value <= edge / error for value in values)
            <= count
            <= sum(value <= edge * error for value in values)
        )


def test_a_snapshot_has_the_buckets_of_every_stage() -> None:
    metrics = StreamMetrics()
    for value in (0.0, 0.003, 0.004, 0.9, 3.0, 5000.0):
        metrics.record("infer", value)
    buckets = metrics.snapshot().buckets["infer"]
    counts = dict(zip(BUCKET_EDGES_S, buckets.cumulative, strict=True))
    assert [counts[edge] for edge in (0.0005, 0.002, 0.005, 1.0, 2.0, 5.0, 10.0)] == [1, 1, 3, 4, 4, 5, 5]
    assert (buckets.count, buckets.total_s) == (6, pytest.approx(5003.907))
    assert set(metrics.snapshot().buckets) == set(STAGES)
