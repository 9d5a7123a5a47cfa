"""The precision of each layer that meets an accuracy budget at the least measured latency.

Layers are ranked by what their int8 costs at the logits (`calibration.sensitivity`). A *plan* is the set of
layers that stay in float, and the search asks two things of one: how many answers it changes, on the images
of the budget and by the engine that will run it (`Judge`), and how long that engine takes (`Timer`).

1. Everything in int8. If that is within the budget, nothing else is tried.
2. Bisection over the ranking: the fewest of its first layers that bring the engine within the budget. A
   judgement stops early where the images so far decide (`pipeline.sequential`), so most take a fraction of the
   images.
3. What has been found is judged on *all* images. If that fails, an early stop had erred, and bisection goes on
   above.
4. Latency is won back: the layers in float with the most multiplications return to int8, one at a time, where
   that is measurably faster and, judged on all images, still within the budget.
5. Should float throughout be faster than the plan, it is taken: int8 then gains nothing.

The result was judged on all images whatever was stopped on the way. An early stop that errs costs latency (a good
plan passed over), never accuracy. Judgements are kept by plan, so that a search that was broken off goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from calibration.budget import Budget
from calibration.sensitivity import LayerSensitivity
from pipeline.contracts import Progress
from pipeline.errors import AccuracyGateError, DataError, UsageError
from pipeline.sequential import looks_of, verdict_so_far
from pipeline.statistics import Interval, images_to_show

__all__ = [
    "MAX_RETURNS",
    "WORTHWHILE",
    "Judge",
    "Judged",
    "KeptLayer",
    "Plan",
    "SearchResult",
    "SearchState",
    "Timer",
    "search_precision",
]

Plan = frozenset[str]
"""The layers that stay in float, by their output tensor."""
Judge = Callable[[Plan], Iterator[NDArray[np.int8]]]
"""Starts a pass of a plan's engine over the images in a fixed random order, a batch at a time. For each image: 1, an
answer lost; -1, one gained; 0, no difference. May be closed before its end."""
Timer = Callable[[Sequence[Plan]], Sequence[float]]
"""Median latencies in milliseconds, of plans measured in turns."""

MAX_RETURNS = 4
"""Layers that are tried in int8 again: each costs a measurement and, if it pays, a judgement."""
WORTHWHILE = 0.01
"""A plan is faster if it takes this share less: medians in one process repeat to about half of that."""


@dataclass(frozen=True, slots=True)
class Judged:
    """What a judgement of one plan found, on all images or until it was decided."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    lost: int
    gained: int
    n_images: int
    within: bool
    complete: bool
    n_passes: int = 1
    """One, or two where an early stop was followed by a pass over all images."""
    n_seen: int = 0
    """Images that went through the engine, over all passes."""


@dataclass(slots=True)
class SearchState:
    """Judgements so far, by `plan_key`: what a broken-off search goes on with."""

    judged: dict[str, Judged] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class KeptLayer:
    """A layer that stays in float, and why."""

    layer: str
    op_type: str
    rank: int
    """In what its int8 costs the logits; 1 is the worst."""
    noise_share: float
    """Of the logits' noise energy that all layers together make."""
    logits_sqnr_db: float | None
    mac_share: float
    reason: str


@dataclass(frozen=True, slots=True)
class SearchResult:
    """The plan found, what it was judged on and what it costs."""

    budget: Budget
    plan: Plan
    kept: tuple[KeptLayer, ...]
    judged: Judged
    """Of the plan, on all images."""
    int8: Judged
    """Of everything in int8; maybe not on all images."""
    interval: Interval
    """95%, of what the budget limits, a fraction."""
    n_evaluations: int
    """Passes over images, early-stopped ones included, those of an earlier run that was broken off too."""
    n_images_judged: int
    """Over all of them."""
    n_timings: int
    plan_ms: float
    int8_ms: float
    float_ms: float
    """With every layer in float."""
    notes: tuple[str, ...]

    @property
    def latency_given_up_ms(self) -> float:
        """Against everything in int8."""
        return self.plan_ms - self.int8_ms

    def to_json(self) -> dict[str, Any]:
        """JSON-compatible values: the `checks` of the stage's record."""
        scaled = self.interval.scaled(100.0)
        judged = self.judged
        return {
            "budget": self.budget.describe(),
            "change_percent": 100.0 * (judged.lost - judged.gained) / judged.n_images,
            "change_interval_percent": [scaled.low, scaled.high],
            "lost": judged.lost,
            "gained": judged.gained,
            "n_images": judged.n_images,
            "n_evaluations": self.n_evaluations,
            "n_images_judged": self.n_images_judged,
            "n_timings": self.n_timings,
            "plan_ms": self.plan_ms,
            "int8_ms": self.int8_ms,
            "float_ms": self.float_ms,
            "latency_given_up_ms": self.latency_given_up_ms,
            "kept_in_float": [
                {"layer": kept.layer, "rank": kept.rank, "reason": kept.reason} for kept in self.kept
            ],
            "notes": list(self.notes),
        }


def search_precision(
    ranking: Sequence[LayerSensitivity],
    budget: Budget,
    n_images: int,
    judge: Judge,
    timer: Timer,
    *,
    state: SearchState | None = None,
    keep: Callable[[SearchState], None] = lambda _: None,
    progress: Progress = lambda *_: None,
) -> SearchResult:
    """Find the plan.

    Args:
        ranking: every quantized layer, the most harmful first: `measure_sensitivity`.
        budget: what a plan must meet.
        n_images: how many outcomes a full pass of `judge` gives.
        judge: judges a plan on the engine.
        timer: measures plans on the engine.
        state: judgements of an earlier run; grows.
        keep: told of `state` after every judgement.
        progress: told of every judgement; the total is not known.

    Raises:
        AccuracyGateError: not even float throughout meets the budget.
        DataError: the images are too few for the budget, or `judge` gave another number of outcomes.
        UsageError: nothing is ranked.
    """
    if not ranking:
        raise UsageError("there is no quantized layer whose precision could be searched")
    budget.require_images(n_images)
    search = _Search(ranking, budget, n_images, judge, timer, state or SearchState(), keep, progress)
    return search.run()


def plan_key(plan: Plan) -> str:
    """SHA-256 (hex) of the layers' names: what `SearchState` calls a plan."""
    return hashlib.sha256("\0".join(sorted(plan)).encode()).hexdigest()


class _Search:
    def __init__(
        self,
        ranking: Sequence[LayerSensitivity],
        budget: Budget,
        n_images: int,
        judge: Judge,
        timer: Timer,
        state: SearchState,
        keep: Callable[[SearchState], None],
        progress: Progress,
    ) -> None:
        self._ranking, self._budget, self._n_images = ranking, budget, n_images
        self._judge, self._timer = judge, timer
        self._state, self._keep, self._progress = state, keep, progress
        self._asked: dict[str, Judged] = {}
        self._n_timings = 0
        self._returns: dict[str, str] = {}
        self._notes: list[str] = []

    def run(self) -> SearchResult:
        everything = self._first(len(self._ranking))
        plan = self._first(self._fewest())
        if plan:
            plan = self._won_back(plan)
        int8_ms, plan_ms, float_ms = self._time([frozenset(), plan, everything])
        faster = float_ms <= plan_ms * (1.0 - WORTHWHILE)
        if faster and self._ask(everything, to_the_end=True).within:
            self._notes.append(
                f"float throughout takes {float_ms:.2f} ms, and {plan_ms:.2f} ms with {len(plan)} layers in float: "
                "int8 gains nothing within this budget"
            )
            plan, plan_ms = everything, float_ms
        judged = self._asked[plan_key(plan)]
        interval = self._budget.interval(judged.lost, judged.gained, judged.n_images)
        self._note_images(judged, interval)
        return SearchResult(
            budget=self._budget,
            plan=plan,
            kept=self._kept(plan),
            judged=judged,
            int8=self._asked[plan_key(frozenset())],
            interval=interval,
            n_evaluations=sum(entry.n_passes for entry in self._asked.values()),
            n_images_judged=sum(entry.n_seen for entry in self._asked.values()),
            n_timings=self._n_timings,
            plan_ms=plan_ms,
            int8_ms=int8_ms,
            float_ms=float_ms,
            notes=tuple(self._notes),
        )

    def _first(self, count: int) -> Plan:
        return frozenset(entry.layer for entry in self._ranking[:count])

    def _fewest(self) -> int:
        """How many of the first layers must stay in float, judged on all images."""
        total = len(self._ranking)
        past, within = -1, total
        middle = 0
        while True:
            while within - past > 1:
                if self._ask(self._first(middle)).within:
                    within = middle
                else:
                    past = middle
                middle = (past + within) // 2
            found = self._ask(self._first(within), to_the_end=True)
            if found.within:
                return within
            if within == total:
                raise AccuracyGateError(
                    f"with all {total} layers in float, {found.lost:,} of {found.n_images:,} answers are lost and "
                    f"{found.gained:,} gained, past {self._budget.describe()}: quantization is not what costs them. "
                    "`edgefold validate` shows which part does; correct it (--preprocess) or allow more"
                )
            # An early stop had called it within. The smallest count above that may still be.
            past, within = within, total
            middle = (past + within) // 2

    def _won_back(self, plan: Plan) -> Plan:
        """`plan` with layers returned to int8 where that is faster and still within the budget."""
        costly = sorted(
            (entry for entry in self._ranking if entry.layer in plan), key=lambda entry: -entry.macs
        )
        for entry in costly[:MAX_RETURNS]:
            smaller = plan - {entry.layer}
            known = self._asked.get(plan_key(smaller))
            if known is not None and not known.within:
                self._returns[entry.layer] = "without it the budget is missed"
                continue
            before_ms, after_ms = self._time([plan, smaller])
            if after_ms > before_ms * (1.0 - WORTHWHILE):
                self._returns[entry.layer] = (
                    f"int8 would not be faster ({after_ms:.2f} against {before_ms:.2f} ms)"
                )
            elif self._ask(smaller).within and self._ask(smaller, to_the_end=True).within:
                self._notes.append(
                    f"{entry.layer} returned to int8: {before_ms:.2f} to {after_ms:.2f} ms, still within the budget"
                )
                plan = smaller
            else:
                self._returns[entry.layer] = "without it the budget is missed"
        return plan

    def _time(self, plans: Sequence[Plan]) -> Sequence[float]:
        self._n_timings += 1
        distinct = list(dict.fromkeys(plans))
        found = dict(zip(distinct, self._timer(distinct), strict=True))
        return [found[plan] for plan in plans]

    def _ask(self, plan: Plan, *, to_the_end: bool = False) -> Judged:
        key = plan_key(plan)
        known = self._state.judged.get(key)
        if known is None or (to_the_end and not known.complete):
            found = self._judged(plan, to_the_end)
            known = self._state.judged[key] = dataclasses.replace(
                found,
                n_passes=1 if known is None else known.n_passes + 1,
                n_seen=found.n_images + (0 if known is None else known.n_seen),
            )
            self._keep(self._state)
        if key not in self._asked:
            self._progress("searching precision", len(self._asked) + 1, None)
        self._asked[key] = known
        return known

    def _judged(self, plan: Plan, to_the_end: bool) -> Judged:
        looks = () if to_the_end else looks_of(self._n_images)
        lost = gained = n = 0
        with contextlib.closing(_one_by_one(self._judge(plan))) as outcomes:
            for outcome in outcomes:
                lost, gained, n = lost + (outcome > 0), gained + (outcome < 0), n + 1
                if n in looks:
                    so_far = functools.partial(self._budget.interval, lost, gained, n)
                    verdict = verdict_so_far(so_far, n, self._n_images, self._budget.limit)
                    if verdict != "open":
                        return Judged(lost, gained, n, verdict == "within", complete=False)
        if n != self._n_images:
            raise DataError(
                f"a judgement saw {n:,} images where {self._n_images:,} were to be; start it again"
            )
        return Judged(lost, gained, n, self._budget.is_met(lost, gained, n), complete=True)

    def _note_images(self, judged: Judged, interval: Interval) -> None:
        """Say so where these images do not show that the budget is met, and how many would."""
        n, limit = judged.n_images, self._budget.limit
        if interval.high <= limit or limit == 0.0:
            return
        note = (
            f"{n:,} images do not show that the budget is met: the 95% interval ends at {100 * interval.high:.2f}%, and "
            f"{100 * limit:g}% are allowed"
        )
        if judged.lost - judged.gained + 1 <= limit * n + 1e-9 and limit < 1.0:  # an image at least below it
            needed = images_to_show(limit, judged.lost / n, judged.gained / n)
            note += f"; about {needed:,} would, if what they lose stays as it is"
        self._notes.append(note)

    def _kept(self, plan: Plan) -> tuple[KeptLayer, ...]:
        noise = sum(entry.logits_nsr for entry in self._ranking) or 1.0
        macs = sum(entry.macs for entry in self._ranking) or 1
        return tuple(
            KeptLayer(
                layer=entry.layer,
                op_type=entry.op_type,
                rank=rank,
                noise_share=entry.logits_nsr / noise,
                logits_sqnr_db=entry.logits_sqnr_db,
                mac_share=entry.macs / macs,
                reason=self._reason(entry, noise, macs),
            )
            for rank, entry in enumerate(self._ranking, 1)
            if entry.layer in plan
        )

    def _reason(self, entry: LayerSensitivity, noise: float, macs: int) -> str:
        words = f"{entry.logits_nsr / noise:.1%} of the logits' noise for {entry.macs / macs:.1%} of the multiplications"
        tried = self._returns.get(entry.layer)
        return f"{words}; {tried}" if tried else words


def _one_by_one(batches: Iterator[NDArray[np.int8]]) -> Generator[int, None, None]:
    """Single outcomes; closing it closes the pass that they come from."""
    try:
        for batch in batches:
            yield from batch.tolist()
    finally:
        close = getattr(batches, "close", None)
        if close is not None:
            close()
