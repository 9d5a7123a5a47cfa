"""Ranges by the error at the layer's output."""

from __future__ import annotations

import numpy as np

from calibration.correction.linear import Samples
from calibration.correction.ranges import search_activation_range, search_weight_scale
from pipeline.artifacts import TensorRange


def layer(seed, outliers=0.0):
    rng = np.random.default_rng(seed)
    x = np.abs(rng.standard_normal((1, 3000, 12))).astype(np.float32)
    x[:, ::500] *= 1.0 + outliers
    w = rng.standard_normal((1, 5, 12))
    return w, Samples(x, (x @ w.transpose(0, 2, 1)).astype(np.float32))


def test_a_range_too_wide_is_narrowed_and_one_too_narrow_widened():
    w, fit = layer(0)
    _, held = layer(0)
    high = float(fit.inputs.max())
    for start, narrower in ((1.6 * high, True), (0.75 * high, False)):
        found, (before, after) = search_activation_range(
            TensorRange(0.0, start), "asymmetric_uint8", w, np.zeros((1, 5)), fit, held
        )
        assert after > before
        assert (found.high < start) == narrower


def test_a_channel_of_no_weight_does_not_count():
    """The tensor's own error is ruled by the wide channel; at the output nothing of it is seen."""
    w, fit = layer(1)
    fit.inputs[:, :, 0] *= 1.9
    w[:, :, 0] = 0.0
    output = (fit.inputs @ w.transpose(0, 2, 1)).astype(np.float32)
    fit = Samples(fit.inputs, output)
    start = TensorRange(0.0, float(fit.inputs.max()))
    found, _ = search_activation_range(start, "asymmetric_uint8", w, np.zeros((1, 5)), fit, fit)
    assert found.high < start.high


def test_one_large_weight_that_meets_nothing_is_clipped():
    w, fit = layer(2)
    w = np.clip(w, -1.0, 1.0)
    w[0, 1, 4] = 1.25
    fit.inputs[:, :, 4] = 0.0
    scale = np.abs(w).max(axis=2) / 127
    found = search_weight_scale(w, scale, fit.inputs)
    assert found[0, 1] < scale[0, 1]
    assert (found <= scale).all()


def test_the_end_of_the_grid_is_reached_after_clipping():
    """Whatever quantizes the clipped weights again finds the same scale."""
    w, fit = layer(3)
    scale = np.abs(w).max(axis=2) / 127
    found = search_weight_scale(w, scale, fit.inputs)
    steps = np.clip(np.rint(w / found[:, :, None]), -127, 127)
    assert (np.abs(steps).max(axis=2) == 127).all()
