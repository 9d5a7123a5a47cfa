"""What an accuracy budget is: how many answers an engine may lose against its reference."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pipeline.errors import DataError, UsageError
from pipeline.statistics import Interval, paired_drop_interval, wilson_interval

__all__ = ["Budget"]


@dataclass(frozen=True, slots=True)
class Budget:
    """How many of the answers an engine may lose: the fraction `limit` of the images.

    ``drop``: right answers lost less those gained, as top-1 falls. ``agreement``: answers changed.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    kind: Literal["drop", "agreement"]
    limit: float

    @staticmethod
    def of_drop(points: float) -> Budget:
        """Top-1 may fall by `points`.

        Raises:
            UsageError: not from 0 to 100.
        """
        return Budget("drop", _fraction("--max-drop", points))

    @staticmethod
    def of_agreement(percent: float) -> Budget:
        """At least `percent` of the images must keep their answer.

        Raises:
            UsageError: not from 0 to 100.
        """
        return Budget("agreement", 1.0 - _fraction("--min-agreement", percent))

    def interval(self, lost: int, gained: int, n_images: int, confidence: float = 0.95) -> Interval:
        """Of what `limit` limits: paired for a drop, Wilson's for answers changed."""
        if self.kind == "drop":
            return paired_drop_interval(lost, gained, n_images, confidence)
        return wilson_interval(lost, n_images, confidence)

    def is_met(self, lost: int, gained: int, n_images: int) -> bool:
        """Whether the drop measured is within the limit; the interval does not count here, as in the gate."""
        return lost - gained <= self.limit * n_images + 1e-9

    def describe(self) -> str:
        """In the words of the option."""
        if self.kind == "drop":
            return f"a drop of at most {100 * self.limit:g} points"
        return f"at least {100 * (1 - self.limit):g}% of the answers kept"

    def require_images(self, n_images: int) -> None:
        """Refuse images too few to judge the budget.

        Raises:
            DataError: a single image is more than the budget; says how many are needed.
        """
        if 0.0 < self.limit * n_images < 1.0:
            raise DataError(
                f"{n_images:,} images cannot judge {self.describe()}: one of them is {100 / n_images:.2g}%. "
                f"At least {math.ceil(1 / self.limit):,} are needed for it to allow a single one; give more images"
            )


def _fraction(option: str, value: float) -> float:
    if not 0.0 <= value <= 100.0:
        raise UsageError(f"{option} is from 0 to 100, got {value:g}")
    return value / 100.0
