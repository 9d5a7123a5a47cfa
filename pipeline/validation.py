"""Judging a chain of candidates on one labelled dataset.

A chain leads from what the user trained to what will run, one change at a time::

    pytorch + library transform → pytorch + our preprocessing → folded fp32 → int8
             reference                  preprocessing              export       INT8

Every candidate sees the same images in one pass, so that the drop between neighbours is the cost
of that one change, measured on paired outcomes. Memory does not grow with the number of images: sums
are kept, and the few images shown in a report. An ensemble is judged in the same way, from its networks
in fp32 to its networks as they ship.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.artifacts import PreprocessSpec, Sample
from pipeline.contracts import Dataset, Progress
from pipeline.errors import DataError
from pipeline.validation_crops import Crops, View
from pipeline.validation_result import AssumedPart, Member, SkippedImage, StageAccuracy, ValidationResult
from pipeline.validation_run import Judge, Passed, Stage, pass_images
from pipeline.validation_state import ResumeFile
from pipeline.validation_tally import MAX_FLIPS, Answers, ChainTally, MemberTally, Pair, stage_accuracy

__all__ = ["MAX_FLIPS", "EnsembleMember", "Judge", "judge_chain", "judge_ensemble", "match_labels"]

_MAX_SKIPPED_LISTED = 50
_MIN_IMAGES_A_CLASS = 5
"""From so many on, one answer to most of a class is a pattern and not an accident."""


@dataclass(frozen=True, slots=True)
class EnsembleMember:
    """One network of an ensemble."""

    name: str
    view: View
    """The pixels it takes."""
    before: Judge
    """In fp32."""
    after: Judge
    """As it ships; the same judge where that is fp32."""

    def with_view(self) -> EnsembleMember:
        """With both judges bound to the member's own pixels."""
        return replace(
            self, before=replace(self.before, view=self.view), after=replace(self.after, view=self.view)
        )


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
    crops: Crops = 1,
    resume: ResumeFile | None = None,
) -> ValidationResult:
    """Judge all candidates in one pass over the data.

    Args:
        judges: at least two, from the reference to the candidate.
        dataset: labelled images, read one batch at a time.
        spec: preprocessing of the pixels that judges get.
        color: channel order of those pixels.
        labels: the model's, one a logit.
        batch_size: images (or crops) a call; the last batch may be short.
        progress: called after every batch.
        assumed: parts of the drop that the chain does not measure.
        notes: carried into the result.
        crops: of each image, the softmax averaged: `pipeline.validation_crops`.
        resume: where the sums are kept, and taken up again. Left complete; remove it when the result is out.

    Raises:
        DataError: an image without a label, labels that do not fit the model's, or no usable image.
        EngineError: a judge's logits are not finite, or not ``[N, len(labels)]``.
        IntegrityError: `resume` holds another judgement.
        UsageError: crops that this preprocessing does not allow.
        ValueError: fewer than two judges, or ``batch_size`` below 1.
    """
    stages = [Stage(judge.name, judge.part, (judge,)) for judge in judges]
    view = View(spec, color)
    return _judged(stages, dataset, view, labels, (), batch_size, progress, crops, resume, assumed, notes)


def judge_ensemble(
    members: Sequence[EnsembleMember],
    dataset: Dataset,
    *,
    precision: str,
    labels: Sequence[str],
    batch_size: int = 32,
    progress: Progress | None = None,
    notes: Sequence[str] = (),
    crops: Crops = 1,
    resume: ResumeFile | None = None,
) -> ValidationResult:
    """Judge networks that answer together: the mean of their softmax (arXiv 1409.4842, section 7).

    The chain leads from the ensemble in fp32 to the ensemble as it ships. Where all ship fp32 it leads from
    the first network to the ensemble. Each member is judged by itself in the same pass.

    Args:
        members: at least two.
        dataset: labelled images.
        precision: of what ships: ``int8``.
        labels: of all members, one a logit.
        batch_size: images (or crops) a call.
        progress: called after every batch.
        notes: carried into the result.
        crops: of each image and network.
        resume: as `judge_chain`.

    Raises:
        DataError, EngineError, IntegrityError, UsageError: as `judge_chain`.
        ValueError: fewer than two members, or ``batch_size`` below 1.
    """
    if len(members) < 2:
        raise ValueError(f"need two members of an ensemble, got {len(members)}")
    members = [m.with_view() for m in members]
    before, after = tuple(m.before for m in members), tuple(m.after for m in members)
    ensemble = f"ensemble of {len(members)}"
    if before == after:
        stages = [
            Stage(members[0].name, "reference", before[:1]),
            Stage(f"{precision} {ensemble}", "ensemble", after),
        ]
    else:
        stages = [
            Stage(f"fp32 {ensemble}", "reference", before),
            Stage(f"{precision} {ensemble}", precision.upper(), after),
        ]
    view = members[0].view
    return _judged(stages, dataset, view, labels, members, batch_size, progress, crops, resume, (), notes)


def _judged(
    stages: Sequence[Stage],
    dataset: Dataset,
    view: View,
    labels: Sequence[str],
    members: Sequence[EnsembleMember],
    batch_size: int,
    progress: Progress | None,
    crops: Crops,
    resume: ResumeFile | None,
    assumed: Sequence[AssumedPart],
    notes: Sequence[str],
) -> ValidationResult:
    started_s = time.monotonic()
    index_of, label_note = match_labels(dataset.class_names, labels, dataset.name)
    judges = list(dict.fromkeys(judge for stage in stages for judge in stage.members))
    places = [(judges.index(member.before), judges.index(member.after)) for member in members]

    def take(
        tally: ChainTally, samples: Sequence[Sample], answers: list[Answers], each: list[Answers]
    ) -> None:
        truth = index_of[_own_labels(samples, len(index_of), dataset.name)]
        tally.add(samples, truth, answers)
        for sums, (before, after) in zip(tally.members, places, strict=True):
            sums.add(each[before], each[after], answers[-1], truth)

    tally, passed = pass_images(
        stages,
        dataset,
        ChainTally.of(len(stages), labels, len(members)),
        take,
        view=view,
        crops=crops,
        n_classes=len(labels),
        batch_size=batch_size,
        progress=progress,
        resume=resume and resume.with_key({"labels": ", ".join(labels)}),
    )
    n, total = tally.n_images, tally.from_first[-1]
    found = [tally.stage(i, stage.name, stage.part) for i, stage in enumerate(stages)]
    return ValidationResult(
        dataset_name=dataset.name,
        dataset_sha256=dataset.sha256,
        n_images=n,
        n_skipped=len(passed.skipped),
        skipped=tuple(SkippedImage(*item) for item in passed.skipped[:_MAX_SKIPPED_LISTED]),
        top_k=tally.meters[0].top_k,
        stages=tuple(found),
        drops=tuple(
            step.drop(after.part, before, after, n)
            for step, before, after in zip(tally.steps, found[:-1], found[1:], strict=True)
        ),
        total=total.drop("total", found[0], found[-1], n),
        assumed=tuple(assumed),
        classes=tally.classes(),
        confusion=tally.confusion_changes(),
        n_flips=n - total.same,
        flips=tally.flips.flips(),
        notes=(*notes, *([label_note] if label_note else []), *_notes(tally, passed, found[0])),
        seconds=time.monotonic() - started_s,
        n_classes=len(labels),
        crops=crops,
        members=tuple(
            _member(member, sums, found[-1], n) for member, sums in zip(members, tally.members, strict=True)
        ),
    )


def _notes(tally: ChainTally, passed: Passed, reference: StageAccuracy) -> list[str]:
    """What a reader of the figures must know first."""
    notes, labels = list(passed.notes), tally.labels
    present = [index for index, count in enumerate(tally.class_images) if count]
    if len(present) == 1 and len(labels) > 1:
        notes.append(
            f"all images are of the class {labels[present[0]]!r}: a network that gives this answer to everything "
            "would be right on all of them; give images of the other classes too"
        )
    elif order := _other_order_note(tally):
        notes.append(order)
    elif reference.top1_interval.low <= 1 / len(labels):
        # A model that does not know its classes loses nothing by quantization: that must not pass for good.
        notes.append(
            f"{reference.name} gets {100 * reference.top1:.2f}% right, which guessing among {len(labels)} classes "
            f"can reach on {tally.n_images} images: are the labels in the model's order, and its weights trained?"
        )
    return notes


def _member(member: EnsembleMember, sums: MemberTally, ensemble: StageAccuracy, n: int) -> Member:
    before = stage_accuracy(sums.before, member.before.name, "reference", Pair())
    after = stage_accuracy(sums.after, member.after.name, member.after.part, sums.step)
    return Member(
        name=member.name,
        identity=member.after.identity,
        before=before,
        after=after,
        drop=sums.step.drop(after.part, before, after, n),
        to_ensemble=sums.to_ensemble.drop("ensemble", after, ensemble, n),
    )


def _other_order_note(tally: ChainTally) -> str | None:
    """Whether the first stage knows the classes by other names: sure answers, and to the wrong labels."""
    n_classes, n = len(tally.labels), tally.n_images
    n_present = sum(count > 0 for count in tally.class_images)
    if n_present < 2 or n < _MIN_IMAGES_A_CLASS * n_present:
        return None
    usual: dict[int, tuple[int, int]] = {}
    for code, count in tally.confusion[0].items():
        usual[code // n_classes] = max(usual.get(code // n_classes, (0, 0)), (count, code % n_classes))
    renamed = {truth: found for truth, found in usual.items() if 2 * found[0] > tally.class_images[truth]}
    answers = {answer for _, answer in renamed.values()}
    if 2 * len(renamed) <= n_present or len(answers) < len(renamed):
        return None  # few classes, or several that end in one: a poor model, and not another order
    truth, (count, answer) = max(renamed.items(), key=lambda item: item[1])
    return (
        f"the labels seem to be in another order than the model's: {tally.meters[0].top1_correct:,} of {n:,} answers "
        f"are right, but most images of {len(renamed)} of {n_present} classes get one and the same other answer "
        f"({count} of {tally.class_images[truth]} images of {tally.labels[truth]!r} are called "
        f"{tally.labels[answer]!r}); give the names in the model's order with --labels FILE"
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
