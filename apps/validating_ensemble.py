"""Several bundles that answer together: what ``edgefold validate A B C --ensemble`` does.

Each keeps its own input size and preprocessing; what they share is the classes, in one order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import ExitStack

from apps.validating import Subject, display_labels, load_judge, subject_of_bundle
from pipeline.bundle import Bundle
from pipeline.contracts import Dataset, EngineBackend, Progress
from pipeline.errors import DataError, UsageError
from pipeline.validation import EnsembleMember, judge_ensemble
from pipeline.validation_crops import Crops, View, check_crops, pixels_a_call
from pipeline.validation_result import ValidationResult
from pipeline.validation_state import ResumeFile

__all__ = ["ensemble_subjects", "validate_ensemble"]


def ensemble_subjects(
    bundles: Sequence[Bundle], backends: Sequence[EngineBackend], labels: Sequence[str] | None = None
) -> list[tuple[str, Subject]]:
    """The bundles with names that tell them apart, all with the same class names.

    Args:
        bundles: at least two.
        backends: what runs each.
        labels: class names to use instead of the bundles' own.

    Raises:
        DataError: the bundles have not the same classes in the same order; says where they part.
        UsageError: fewer than two bundles, or one of them twice.
    """
    if len(bundles) < 2:
        raise UsageError(f"an ensemble is made of two bundles or more, got {len(bundles)}")
    paths = [bundle.path.resolve() for bundle in bundles]
    if twice := next((path for path in paths if paths.count(path) > 1), None):
        raise UsageError(
            f"the bundle {str(twice)!r} is given twice; an ensemble of equal networks is one network"
        )
    names = [path.name for path in paths]
    names = [str(path) if names.count(name) > 1 else name for path, name in zip(paths, names, strict=True)]
    subjects = [subject_of_bundle(bundle, backend) for bundle, backend in zip(bundles, backends, strict=True)]
    if labels is not None:
        subjects = [dataclasses.replace(subject, labels=tuple(labels)) for subject in subjects]
    named = next((i for i, subject in enumerate(subjects) if subject.labels), 0)
    for name, subject in zip(names, subjects, strict=True):
        _check_classes(names[named], subjects[named], name, subject)
    subjects = [dataclasses.replace(subject, labels=subjects[named].labels) for subject in subjects]
    return list(zip(names, subjects, strict=True))


def validate_ensemble(
    subjects: Sequence[tuple[str, Subject]],
    dataset: Dataset,
    backends: Sequence[EngineBackend],
    *,
    batch_size: int = 16,
    progress: Progress | None = None,
    notes: Sequence[str] = (),
    crops: Crops = 1,
    resume: ResumeFile | None = None,
) -> ValidationResult:
    """Judge the ensemble in fp32 and as it ships, and each member by itself.

    Args:
        subjects: `ensemble_subjects`.
        dataset: `apps.validating.open_labelled`.
        backends: what runs each.
        batch_size: images (or crops) a call.
        progress: called after every batch.
        notes: carried into the result.
        crops: of each image and network.
        resume: where the sums are kept meanwhile.

    Raises:
        UsageError, DataError, EngineError, IntegrityError: as `pipeline.validation.judge_ensemble`.
    """
    for _, subject in subjects:
        check_crops(crops, subject.preprocess)
    batch_size = pixels_a_call(batch_size, crops)
    precisions = {subject.precision for _, subject in subjects}
    with ExitStack() as stack:
        members = [
            _member(stack, name, subject, backend, batch_size)
            for (name, subject), backend in zip(subjects, backends, strict=True)
        ]
        return judge_ensemble(
            members,
            dataset,
            precision=precisions.pop() if len(precisions) == 1 else "mixed precision",
            labels=display_labels(subjects[0][1], dataset),
            batch_size=batch_size,
            progress=progress,
            notes=notes,
            crops=crops,
            resume=resume,
        )


def _member(
    stack: ExitStack, name: str, subject: Subject, backend: EngineBackend, batch_size: int
) -> EnsembleMember:
    before = load_judge(stack, subject, subject.fp32, backend, "fp32, folded", "reference", batch_size)
    before = after = dataclasses.replace(before, name=f"{name}, {before.name}")
    if subject.final is not None:
        part = subject.precision.upper()
        after = load_judge(stack, subject, subject.final, backend, subject.precision, part, batch_size)
        after = dataclasses.replace(after, name=f"{name}, {after.name}")
    return EnsembleMember(name, View(subject.preprocess, subject.input_color), before, after)


def _check_classes(name: str, subject: Subject, other_name: str, other: Subject) -> None:
    if subject.num_classes != other.num_classes:
        raise DataError(
            f"{name} has {subject.num_classes} classes and {other_name} {other.num_classes}: the networks of an "
            "ensemble answer among the same classes; leave one of them out"
        )
    differing = [
        (index, mine, theirs)
        for index, (mine, theirs) in enumerate(zip(subject.labels, other.labels, strict=False))
        if mine != theirs
    ]
    if differing:
        index, mine, theirs = differing[0]
        raise DataError(
            f"{len(differing)} of the {subject.num_classes} outputs are other classes in {other_name} than in {name}: "
            f"output {index} is {mine!r} in {name} and {theirs!r} in {other_name}; an ensemble averages equal "
            "outputs. Give --labels FILE if only the names differ"
        )
