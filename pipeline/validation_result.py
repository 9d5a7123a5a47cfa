"""What a validation found: frozen values, as JSON, and the accuracy gate on them.

Accuracies and agreements are fractions in [0, 1]; drops and their intervals are points (percent of
the images; positive: worse). A logits SQNR of ``None`` means identical logits (an infinite ratio).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal, Protocol

from pipeline.errors import AccuracyGateError, DataError, UsageError
from pipeline.statistics import Interval, images_to_show
from pipeline.validation_meter import Confidence

__all__ = [
    "AssumedPart",
    "ClassChange",
    "Compared",
    "ConfusionChange",
    "Drop",
    "Flip",
    "Member",
    "SkippedImage",
    "StageAccuracy",
    "ValidationResult",
    "check_agreement",
    "check_budget",
    "interval_warning",
]

_STRICT: dict[str, Any] = {"extra": "forbid", "allow_inf_nan": False}


@dataclass(frozen=True, slots=True)
class StageAccuracy:
    """One judged candidate."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    name: str
    part: str
    """What this stage changed in the one before it; of the first stage, ``reference``."""
    top1_correct: int
    top_k_correct: int
    top1: float
    top1_interval: Interval
    """95%, Wilson."""
    top_k: float
    sqnr_from_first_db: float | None
    max_abs_error_from_first: float
    confidence: Confidence
    """How far this stage's confidence in its answers is from its accuracy."""


@dataclass(frozen=True, slots=True)
class Drop:
    """What changed from one judged stage to another, on the same images."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    part: str
    before: str
    after: str
    lost: int
    """Images only `before` gets right (top-1)."""
    gained: int
    """Images only `after` gets right."""
    drop_points: float
    """Top-1: ``100 * (lost - gained) / n_images``."""
    interval_points: Interval
    """95%, of the paired outcomes: `pipeline.statistics.paired_drop_interval`."""
    top_k_drop_points: float
    mcnemar_p: float
    """Exact: how likely so uneven a split of lost and gained is by chance alone."""
    agreement: float
    """Share of images with the same top-1 answer, right or wrong."""
    sqnr_db: float | None
    max_abs_error: float
    """Of the logits."""


@dataclass(frozen=True, slots=True)
class AssumedPart:
    """A part of the drop that was not measured on these images, and why it is known without."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    part: str
    reason: str


@dataclass(frozen=True, slots=True)
class ClassChange:
    """One class, judged by the first and by the last stage."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    index: int
    label: str
    n_images: int
    before_correct: int
    after_correct: int
    before_accuracy: float
    after_accuracy: float
    lost: int
    gained: int
    interval_points: Interval
    """95%, of this class's drop; of many such intervals some miss."""
    adjusted_p: float
    """McNemar's exact test, adjusted by Holm for the number of classes: below 0.05, the class changed by
    more than chance makes any of them change."""


@dataclass(frozen=True, slots=True)
class ConfusionChange:
    """How many images of `truth` are taken for `predicted`, by the first and by the last stage."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    truth: str
    predicted: str
    before: int
    after: int


@dataclass(frozen=True, slots=True)
class Flip:
    """An image to which the last stage gives another answer than the first."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    key: str
    truth: str | None
    """``None`` where the images carry no labels."""
    before: str
    after: str
    before_confidence: float
    """Softmax probability of `before` in the first stage."""
    after_confidence: float
    kind: Literal["lost", "gained", "changed"]
    """Right to wrong, wrong to right, or one wrong (or unlabelled) answer to another."""
    thumbnail_jpeg: bytes | None = field(default=None, repr=False)
    """Not in the JSON."""

    @property
    def confidence(self) -> float:
        """The lower of both: a flip between two sure answers tells more than one between near ties."""
        return min(self.before_confidence, self.after_confidence)


@dataclass(frozen=True, slots=True)
class SkippedImage:
    """An image that was left out."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    key: str
    reason: str


@dataclass(frozen=True, slots=True)
class Member:
    """One network of an ensemble."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    name: str
    identity: str
    """What ships, by content: the graph's SHA-256 and the engine."""
    before: StageAccuracy
    """Alone, in fp32."""
    after: StageAccuracy
    """Alone, as it ships."""
    drop: Drop
    """From `before` to `after`."""
    to_ensemble: Drop
    """From `after` to the ensemble as it ships; negative: the ensemble is better."""


@dataclass(frozen=True, slots=True)
class ValidationResult:
    """A chain of candidates judged on one labelled dataset.

    ``drops[i]`` leads from ``stages[i]`` to ``stages[i + 1]``; `total` from the first to the last,
    and so do `classes`, `confusion` and `flips`.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    dataset_name: str
    dataset_sha256: str
    n_images: int
    n_skipped: int
    skipped: tuple[SkippedImage, ...]
    """The first of them."""
    top_k: int
    """``min(5, classes)``."""
    stages: tuple[StageAccuracy, ...]
    drops: tuple[Drop, ...]
    total: Drop
    assumed: tuple[AssumedPart, ...]
    classes: tuple[ClassChange, ...]
    """By class index; classes without an image are left out."""
    confusion: tuple[ConfusionChange, ...]
    """The largest changes first."""
    n_flips: int
    flips: tuple[Flip, ...]
    """The most confident first; not all of them."""
    notes: tuple[str, ...]
    seconds: float
    n_classes: int
    """Of the model; `classes` may be fewer."""
    crops: int
    """Crops of an image whose softmax was averaged: 1, 10, 12 or 144."""
    members: tuple[Member, ...]
    """Of an ensemble; empty for a single network."""

    def to_json(self) -> dict[str, Any]:
        """JSON-compatible values: finite numbers, ``null`` for an infinite SQNR, no thumbnails."""
        tree: dict[str, Any] = asdict(self)
        for flip in tree["flips"]:
            del flip["thumbnail_jpeg"]
        return tree


def check_budget(result: ValidationResult, max_drop_points: float) -> None:
    """Refuse an engine whose measured total top-1 drop is past the budget.

    The gate is on the point estimate: the interval says how far it may be off, and
    `interval_warning` when that is too far to decide.

    Raises:
        AccuracyGateError: the drop is larger than `max_drop_points`.
        DataError: all images are of one class, where a network that names only this class has no drop.
        UsageError: the budget is not a number of points from 0 to 100.
    """
    _check_points(max_drop_points)
    if len(result.classes) == 1 and result.n_classes > 1:
        raise DataError(
            f"all {result.n_images:,} images of {result.dataset_name} are of the class "
            f"{result.classes[0].label!r}: a network that answers {result.classes[0].label!r} to everything loses "
            f"nothing on them, so they cannot judge --max-drop; give images of all {result.n_classes} classes"
        )
    total = result.total
    if _within(total.drop_points, max_drop_points):
        return
    warning = interval_warning(result, max_drop_points)
    raise AccuracyGateError(
        f"top-1 falls by {total.drop_points:.2f} points from {total.before} to {total.after} (95% interval "
        f"{total.interval_points.low:+.2f} to {total.interval_points.high:+.2f}, {result.n_images:,} images), "
        f"past the budget of {max_drop_points:g}. {_cause(result, max_drop_points)}"
        + (f" {warning}" if warning else "")
    )


class Compared(Protocol):
    """Two stages, and the share of images to which they give the same answer."""

    @property
    def before(self) -> str:
        """The name of the first."""
        ...

    @property
    def after(self) -> str:
        """The name of the second."""
        ...

    @property
    def agreement(self) -> float:
        """In [0, 1]."""
        ...


def check_agreement(total: Compared, n_images: int, min_agreement_percent: float) -> None:
    """Refuse an engine that gives too many images another answer than the first stage.

    Args:
        total: from the first stage to the last: a `Drop`, or an `Agreement` of images without labels.
        n_images: on which it was measured.
        min_agreement_percent: what is asked for.

    Raises:
        AccuracyGateError: the share is smaller.
        UsageError: not a percentage from 0 to 100.
    """
    if not math.isfinite(min_agreement_percent) or not 0 <= min_agreement_percent <= 100:
        raise UsageError(f"--min-agreement is a percentage, 0 to 100, got {min_agreement_percent}")
    if 100 * total.agreement >= min_agreement_percent - 1e-9:
        return
    raise AccuracyGateError(
        f"{total.after} gives {100 * total.agreement:.2f}% of {n_images:,} images the answer of {total.before}, fewer "
        f"than the {min_agreement_percent:g}% of --min-agreement: try another --calibrator (entropy, mse, percentile, "
        "minmax), calibrate on more images that look like the ones judged, or ask for less."
    )


def interval_warning(result: ValidationResult, max_drop_points: float) -> str | None:
    """Whether these images are too few to judge the budget, and how many would be enough.

    Too few they are where ``± half width`` of the total drop's 95% interval is wider than the budget: an
    engine with no drop at all may then fail, and one with twice the budget may pass. And where the drop is
    within the budget, but its interval reaches past it. Enough are those that show it in 4 of 5
    measurements, where as many answers change as here: `pipeline.statistics.images_to_show`.

    Raises:
        UsageError: the budget is not a number of points from 0 to 100.
    """
    _check_points(max_drop_points)
    total, n = result.total, result.n_images
    if not 0 < max_drop_points < 100:
        return None
    changed, budget = (total.lost + total.gained) / n, max_drop_points / 100
    if total.interval_points.half_width > max_drop_points:
        needed = images_to_show(budget, changed / 2, changed / 2)
        return (
            f"{n:,} images measure the drop to ±{total.interval_points.half_width:.2f} points, wider than the budget "
            f"of {max_drop_points:g}; about {_two_digits(needed)} images are needed to show that an engine without a "
            "drop is within it (in 4 of 5 measurements)."
        )
    if total.drop_points < max_drop_points < total.interval_points.high:
        needed = images_to_show(budget, total.lost / n, total.gained / n)
        return (
            f"The interval reaches past the budget of {max_drop_points:g}; about {_two_digits(needed)} images are "
            f"needed to show that a drop of {total.drop_points:.2f} points is within it (in 4 of 5 measurements)."
        )
    return None


_INT8_REMEDY = (
    "try another --calibrator (entropy, mse, percentile, minmax), calibrate on more images that look like "
    "the ones judged, or allow more with --max-drop."
)
_REMEDIES = {
    "preprocessing": (
        "the network was trained with another transform than the bundle uses; correct resize, crop, "
        "mean and std with --preprocess, or allow more with --max-drop."
    ),
    "export": (
        "the ONNX graph differs from the PyTorch module; run `edgefold inspect` to see what each pass "
        "rewrote, or allow more with --max-drop."
    ),
}


def _cause(result: ValidationResult, max_drop_points: float) -> str:
    """Which part of the drop is to blame, and its remedy."""
    worst = max(result.drops, key=lambda drop: drop.drop_points)
    of_fp32 = [drop for drop in result.drops if drop.part in _REMEDIES]
    fp32_points = sum(drop.drop_points for drop in of_fp32)
    if of_fp32 and not _within(fp32_points, max_drop_points):
        worst = max(of_fp32, key=lambda drop: drop.drop_points)
        start = (
            f"fp32 itself misses it: {of_fp32[-1].after} has lost {fp32_points:.2f} points before anything is "
            f"quantized, which no precision wins back. Most of that comes from {worst.part}"
        )
    else:
        start = f"Most of it comes from {worst.part}"
    return f"{start} ({worst.drop_points:+.2f}): {_REMEDIES.get(worst.part, _INT8_REMEDY)}"


def _within(drop_points: float, max_drop_points: float) -> bool:
    return drop_points <= max_drop_points + 1e-9  # 100 * 5 / 1000 may come out above 0.5


def _check_points(max_drop_points: float) -> None:
    if not math.isfinite(max_drop_points) or not 0 <= max_drop_points <= 100:
        raise UsageError(f"--max-drop is in points of top-1, 0 to 100, got {max_drop_points}")


def _two_digits(count: int) -> str:
    """Rounded up to two digits: more would claim a precision that an estimate lacks."""
    unit = 10 ** max(0, len(str(count)) - 2)
    return f"{-(-count // unit) * unit:,}"
