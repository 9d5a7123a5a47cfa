"""The four range methods on distributions of every shape."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from calibration.observers import TensorObserver, distribution
from calibration.qparams import asymmetric_uint8, dequantize, quantize
from calibration.ranges import METHODS, entropy, minmax, mse, percentile, quantization_error
from pipeline.artifacts import TensorRange

VALUES = hnp.arrays(
    np.float32, st.integers(1, 200), elements=st.floats(-1000, 1000, width=32, allow_subnormal=False)
)
EVERY_METHOD = pytest.mark.parametrize("method", sorted(METHODS))


def seen(values):
    observer = TensorObserver("t")
    observer.update(values.min(keepdims=True), values.max(keepdims=True), values)
    return distribution(observer.histogram, observer.low, observer.high)


@EVERY_METHOD
@settings(max_examples=40, deadline=None)
@given(values=VALUES)
def test_a_range_is_in_order_and_within_what_was_seen_and_zero(method, values):
    found = METHODS[method](seen(values))
    assert found.low <= found.high
    slack = 1e-9 * float(np.abs(values).max())
    assert min(float(values.min()), 0.0) - slack <= found.low
    assert found.high <= max(float(values.max()), 0.0) + slack
    asymmetric_uint8(found)  # accepts it


@given(values=VALUES)
def test_minmax_is_exact(values):
    assert minmax(seen(values)) == TensorRange(float(values.min()), float(values.max()))


@settings(max_examples=60, deadline=None)
@given(values=VALUES)
def test_mse_never_has_a_larger_error_than_minmax(values):
    what = seen(values)
    assert quantization_error(what, mse(what)) <= quantization_error(what, minmax(what))


@pytest.mark.parametrize("both_signs", [False, True])
def test_outliers_are_clipped_by_all_but_minmax(both_signs):
    rng = np.random.default_rng(0)
    values = rng.standard_normal(200_000).astype(np.float32)
    if not both_signs:
        values = np.abs(values)
    values[0] = 100.0
    what = seen(values)
    assert minmax(what).high == 100.0
    for method in (percentile, entropy):
        assert 2.0 < method(what).high < 60.0, method
    # Clip c costs (100 - c)^2 / 200,000 and rounds with (c / 255)^2 / 12: the sum is least at 79.6.
    assert mse(what).high == pytest.approx(79.6, rel=0.05)
    assert quantization_error(what, mse(what)) < 0.85 * quantization_error(what, minmax(what))


@pytest.mark.parametrize("percent", [90.0, 99.0, 99.9])
def test_percentile_of_one_sign_is_numpys(percent):
    values = np.abs(np.random.default_rng(1).standard_normal(100_000)).astype(np.float32)
    found = percentile(seen(values), percent)
    assert found.high == pytest.approx(np.percentile(values, percent), rel=0.008)
    assert found.low == values.min()


@pytest.mark.parametrize("percent", [90.0, 99.0, 99.9])
def test_percentile_of_both_signs_leaves_out_half_on_each_side(percent):
    values = np.random.default_rng(2).standard_normal(100_000).astype(np.float32) + np.float32(0.3)
    found = percentile(seen(values), percent)
    rest = (100.0 - percent) / 2
    assert found.low == pytest.approx(np.percentile(values, rest), rel=0.008)
    assert found.high == pytest.approx(np.percentile(values, 100.0 - rest), rel=0.008)


@pytest.mark.parametrize("percent", [0.0, -1.0, 100.1, float("nan")])
def test_a_percentage_out_of_bounds_is_refused(percent):
    with pytest.raises(ValueError, match=f"percent is {percent}"):
        percentile(seen(np.ones(3, np.float32)), percent)


def test_all_of_100_percent_is_minmax():
    what = seen(np.random.default_rng(3).standard_normal(1000).astype(np.float32))
    assert percentile(what, 100.0) == minmax(what)


@pytest.mark.parametrize("high", [1.0, 2.5, 4.0])
def test_the_closed_form_error_is_what_quantizing_costs(high):
    values = np.random.default_rng(4).standard_normal(200_000).astype(np.float32)
    wanted = TensorRange(-high, high)
    params = asymmetric_uint8(wanted)
    measured = float(np.mean((dequantize(quantize(values, params), params) - values).astype(np.float64) ** 2))
    assert quantization_error(seen(values), wanted) == pytest.approx(measured, rel=0.02)


@EVERY_METHOD
@pytest.mark.parametrize("value", [0.0, 1.5, -1.5])
def test_a_constant_tensor_keeps_its_value(method, value):
    """A range that lost it would turn the tensor into zeros."""
    params = asymmetric_uint8(METHODS[method](seen(np.full(10, value, np.float32))))
    restored = dequantize(quantize(np.array([value], np.float32), params), params)
    assert restored[0] == pytest.approx(value, rel=0.01)
