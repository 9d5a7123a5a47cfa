"""Judging a chain of candidates on one labelled dataset.

A chain leads from what the user trained to what will run, one change at a time::

    pytorch + library transform → pytorch + our preprocessing → folded fp32 → int8
             reference                  preprocessing              export       INT8

Every candidate sees the same images in one pass, so that the drop between neighbours is the cost
of that one change, measured on paired outcomes. Memory does not grow with the number of images: sums
are kept, and the few images shown in a report.
"""

from __future__ import annotations

import heapq
import io
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.artifacts import PreprocessSpec, Sample
from pipeline.contracts import Dataset, Progress
from pipeline.datasets import labelled_batches
from pipeline.errors import DataError, EngineError
from pipeline.metrics import sqnr_db_from_energies, top_k_correct
from pipeline.statistics import mcnemar_exact_p, paired_drop_interval, wilson_interval
from pipeline.validation_result import (
    AssumedPart,
    ClassChange,
    ConfusionChange,
    Drop,
    Flip,
    SkippedImage,
    StageAccuracy,
    ValidationResult,
)

__all__ = ["MAX_FLIPS", "Judge", "judge_chain", "match_labels"]

MAX_FLIPS = 48
"""Flipped images kept with a thumbnail: what a person looks through, and a bound on memory."""
_MAX_CONFUSION_CHANGES = 30
_MAX_SKIPPED_LISTED = 50
_THUMBNAIL_SIDE_PX = 160


@dataclass(frozen=True, slots=True)
class Judge:
    """A candidate of the chain.

    ``logits(samples, pixels)`` gets a batch both ways: the images as they are (for a judge with a
    transform of its own) and as uint8 NHWC pixels that went through the shared preprocessing once
    for all judges. It returns float ``[N, C]``.
    """

    name: str
    part: str
    """What it changes in the judge before it: ``preprocessing``, ``export``, ``INT8``; of the first
    judge, ``reference``."""
    logits: Callable[[Sequence[Sample], NDArray[np.uint8]], NDArray[np.float32]]


def judge_chain(
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
) -> ValidationResult:
    """Judge all candidates in one pass over the data.

    Args:
        judges: at least two, from the reference to the candidate.
        dataset: labelled images, read one batch at a time.
        spec: preprocessing of the pixels that judges get.
        color: channel order of those pixels.
        labels: the model's, one a logit.
        batch_size: images a call; the last batch may be short.
        progress: called after every batch.
        assumed: parts of the drop that the chain does not measure.
        notes: carried into the result.

    Raises:
        DataError: an image without a label, labels that do not fit the model's, or no usable image.
        EngineError: a judge's logits are not finite, or not ``[N, len(labels)]``.
        ValueError: fewer than two judges, or ``batch_size`` below 1.
    """
    if len(judges) < 2 or batch_size < 1:
        raise ValueError(f"need two judges and a batch size of 1, got {len(judges)} and {batch_size}")
    started = time.monotonic()
    index_of, label_note = match_labels(dataset.class_names, labels, dataset.name)
    tally = _Tally(judges, labels)
    n_done = 0
    for samples, pixels in labelled_batches(dataset, spec, color, batch_size):
        truth = index_of[_own_labels(samples, len(index_of), dataset.name)]
        outputs = [_checked_logits(judge, samples, pixels, len(labels)) for judge in judges]
        tally.add(samples, truth, outputs)
        n_done += len(samples)
        if progress is not None:
            progress("judging", n_done, len(dataset))
    if n_done == 0:
        reasons = "; ".join(f"{key}: {reason}" for key, reason in list(dataset.skipped)[:3])
        raise DataError(f"{dataset.name} has no usable image" + (f" ({reasons})" if reasons else ""))
    return tally.result(
        dataset,
        assumed=tuple(assumed),
        notes=(*notes, *([label_note] if label_note else [])),
        seconds=time.monotonic() - started,
    )


def match_labels(
    dataset_names: Sequence[str] | None, model_labels: Sequence[str], dataset: str
) -> tuple[NDArray[np.int64], str | None]:
    """Which logit each class of the dataset is.

    By name (case, ``_`` and ``-`` aside), in any order, and the dataset may lack classes. By index
    only where the names say nothing: equal counts, and no name in common, as between synset numbers
    and words.

    Returns:
        int64 ``[dataset classes]`` of logit indices, and a note when the match was by index.

    Raises:
        DataError: no labels, or no sound match; lists the names that fit nothing.
    """
    if dataset_names is None:
        raise DataError(f"{dataset} has no labels; accuracy needs a folder a class, or labels.csv")
    if list(dataset_names) == list(model_labels):
        return np.arange(len(model_labels)), None
    own, theirs = [_canonical(n) for n in dataset_names], [_canonical(n) for n in model_labels]
    counts = Counter(theirs)
    position = {name: index for index, name in enumerate(theirs)}
    missing = [name for name, key in zip(dataset_names, own, strict=True) if key not in position]
    ambiguous = [name for name, key in zip(dataset_names, own, strict=True) if counts[key] > 1]
    if not missing and not ambiguous and len(set(own)) == len(own):
        return np.array([position[key] for key in own], dtype=np.int64), None
    if len(own) == len(theirs) and len(missing) == len(own):
        return np.arange(len(own)), (
            f"no class name of {dataset} is among the model's labels: matched by index "
            f"({dataset_names[0]!r} is {model_labels[0]!r}); give --labels to match by name"
        )
    relation = "among" if missing else "unique among"
    unfit = missing or ambiguous or list(dataset_names)
    listed = ", ".join(map(repr, unfit[:10])) + (", …" if len(unfit) > 10 else "")
    raise DataError(
        f"{len(unfit)} of the {len(own)} classes of {dataset} are not {relation} the model's "
        f"{len(theirs)} labels ({', '.join(map(repr, model_labels[:3]))}, …): {listed}; rename the "
        "folders, or give the class names in the model's order with --labels FILE"
    )


def _canonical(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())


def _own_labels(samples: Sequence[Sample], n_classes: int, dataset: str) -> NDArray[np.int64]:
    for sample in samples:
        if sample.label is None or not 0 <= sample.label < n_classes:
            raise DataError(
                f"{dataset}: {sample.key} has label {sample.label}, not one of its {n_classes} classes"
            )
    return np.array([sample.label for sample in samples], dtype=np.int64)


def _checked_logits(
    judge: Judge, samples: Sequence[Sample], pixels: NDArray[np.uint8], n_classes: int
) -> NDArray[np.float64]:
    raw = judge.logits(samples, pixels)
    if raw.shape != (len(samples), n_classes):
        raise EngineError(
            f"{judge.name} gives outputs of shape {list(raw.shape)} for {len(samples)} images, where "
            f"{n_classes} labels make [{len(samples)}, {n_classes}]: the labels are not this model's"
        )
    logits = raw.astype(np.float64)
    broken = np.flatnonzero(~np.isfinite(logits).all(axis=1))
    if broken.size:
        raise EngineError(
            f"{judge.name} gives NaN or infinite logits for {broken.size} of {len(samples)} images, first "
            f"{samples[int(broken[0])].key}: look for such values in the weights, or for empty ranges"
        )
    return logits


class _Pair:
    """Running sums over the images, of two judges."""

    def __init__(self, before: int, after: int) -> None:
        self.before, self.after = before, after
        self.lost = self.gained = self.same = 0
        self.signal_energy = self.noise_energy = self.max_abs_error = 0.0

    def add(
        self, logits: list[NDArray[np.float64]], top1: list[NDArray[np.int64]], truth: NDArray[np.int64]
    ) -> None:
        reference, error = logits[self.before], logits[self.before] - logits[self.after]
        was_right, is_right = top1[self.before] == truth, top1[self.after] == truth
        self.lost += int(np.sum(was_right & ~is_right))
        self.gained += int(np.sum(~was_right & is_right))
        self.same += int(np.sum(top1[self.before] == top1[self.after]))
        self.signal_energy += float(np.vdot(reference, reference))
        self.noise_energy += float(np.vdot(error, error))
        self.max_abs_error = max(self.max_abs_error, float(np.max(np.abs(error))))

    @property
    def sqnr_db(self) -> float | None:
        # Two answers that differ have noise; a reference of zeros only would be -inf, as bad as 0 dB.
        if self.noise_energy == 0.0:
            return None
        return sqnr_db_from_energies(self.signal_energy, self.noise_energy) if self.signal_energy else 0.0


class _Tally:
    """All that is kept while the images go by."""

    def __init__(self, judges: Sequence[Judge], labels: Sequence[str]) -> None:
        self.judges, self.labels = judges, labels
        self.top_k = min(5, len(labels))
        self.n = 0
        last = len(judges) - 1
        self.top1_correct = [0] * len(judges)
        self.top_k_correct = [0] * len(judges)
        self.steps = [_Pair(i, i + 1) for i in range(last)]
        self.from_first = [_Pair(0, i) for i in range(len(judges))]
        n_classes = len(labels)
        self.class_images = np.zeros(n_classes, np.int64)
        self.class_correct = np.zeros((2, n_classes), np.int64)
        self.confusion: tuple[Counter[tuple[int, int]], Counter[tuple[int, int]]] = (Counter(), Counter())
        self.flips: list[tuple[float, int, Flip]] = []

    def add(
        self, samples: Sequence[Sample], truth: NDArray[np.int64], logits: list[NDArray[np.float64]]
    ) -> None:
        top1 = [row.argmax(axis=1) for row in logits]
        for i, rows in enumerate(logits):
            self.top1_correct[i] += int(np.sum(top1[i] == truth))
            self.top_k_correct[i] += int(np.sum(top_k_correct(rows, truth, self.top_k)))
        for pair in (*self.steps, *self.from_first):
            pair.add(logits, top1, truth)
        np.add.at(self.class_images, truth, 1)
        for side, answers in enumerate((top1[0], top1[-1])):
            np.add.at(self.class_correct[side], truth[answers == truth], 1)
            wrong = answers != truth
            self.confusion[side].update(zip(truth[wrong].tolist(), answers[wrong].tolist(), strict=True))
        for row in np.flatnonzero(top1[0] != top1[-1]).tolist():
            before, after = _softmax(logits[0][row]), _softmax(logits[-1][row])
            self._keep_flip(samples[row], self.n + row, int(truth[row]), before, after)
        self.n += len(samples)

    def _keep_flip(
        self, sample: Sample, order: int, truth: int, before: NDArray[np.float64], after: NDArray[np.float64]
    ) -> None:
        was, now = int(before.argmax()), int(after.argmax())
        confidence = float(min(before[was], after[now]))
        if len(self.flips) == MAX_FLIPS and confidence <= self.flips[0][0]:
            return
        flip = Flip(
            key=sample.key,
            truth=self.labels[truth],
            before=self.labels[was],
            after=self.labels[now],
            before_confidence=float(before[was]),
            after_confidence=float(after[now]),
            kind="lost" if was == truth else "gained" if now == truth else "changed",
            thumbnail_jpeg=_thumbnail(sample.image),
        )
        # -order: of equally confident flips the earlier stays, and flips are never compared themselves.
        entry = (confidence, -order, flip)
        if len(self.flips) < MAX_FLIPS:
            heapq.heappush(self.flips, entry)
        else:
            heapq.heapreplace(self.flips, entry)

    def result(
        self, dataset: Dataset, *, assumed: tuple[AssumedPart, ...], notes: tuple[str, ...], seconds: float
    ) -> ValidationResult:
        skipped = [SkippedImage(key, reason) for key, reason in dataset.skipped]
        total = self.from_first[-1]
        stages = tuple(self._stage(i) for i in range(len(self.judges)))
        return ValidationResult(
            dataset_name=dataset.name,
            dataset_sha256=dataset.sha256,
            n_images=self.n,
            n_skipped=len(skipped),
            skipped=tuple(skipped[:_MAX_SKIPPED_LISTED]),
            top_k=self.top_k,
            stages=stages,
            drops=tuple(self._drop(pair, self.judges[pair.after].part) for pair in self.steps),
            total=self._drop(total, "total"),
            assumed=assumed,
            classes=self._classes(),
            confusion=self._confusion_changes(),
            n_flips=self.n - total.same,
            flips=tuple(flip for _, _, flip in sorted(self.flips, key=lambda entry: entry[:2], reverse=True)),
            notes=(*notes, *_guessing_note(stages[0], len(self.labels), self.n)),
            seconds=seconds,
        )

    def _stage(self, i: int) -> StageAccuracy:
        return StageAccuracy(
            name=self.judges[i].name,
            part=self.judges[i].part,
            top1_correct=self.top1_correct[i],
            top_k_correct=self.top_k_correct[i],
            top1=self.top1_correct[i] / self.n,
            top1_interval=wilson_interval(self.top1_correct[i], self.n),
            top_k=self.top_k_correct[i] / self.n,
            sqnr_from_first_db=self.from_first[i].sqnr_db,
            max_abs_error_from_first=self.from_first[i].max_abs_error,
        )

    def _drop(self, pair: _Pair, part: str) -> Drop:
        return Drop(
            part=part,
            before=self.judges[pair.before].name,
            after=self.judges[pair.after].name,
            lost=pair.lost,
            gained=pair.gained,
            drop_points=100 * (pair.lost - pair.gained) / self.n,
            interval_points=paired_drop_interval(pair.lost, pair.gained, self.n).scaled(100),
            top_k_drop_points=100
            * (self.top_k_correct[pair.before] - self.top_k_correct[pair.after])
            / self.n,
            mcnemar_p=mcnemar_exact_p(pair.lost, pair.gained),
            agreement=pair.same / self.n,
            sqnr_db=pair.sqnr_db,
            max_abs_error=pair.max_abs_error,
        )

    def _classes(self) -> tuple[ClassChange, ...]:
        return tuple(
            ClassChange(
                i, self.labels[i], int(n), int(before), int(after), int(before) / int(n), int(after) / int(n)
            )
            for i, (n, before, after) in enumerate(zip(self.class_images, *self.class_correct, strict=True))
            if n
        )

    def _confusion_changes(self) -> tuple[ConfusionChange, ...]:
        before, after = self.confusion
        changed = [pair for pair in sorted({*before, *after}) if before[pair] != after[pair]]
        changed.sort(key=lambda pair: -abs(after[pair] - before[pair]))
        return tuple(
            ConfusionChange(self.labels[t], self.labels[p], before[t, p], after[t, p])
            for t, p in changed[:_MAX_CONFUSION_CHANGES]
        )


def _guessing_note(reference: StageAccuracy, n_classes: int, n_images: int) -> tuple[str, ...]:
    """A model that does not know its classes loses nothing by quantization: that must not pass for good."""
    if reference.top1_interval.low > 1 / n_classes:
        return ()
    return (
        f"{reference.name} gets {100 * reference.top1:.2f}% right, which guessing among {n_classes} classes can "
        f"reach on {n_images} images: are the labels in the model's order, and its weights trained?",
    )


def _softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    exponentials = np.exp(logits - logits.max())
    probabilities: NDArray[np.float64] = exponentials / exponentials.sum()
    return probabilities


def _thumbnail(image: NDArray[np.uint8]) -> bytes:
    picture = Image.fromarray(np.ascontiguousarray(image))
    picture.thumbnail((_THUMBNAIL_SIDE_PX, _THUMBNAIL_SIDE_PX))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()
