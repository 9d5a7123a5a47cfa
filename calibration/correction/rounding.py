"""Adaptive rounding: which of the integers around each weight to take, judged at the layer's output.

Rounding each weight to the nearest integer makes the error of each weight smallest, not that of their sum.
Which way each weight should go depends on all the others of its output channel through what they are
multiplied with (Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", arXiv
2004.10568, section 3.2): with samples ``x`` of the layer's input and ``y`` of the output it should have, the
error of an output channel with weights ``w`` and the best bias is

    E[(y - w x - b)^2] = const - 2 w B + w H w',    H = cov(x, x),   B = cov(x, y)

a quadratic in integers, ``w = scale * q``. AdaRound relaxes it and descends by stochastic gradients through
the samples. Here ``H`` and ``B`` are summed over all samples once, after which the samples are no longer
needed, and the problem is solved in the integers themselves:

1. *The real-valued optimum.* ``x`` is the input as the quantized layers before leave it, ``y`` the output of the
   fp32 model (AdaRound's asymmetric reconstruction): the best weights make up for part of the noise that
   reaches the layer. `best_weights` solves for them, held near the original ones by a ridge.
2. *Rounding one after another, the rest making up for it*: the error made so far moves the weights not yet
   rounded to where the quadratic is smallest again (one column of the Cholesky factor of ``H^-1`` each, as in
   Frantar et al., "GPTQ", arXiv 2210.17323, section 3).
3. *Descent*: each weight in turn moves to its best allowed integer with all others fixed, until nothing moves.

A weight may only become the integer below its optimum or the one above, as in AdaRound.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calibration.correction.linear import Samples

__all__ = ["Moments", "at_the_ends", "best_bias", "best_weights", "moments", "round_adaptively"]

Array = NDArray[np.float64]

_BLOCK = 64
"""Columns updated by themselves before the rest follows in one product: what fits into a core's cache."""
_MAX_SWEEPS = 8
_LIMIT = 127.0
_ROUNDING_RIDGE = 0.03
"""In `round_adaptively`, where it only weighs the errors of weights against one another."""


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
    bias: Array = seen.output_mean - (weights @ seen.input_mean[:, :, None])[:, :, 0]
    return bias


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


def best_weights(weights: Array, seen: Moments, ridge: float) -> Array:
    """The real-valued weights that serve the quantized input best, near `weights`.

    ``W + (H + R)^-1 (B - H W)``: where the input lost something that other inputs can still tell, they do.

    Args:
        weights: ``[G, O, K]``, of the fp32 model.
        seen: of the layer's samples.
        ridge: how much a weight resists, in units of its input's own variance. What the samples say of the
            noise that reaches the layer is soon an accident of theirs: ``K`` numbers are fitted to each output.
    """
    h, b = seen.input_covariance, seen.cross_covariance
    original = weights.transpose(0, 2, 1)
    moved = np.linalg.solve(_ridged(h, ridge), b - h @ original)
    best: Array = (original + moved).transpose(0, 2, 1)
    return best


def round_adaptively(weights: Array, scale: Array, seen: Moments, ends: NDArray[np.bool_]) -> Array:
    """The integers whose layer output is closest to that of real-valued weights.

    Args:
        weights: ``[G, O, K]``, real: `best_weights`, or the fp32 model's.
        scale: ``[G, O]``, the step of each output channel.
        seen: of the layer's samples.
        ends: ``[G, O, K]``, weights that are to stay at the end of the grid.

    Returns:
        ``[G, O, K]`` integers as float64, each next to ``weights / scale`` and within ±127.
    """
    h = _ridged(seen.input_covariance, _ROUNDING_RIDGE)
    order = np.argsort(-np.diagonal(h, axis1=1, axis2=2).sum(axis=0), kind="stable")
    h = h[:, order][:, :, order]
    target = weights.transpose(0, 2, 1)[:, order]
    real = target / scale[:, None, :]
    low, high = np.clip(np.floor(real), -_LIMIT, _LIMIT), np.clip(np.ceil(real), -_LIMIT, _LIMIT)
    fixed = ends.transpose(0, 2, 1)[:, order]
    end = np.where(real < 0.0, -_LIMIT, _LIMIT)
    low, high = np.where(fixed, end, low), np.where(fixed, end, high)
    b = h @ target
    q = _round_in_turn(h, target, scale, low, high)
    _descend(q, h, b, scale, low, high)
    result: Array = np.empty_like(q)
    result[:, order] = q
    chosen: Array = result.transpose(0, 2, 1)
    return chosen


def at_the_ends(weights: Array, scale: Array) -> NDArray[np.bool_]:
    """Which weights lie at or beyond the ends of their channel's grid.

    Scales are float32: the largest weight of a channel is 127 steps but for 1e-7.
    """
    ends: NDArray[np.bool_] = np.abs(weights) > (_LIMIT - 1e-4) * scale[:, :, None]
    return ends


def _ridged(h: Array, ridge: float) -> Array:
    """``H`` with its diagonal raised.

    The tiny second term keeps inputs that never vary (dead channels) solvable: they stay where they are.
    """
    variance = np.diagonal(h, axis1=1, axis2=2)
    result: Array = h.copy()
    diagonal = np.arange(h.shape[1])
    result[:, diagonal, diagonal] += (
        ridge * variance + 1e-9 * variance.mean(axis=1, keepdims=True) + np.finfo(np.float32).tiny
    )
    return result


def _round_in_turn(h: Array, target: Array, step: Array, low: Array, high: Array) -> Array:
    """Step 2 of the module's docstring; ``[G, K, O]``."""
    remaining = target.copy()
    factor = np.linalg.cholesky(np.linalg.inv(h)).transpose(0, 2, 1)
    q: Array = np.empty_like(remaining)
    n = h.shape[1]
    for start in range(0, n, _BLOCK):
        end = min(start + _BLOCK, n)
        errors = np.empty((len(h), end - start, target.shape[2]))
        for k in range(start, end):
            q[:, k] = np.clip(np.rint(remaining[:, k] / step), low[:, k], high[:, k])
            error = (remaining[:, k] - q[:, k] * step) / factor[:, k, k, None]
            errors[:, k - start] = error
            remaining[:, k + 1 : end] -= factor[:, k, k + 1 : end, None] * error[:, None]
        remaining[:, end:] -= factor[:, start:end, end:].transpose(0, 2, 1) @ errors
    return q


def _descend(q: Array, h: Array, b: Array, step: Array, low: Array, high: Array) -> None:
    """Step 3, in place. ``gradient = H w - B``; moving ``w_k`` by ``d`` adds ``d H_k`` to it."""
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
