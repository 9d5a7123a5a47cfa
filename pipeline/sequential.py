"""Stopping a judgement early: whether a drop measured on all images will be within a limit, from the first of them.

The images come in random order, so the first ``n`` of ``N`` are a sample of all. After a sixteenth, an eighth,
a quarter and a half of them the drop so far is looked at; where its interval lies on one side of the
limit, the rest is not needed. Each look may err with some probability, and they add up. The error ``alpha``
is therefore *spent* over the looks, after Lan and DeMets (Biometrika 70 (1983) 659-663), by their function of
Pocock's type, of which a share ``t = n / N`` of the images has spent::

    alpha(t) = alpha ln(1 + (e - 1) t)

and look ``i`` tests at ``alpha(t_i) - alpha(t_(i-1))``. They would share the error by the looks' joint distribution;
here the parts are simply added (Boole's inequality), which is conservative. So is ignoring that the first ``n`` are
part of the ``N``: the two drops differ with variance ``1/n - 1/N``, not ``1/n``, of one image's.

Each side has its ``alpha``: the probability that a candidate within the limit is called past it, and the reverse.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

from pipeline.statistics import Interval

__all__ = ["ALPHA", "LOOKS", "MIN_LOOK_IMAGES", "Verdict", "look_confidence", "looks_of", "verdict_so_far"]

Verdict = Literal["within", "past", "open"]

ALPHA = 0.05
"""Of each side, over all looks of one judgement."""
LOOKS = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
MIN_LOOK_IMAGES = 50
"""A score interval of fewer images is too far from its nominal coverage to spend errors of 0.01 with."""


def looks_of(n_images: int) -> tuple[int, ...]:
    """After how many images of `n_images` to look; the end is not one of them."""
    looks = [math.ceil(share * n_images) for share in LOOKS]
    return tuple(n for n in looks if MIN_LOOK_IMAGES <= n < n_images)


def look_confidence(look: int, n_images: int) -> float:
    """Confidence of the two-sided interval whose ends the look after `look` images tests with.

    Raises:
        ValueError: there is no such look.
    """
    looks = looks_of(n_images)
    if look not in looks:
        raise ValueError(f"no look after {look} images of {n_images}: those are {looks}")
    earlier = [n for n in looks if n < look]
    spent = _spent(look / n_images) - (_spent(max(earlier) / n_images) if earlier else 0.0)
    return 1.0 - 2.0 * spent


def verdict_so_far(interval: Callable[[float], Interval], look: int, n_images: int, limit: float) -> Verdict:
    """What can be said after `look` images.

    Args:
        interval: of the drop so far, a fraction, by confidence.
        look: images so far; one of `looks_of`.
        n_images: images in all.
        limit: the drop that all images may have, a fraction.

    Raises:
        ValueError: there is no such look.
    """
    so_far = interval(look_confidence(look, n_images))
    if so_far.low > limit:
        return "past"
    return "within" if so_far.high <= limit else "open"


def _spent(share: float) -> float:
    return ALPHA * math.log1p((math.e - 1.0) * share)
