"""Intervals for accuracies and for the difference of two accuracies measured on the same images.

Two engines judged on the same images are *paired*: the images both get right, or both get wrong,
say nothing about their difference. Only the discordant ones do, and there are few of them, which
is why a paired interval is far narrower than two separate ones suggest::

                     second right   second wrong
    first right           a              b          b: lost by the second
    first wrong           c              d          c: gained by the second

    drop = (b - c) / n
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, ClassVar

__all__ = [
    "Interval",
    "holm_adjusted",
    "images_to_show",
    "mcnemar_exact_p",
    "paired_drop_interval",
    "wilson_interval",
]


@dataclass(frozen=True, slots=True)
class Interval:
    """A closed interval ``[low, high]``."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Half its length; the ``±`` of a symmetric interval."""
        return (self.high - self.low) / 2

    def scaled(self, factor: float) -> Interval:
        """Both ends times a positive factor: from fractions to percent or points."""
        return Interval(self.low * factor, self.high * factor)


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval for one proportion, within ``[0, 1]``.

    It keeps close to its nominal coverage near 0 and 1, where the textbook (Wald) interval
    collapses to a point: Wilson, JASA 22 (1927) 209-212; Brown, Cai and DasGupta, Statistical
    Science 16 (2001) 101-133.

    Raises:
        ValueError: the counts are impossible, or ``confidence`` is not between 0 and 1.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"need 0 <= successes <= n and n >= 1, got {successes} of {n}")
    z = _z(confidence)
    p = successes / n
    shrink = 1 + z * z / n
    centre = (p + z * z / (2 * n)) / shrink
    half = z / shrink * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # Exactly 0 and 1 at the ends, where rounding would leave 1e-17.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return Interval(low, high)


def paired_drop_interval(b: float, c: float, n: float, confidence: float = 0.95) -> Interval:
    """Tango's score interval for the drop ``(b - c) / n`` of two accuracies on the same images.

    Tango, Statistics in Medicine 17 (1998) 891-908. The interval is the set of drops ``t`` that a
    score test does not reject, ``|Z(t)| <= z``, with::

        Z(t) = (b - c - n t) / sqrt(n (2 q + t (1 - t)))

    where ``q``, the probability of a gained image, is its maximum-likelihood estimate under the
    drop ``t``: the larger root of ``2n q^2 + B q + C = 0`` with ``B = (2n - b + c) t - b - c`` and
    ``C = -c t (1 - t)``. It needs only the discordant counts. Its coverage stays near the nominal
    one for few discordant images, also for none, where the Wald interval has no width at all
    (compared in Newcombe, ibid. 2635-2650, and Fagerland, Lydersen and Laake, ibid. 33 (2014)
    2850-2875, who recommend it).

    Args:
        b: images the first gets right and the second wrong. Not an integer only where counts are
            scaled to plan for another number of images.
        c: images the first gets wrong and the second right.
        n: all images.
        confidence: nominal coverage.

    Returns:
        The drop as a fraction, within ``[-1, 1]``; positive: the second is worse.

    Raises:
        ValueError: the counts are impossible, or ``confidence`` is not between 0 and 1.
    """
    if n <= 0 or b < 0 or c < 0 or b + c > n * (1 + 1e-12):  # scaled counts carry rounding
        raise ValueError(f"need b, c >= 0 and b + c <= n, n > 0, got b={b}, c={c}, n={n}")
    z = _z(confidence)
    estimate = (b - c) / n
    low = _cross(b, c, n, z, inside=estimate, outside=-1.0)
    high = _cross(b, c, n, z, inside=estimate, outside=1.0)
    return Interval(low, high)


def mcnemar_exact_p(b: int, c: int) -> float:
    """Exact two-sided McNemar test: how likely so uneven a split of ``b + c`` discordant images is
    where gains and losses are equally probable.

    Twice the smaller tail of Binomial(b + c, 1/2), at most 1. McNemar, Psychometrika 12 (1947)
    153-157.

    Raises:
        ValueError: a count is negative.
    """
    if b < 0 or c < 0:
        raise ValueError(f"need counts >= 0, got b={b}, c={c}")
    n, smaller = b + c, min(b, c)
    term = tail = 1
    for k in range(smaller):
        term = term * (n - k) // (k + 1)
        tail += term
    # Integers up to here: the quotient is rounded once.
    p: float = 2 * tail / 2**n
    return min(1.0, p)


def images_to_show(
    margin: float, lost_rate: float, gained_rate: float, confidence: float = 0.95, power: float = 0.8
) -> int:
    """How many images it takes to show that a drop is below ``margin``.

    *Show* means that the upper end of `paired_drop_interval` lies below the margin, and it is to
    happen with probability ``power`` where the true rates are those given. The estimate
    ``(b - c) / n`` has mean ``t = lost_rate - gained_rate`` and variance ``v1 / n``, with
    ``v1 = lost_rate + gained_rate - t^2``. The test at the margin ``m`` scales it by ``v0 / n``, with
    ``v0 = 2 q + m (1 - m)`` and ``q`` the limit of Tango's restricted estimate. So it rejects "the drop
    is ``m`` or more" with probability::

        Phi((sqrt(n) (m - t) - z_confidence sqrt(v0)) / sqrt(v1))

    which is ``power`` at::

        n = ((z_confidence sqrt(v0) + z_power sqrt(v1)) / (m - t))^2

    Nam, Biometrics 53 (1997) 1422-1430, for matched pairs; with ``m = 0`` and ``v0`` the discordant
    rate it is the size of McNemar's test by Connor, ibid. 43 (1987) 207-211.

    Args:
        margin: the drop not to be reached, a fraction; above ``lost_rate - gained_rate``.
        lost_rate: share of the images that only the first gets right.
        gained_rate: share of the images that only the second gets right.
        confidence: of the two-sided interval.
        power: probability of showing it.

    Raises:
        ValueError: an argument is out of range, or the drop is not below the margin.
    """
    drop = lost_rate - gained_rate
    if min(lost_rate, gained_rate) < 0 or lost_rate + gained_rate > 1:
        raise ValueError(f"rates must be >= 0, together at most 1, got {lost_rate} and {gained_rate}")
    if not drop < margin < 1 or margin <= 0 or not 0.5 <= power < 1:
        raise ValueError(
            f"need drop < margin in (0, 1) and power in [0.5, 1), got drop {drop}, margin {margin}, power {power}"
        )
    null_variance = 2 * _restricted_gain(lost_rate, gained_rate, 1.0, margin) + margin * (1 - margin)
    true_variance = lost_rate + gained_rate - drop * drop
    z_power = NormalDist().inv_cdf(power)
    spread = _z(confidence) * math.sqrt(null_variance) + z_power * math.sqrt(true_variance)
    return math.ceil((spread / (margin - drop)) ** 2)


def holm_adjusted(p_values: Sequence[float]) -> list[float]:
    """P values of several tests, so that 0.05 again bounds the chance of *any* false alarm among them.

    Step down: the ``i``-th smallest of ``m`` (from 0) is multiplied by ``m - i`` and is at least the
    one before it. Holm, Scandinavian Journal of Statistics 6 (1979) 65-70. A hundred classes
    compared at 0.05 each would show five changes that are none.

    Returns:
        In the order given, each at most 1.
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def _z(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def _score(b: float, c: float, n: float, drop: float) -> float:
    """Tango's ``Z``; falls in ``drop``, and passes 0 at the estimate."""
    numerator = b - c - n * drop
    variance = n * (2 * _restricted_gain(b, c, n, drop) + drop * (1 - drop))
    if variance <= 0.0:
        return math.copysign(math.inf, numerator) if numerator else 0.0
    return numerator / math.sqrt(variance)


def _restricted_gain(b: float, c: float, n: float, drop: float) -> float:
    """Tango's ``q``: the probability of a gained image, estimated under the drop."""
    linear = (2 * n - b + c) * drop - b - c
    constant = -c * drop * (1 - drop)
    return (math.sqrt(max(0.0, linear * linear - 8 * n * constant)) - linear) / (4 * n)


def _cross(b: float, c: float, n: float, z: float, *, inside: float, outside: float) -> float:
    """Where ``|Z|`` passes ``z`` on the way from the estimate to an end of the range."""
    if abs(_score(b, c, n, outside)) <= z:
        return outside
    for _ in range(60):  # halves an interval of at most 2 below one float64 step
        middle = (inside + outside) / 2
        if abs(_score(b, c, n, middle)) <= z:
            inside = middle
        else:
            outside = middle
    return inside
