"""What is kept while the images go by: sums, and a few flipped images.

Plain values only, in dataclasses, so that `pipeline.validation_state` can write a tally down as it is
and a judgement that was broken off goes on from there.
"""

from __future__ import annotations

import base64
import heapq
import io
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.artifacts import Sample
from pipeline.metrics import log_probabilities, probabilities, sqnr_db_from_energies
from pipeline.statistics import holm_adjusted, mcnemar_exact_p, paired_drop_interval
from pipeline.validation_meter import AccuracyMeter
from pipeline.validation_result import ClassChange, ConfusionChange, Drop, Flip, StageAccuracy

__all__ = ["MAX_FLIPS", "Answers", "ChainTally", "FlipKeeper", "MemberTally", "Pair", "stage_accuracy"]

MAX_FLIPS = 48
"""Flipped images kept with a thumbnail: what a person looks through, and a bound on memory."""
_MAX_CONFUSION_CHANGES = 30
_THUMBNAIL_SIDE_PX = 160


@dataclass(frozen=True, slots=True)
class Answers:
    """What a stage says to a batch of images."""

    scores: NDArray[np.float64]
    """``[N, C]``: what ranks the classes. Logits, or the logarithm of averaged probabilities."""
    logits: NDArray[np.float64]
    """``[M, C]``: all that were averaged, crops and members; of one network on one crop, the scores."""

    @property
    def top1(self) -> NDArray[np.int64]:
        """The answers, ``[N]``."""
        answers: NDArray[np.int64] = self.scores.argmax(axis=1)
        return answers


@dataclass(slots=True)
class Pair:
    """Running sums over the images, of two stages."""

    lost: int = 0
    gained: int = 0
    same: int = 0
    signal_energy: float = 0.0
    noise_energy: float = 0.0
    max_abs_error: float = 0.0

    def add(self, before: Answers, after: Answers, truth: NDArray[np.int64] | None) -> None:
        """Add a batch; without `truth` nothing is lost or gained."""
        if truth is not None:
            was_right, is_right = before.top1 == truth, after.top1 == truth
            self.lost += int(np.sum(was_right & ~is_right))
            self.gained += int(np.sum(~was_right & is_right))
        self.same += int(np.sum(before.top1 == after.top1))
        reference, approximation = before.logits, after.logits
        if reference.shape != approximation.shape:  # one network against several: only their ends compare
            reference, approximation = log_probabilities(before.scores), log_probabilities(after.scores)
        error = reference - approximation
        self.signal_energy += float(np.vdot(reference, reference))
        self.noise_energy += float(np.vdot(error, error))
        self.max_abs_error = max(self.max_abs_error, float(np.max(np.abs(error))))

    @property
    def sqnr_db(self) -> float | None:
        """Of the logits; ``None`` where they are identical."""
        # Two answers that differ have noise; a reference of zeros only would be -inf, as bad as 0 dB.
        if self.noise_energy == 0.0:
            return None
        return sqnr_db_from_energies(self.signal_energy, self.noise_energy) if self.signal_energy else 0.0

    def drop(self, part: str, before: StageAccuracy, after: StageAccuracy, n: int) -> Drop:
        """The sums of `n` images as a result."""
        return Drop(
            part=part,
            before=before.name,
            after=after.name,
            lost=self.lost,
            gained=self.gained,
            drop_points=100 * (self.lost - self.gained) / n,
            interval_points=paired_drop_interval(self.lost, self.gained, n).scaled(100),
            top_k_drop_points=100 * (before.top_k_correct - after.top_k_correct) / n,
            mcnemar_p=mcnemar_exact_p(self.lost, self.gained),
            agreement=self.same / n,
            sqnr_db=self.sqnr_db,
            max_abs_error=self.max_abs_error,
        )


@dataclass(slots=True)
class FlipKeeper:
    """The most confident of the images that changed their answer."""

    kept: list[tuple[float, int, Flip, str]] = field(default_factory=list)
    """A heap of (confidence, -order, flip, thumbnail in base64): of equally confident flips the earlier
    stays, and flips are never compared themselves."""

    def add(
        self,
        samples: Sequence[Sample],
        n_before: int,
        before: Answers,
        after: Answers,
        truth: NDArray[np.int64] | None,
        labels: Sequence[str],
    ) -> None:
        """Look through a batch; `n_before` images came before it."""
        rows = np.flatnonzero(before.top1 != after.top1)
        if rows.size == 0:
            return
        was, now = probabilities(before.scores[rows]), probabilities(after.scores[rows])
        for place, row in enumerate(rows.tolist()):
            true = None if truth is None else int(truth[row])
            answers = int(was[place].argmax()), int(now[place].argmax())
            sure = float(was[place].max()), float(now[place].max())
            if len(self.kept) == MAX_FLIPS and min(sure) <= self.kept[0][0]:
                continue
            flip = Flip(
                key=samples[row].key,
                truth=None if true is None else labels[true],
                before=labels[answers[0]],
                after=labels[answers[1]],
                before_confidence=sure[0],
                after_confidence=sure[1],
                kind="lost" if answers[0] == true else "gained" if answers[1] == true else "changed",
            )
            entry = (min(sure), -(n_before + row), flip, _thumbnail(samples[row].image))
            if len(self.kept) < MAX_FLIPS:
                heapq.heappush(self.kept, entry)
            else:
                heapq.heapreplace(self.kept, entry)

    def flips(self) -> tuple[Flip, ...]:
        """The most confident first, with their thumbnails."""
        ordered = sorted(self.kept, key=lambda entry: entry[:2], reverse=True)
        return tuple(replace(flip, thumbnail_jpeg=base64.b64decode(picture)) for *_, flip, picture in ordered)


@dataclass(slots=True)
class MemberTally:
    """One network of an ensemble, in both stages, and beside the ensemble."""

    before: AccuracyMeter
    after: AccuracyMeter
    step: Pair = field(default_factory=Pair)
    to_ensemble: Pair = field(default_factory=Pair)
    """From this network as it ships to the ensemble."""

    def add(self, before: Answers, after: Answers, ensemble: Answers, truth: NDArray[np.int64]) -> None:
        """Add a batch."""
        self.before.update(before.scores, truth)
        self.after.update(after.scores, truth)
        self.step.add(before, after, truth)
        self.to_ensemble.add(after, ensemble, truth)


@dataclass(slots=True)
class ChainTally:
    """Everything of a chain of stages on labelled images."""

    labels: list[str]
    meters: list[AccuracyMeter]
    steps: list[Pair]
    """From each stage to the next."""
    from_first: list[Pair]
    class_images: list[int]
    class_correct: tuple[list[int], list[int]]
    """By the first and the last stage."""
    class_discordant: tuple[list[int], list[int]]
    """Lost and gained."""
    flips: FlipKeeper = field(default_factory=FlipKeeper)
    confusion: tuple[dict[int, int], dict[int, int]] = field(default_factory=lambda: ({}, {}))
    """Wrong answers of the first and the last stage: ``truth * classes + answer`` to their number."""
    members: list[MemberTally] = field(default_factory=list)

    @classmethod
    def of(cls, n_stages: int, labels: Sequence[str], n_members: int = 0) -> ChainTally:
        """An empty one."""
        n = len(labels)
        return cls(
            labels=list(labels),
            meters=[AccuracyMeter(n) for _ in range(n_stages)],
            steps=[Pair() for _ in range(n_stages - 1)],
            from_first=[Pair() for _ in range(n_stages)],
            class_images=[0] * n,
            class_correct=([0] * n, [0] * n),
            class_discordant=([0] * n, [0] * n),
            members=[MemberTally(AccuracyMeter(n), AccuracyMeter(n)) for _ in range(n_members)],
        )

    @property
    def n_images(self) -> int:
        """How many were added."""
        return self.meters[0].n_images

    def add(self, samples: Sequence[Sample], truth: NDArray[np.int64], stages: Sequence[Answers]) -> None:
        """Add a batch: the answers of every stage."""
        self.flips.add(samples, self.n_images, stages[0], stages[-1], truth, self.labels)
        for meter, answers in zip(self.meters, stages, strict=True):
            meter.update(answers.scores, truth)
        for step, before, after in zip(self.steps, stages[:-1], stages[1:], strict=True):
            step.add(before, after, truth)
        for pair, answers in zip(self.from_first, stages, strict=True):
            pair.add(stages[0], answers, truth)
        before_right, after_right = stages[0].top1 == truth, stages[-1].top1 == truth
        _count(self.class_images, truth)
        _count(self.class_correct[0], truth[before_right])
        _count(self.class_correct[1], truth[after_right])
        _count(self.class_discordant[0], truth[before_right & ~after_right])
        _count(self.class_discordant[1], truth[~before_right & after_right])
        for counts, answers, right in zip(
            self.confusion, (stages[0], stages[-1]), (before_right, after_right), strict=True
        ):
            for code in (truth * len(self.labels) + answers.top1)[~right].tolist():
                counts[code] = counts.get(code, 0) + 1

    def stage(self, index: int, name: str, part: str) -> StageAccuracy:
        """One stage as a result."""
        pair = self.from_first[index]
        return stage_accuracy(self.meters[index], name, part, pair)

    def classes(self) -> tuple[ClassChange, ...]:
        """The classes that have an image, by index."""
        present = [index for index, n in enumerate(self.class_images) if n]
        lost, gained = self.class_discordant
        adjusted = holm_adjusted([mcnemar_exact_p(lost[i], gained[i]) for i in present])
        return tuple(
            ClassChange(
                index=i,
                label=self.labels[i],
                n_images=self.class_images[i],
                before_correct=self.class_correct[0][i],
                after_correct=self.class_correct[1][i],
                before_accuracy=self.class_correct[0][i] / self.class_images[i],
                after_accuracy=self.class_correct[1][i] / self.class_images[i],
                lost=lost[i],
                gained=gained[i],
                interval_points=paired_drop_interval(lost[i], gained[i], self.class_images[i]).scaled(100),
                adjusted_p=p,
            )
            for i, p in zip(present, adjusted, strict=True)
        )

    def confusion_changes(self) -> tuple[ConfusionChange, ...]:
        """The pairs of classes confused more often, or less, than before."""
        before, after = self.confusion
        changes = {code: after.get(code, 0) - before.get(code, 0) for code in sorted({*before, *after})}
        changed = sorted((code for code in changes if changes[code]), key=lambda code: -abs(changes[code]))
        n = len(self.labels)
        return tuple(
            ConfusionChange(
                self.labels[code // n], self.labels[code % n], before.get(code, 0), after.get(code, 0)
            )
            for code in changed[:_MAX_CONFUSION_CHANGES]
        )


def stage_accuracy(meter: AccuracyMeter, name: str, part: str, from_first: Pair) -> StageAccuracy:
    """A meter as a stage of the result."""
    figures = meter.figures()
    return StageAccuracy(
        name=name,
        part=part,
        top1_correct=figures.top1_correct,
        top_k_correct=figures.top_k_correct,
        top1=figures.top1,
        top1_interval=figures.top1_interval,
        top_k=figures.top_k_accuracy,
        sqnr_from_first_db=from_first.sqnr_db,
        max_abs_error_from_first=from_first.max_abs_error,
        confidence=figures.confidence,
    )


def _count(counts: list[int], classes: NDArray[Any]) -> None:
    for index in classes.tolist():
        counts[index] += 1


def _thumbnail(image: NDArray[np.uint8]) -> str:
    picture = Image.fromarray(np.ascontiguousarray(image))
    picture.thumbnail((_THUMBNAIL_SIDE_PX, _THUMBNAIL_SIDE_PX))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
