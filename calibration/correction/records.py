"""The names of the corrections, and what each did to each layer."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import UsageError

__all__ = [
    "AUTO",
    "CORRECTIONS",
    "CorrectionRecord",
    "checked_corrections",
    "gains",
    "judging",
    "parse_corrections",
    "rounded_db",
    "summary",
]

CORRECTIONS = ("equalize", "ranges", "bias", "adaround")
"""In the order in which they are made."""
AUTO = "auto"
"""In their place: what `calibration.correction.choice` chooses."""
_CHOICES = f"{', '.join(CORRECTIONS)}, or none, or {AUTO}"


@dataclass(frozen=True, slots=True)
class CorrectionRecord:
    """One correction of one layer, judged at that layer's output on images it was not made from."""

    layer: str
    """The name of the layer's output tensor."""
    correction: str
    before_db: float
    """SQNR of the output against fp32 without it, the layers before as they then were."""
    after_db: float
    kept: bool
    """Otherwise it was undone: it made the layer worse."""


def judging(n_images: int) -> NDArray[np.bool_]:
    """Which of the images judge what the others gave: one in five, from three on."""
    judges: NDArray[np.bool_] = np.arange(n_images) % 5 == 2
    return judges


def checked_corrections(names: Collection[str]) -> frozenset[str]:
    """`names` as a set; `AUTO` stands alone.

    Raises:
        UsageError: one is unknown; names those there are.
    """
    if set(names) == {AUTO}:
        return frozenset(names)
    unknown = sorted(set(names) - set(CORRECTIONS))
    if unknown:
        raise UsageError(f"no correction {unknown[0]!r}; choose from {_CHOICES}")
    return frozenset(names)


def parse_corrections(text: str) -> tuple[str, ...]:
    """``a,b`` to names, ``auto`` to `AUTO`, ``none`` to no name.

    Raises:
        UsageError: a name is unknown.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if names == ["none"]:
        return ()
    if names == [AUTO]:
        return (AUTO,)
    if not names:
        raise UsageError(f"no correction is named; choose from {_CHOICES}")
    wanted = checked_corrections(names)
    return tuple(name for name in CORRECTIONS if name in wanted)


def summary(records: Sequence[CorrectionRecord]) -> list[list[Any]]:
    """For a stage's record: ``[layer, correction, before dB, after dB, kept or undone]`` each; ``None``: exact."""
    return [
        [
            record.layer,
            record.correction,
            rounded_db(record.before_db),
            rounded_db(record.after_db),
            "kept" if record.kept else "undone",
        ]
        for record in records
    ]


def gains(records: Sequence[CorrectionRecord]) -> list[dict[str, Any]]:
    """What each correction won: the median over its layers, those where it was undone unchanged; ``None``: exact.

    Each layer is judged by itself, on images that the correction was not made from.
    """
    found = []
    for name in CORRECTIONS:
        of_it = [record for record in records if record.correction == name]
        if not of_it:
            continue
        before = np.array([record.before_db for record in of_it])
        after = np.array([record.after_db if record.kept else record.before_db for record in of_it])
        found.append(
            {
                "correction": name,
                "n_layers": len(of_it),
                "n_undone": sum(not record.kept for record in of_it),
                "median_before_db": rounded_db(float(np.median(before))),
                "median_after_db": rounded_db(float(np.median(after))),
            }
        )
    return found


def rounded_db(decibels: float) -> float | None:
    """For JSON, which knows no infinity."""
    return round(decibels, 2) if math.isfinite(decibels) else None
