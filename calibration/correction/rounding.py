"""Adaptive rounding: which of the integers around each weight to take, judged at the layer's output.

Rounding each weight to the nearest integer makes the error of each weight smallest, not that of their sum.
Which way each weight should go depends on all the others of its output channel through what they are
multiplied with (Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", arXiv
2004.10568, eq. 13 to 15): with samples ``x`` of the layer's input and ``y`` of the output it should have, the
error of an output channel with weights ``w`` and the best bias is

    E[(y - w x - b)^2] = const - 2 w B + w H w',    H = cov(x, x),   B = cov(x, y)

a quadratic in integers, ``w = scale * q``. AdaRound relaxes it and descends by stochastic gradients through
the samples. Here ``H`` and ``B`` are summed over all samples once, after which the samples are no longer
needed, and the problem is solved in the integers themselves:

1. *Rounding one after another, the rest making up for it*: the real-valued optimum is rounded weight by weight;
   the error made so far moves the weights not yet rounded to where the quadratic is smallest again (one
   column of the Cholesky factor of ``H^-1`` each, as in Frantar et al., "GPTQ", arXiv 2210.17323, eq. 3 and 5).
2. *Descent*: each weight in turn moves to its best allowed integer with all others fixed, until nothing moves.

As in AdaRound, a weight may only become the integer below it or the one above. ``x`` is the input as the
quantized layers before leave it and ``y`` the output of the fp32 model (AdaRound's asymmetric
reconstruction), so a layer also makes up for part of the noise that reaches it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calibration.correction.linear import Samples

__all__ = ["Moments", "best_bias", "moments", "round_adaptively"]

Array = NDArray[np.float64]

_BLOCK = 64
"""Columns updated by themselves before the rest follows in one product: what fits into a core's cache."""
_MAX_SWEEPS = 8
_LIMIT = 127.0
_ON_GRID = 1e-4


@dataclass(frozen=True, slots=True)
class Moments:
    """First and second moments of a layer's samples, float64.

    ``H`` is ``[G, K, K]``, ``B`` ``[G, K, O]``; about the means, or about zero where the bias is fixed.
    """

    input_mean: Array
    """``[G, K]``"""
    output_mean: Array
    """``[G, O]``"""
    input_covariance: Array
    cross_covariance: Array


def best_bias(weights: Array, seen: Moments) -> Array:
    """The bias ``[G, O]`` at which `weights` ``[G, O, K]`` give every output channel the mean it should have."""
    return seen.output_mean - (weights @ seen.input_mean[:, :, None])[:, :, 0]


def moments(samples: Samples, fixed_bias: Array | None = None, second: bool = True) -> Moments:
    """Sum up samples.

    Args:
        samples: of the layer's input and of the output it should have.
        fixed_bias: ``[G, O]`` where the bias stays as it is; ``None``: it is chosen with the weights.
        second: whether the covariances are wanted; they take the time. Without, they are empty.
    """
    x, y = samples.inputs, samples.outputs
    input_mean = x.mean(axis=1, dtype=np.float64)
    output_mean = y.mean(axis=1, dtype=np.float64)
    if not second:
        return Moments(input_mean, output_mean, np.empty((0, 0, 0)), np.empty((0, 0, 0)))
    if fixed_bias is None:
        about_x, about_y = input_mean, output_mean
    else:
        about_x, about_y = np.zeros_like(input_mean), fixed_bias
    centred_x = x - about_x[:, None].astype(np.float32)
    centred_y = y - about_y[:, None].astype(np.float32)
    transposed = centred_x.transpose(0, 2, 1)
    n = x.shape[1]
    return Moments(
        input_mean,
        output_mean,
        (transposed @ centred_x).astype(np.float64) / n,
        (transposed @ centred_y).astype(np.float64) / n,
    )


def round_adaptively(weights: Array, scale: Array, seen: Moments, ridge: float) -> Array:
    """The integers that keep the layer's output closest to what it should be.

    Args:
        weights: ``[G, O, K]``, real.
        scale: ``[G, O]``, the step of each output channel.
        seen: of the layer's samples.
        ridge: how much a weight resists leaving its real value, in units of its input's own variance. Samples
            are few and alike; without it the solution fits their accidents.

    Returns:
        ``[G, O, K]`` integers as float64, each next to ``weights / scale`` and within ±127.
    """
    variance = np.diagonal(seen.input_covariance, axis1=1, axis2=2)
    # The tiny second term keeps inputs that never vary (dead channels) solvable: they stay where they are.
    pull = ridge * variance + 1e-9 * variance.mean(axis=1, keepdims=True) + np.finfo(np.float32).tiny
    order = np.argsort(-variance.sum(axis=0), kind="stable")
    target = weights.transpose(0, 2, 1)[:, order]
    h = seen.input_covariance[:, order][:, :, order].copy()
    diagonal = np.arange(h.shape[1])
    h[:, diagonal, diagonal] += pull[:, order]
    b = seen.cross_covariance[:, order] + pull[:, order, None] * target
    step = scale[:, None, :]
    real = target / step
    # Scales are float32: the largest weight of a channel is 127 steps but for 1e-7, and must stay so.
    real = np.where(np.abs(real - np.rint(real)) < _ON_GRID, np.rint(real), real)
    low, high = np.maximum(np.floor(real), -_LIMIT), np.minimum(np.ceil(real), _LIMIT)
    q = _round_in_turn(h, b, step[:, 0], low, high)
    _descend(q, h, b, step[:, 0], low, high)
    result = np.empty_like(q)
    result[:, order] = q
    return result.transpose(0, 2, 1)


def _round_in_turn(h: Array, b: Array, step: Array, low: Array, high: Array) -> Array:
    """Step 1 of the module's docstring; ``[G, K, O]``."""
    remaining = np.linalg.solve(h, b)
    factor = np.linalg.cholesky(np.linalg.inv(h)).transpose(0, 2, 1)
    q = np.empty_like(remaining)
    n = h.shape[1]
    for start in range(0, n, _BLOCK):
        end = min(start + _BLOCK, n)
        errors = np.empty((len(h), end - start, b.shape[2]))
        for k in range(start, end):
            q[:, k] = np.clip(np.rint(remaining[:, k] / step), low[:, k], high[:, k])
            error = (remaining[:, k] - q[:, k] * step) / factor[:, k, k, None]
            errors[:, k - start] = error
            remaining[:, k + 1 : end] -= factor[:, k, k + 1 : end, None] * error[:, None]
        remaining[:, end:] -= factor[:, start:end, end:].transpose(0, 2, 1) @ errors
    return q


def _descend(q: Array, h: Array, b: Array, step: Array, low: Array, high: Array) -> None:
    """Step 2, in place. ``gradient = H w - B``; moving ``w_k`` by ``d`` adds ``d H_k`` to it."""
    gradient = h @ (q * step[:, None]) - b
    n = h.shape[1]
    for _ in range(_MAX_SWEEPS):
        n_moved = 0
        for start in range(0, n, _BLOCK):
            end = min(start + _BLOCK, n)
            local = gradient[:, start:end].copy()
            moves = np.zeros_like(local)
            for k in range(start, end):
                best = np.rint(q[:, k] - local[:, k - start] / (h[:, k, k, None] * step))
                change = np.clip(best, low[:, k], high[:, k]) - q[:, k]
                moved = np.count_nonzero(change)
                if moved:
                    n_moved += moved
                    q[:, k] += change
                    moves[:, k - start] = change * step
                    local += h[:, start:end, k, None] * moves[:, None, k - start]
            gradient += h[:, :, start:end] @ moves
        if n_moved <= 1e-4 * q.size:
            break
