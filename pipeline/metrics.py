"""How far two sets of outputs are apart, and whether they name the right class. Pure functions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "agreement",
    "cosine_similarity",
    "log_probabilities",
    "max_abs_error",
    "probabilities",
    "sqnr_db",
    "sqnr_db_from_energies",
    "top_k_correct",
]

_SUM_ATOL = 1e-3
"""How far from 1 the sum of a row of probabilities may be: a thousand of them in float16 stay within it."""


def sqnr_db(reference: NDArray[Any], approximation: NDArray[Any]) -> float:
    """Signal-to-quantization-noise ratio, ``10 log10(sum r^2 / sum (r - a)^2)``.

    Args:
        reference: real values of any shape.
        approximation: the same shape.

    Returns:
        Decibels; ``inf`` when both are equal, ``-inf`` when only the reference is all zero, NaN
        when either holds one.

    Raises:
        ValueError: the shapes differ.
    """
    signal, approximate = _same_shape(reference, approximation)
    noise = signal - approximate
    return sqnr_db_from_energies(float(np.vdot(signal, signal)), float(np.vdot(noise, noise)))


def sqnr_db_from_energies(signal_energy: float, noise_energy: float) -> float:
    """`sqnr_db` of sums kept over many batches: ``sum r^2`` and ``sum (r - a)^2``."""
    if math.isnan(signal_energy) or math.isnan(noise_energy):
        return math.nan
    if noise_energy == 0.0:
        return math.inf
    if signal_energy == 0.0:
        return -math.inf
    # A difference of logarithms: the quotient of the energies could overflow.
    return 10.0 * (math.log10(signal_energy) - math.log10(noise_energy))


def cosine_similarity(reference: NDArray[Any], approximation: NDArray[Any]) -> float:
    """Cosine of the angle between both as flat vectors, in ``[-1, 1]``.

    Two zero vectors count as equal (1), a zero and a non-zero vector as unrelated (0).

    Raises:
        ValueError: the shapes differ.
    """
    a, b = (array.ravel() for array in _same_shape(reference, approximation))
    # Scaled to a largest magnitude of 1: squares of the raw values could overflow or vanish.
    a_peak, b_peak = _peak(a), _peak(b)
    if a_peak == 0.0 or b_peak == 0.0:
        return 1.0 if a_peak == b_peak else 0.0
    a, b = a / a_peak, b / b_peak
    cosine = float(np.dot(a, b)) / math.sqrt(float(np.dot(a, a)) * float(np.dot(b, b)))
    return cosine if math.isnan(cosine) else max(-1.0, min(1.0, cosine))


def max_abs_error(reference: NDArray[Any], approximation: NDArray[Any]) -> float:
    """Largest ``|r - a|``; 0 for empty arrays, NaN when either holds one.

    Raises:
        ValueError: the shapes differ.
    """
    a, b = _same_shape(reference, approximation)
    return _peak(a - b)


def agreement(reference_logits: NDArray[Any], logits: NDArray[Any]) -> float:
    """The share of rows, in ``[0, 1]``, on which both have the same top-1 class.

    Args:
        reference_logits: ``[N, C]``.
        logits: ``[N, C]``.

    Raises:
        ValueError: the shapes differ, or there is no row.
    """
    a, b = _same_shape(reference_logits, logits)
    if a.ndim != 2 or a.shape[0] == 0:
        raise ValueError(f"agreement needs logits of shape [N >= 1, C], got {a.shape}")
    return float(np.mean(a.argmax(axis=1) == b.argmax(axis=1)))


def top_k_correct(logits: NDArray[Any], labels: NDArray[Any], k: int) -> NDArray[np.bool_]:
    """Whether each row's label is among its ``k`` largest logits.

    Equal logits rank by index, so that ``k=1`` is exactly ``argmax == label``, and a network that
    answers the same for every class gets no credit for it.

    Args:
        logits: ``[N, C]``.
        labels: integers ``[N]`` in ``[0, C)``.
        k: 1 to C.

    Returns:
        bool ``[N]``.

    Raises:
        ValueError: a shape, ``k`` or a label is out of range.
    """
    if logits.ndim != 2 or labels.shape != (logits.shape[0],):
        raise ValueError(f"need logits [N, C] and labels [N], got {logits.shape} and {labels.shape}")
    n_classes = logits.shape[1]
    if not 1 <= k <= n_classes:
        raise ValueError(f"k must be 1 to {n_classes} (the classes), got {k}")
    if labels.size and (int(labels.min()) < 0 or int(labels.max()) >= n_classes):
        raise ValueError(f"labels must be 0 to {n_classes - 1}, got {labels.min()} to {labels.max()}")
    own = np.take_along_axis(logits, labels[:, None], axis=1)
    earlier = np.arange(n_classes)[None, :] < labels[:, None]
    rank = np.sum((logits > own) | ((logits == own) & earlier), axis=1)
    correct: NDArray[np.bool_] = rank < k
    return correct


def probabilities(scores: NDArray[Any]) -> NDArray[np.float64]:
    """Softmax of each row of logits.

    A row that already is a distribution (an imported graph may end in a softmax) stays as it is: a
    second softmax would flatten it.

    Args:
        scores: real values ``[N, C]``.

    Returns:
        float64 ``[N, C]``; rows sum to 1.
    """
    values = np.asarray(scores, np.float64)
    exponentials = np.exp(values - values.max(axis=1, keepdims=True))
    softmax: NDArray[np.float64] = exponentials / exponentials.sum(axis=1, keepdims=True)
    already = (values.min(axis=1) >= 0.0) & (np.abs(values.sum(axis=1) - 1.0) < _SUM_ATOL)
    if already.any():
        softmax[already] = values[already]
    return softmax


def log_probabilities(scores: NDArray[Any]) -> NDArray[np.float64]:
    """Natural logarithm of `probabilities`, finite: below the smallest float64 they count as that."""
    logarithms: NDArray[np.float64] = np.log(np.maximum(probabilities(scores), np.finfo(np.float64).tiny))
    return logarithms


def _same_shape(a: NDArray[Any], b: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    if a.shape != b.shape:
        raise ValueError(f"shapes differ: {a.shape} and {b.shape}")
    # float64: float32 sums over many logits lose the small noise they are to measure.
    return np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)


def _peak(a: NDArray[np.float64]) -> float:
    return float(np.max(np.abs(a))) if a.size else 0.0
