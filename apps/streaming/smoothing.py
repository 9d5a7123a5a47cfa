"""A running average of the class probabilities, by time and not by frame.

With time constant τ, a frame that comes Δt after the one before moves the average by

    α = 1 − exp(−Δt / τ),        average ← average + α · (probabilities − average).

That is the exact step response of a first-order low-pass filter whose input holds the new value over Δt:
two steps of Δt/2 with the same input make the same average as one of Δt, since
(1 − α₁)(1 − α₂) = exp(−(Δt₁ + Δt₂) / τ). A constant α would smooth a camera of 5 FPS six times longer than
one of 30 FPS, and longer still when frames are dropped under load.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

__all__ = ["ProbabilityAverage"]


class ProbabilityAverage:
    """The average of one source. It sums to 1 where the probabilities do.

    Args:
        smoothing_s: time constant τ; 0 takes every frame as it is.
        gap_s: after so long without a frame it starts anew: what was in view before the gap says
            nothing about what is now.
    """

    def __init__(self, smoothing_s: float, gap_s: float) -> None:
        self._smoothing_s = smoothing_s
        self._gap_s = gap_s
        self._value: NDArray[np.float64] | None = None
        self._last_ns = 0

    @property
    def value(self) -> NDArray[np.float64] | None:
        """float64 (C,), not to be written to; ``None`` before the first frame."""
        return self._value

    def update(self, timestamp_ns: int, probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
        """Takes a frame, and returns the average.

        Args:
            timestamp_ns: of the frame, monotonic. A frame from before the last one has no weight.
            probabilities: (C,), in [0, 1].
        """
        elapsed_s = (timestamp_ns - self._last_ns) / 1e9
        if self._value is None or self._smoothing_s == 0.0 or elapsed_s > self._gap_s:
            self._value = np.array(probabilities, np.float64)
        elif elapsed_s > 0.0:
            # expm1 keeps the digits of a small α.
            alpha = -math.expm1(-elapsed_s / self._smoothing_s)
            self._value = self._value + alpha * (probabilities - self._value)
        else:
            return self._value
        self._last_ns = timestamp_ns
        return self._value

    def reset(self) -> None:
        """The next frame starts anew."""
        self._value = None
