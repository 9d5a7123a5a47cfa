"""Judging an engine on images without labels: whether it still says what fp32 says.

Agreement is not accuracy: two networks that are wrong together agree, and an image that one of them gets
right and the other wrong counts against it either way. It bounds the drop all the same: an engine that
gives a share ``a`` of the images fp32's answer has lost at most ``1 - a`` of its top-1, whatever the labels.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal

from pipeline.artifacts import PreprocessSpec, Sample
from pipeline.contracts import Dataset, Progress
from pipeline.statistics import Interval, wilson_interval
from pipeline.validation_crops import Crops, View
from pipeline.validation_result import AssumedPart, Flip, SkippedImage
from pipeline.validation_run import Judge, Stage, pass_images
from pipeline.validation_state import ResumeFile
from pipeline.validation_tally import Answers, FlipKeeper, Pair

__all__ = ["Agreement", "AgreementResult", "judge_agreement"]

_STRICT: dict[str, Any] = {"extra": "forbid", "allow_inf_nan": False}
_MAX_SKIPPED_LISTED = 50


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far two stages say the same."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    part: str
    before: str
    after: str
    same: int
    """Images with the same top-1 answer."""
    agreement: float
    interval: Interval
    """95%, Wilson."""
    sqnr_db: float | None
    """Of the logits; ``None`` where they are identical."""
    max_abs_error: float


@dataclass(frozen=True, slots=True)
class AgreementResult:
    """A chain of candidates on images without labels; `total` leads from the first to the last."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    dataset_name: str
    dataset_sha256: str
    n_images: int
    n_skipped: int
    skipped: tuple[SkippedImage, ...]
    """The first of them."""
    stages: tuple[str, ...]
    steps: tuple[Agreement, ...]
    total: Agreement
    assumed: tuple[AssumedPart, ...]
    flips: tuple[Flip, ...]
    """The most confident first; not all of them."""
    notes: tuple[str, ...]
    seconds: float
    crops: int

    @property
    def n_flips(self) -> int:
        """Images that changed their answer."""
        return self.n_images - self.total.same

    def to_json(self) -> dict[str, Any]:
        """JSON-compatible values: ``null`` for an infinite SQNR, no thumbnails."""
        tree: dict[str, Any] = asdict(self)
        for flip in tree["flips"]:
            del flip["thumbnail_jpeg"]
        return tree


@dataclass(slots=True)
class _AgreementTally:
    labels: list[str]
    steps: list[Pair]
    n_images: int = 0
    total: Pair = field(default_factory=Pair)
    flips: FlipKeeper = field(default_factory=FlipKeeper)

    def add(self, samples: Sequence[Sample], stages: Sequence[Answers]) -> None:
        for step, before, after in zip(self.steps, stages[:-1], stages[1:], strict=True):
            step.add(before, after, None)
        self.total.add(stages[0], stages[-1], None)
        self.flips.add(samples, self.n_images, stages[0], stages[-1], None, self.labels)
        self.n_images += len(samples)


def judge_agreement(
    judges: Sequence[Judge],
    dataset: Dataset,
    *,
    spec: PreprocessSpec,
    color: Literal["RGB", "BGR"],
    labels: Sequence[str],
    batch_size: int = 32,
    progress: Progress | None = None,
    assumed: Sequence[AssumedPart] = (),
    notes: Sequence[str] = (),
    crops: Crops = 1,
    resume: ResumeFile | None = None,
) -> AgreementResult:
    """As `pipeline.validation.judge_chain`, of which the arguments are, without asking what is right.

    Labels that the images carry are not looked at.

    Raises:
        DataError: no usable image.
        EngineError, IntegrityError, UsageError, ValueError: as `judge_chain`.
    """
    started_s = time.monotonic()
    tally, passed = pass_images(
        [Stage(judge.name, judge.part, (judge,)) for judge in judges],
        dataset,
        _AgreementTally(list(labels), [Pair() for _ in judges[1:]]),
        lambda tally, samples, stages, _: tally.add(samples, stages),
        view=View(spec, color),
        crops=crops,
        n_classes=len(labels),
        batch_size=batch_size,
        progress=progress,
        resume=resume and resume.with_key({"labels": "left out"}),
    )
    n = tally.n_images
    return AgreementResult(
        dataset_name=dataset.name,
        dataset_sha256=dataset.sha256,
        n_images=n,
        n_skipped=len(passed.skipped),
        skipped=tuple(SkippedImage(*item) for item in passed.skipped[:_MAX_SKIPPED_LISTED]),
        stages=tuple(judge.name for judge in judges),
        steps=tuple(
            _agreement(step, after.part, before.name, after.name, n)
            for step, before, after in zip(tally.steps, judges[:-1], judges[1:], strict=True)
        ),
        total=_agreement(tally.total, "total", judges[0].name, judges[-1].name, n),
        assumed=tuple(assumed),
        flips=tally.flips.flips(),
        notes=(*notes, *passed.notes),
        seconds=time.monotonic() - started_s,
        crops=crops,
    )


def _agreement(pair: Pair, part: str, before: str, after: str, n: int) -> Agreement:
    return Agreement(
        part=part,
        before=before,
        after=after,
        same=pair.same,
        agreement=pair.same / n,
        interval=wilson_interval(pair.same, n),
        sqnr_db=pair.sqnr_db,
        max_abs_error=pair.max_abs_error,
    )
