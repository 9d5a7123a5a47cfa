"""Scales and zero points: what every engine relies on, over all ranges."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from calibration.qparams import (
    asymmetric_uint8,
    dequantize,
    half_scale,
    int32_bias,
    min_weight_scale,
    per_channel_int8,
    quantize,
    representable_range,
    symmetric_int8,
)
from pipeline.artifacts import QuantParams, TensorRange
from pipeline.errors import CalibrationError

BOUNDS = st.floats(-1e6, 1e6, width=32)
RANGES = st.tuples(BOUNDS, BOUNDS).map(lambda ends: TensorRange(min(ends), max(ends)))
FORMS = pytest.mark.parametrize("form", [asymmetric_uint8, symmetric_int8])
HALF_STEP = 0.5 + 1e-3
"""In steps; the rest is float32 division, an ulp of a quotient up to 255."""


@FORMS
@given(wanted=RANGES)
def test_zero_maps_exactly(form, wanted):
    params = form(wanted)
    zero = quantize(np.zeros(1, np.float32), params)
    assert zero[0] == params.zero_point
    assert dequantize(zero, params)[0] == 0.0


@FORMS
@given(wanted=RANGES)
def test_the_grid_spans_the_range_to_within_half_a_step(form, wanted):
    params = form(wanted)
    ends = representable_range(params)
    slack = HALF_STEP * float(params.scale)
    assert ends.low <= 0.0 <= ends.high
    assert ends.low <= wanted.low + slack
    assert ends.high >= wanted.high - slack


@given(wanted=RANGES)
def test_the_asymmetric_grid_is_no_wider_than_the_range_with_zero(wanted):
    low, high = min(wanted.low, 0.0), max(wanted.high, 0.0)
    params = asymmetric_uint8(wanted)
    if high - low > 1e-30:
        assert float(params.scale) == pytest.approx((high - low) / 255, rel=1e-6)
    assert params.scale.dtype == np.float32
    assert params.zero_point.dtype == np.uint8
    if wanted.low >= 0.0:
        assert params.zero_point == 0  # a Relu disappears into such a grid


@FORMS
@given(wanted=RANGES, part=st.floats(0.0, 1.0))
def test_round_trip_is_within_half_a_step_inside_the_grid(form, wanted, part):
    params = form(wanted)
    ends = representable_range(params)
    value = np.array([ends.low + part * (ends.high - ends.low)], np.float32)
    error = abs(float(dequantize(quantize(value, params), params)[0]) - float(value[0]))
    assert error <= HALF_STEP * float(params.scale)


@given(wanted=RANGES)
def test_symmetric_has_zero_point_zero_and_never_minus_128(wanted):
    params = symmetric_int8(wanted)
    assert params.zero_point == 0
    far = np.array([-np.inf, np.inf, -200 * params.scale, 200 * params.scale], np.float32)
    assert quantize(far, params).tolist() == [-127, 127, -127, 127]


def test_a_scale_off_by_a_tenth_breaks_the_half_step():
    """The bound above can fail."""
    params = symmetric_int8(TensorRange(-1.0, 1.0))
    wrong = type(params)(np.float32(params.scale * 1.1), params.zero_point, "int8")
    restored = dequantize(quantize(np.ones(1, np.float32), params), wrong)
    assert abs(restored[0] - 1.0) > HALF_STEP * params.scale


@FORMS
@pytest.mark.parametrize(
    ("low", "high"), [(np.nan, 1.0), (0.0, np.nan), (-np.inf, 0.0), (0.0, np.inf), (2.0, 1.0)]
)
def test_what_is_no_range_is_refused_with_its_bounds(form, low, high):
    with pytest.raises(CalibrationError, match=rf"\[{low}, {high}\] is no range"):
        form(TensorRange(low, high))


@FORMS
def test_a_tensor_of_zeros_gets_a_usable_scale(form):
    assert form(TensorRange(0.0, 0.0)).scale == 1.0


@FORMS
def test_scales_are_never_subnormal(form):
    """Engines flush a subnormal scale to zero and divide by it."""
    assert form(TensorRange(0.0, 1e-44)).scale == np.finfo(np.float32).tiny


@given(
    weights=hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=2, max_dims=4, max_side=5),
        elements=st.floats(-100, 100, width=32),
    ),
    data=st.data(),
)
def test_each_channel_has_the_scale_of_its_largest_weight(weights, data):
    axis = data.draw(st.integers(0, weights.ndim - 1))
    params = per_channel_int8(weights, axis)
    assert params.axis == axis
    assert params.scale.shape == params.zero_point.shape == (weights.shape[axis],)
    assert not params.zero_point.any()
    stored = quantize(weights, params)
    assert stored.dtype == np.int8
    restored = dequantize(stored, params)
    for channel, scale in enumerate(params.scale):
        own = weights.take(channel, axis)
        assert scale == pytest.approx(max(np.abs(own).max() / 127, np.finfo(np.float32).tiny), rel=1e-6)
        assert np.abs(restored.take(channel, axis) - own).max() <= HALF_STEP * scale


def test_the_wrong_axis_is_worse():
    weights = np.array([[1.0, 1.0], [1e-3, 0.7e-3]], np.float32)
    errors = []
    for axis in (0, 1):
        params = per_channel_int8(weights, axis)
        errors.append(np.abs(dequantize(quantize(weights, params), params) - weights)[1].max())
    assert errors[1] > 10 * errors[0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(bad):
    weights = np.ones((2, 3), np.float32)
    weights[1, 1] = bad
    with pytest.raises(CalibrationError, match="weights hold NaN or Inf"):
        per_channel_int8(weights, 0)


@given(
    bias=hnp.arrays(np.float32, 4, elements=st.floats(-1e4, 1e4, width=32)),
    input_scale=st.floats(2**-10, 8.0, width=32),
    tiny=st.floats(0.0, 2**-10, width=32),
)
def test_a_bias_fits_in_half_of_int32_and_keeps_its_value(bias, input_scale, tiny):
    """Even beside weights that are next to nothing."""
    scale = np.float32(input_scale)
    weights = per_channel_int8(np.full((4, 2), tiny, np.float32), 0, min_weight_scale(bias, scale))
    steps, params = int32_bias(bias, scale, weights.scale)
    assert steps.dtype == np.int32
    assert np.abs(steps.astype(np.int64)).max() <= 2**30 * (1 + 1e-6)
    restored = steps * params.scale.astype(np.float64)
    assert (np.abs(restored - bias) <= HALF_STEP * params.scale + 1e-6 * np.abs(bias)).all()


def test_a_bias_beyond_int32_is_refused():
    with pytest.raises(CalibrationError, match="does not fit in int32"):
        int32_bias(np.ones(1, np.float32), np.float32(1e-6), np.array([1e-6], np.float32))


@pytest.mark.parametrize("half_type", ["float16", "bfloat16"])
@given(values=st.lists(st.floats(1e-9, 6e4), min_size=1, max_size=8))
def test_half_scales_are_the_next_value_up(half_type, values):
    dtype = np.dtype(np.float16) if half_type == "float16" else ir.DataType.BFLOAT16.numpy()
    wide = np.asarray(values, np.float32)
    given_params = QuantParams(wide, np.zeros(len(values), np.int8), "int8", 0)
    scale = half_scale(given_params, half_type).scale
    assert scale.dtype == np.float32
    assert np.array_equal(scale.astype(dtype).astype(np.float32), scale), "exact in the type"
    assert (scale >= wide).all(), "nothing clips more"
    below = np.nextafter(scale.astype(dtype), np.asarray(0, dtype)).astype(np.float32)
    assert (below < wide).all(), "and no coarser than need be"


def test_half_scales_that_are_exact_stay_and_those_too_large_are_refused():
    def params(scale):
        return QuantParams(np.asarray(scale, np.float32), np.asarray(0, np.int8), "int8")

    assert half_scale(params(0.5), "float16").scale == 0.5
    assert half_scale(params(2.0**-24), "float16").scale == 2.0**-24  # the smallest there is
    with pytest.raises(CalibrationError, match="does not fit in float16; choose bfloat16"):
        half_scale(params(7e4), "float16")
    assert half_scale(params(7e4), "bfloat16").scale >= 7e4
