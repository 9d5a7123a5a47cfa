"""Range search by the squared error at the layer's output, for its input and for its weights.

A range chosen for a tensor by itself treats all its values alike. At the layer's output an error counts by
the weights it meets, and errors of neighbouring inputs cancel or add up.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from calibration.correction.linear import Samples
from calibration.qparams import ACTIVATION_FORMS, dequantize, quantize
from pipeline.artifacts import TensorRange
from pipeline.metrics import sqnr_db

__all__ = ["search_activation_range", "search_weight_scale"]

_ACTIVATION_FACTORS = (0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.2, 1.4)
"""Of the range that the method chose for the tensor."""
_WEIGHT_FACTORS = (1.0, 0.95, 0.9, 0.85, 0.8)
_WEIGHT_POSITIONS = 4096


def search_activation_range(
    start: TensorRange,
    form: Literal["asymmetric_uint8", "symmetric_int8"],
    weights: NDArray[np.float64],
    bias: NDArray[np.float64],
    fit: Samples,
    held: Samples,
) -> tuple[TensorRange, tuple[float, float]]:
    """The width of the input's grid that serves the layer best.

    Args:
        start: the range so far; both its ends are multiplied by the same factor.
        form: of the grid.
        weights: ``[G, O, K]``, not rounded.
        bias: ``[G, O]``.
        fit: real inputs, and outputs, to choose by.
        held: others, to judge by.

    Returns:
        The range, and the SQNR in dB of the output on `held` with `start` and with it.
    """
    matrix = weights.astype(np.float32).transpose(0, 2, 1)
    offset = bias[:, None].astype(np.float32)

    def judged(samples: Samples, factor: float) -> float:
        params = ACTIVATION_FORMS[form](TensorRange(factor * start.low, factor * start.high))
        restored = dequantize(quantize(samples.inputs, params), params)
        return sqnr_db(samples.outputs, restored @ matrix + offset)

    best = max(_ACTIVATION_FACTORS, key=lambda factor: judged(fit, factor))
    found = TensorRange(best * start.low, best * start.high)
    return found, (judged(held, 1.0), judged(held, best))


def search_weight_scale(
    weights: NDArray[np.float64], scale: NDArray[np.float64], inputs: NDArray[np.float32]
) -> NDArray[np.float64]:
    """The step of every output channel at which rounding to nearest leaves least error in its output.

    Args:
        weights: ``[G, O, K]``.
        scale: ``[G, O]``, the steps so far; finer ones, which clip the largest weights, are tried.
        inputs: ``[G, positions, K]`` samples of what the weights are multiplied with.

    Returns:
        ``[G, O]``.
    """
    stride = -(-inputs.shape[1] // _WEIGHT_POSITIONS)
    inputs = inputs[:, ::stride]
    best, least = scale, np.full(scale.shape, np.inf)
    for factor in _WEIGHT_FACTORS:
        step = (factor * scale)[:, :, None]
        error = np.clip(np.rint(weights / step), -127, 127) * step - weights
        noise = inputs @ error.transpose(0, 2, 1).astype(np.float32)
        energy = np.einsum("gpo,gpo->go", noise, noise)
        better = energy < least
        best, least = np.where(better, factor * scale, best), np.where(better, energy, least)
    return best
