"""One call of ``edgefold validate``: its options put to work, its result shown, its gates checked."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from apps.attributing import Attributed, attribute_result, check_attributable, print_attribution
from apps.console import console, print_json, progress_display
from apps.report import print_agreement, print_validation, render_report
from apps.validating import (
    Against,
    calibration_note,
    compare_subject,
    display_labels,
    find_reference,
    open_images,
    open_labelled,
    validate_subject,
)
from apps.validating_device import Judged, judged_as, judged_here
from apps.validating_ensemble import ensemble_subjects, validate_ensemble
from engines import get_backend
from pipeline.artifacts import CalibrationTable
from pipeline.bundle import Bundle, open_bundle
from pipeline.contracts import EngineBackend
from pipeline.datasets import read_labels
from pipeline.errors import UsageError
from pipeline.validation_agreement import AgreementResult
from pipeline.validation_crops import check_crops
from pipeline.validation_result import ValidationResult, check_agreement, check_budget
from pipeline.validation_state import ResumeFile

__all__ = ["ValidateOutcome", "ValidateRequest", "check_gates", "present", "validate"]


@dataclass(frozen=True, slots=True)
class ValidateRequest:
    """The options of ``edgefold validate``, as given."""

    bundles: tuple[Path, ...]
    data: str
    labels: Path | None = None
    limit: int | None = None
    batch_size: int = 16
    crops: int = 1
    ensemble: bool = False
    engine: str | None = None
    as_target: str | None = None
    against: Against = "auto"
    max_drop_points: float | None = None
    min_agreement_percent: float | None = None
    attribute: bool = False
    resume: Path | None = None
    report: Path | None = None
    json_output: bool = False


@dataclass(frozen=True, slots=True)
class ValidateOutcome:
    """What was found: accuracy, or agreement where the images have no labels."""

    bundles: tuple[Bundle, ...]
    result: ValidationResult | AgreementResult
    attributed: Attributed | None = None

    def to_json(self) -> dict[str, Any]:
        """The result, and with ``--attribute`` the key ``attribution``."""
        tree = self.result.to_json()
        return tree if self.attributed is None else {**tree, "attribution": self.attributed.to_json()}


def validate(request: ValidateRequest) -> ValidateOutcome:
    """Judge what was asked for.

    Raises:
        UsageError: the options contradict each other.
        EdgefoldError: as `apps.validating.validate_subject`, and opening a bundle.
    """
    if len(request.bundles) > 1 and not request.ensemble:
        raise UsageError(
            f"{len(request.bundles)} bundles were given: add --ensemble to judge them together, or judge them one at "
            "a time"
        )
    bundles = tuple(open_bundle(path) for path in request.bundles)
    if request.attribute:
        check_attributable(
            bundles[0], crops=request.crops, ensemble=request.ensemble, as_target=request.as_target
        )
    resume = None if request.resume is None else ResumeFile(request.resume)
    if request.ensemble:
        if request.as_target is not None:
            raise UsageError("--as is of one bundle; judge the members one at a time")
        backends = [
            get_backend(request.engine or bundle.manifest.ready_engine().backend) for bundle in bundles
        ]
        return ValidateOutcome(bundles, _ensemble(request, bundles, backends, resume))
    with TemporaryDirectory(prefix="edgefold-validate-") as folder:
        if request.as_target is None:
            judged = judged_here(bundles[0], request.engine, Path(folder))
        else:
            judged = judged_as(bundles[0], request.as_target, request.engine, Path(folder))
        return _single(request, bundles[0], judged, resume)


def present(outcome: ValidateOutcome, request: ValidateRequest) -> None:
    """Write the report, and print the result; then the state to resume from is of no more use."""
    result, only = outcome.result, outcome.bundles[0] if len(outcome.bundles) == 1 else None
    labelled = result if isinstance(result, ValidationResult) else None
    if request.report is not None:
        render_report(
            request.report,
            validation=labelled,
            agreement=None if isinstance(result, ValidationResult) else result,
            title=None if only else " + ".join(bundle.path.name for bundle in outcome.bundles),
            manifest=only.manifest if only else None,
            max_drop_points=request.max_drop_points,
            min_agreement_percent=request.min_agreement_percent,
            calibration=_calibration_table(only) if only else None,
            attributed=outcome.attributed,
        )
    if request.json_output:
        print_json(json.dumps(outcome.to_json(), indent=2, allow_nan=False))
    else:
        if isinstance(result, ValidationResult):
            print_validation(result, console, max_drop_points=request.max_drop_points)
        else:
            print_agreement(result, console, min_agreement_percent=request.min_agreement_percent)
        if outcome.attributed is not None:
            print_attribution(outcome.attributed, console)
        if request.report is not None:
            console.print(f"report: {request.report}", markup=False, soft_wrap=True)
    if request.resume is not None:
        ResumeFile(request.resume).remove()


def check_gates(outcome: ValidateOutcome, request: ValidateRequest) -> None:
    """Refuse an engine past a budget that was stated.

    Raises:
        AccuracyGateError: the drop is too large, or the agreement too small.
        DataError: the images cannot judge the budget.
    """
    result = outcome.result
    if request.max_drop_points is not None and isinstance(result, ValidationResult):
        check_budget(result, request.max_drop_points)
    if request.min_agreement_percent is not None:
        check_agreement(result.total, result.n_images, request.min_agreement_percent)


def _single(
    request: ValidateRequest, bundle: Bundle, judged: Judged, resume: ResumeFile | None
) -> ValidateOutcome:
    subject = judged.subject
    if request.labels is not None:
        subject = dataclasses.replace(subject, labels=read_labels(request.labels))
    crops = check_crops(request.crops, subject.preprocess)
    # Labels may be missing only where a measure that needs none was asked for: else it was an oversight.
    opener = open_labelled if request.min_agreement_percent is None else open_images
    dataset = opener(request.data, subject.labels, subject.num_classes, request.limit)
    if dataset.class_names is None and request.max_drop_points is not None:
        raise UsageError(
            f"--max-drop needs labels, and {request.data!r} has none; give --min-agreement alone"
        )
    judge = validate_subject if dataset.class_names is not None else compare_subject
    note = calibration_note(bundle.manifest, dataset)
    with progress_display() as progress:
        result = judge(
            subject,
            dataset,
            judged.backend,
            find_reference(bundle.manifest, request.against),
            batch_size=request.batch_size,
            progress=progress,
            notes=(*judged.notes, *([note] if note else [])),
            crops=crops,
            resume=resume,
        )
        attributed = None
        if request.attribute:
            labels = display_labels(subject, dataset)
            attributed = attribute_result(bundle, subject, judged.backend, dataset, result, labels, progress)
    return ValidateOutcome((bundle,), result, attributed)


def _ensemble(
    request: ValidateRequest,
    bundles: Sequence[Bundle],
    backends: Sequence[EngineBackend],
    resume: ResumeFile | None,
) -> ValidationResult:
    if request.against == "torch":
        raise UsageError("--against torch is of one bundle: an ensemble is compared with its own fp32 graphs")
    subjects = ensemble_subjects(
        bundles, backends, None if request.labels is None else read_labels(request.labels)
    )
    first = subjects[0][1]
    crops = check_crops(request.crops, first.preprocess)
    dataset = open_labelled(request.data, first.labels, first.num_classes, request.limit)
    notes = [calibration_note(bundle.manifest, dataset) for bundle in bundles]
    with progress_display() as progress:
        return validate_ensemble(
            subjects,
            dataset,
            backends,
            batch_size=request.batch_size,
            progress=progress,
            notes=sorted({note for note in notes if note}),
            crops=crops,
            resume=resume,
        )


def _calibration_table(bundle: Bundle) -> CalibrationTable | None:
    from calibration.table import table_from_json

    if "calibration.json" not in bundle.manifest.files:
        return None
    return table_from_json(bundle.read_bytes("calibration.json"))
