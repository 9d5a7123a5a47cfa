"""Affine quantization, in plain NumPy: ``real = scale * (q - zero_point)``.

One real-valued range gives both forms engines ask for, so that one calibration serves all of them:

* *asymmetric uint8*, ``q`` in [0, 255]: the whole grid spans the range (OpenVINO, ONNX Runtime);
* *symmetric int8*, ``q`` in [-127, 127], zero point 0: TensorRT, and every weight.

Zero is always on the grid: padding, ReLU and missing branches produce exact zeros, and an offset in
them would be an error shared by every pixel. (Jacob et al., "Quantization and Training of Neural
Networks for Efficient Integer-Arithmetic-Only Inference", arXiv 1712.05877, section 2.1.)
"""

from __future__ import annotations

import dataclasses
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from pipeline.artifacts import QuantParams, TensorRange
from pipeline.errors import CalibrationError

__all__ = [
    "ACTIVATION_FORMS",
    "asymmetric_uint8",
    "dequantize",
    "half_scale",
    "int32_bias",
    "per_channel_int8",
    "quantize",
    "representable_range",
    "symmetric_int8",
]

_LIMITS = {"int8": (-127, 127), "uint8": (0, 255), "int32": (-(2**31) + 1, 2**31 - 1)}
_TINY = float(np.finfo(np.float32).tiny)
"""The smallest normal float32: engines flush smaller scales to zero and then divide by it."""
_BIAS_HEADROOM_BITS = 30
"""A quantized bias takes at most half of int32, so that the products added to it cannot overflow."""


def asymmetric_uint8(tensor_range: TensorRange) -> QuantParams:
    """The uint8 grid over a range widened to contain 0.

    The zero point is rounded to an integer, which moves the grid by at most half a step.

    Raises:
        CalibrationError: a bound is not finite, or ``low > high``.
    """
    low, high = _widened_to_zero(tensor_range)
    scale = _float32_scale((high - low) / 255.0)
    zero_point = int(np.clip(np.rint(-low / float(scale)), 0, 255))
    return QuantParams(scale, np.asarray(zero_point, np.uint8), "uint8")


def symmetric_int8(tensor_range: TensorRange) -> QuantParams:
    """The int8 grid whose ends are plus and minus the larger magnitude of the range.

    Raises:
        CalibrationError: a bound is not finite, or ``low > high``.
    """
    low, high = _widened_to_zero(tensor_range)
    return QuantParams(_float32_scale(max(-low, high) / 127.0), np.asarray(0, np.int8), "int8")


ACTIVATION_FORMS = MappingProxyType({"asymmetric_uint8": asymmetric_uint8, "symmetric_int8": symmetric_int8})
"""The grid over a range, by the name a placement gives its form."""


def per_channel_int8(
    weights: NDArray[np.float32], axis: int, min_scale: NDArray[Any] | float = 0.0
) -> QuantParams:
    """Symmetric int8 parameters for each slice of `weights` along `axis`.

    Args:
        weights: float32, any rank.
        axis: the output-channel axis.
        min_scale: scales are at least this, a number or one for each channel. `int32_bias` needs it
            where a channel's weights are tiny beside its bias.

    Raises:
        CalibrationError: a weight is NaN or Inf.
    """
    other_axes = tuple(i for i in range(weights.ndim) if i != axis % weights.ndim)
    # Not one abs(): NaN and Inf survive max and min, and no copy of the weights is made.
    largest = np.maximum(weights.max(axis=other_axes), -weights.min(axis=other_axes)).astype(np.float64)
    if not np.isfinite(largest).all():
        raise CalibrationError("the weights hold NaN or Inf; check the checkpoint")
    scale = np.maximum(np.maximum(largest / 127.0, min_scale), _TINY).astype(np.float32)
    return QuantParams(scale, np.zeros(scale.shape, np.int8), "int8", axis)


def int32_bias(
    bias: NDArray[np.float32], input_scale: NDArray[np.float32], weight_scale: NDArray[np.float32]
) -> tuple[NDArray[np.int32], QuantParams]:
    """The bias in units of the accumulator, whose scale is ``input_scale * weight_scale``.

    Raises:
        CalibrationError: a value does not fit in int32; `min_weight_scale` prevents it.
    """
    scale = (input_scale * weight_scale).astype(np.float32)
    steps = np.rint(bias.astype(np.float64) / scale)
    if not (np.abs(steps) < 2**31).all():
        raise CalibrationError(
            f"a bias of {np.abs(steps).max():.3g} accumulator steps does not fit in int32; limit {2**31 - 1}"
        )
    params = QuantParams(scale, np.zeros(scale.shape, np.int32), "int32", 0)
    return steps.astype(np.int32), params


def min_weight_scale(bias: NDArray[np.float32], input_scale: NDArray[np.float32]) -> NDArray[np.float64]:
    """The smallest weight scale of each channel at which its bias keeps within half of int32."""
    return np.abs(bias.astype(np.float64)) / (float(input_scale) * 2.0**_BIAS_HEADROOM_BITS)


def half_scale(params: QuantParams, half_type: Literal["float16", "bfloat16"]) -> QuantParams:
    """The same grid with every scale a value of `half_type`: the next one up, so that nothing clips more.

    A strongly typed engine stores scales in the type of the remainder. One that is rounded after the
    integers were made is wrong by up to 2^-11 (float16) or 2^-8 (bfloat16) in every value; chosen among
    the representable ones beforehand, it is exact and the step is at most 2^-10 or 2^-7 wider.

    float16 ends at 6e-8, and below 6.1e-5 (its subnormals) its values are 6e-8 apart: a scale of 1e-5, as
    weights have that take pixels, is still met to 0.6%. What is below 6e-8 gets 6e-8; its channel then is
    zero or nearly so beside any other.

    Args:
        params: with positive float32 scales.
        half_type: what the scales are stored in.

    Raises:
        CalibrationError: a scale is above the largest value of the type.
    """
    dtype = np.dtype(half_type) if half_type == "float16" else ir.DataType.BFLOAT16.numpy()
    with np.errstate(over="ignore"):
        nearest = params.scale.astype(dtype)
    up = np.nextafter(nearest, np.asarray(np.inf, dtype))
    scale = np.where(nearest.astype(np.float32) < params.scale, up, nearest).astype(np.float32)
    if not np.isfinite(scale).all():
        raise CalibrationError(
            f"a scale of {params.scale.max():.6g} does not fit in {half_type}"
            + ("; choose bfloat16" if half_type == "float16" else "")
        )
    return dataclasses.replace(params, scale=scale)


def quantize(values: NDArray[Any], params: QuantParams) -> NDArray[Any]:
    """To integers: round half to even (as ONNX QuantizeLinear), then saturate.

    Symmetric int8 saturates at -127, not -128: the grid then is symmetric and no product of two
    values can be the one that overflows.
    """
    low, high = _LIMITS[params.dtype]
    # In place from here on: a weight is megabytes, and every further copy of it takes as long as the arithmetic.
    steps = np.asarray(values / _along(params.scale, params, values.ndim))
    np.rint(steps, out=steps)
    steps += _along(params.zero_point.astype(np.float32), params, values.ndim)
    quantized: NDArray[Any] = np.clip(steps, low, high, out=steps).astype(params.dtype)
    return quantized


def dequantize(quantized: NDArray[Any], params: QuantParams) -> NDArray[np.float32]:
    """Back to real values, float32."""
    if params.dtype != "int32":  # float32 holds these integers and their differences exactly
        steps = np.asarray(quantized.astype(np.float32))
        steps -= _along(params.zero_point.astype(np.float32), params, quantized.ndim)
        steps *= _along(params.scale, params, quantized.ndim)
        return steps
    offset = quantized.astype(np.int64) - _along(params.zero_point.astype(np.int64), params, quantized.ndim)
    real: NDArray[np.float32] = (offset * _along(params.scale, params, quantized.ndim)).astype(np.float32)
    return real


def representable_range(params: QuantParams) -> TensorRange:
    """The real values at the two ends of a per-tensor grid."""
    low, high = _LIMITS[params.dtype]
    scale, zero_point = float(params.scale), int(params.zero_point)
    return TensorRange(scale * (low - zero_point), scale * (high - zero_point))


def _widened_to_zero(tensor_range: TensorRange) -> tuple[float, float]:
    low, high = tensor_range.low, tensor_range.high
    if not (np.isfinite(low) and np.isfinite(high)) or low > high:
        raise CalibrationError(f"[{low}, {high}] is no range: its bounds must be finite and in order")
    return min(low, 0.0), max(high, 0.0)


def _float32_scale(scale: float) -> NDArray[np.float32]:
    # A tensor that is always zero has no range; any scale represents it, and 1 is readable.
    return np.asarray(1.0 if scale == 0.0 else max(scale, _TINY), np.float32)


def _along(per_channel: NDArray[Any], params: QuantParams, rank: int) -> NDArray[Any]:
    if params.axis is None or per_channel.ndim == 0:
        return per_channel
    shape = [1] * rank
    shape[params.axis] = -1
    return per_channel.reshape(shape)
