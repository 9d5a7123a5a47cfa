"""Adaptive rounding: against every other choice on small problems, and against nearest on larger ones."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from calibration.correction.linear import Samples
from calibration.correction.rounding import (
    at_the_ends,
    best_bias,
    best_weights,
    moments,
    round_adaptively,
)


def problem(groups, outputs, sums, positions, seed=0, noise=0.0):
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((groups, sums, sums))
    x = rng.standard_normal((groups, positions, sums)) @ mix + rng.standard_normal((groups, 1, sums))
    w = rng.standard_normal((groups, outputs, sums))
    b = rng.standard_normal((groups, outputs))
    y = x @ w.transpose(0, 2, 1) + b[:, None]
    seen = x + noise * rng.standard_normal(x.shape)
    return w, b, Samples(seen.astype(np.float32), y.astype(np.float32))


def error(samples, weights, bias):
    output = samples.inputs @ weights.transpose(0, 2, 1) + bias[:, None]
    return float(np.mean((output - samples.outputs) ** 2))


def rounded(w, scale, seen, ridge):
    return round_adaptively(best_weights(w, seen, ridge), scale, seen, at_the_ends(w, scale))


def solved(w, scale, samples, ridge=1e-6):
    seen = moments(samples)
    steps = rounded(w, scale, seen, ridge)
    weights = steps * scale[:, :, None]
    return steps, error(samples, weights, best_bias(weights, seen))


def test_close_to_the_best_of_all_choices():
    """8 weights: all 256 choices are tried. Descent finds a local optimum, which is close to the best."""
    ratios = []
    for seed in range(10):
        w, _, samples = problem(1, 1, 8, 400, seed)
        scale = np.full((1, 1), 0.4)
        _, found = solved(w, scale, samples)
        seen = moments(samples)
        floor = np.floor(w / 0.4)
        every = []
        for up in itertools.product((0.0, 1.0), repeat=8):
            weights = (floor + np.array(up)) * 0.4
            every.append(error(samples, weights, best_bias(weights, seen)))
        ratios.append(found / min(every))
        assert found <= np.percentile(every, 2)
    assert np.median(ratios) < 1.2


@pytest.mark.parametrize(("groups", "outputs", "sums"), [(1, 6, 100), (5, 1, 9), (2, 4, 70)])
def test_better_than_nearest_and_next_to_the_real_weight(groups, outputs, sums):
    w, _, samples = problem(groups, outputs, sums, 2000)
    scale = np.abs(w).max(axis=2) / 7
    steps, found = solved(w, scale, samples, ridge=0.01)
    nearest = np.rint(w / scale[:, :, None]) * scale[:, :, None]
    assert found < 0.9 * error(samples, nearest, best_bias(nearest, moments(samples)))
    assert np.array_equal(steps, np.rint(steps))
    target = best_weights(w, moments(samples), 0.01)
    assert (np.abs(steps - target / scale[:, :, None]) < 1.0 + 1e-9).all()


def test_makes_up_for_noise_in_its_input():
    """With a noisy input the best weights are not the original ones: shrunk towards what can be trusted."""
    w, _, samples = problem(1, 4, 20, 5000, noise=2.0)
    scale = np.abs(w).max(axis=2) / 31
    _, found = solved(w, scale, samples)
    assert found < error(samples, w, best_bias(w, moments(samples)))


def test_the_ridge_keeps_weights_near_where_samples_are_few():
    w, _, samples = problem(1, 3, 60, 20, noise=1.0)
    seen = moments(samples)
    moved = [np.abs(best_weights(w, seen, ridge) - w).max() for ridge in (1e-6, 1.0, 1e3)]
    assert moved[0] > 2 * moved[1] > 100 * moved[2]
    assert moved[2] < 1e-2


def test_a_fixed_bias_is_respected():
    """A constant input does a bias's work where the bias itself must stay wrong."""
    w, b, samples = problem(1, 3, 30, 2000)
    samples.inputs[:, :, 0] = 1.0
    wrong = b + 2.0
    scale = np.full(w.shape[:2], 0.25)
    fixed = rounded(w, scale, moments(samples, wrong), 1e-6)
    free = rounded(w, scale, moments(samples), 1e-6)
    assert error(samples, fixed * 0.25, wrong) < error(samples, free * 0.25, wrong)


def test_inputs_that_never_vary_leave_their_weights_at_the_nearest():
    w, _, samples = problem(1, 2, 10, 500)
    samples.inputs[:, :, 3] = 0.0
    scale = np.abs(w).max(axis=2) / 7
    steps, _ = solved(w, scale, samples)
    np.testing.assert_array_equal(steps[:, :, 3], np.rint(w / scale[:, :, None])[:, :, 3])


def test_the_largest_weight_stays_at_the_end_of_the_grid():
    """So that quantizing the rounded weights again finds the same scale."""
    w, _, samples = problem(2, 5, 40, 800)
    scale = (np.abs(w).max(axis=2) / 127).astype(np.float32).astype(np.float64)
    steps, _ = solved(w, scale, samples, ridge=0.1)
    assert (np.abs(steps).max(axis=2) == 127).all()
