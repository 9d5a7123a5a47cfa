"""Streaming statistics of a tensor: exact extrema and a histogram that needs no range beforehand.

The usual histogram has equal bins over a range that a first pass over the images must find. This one has
logarithmic bins fixed once for all: a value's bin is the leading 16 bits of its float32 form (sign,
exponent and 7 bits of the mantissa), so 128 bins an octave, each at most 0.8% wide. One pass therefore
serves every method, memory does not depend on the number of images, and counting is one shift and one
`numpy.bincount`.

The range methods ask for the density near the clipping point; there the bins are 1/128 to 1/256 of the
range wide, and the exact extrema bound the outermost ones.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import CalibrationError

__all__ = ["N_BINS", "Distribution", "TensorObserver", "distribution"]

_BINS_PER_OCTAVE = 128
_MIN_EXPONENT = -32
_MAX_EXPONENT = 32
_N_MAGNITUDES = (_MAX_EXPONENT - _MIN_EXPONENT) * _BINS_PER_OCTAVE
N_BINS = 2 * _N_MAGNITUDES
"""Magnitudes of [2^-32, 2^32), positive then negative; what is smaller counts as zero, what is
larger as the largest."""

_FIRST_MAGNITUDE = (127 + _MIN_EXPONENT) * _BINS_PER_OCTAVE
_NON_FINITE = 255 * _BINS_PER_OCTAVE


@dataclass(frozen=True, slots=True)
class Distribution:
    """How much of a tensor lies where: ``mass[i]`` spread evenly over ``[edges[i], edges[i + 1]]``.

    ``edges`` (float64, ascending) start at the smallest value seen and end at the largest. An exact
    zero is a bin of no width.
    """

    edges: NDArray[np.float64]
    mass: NDArray[np.float64]

    @property
    def low(self) -> float:
        """The smallest value."""
        return float(self.edges[0])

    @property
    def high(self) -> float:
        """The largest value."""
        return float(self.edges[-1])


class TensorObserver:
    """Extrema and histogram of one tensor, updated batch by batch."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.low = np.inf
        self.high = -np.inf
        self.histogram = np.zeros(N_BINS, np.int64)

    def update(
        self, lows: NDArray[np.float32] | None, highs: NDArray[np.float32], samples: NDArray[np.float32]
    ) -> None:
        """Take in one batch.

        Args:
            lows: the smallest value of each image, or ``None`` where it is known to be at least 0.
            highs: the largest value of each image.
            samples: float32 values of the tensor, all or an even selection; any shape.

        Raises:
            CalibrationError: a value is NaN or Inf.
        """
        low = 0.0 if lows is None else float(lows.min())
        high = float(highs.max())
        counts = np.bincount(_bins(samples))
        if counts.size > N_BINS or not (np.isfinite(low) and np.isfinite(high)):
            n_bad = int(counts[N_BINS]) if counts.size > N_BINS else 0
            raise CalibrationError(
                f"tensor {self.name!r} holds NaN or Inf ({n_bad} of {samples.size} values looked at; extrema "
                f"{low} and {high}); check the model's weights and its preprocessing"
            )
        self.low = min(self.low, low)
        self.high = max(self.high, high)
        self.histogram[: counts.size] += counts


def distribution(histogram: NDArray[np.int64], low: float, high: float) -> Distribution:
    """A histogram on the real axis.

    Args:
        histogram: counts of `N_BINS` bins.
        low: exact smallest value; ``high``: exact largest. They cut the outermost bins, which
            otherwise reach past them, and extend them where the histogram saw but a selection.

    Raises:
        CalibrationError: the histogram is empty.
    """
    if not histogram.any():
        raise CalibrationError("an empty histogram has no distribution")
    positive, negative = histogram[:_N_MAGNITUDES], histogram[_N_MAGNITUDES:]
    edges = _magnitude_edges()
    # Bin 0 holds zeros and what is nothing beside any step: it has no width here.
    zeros = positive[0] + negative[0]
    signed_edges = np.concatenate((-edges[:0:-1], edges[1:]))
    mass = np.concatenate((negative[:0:-1], [zeros], positive[1:])).astype(np.float64)
    used = np.flatnonzero(mass)
    first, last = int(used[0]), int(used[-1])
    mass = mass[first : last + 1]
    cut = signed_edges[first : last + 2].copy()
    cut[0], cut[-1] = min(low, cut[1]), max(high, cut[-2])
    return Distribution(np.clip(cut, min(low, high), max(low, high)), mass)


def _bins(values: NDArray[np.float32]) -> NDArray[np.intp]:
    halves = np.ascontiguousarray(values, np.float32).reshape(-1).view(np.uint16)
    leading = halves[1::2] if sys.byteorder == "little" else halves[::2]
    # mode="clip" skips a bounds check that 16 bits cannot fail, for a third of the time.
    return _BIN_OF_LEADING_BITS.take(leading, mode="clip")


def _bin_table() -> NDArray[np.intp]:
    """The bin of every float32 by its leading 16 bits; NaN and Inf go to a bin past the last."""
    bits = np.arange(1 << 16)
    raw = bits & 0x7FFF
    magnitude = np.clip(raw - _FIRST_MAGNITUDE, 0, _N_MAGNITUDES - 1)
    negative = (bits >> 15) * (magnitude > 0)
    return np.where(raw >= _NON_FINITE, N_BINS, magnitude + negative * _N_MAGNITUDES).astype(np.intp)


_BIN_OF_LEADING_BITS = _bin_table()


def _magnitude_edges() -> NDArray[np.float64]:
    """Lower edges of the magnitudes, and the upper edge of the last; the first is 0."""
    index = np.arange(_N_MAGNITUDES + 1)
    octave, step = np.divmod(index, _BINS_PER_OCTAVE)
    edges: NDArray[np.float64] = np.exp2(octave + _MIN_EXPONENT) * (1.0 + step / _BINS_PER_OCTAVE)
    edges[0] = 0.0
    return edges
