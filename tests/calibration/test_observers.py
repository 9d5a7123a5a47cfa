"""The range-free histogram against plain NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from calibration.observers import N_BINS, TensorObserver, distribution
from pipeline.errors import CalibrationError

FINITE = st.floats(-1e9, 1e9, width=32)
BATCH = hnp.arrays(
    np.float32, hnp.array_shapes(min_dims=2, max_dims=4, min_side=1, max_side=6), elements=FINITE
)
BIN_WIDTH = 1 / 128
"""Relative: 7 bits of the mantissa."""


def feed(observer, batch):
    rows = batch.reshape(len(batch), -1)
    observer.update(rows.min(axis=1), rows.max(axis=1), batch)


def observed(*batches):
    observer = TensorObserver("t")
    for batch in batches:
        feed(observer, batch)
    return observer


@given(batches=st.lists(BATCH, min_size=1, max_size=4))
def test_extrema_are_exact_and_every_value_is_counted(batches):
    observer = observed(*batches)
    assert observer.low == min(float(batch.min()) for batch in batches)
    assert observer.high == max(float(batch.max()) for batch in batches)
    assert observer.histogram.sum() == sum(batch.size for batch in batches)


@given(batches=st.lists(BATCH, min_size=2, max_size=4), data=st.data())
def test_the_order_of_batches_does_not_matter(batches, data):
    shuffled = data.draw(st.permutations(batches))
    one, other = observed(*batches), observed(*shuffled)
    assert (one.low, one.high) == (other.low, other.high)
    assert np.array_equal(one.histogram, other.histogram)


@given(batch=BATCH)
def test_nor_does_the_batch_size(batch):
    whole, single = observed(batch), observed(*np.split(batch, len(batch)))
    assert np.array_equal(whole.histogram, single.histogram)


@given(value=st.floats(2.0**-31, 2.0**31, width=32), sign=st.sampled_from([-1.0, 1.0]))
def test_a_value_lies_in_its_bin_and_the_bin_is_narrow(value, sign):
    value = np.float32(sign * value)
    histogram = observed(np.full((1, 1), value)).histogram
    # Extrema far outside: the bin keeps its own edges.
    wide = distribution(
        histogram + observed(np.array([[-(2.0**32), 2.0**32]], np.float32)).histogram, -1e10, 1e10
    )
    index = [i for i in range(len(wide.mass)) if wide.mass[i] > 0][1]
    left, right = wide.edges[index], wide.edges[index + 1]
    assert left <= value <= right
    assert right - left <= BIN_WIDTH * abs(value) * (1 + BIN_WIDTH)


@given(batch=BATCH)
def test_a_distribution_keeps_the_mass_and_ends_at_the_extrema(batch):
    observer = observed(batch)
    seen = distribution(observer.histogram, observer.low, observer.high)
    assert seen.mass.sum() == batch.size
    assert len(seen.edges) == len(seen.mass) + 1
    assert (np.diff(seen.edges) >= 0.0).all()
    assert (seen.low, seen.high) == (observer.low, observer.high)


@pytest.mark.parametrize("percent", [1, 10, 50, 90, 99])
def test_percentiles_are_numpys_to_a_bin_width(percent):
    values = np.random.default_rng(0).lognormal(0.0, 2.0, (1, 50_000)).astype(np.float32)
    observer = observed(values)
    seen = distribution(observer.histogram, observer.low, observer.high)
    found = np.interp(percent / 100, np.append(0, np.cumsum(seen.mass)) / seen.mass.sum(), seen.edges)
    assert found == pytest.approx(np.percentile(values, percent), rel=0.008)


def test_density_is_numpys_histogram():
    values = np.random.default_rng(1).standard_normal((1, 100_000)).astype(np.float32)
    observer = observed(values)
    seen = distribution(observer.histogram, observer.low, observer.high)
    grid = np.linspace(-3, 3, 25)
    up_to = np.interp(grid, seen.edges, np.append(0, np.cumsum(seen.mass)))
    # A grid line cuts a bin anywhere: off by at most the values of one bin.
    assert np.abs(np.diff(up_to) - np.histogram(values, grid)[0]).max() < 0.008 * values.size


def test_non_negative_tensors_need_no_minimum():
    observer = TensorObserver("relu")
    observer.update(None, np.array([2.0, 3.0], np.float32), np.array([[1.0, 2.0], [3.0, 0.5]], np.float32))
    assert (observer.low, observer.high) == (0.0, 3.0)


def test_zeros_of_both_signs_and_dust_are_one_bin():
    values = np.array([[0.0, -0.0, 1e-20, -1e-20, 1e-44]], np.float32)
    histogram = observed(values).histogram
    assert histogram[0] == 5


def test_what_is_too_large_counts_as_the_largest():
    histogram = observed(np.array([[1e30, -1e30]], np.float32)).histogram
    assert histogram[N_BINS // 2 - 1] == 1
    assert histogram[N_BINS - 1] == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["sample", "extremum"])
def test_a_value_that_is_not_finite_names_the_tensor(bad, where):
    fine = np.ones((1, 4), np.float32)
    broken = fine.copy()
    broken[0, 2] = bad
    samples, extremum = (broken, fine) if where == "sample" else (fine, broken)
    observer = TensorObserver("layer3/relu")
    with pytest.raises(CalibrationError, match="'layer3/relu' holds NaN or Inf"):
        observer.update(extremum[:, 2], extremum[:, 2], samples)


def test_a_refused_batch_leaves_no_trace():
    observer = observed(np.ones((1, 4), np.float32))
    before = observer.histogram.copy()
    with pytest.raises(CalibrationError):
        feed(observer, np.full((1, 4), np.nan, np.float32))
    assert np.array_equal(observer.histogram, before)


def test_nothing_seen_has_no_distribution():
    with pytest.raises(CalibrationError, match="empty histogram"):
        distribution(np.zeros(N_BINS, np.int64), 0.0, 0.0)
