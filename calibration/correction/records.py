"""The names of the corrections, and what each did to each layer."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import UsageError

__all__ = [
    "CORRECTIONS",
    "CorrectionRecord",
    "checked_corrections",
    "judging",
    "parse_corrections",
    "summary",
]

CORRECTIONS = ("equalize", "ranges", "bias", "adaround")
"""In the order in which they are made."""


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
    """`names` as a set.

    Raises:
        UsageError: one is unknown; names those there are.
    """
    unknown = sorted(set(names) - set(CORRECTIONS))
    if unknown:
        raise UsageError(f"no correction {unknown[0]!r}; choose from {', '.join(CORRECTIONS)}, or none")
    return frozenset(names)


def parse_corrections(text: str | None) -> tuple[str, ...]:
    """``a,b`` to names; ``none`` and ``None`` to no name.

    Raises:
        UsageError: a name is unknown.
    """
    if text is None:
        return ()
    names = [name.strip() for name in text.split(",") if name.strip()]
    if names == ["none"]:
        return ()
    if not names:
        raise UsageError(f"no correction is named; choose from {', '.join(CORRECTIONS)}, or none")
    wanted = checked_corrections(names)
    return tuple(name for name in CORRECTIONS if name in wanted)


def summary(records: Sequence[CorrectionRecord]) -> list[list[Any]]:
    """For a stage's record: ``[layer, correction, before dB, after dB, kept or undone]`` each."""
    return [
        [
            record.layer,
            record.correction,
            round(record.before_db, 2),
            round(record.after_db, 2),
            "kept" if record.kept else "undone",
        ]
        for record in records
    ]
