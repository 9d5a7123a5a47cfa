import itertools
import json
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from pipeline.metrics import probabilities
from pipeline.statistics import wilson_interval
from pipeline.validation_meter import N_CONFIDENCE_BINS, AccuracyMeter


def expected_calibration_error(confidence, right):
    """Equation 5 of arXiv 1706.04599, bin by bin over all images at once."""
    edges = np.linspace(0, 1, N_CONFIDENCE_BINS + 1)
    total = 0.0
    for low, high in itertools.pairwise(edges):
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            total += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return total


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 60), st.integers(2, 12), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_updates_add_up_to_the_formulas_on_all_images_at_once(n, n_classes, batch_size, seed):
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=2, size=(n, n_classes))
    labels = rng.integers(0, n_classes, n)
    meter = AccuracyMeter(n_classes)
    for start in range(0, n, batch_size):
        meter.update(logits[start : start + batch_size], labels[start : start + batch_size])
    figures = meter.figures()

    softmax = probabilities(logits)
    right = logits.argmax(axis=1) == labels
    in_top_k = [label in np.argsort(-row)[:5] for row, label in zip(logits, labels, strict=True)]
    assert (figures.n_images, figures.top1_correct, figures.top_k) == (n, int(right.sum()), min(5, n_classes))
    assert figures.top1_interval == wilson_interval(int(right.sum()), n)
    assert figures.top_k_accuracy == pytest.approx(np.mean(in_top_k))
    assert figures.confidence.mean == pytest.approx(softmax.max(axis=1).mean())
    assert figures.confidence.ece == pytest.approx(expected_calibration_error(softmax.max(axis=1), right))
    assert sum(item.n_images for item in figures.confidence.bins) == n
    assert all(item.low < item.mean_confidence <= item.high + 1e-12 for item in figures.confidence.bins)


def test_one_frame_at_a_time_is_the_same():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(20, 4)).astype(np.float32), rng.integers(0, 4, 20)
    together, apart = AccuracyMeter(4), AccuracyMeter(4)
    together.update(logits, labels)
    for row, label in zip(logits, labels.tolist(), strict=True):
        apart.update(row, label)
    assert apart.figures().top1 == together.figures().top1
    assert apart.figures().confidence.ece == pytest.approx(together.figures().confidence.ece)


def test_a_confidence_on_an_edge_belongs_to_the_bin_below():
    # Probabilities pass unchanged: 0.6 is exactly 9 / 15 in float64.
    meter = AccuracyMeter(2)
    meter.update(np.array([[0.6, 0.4], [0.4, 0.6]]), np.array([0, 0]))
    (only,) = meter.figures().confidence.bins
    assert (only.low, only.high) == pytest.approx((8 / 15, 9 / 15))
    assert only.accuracy == 0.5
    assert meter.figures().confidence.ece == pytest.approx(0.1)


def test_a_sure_and_wrong_network_is_off_by_its_confidence():
    meter = AccuracyMeter(3)
    meter.update(np.eye(3) * 100, np.array([1, 2, 0]))
    assert meter.figures().confidence.ece == pytest.approx(1.0)


def test_its_state_is_json_and_goes_on_from_there():
    rng = np.random.default_rng(2)
    logits, labels = rng.normal(size=(30, 3)), rng.integers(0, 3, 30)
    whole = AccuracyMeter(3)
    whole.update(logits, labels)
    first = AccuracyMeter(3)
    first.update(logits[:17], labels[:17])
    again = TypeAdapter(AccuracyMeter).validate_json(json.dumps(asdict(first)))
    again.update(logits[17:], labels[17:])
    assert again.figures() == whole.figures()


def test_what_does_not_fit_is_refused():
    meter = AccuracyMeter(3)
    with pytest.raises(ValueError, match="no image"):
        meter.figures()
    with pytest.raises(ValueError, match=r"logits \[N, 3\], got \(2, 4\)"):
        meter.update(np.zeros((2, 4)), np.array([0, 1]))
    with pytest.raises(ValueError, match="labels must be 0 to 2"):
        meter.update(np.zeros(3), 3)
