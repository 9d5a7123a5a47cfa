"""What a validation result means, in words that need no statistics to read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipeline.statistics import Interval
from pipeline.validation_agreement import AgreementResult
from pipeline.validation_result import Drop, ValidationResult, interval_warning

__all__ = [
    "Verdict",
    "agreement_verdict",
    "images",
    "p_value",
    "percent",
    "points",
    "protocol",
    "short",
    "sqnr",
    "verdict",
]

_NOTICEABLE_POINTS = 1.0
"""Without a budget: what most users of a classifier would notice, and call a loss."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """A headline, and the sentences that back it."""

    level: Literal["good", "unsure", "bad"]
    headline: str
    sentences: tuple[str, ...]


def verdict(result: ValidationResult, max_drop_points: float | None = None) -> Verdict:
    """Judge the total drop, against a budget where there is one.

    Args:
        result: what was measured.
        max_drop_points: the budget in points of top-1.
    """
    total, before, after = result.total, result.stages[0], result.stages[-1]
    low, high = total.interval_points.low, total.interval_points.high
    sentences = [
        f"On {images(result.n_images)}, {before.name} gets {percent(before.top1)} right and {after.name} "
        f"{percent(after.top1)}: {total.lost:,} lost, {total.gained:,} gained, "
        f"{_change(total.drop_points)}.",
        f"With 95% confidence the true drop lies between {points(low)} and {points(high)} points."
        + _chance(total),
    ]
    if max_drop_points is not None:
        warning = interval_warning(result, max_drop_points)
        sentences += [warning] if warning else []
        if total.drop_points > max_drop_points + 1e-9:
            headline = f"Past the budget: {total.drop_points:.2f} points lost, {max_drop_points:g} allowed"
            return Verdict("bad", headline, tuple(sentences))
        headline = f"Within the budget of {max_drop_points:g} points" + (
            ", but on too few images to be sure" if warning else ""
        )
        if warning is None:
            sentences.append("The whole interval lies within the budget.")
        return Verdict("unsure" if warning else "good", headline, tuple(sentences))
    if low > 0:
        headline = f"{after.name} costs accuracy: {total.drop_points:.2f} points of top-1"
        return Verdict(
            "bad" if total.drop_points > _NOTICEABLE_POINTS else "unsure", headline, tuple(sentences)
        )
    if high < 0:
        return Verdict("good", f"No loss: {after.name} is the more accurate here", tuple(sentences))
    if high <= _NOTICEABLE_POINTS:
        return Verdict("good", f"{after.name} keeps the accuracy", tuple(sentences))
    headline = f"No loss shown, but {images(result.n_images)} cannot rule out {high:.1f} points"
    return Verdict("unsure", headline, tuple(sentences))


def agreement_verdict(result: AgreementResult, min_agreement_percent: float | None = None) -> Verdict:
    """Judge the agreement with the first stage, against a limit where there is one.

    Args:
        result: what was measured.
        min_agreement_percent: the share of images that must keep their answer.
    """
    total = result.total
    sentences = (
        f"On {images(result.n_images)} without labels, {total.after} gives {percent(total.agreement)} of them the "
        f"answer of {total.before}: {result.n_flips:,} changed. With 95% confidence the true share lies between "
        f"{_between(total.interval)}.",
        f"Whatever the labels are, top-1 can have fallen by {100 * (1 - total.agreement):.2f} points at most on these "
        "images. How much it did fall, only labels can tell.",
    )
    share = percent(total.agreement)
    if min_agreement_percent is None:
        return Verdict("unsure", f"{total.after} keeps {share} of the answers", sentences)
    if 100 * total.agreement < min_agreement_percent - 1e-9:
        headline = f"Too few answers kept: {share}, and {min_agreement_percent:g}% asked for"
        return Verdict("bad", headline, sentences)
    sure = 100 * total.interval.low >= min_agreement_percent
    headline = f"{share} of the answers kept, {min_agreement_percent:g}% asked for" + (
        "" if sure else ", but on too few images to be sure"
    )
    return Verdict("good" if sure else "unsure", headline, sentences)


def protocol(result: ValidationResult | AgreementResult) -> str:
    """What was averaged, where something was: ``, 12 crops each``."""
    return f", {result.crops} crops each" if result.crops > 1 else ""


def images(count: int) -> str:
    """``1 image``, ``2,000 images``."""
    return f"{count:,} image{'' if count == 1 else 's'}"


def percent(fraction: float) -> str:
    """``94.15%``."""
    return f"{100 * fraction:.2f}%"


def points(value: float) -> str:
    """``+0.25``, ``−0.10``, ``0.00``: a drop, with its sign."""
    text = f"{value:+.2f}"
    return "0.00" if text in ("+0.00", "-0.00") else text.replace("-", "−")


def short(count: int) -> str:
    """``29.2 M``: a large count to three digits."""
    for unit, suffix in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= unit:
            return f"{count / unit:.3g} {suffix}"
    return str(count)


def sqnr(value_db: float | None) -> str:
    """``18.3 dB``; identical logits have an infinite ratio."""
    return "identical" if value_db is None else f"{value_db:.1f} dB"


def p_value(p: float) -> str:
    """``= 0.032``: two digits, and no string of zeros."""
    return "< 0.0001" if p < 1e-4 else f"= {p:.2g}"


def _between(interval: Interval) -> str:
    return f"{percent(interval.low)} and {percent(interval.high)}"


def _chance(total: Drop) -> str:
    if total.lost == total.gained:
        return ""
    interval, p = total.interval_points, p_value(total.mcnemar_p)
    if interval.low <= 0 <= interval.high:
        return f" So small a difference can be chance alone (McNemar p {p})."
    return f" Chance alone hardly makes such a difference (McNemar p {p})."


def _change(drop_points: float) -> str:
    if drop_points == 0:
        return "no change in top-1"
    return f"a {'drop' if drop_points > 0 else 'gain'} of {abs(drop_points):.2f} points"
