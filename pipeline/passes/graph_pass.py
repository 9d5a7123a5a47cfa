"""What a graph pass is, and what it tells about its run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

__all__ = ["EXACT_ALGEBRA", "Feeds", "GraphPass", "LeaveAlone", "PassRecord", "RewriteReport", "Tolerance"]

Feeds = dict[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far the outputs may move under one pass. Both limits hold."""

    relative: float
    """Of the largest absolute error to the largest absolute output before the pass."""
    sqnr_db: float
    """At least this signal-to-noise ratio, where the noise is the change."""


EXACT_ALGEBRA = Tolerance(relative=1e-3, sqnr_db=70.0)
"""For passes that are exact over the reals: what float32 rounding may do, nothing more.

Measured on networks of 20 to 244 convolutions: 100 to 125 dB and 1e-6 to 1e-5, and at worst (random
weights, batch-norm statistics of four images) 89 dB and 4e-5. A batch-norm epsilon of 1e-3 forgotten in
one layer gives 66 dB.
"""


WORST = Tolerance(relative=0.01, sqnr_db=40.0)
"""What no model's own rounding excuses, where a pass is exact."""


@dataclass(frozen=True, slots=True)
class RewriteReport:
    """What a rewrite did: how many nodes went, and which candidates it left alone and why."""

    n_rewrites: int
    skipped: tuple[tuple[str, str], ...] = ()
    """``(node, reason)``."""


@dataclass(frozen=True, slots=True)
class GraphPass:
    """A named rewrite of a graph, in place.

    ``rewrite`` is idempotent: on its own result it rewrites nothing. ``original_feeds`` is set where
    the pass changes the model's input: from the original model and feeds of the rewritten one it makes
    the feeds of the original that mean the same.

    Some models cancel so much that no fixed tolerance fits them. Where `tolerance` is exceeded, the pass
    may still move the outputs twice as far as the original moves when each of its weights is changed by
    ``nudge`` of itself, and never further than ``worst``. A pass that rounds the weights says by how much.
    """

    name: str
    rewrite: Callable[[ir.Model], RewriteReport]
    tolerance: Tolerance = EXACT_ALGEBRA
    original_feeds: Callable[[ir.Model, Feeds], Feeds] | None = None
    nudge: float = 2.0**-20
    """Eight units in the last place of float32."""
    worst: Tolerance = WORST


@dataclass(frozen=True, slots=True)
class PassRecord:
    """One pass as it ran. The two measures are ``None`` where it changed nothing."""

    name: str
    n_rewrites: int
    skipped: tuple[tuple[str, str], ...]
    seconds: float
    max_abs_error: float | None
    sqnr_db: float | None
    """``None`` also where the outputs are bit for bit the same."""

    def as_json(self) -> dict[str, Any]:
        """JSON-compatible values; what `from_json` reads."""
        return {**dataclasses.asdict(self), "skipped": [list(entry) for entry in self.skipped]}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> PassRecord:
        """A record as the ``fold`` stage's record keeps it."""
        return cls(**{**values, "skipped": tuple((node, reason) for node, reason in values["skipped"])})


class LeaveAlone(Exception):
    """Raised inside a pass: a candidate stays as it is, and the message says why."""
