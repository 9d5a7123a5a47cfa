"""What ``edgefold build`` does: the stages wired to real engines and quantizers, published as a bundle."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Literal

from apps.calibrating import ReusedTable, check_calibration_options, open_modelopt, open_reused
from apps.console import console
from apps.golden import add_golden
from apps.publishing import BuildOutcome, BuildRequest, Made, calibration_tools, make_manifest, write_report
from pipeline.artifacts import EngineOptions
from pipeline.bundle import BundleWriter
from pipeline.compile import Calibration, Compiled, compile_model
from pipeline.contracts import Batches, Dataset, EngineBackend, Progress
from pipeline.errors import DataError, UsageError
from pipeline.manifest import EngineRecord
from pipeline.validation_agreement import AgreementResult

if TYPE_CHECKING:
    from calibration.quantizer import StaticQuantizer
    from pipeline.models.resolve import ResolvedModel
    from pipeline.targets import Preflight
    from pipeline.validation_result import ValidationResult

__all__ = ["INPUT_COLOR", "Material", "build", "open_passes", "open_quantizer"]

INPUT_COLOR: Literal["BGR"] = "BGR"
"""What OpenCV and V4L2 deliver: the frames of a stream need no reordering."""
_CALIBRATION_BATCH = 1
_CPU_ENGINE = "openvino"


@dataclass(frozen=True, slots=True)
class Material:
    """What a build works with, opened and checked."""

    request: BuildRequest
    model: ResolvedModel
    calibration_data: Dataset | None
    evaluation: Dataset | None
    work_dir: Path
    """For files that do not ship."""
    bundle_dir: Path
    """Where the bundle's files are written; published when all is done."""
    reused: ReusedTable | None = None
    """The calibration that is used again instead of a new one."""

    @property
    def calibration_name(self) -> str:
        """Of the images that the ranges come from."""
        if self.reused is not None:
            return self.reused.dataset_name
        return "" if self.calibration_data is None else self.calibration_data.name


def build(request: BuildRequest, progress: Progress) -> BuildOutcome:
    """Build, judge and publish.

    Raises:
        UsageError: the request contradicts itself.
        UnsupportedError: the target, precision or engine is not available.
        AccuracyGateError: the drop is past ``max_drop_points``; nothing was published.
        EdgefoldError: the stage that failed; nothing was published.
    """
    preflight = _check(request)
    with ExitStack() as stack:
        # Opened first: an output that cannot be written is found before any work is done.
        writer = stack.enter_context(BundleWriter(request.out, overwrite=request.overwrite))
        work_dir = Path(stack.enter_context(TemporaryDirectory(prefix="edgefold-build-")))
        model = _resolve(request)
        for note in model.notes:
            console.print(f"note: {note}", style="yellow", markup=False)
        evaluation = _open_evaluation(request, model)
        model = _with_labels(model, evaluation)
        calibration_data = _open_calibration(request)
        reused = open_reused(request, calibration_data)
        material = Material(request, model, calibration_data, evaluation, work_dir, writer.path, reused)
        if preflight.target.family == "cpu":
            made = _make_for_cpu(material, progress)
        else:
            from apps.device_building import make_for_device

            made = make_for_device(material, preflight, progress)
        if material.calibration_data is not None:
            _report_skipped(material.calibration_data)
        if made.table is not None:
            from calibration.table import table_to_json

            writer.add_file("calibration.json", table_to_json(made.table))
        add_golden(writer, made, work_dir)
        manifest = make_manifest(request, model, made, material.calibration_name, evaluation)
        write_report(request, writer, manifest, made)
        bundle = writer.commit(manifest)
    return BuildOutcome(bundle, made.validation, model.notes, made.agreement, made.searched)


def _make_for_cpu(material: Material, progress: Progress) -> Made:
    from engines import get_backend

    request = material.request
    backend = get_backend(request.engine or _CPU_ENGINE)
    calibration, data = None, material.calibration_data
    if material.reused is not None:
        calibration = material.reused.calibration("cpu")
    elif data is not None and request.calibrator == "modelopt":
        calibration = Calibration(open_modelopt("cpu"), open_passes(material.model, data), data.sha256)
    elif data is not None:
        quantizer, passes = open_quantizer(material, data, placement="cpu")
        calibration = Calibration(quantizer, passes, data.sha256)
    compiled = compile_model(
        material.model,
        work_dir=material.work_dir,
        bundle_dir=material.bundle_dir,
        calibration=calibration,
        input_color=INPUT_COLOR,
        backend=backend,
        options=EngineOptions(),
        progress=progress,
    )
    searched = None
    if request.meet_budget:
        from apps.budgeting import budget_of, meet_budget

        budget = budget_of(request)
        assert data is not None, "_check asked for calibration images"
        assert material.evaluation is not None, "_check asked for images to judge the budget on"
        assert budget is not None, "_check asked for a budget"
        searched = meet_budget(
            request,
            budget,
            material.model,
            compiled,
            material.evaluation,
            quantizer,
            passes,
            backend,
            material.work_dir,
            progress,
        )
        compiled = searched.compiled
    validation = agreement = None
    if material.evaluation is not None:
        result = _judge(request, material.model, compiled, material.evaluation, data, backend, progress)
        if isinstance(result, AgreementResult):
            agreement = result
        else:
            validation = result
    engine = EngineRecord(compiled.engine.backend, compiled.engine.path.name, compiled.engine.fingerprint)
    return Made(compiled.final, compiled.table, validation, engine, agreement=agreement, searched=searched)


def _check(request: BuildRequest) -> Preflight:
    from calibration.correction import parse_corrections
    from pipeline.targets import find_target, preflight

    checked = preflight(
        find_target(request.target),
        precision=request.precision,
        jetpack=request.jetpack,
        tensorrt=request.tensorrt,
        dla=request.dla,
    )
    if checked.target.family == "cpu":
        from engines import get_backend

        get_backend(request.engine or _CPU_ENGINE)
    elif request.engine is not None:
        raise UsageError(
            f"--engine {request.engine} is for a CPU; {checked.target.name} runs a TensorRT plan: leave it out"
        )
    parse_corrections(request.corrections)
    check_calibration_options(request)
    if request.dla and request.precision != "int8":
        raise UsageError(f"--dla writes an int8 calibration cache; --precision {request.precision} has none")
    if request.max_drop_points is not None and request.eval_data is None:
        raise UsageError("--max-drop needs labelled images to measure the drop on: give --eval DATA")
    _check_budget_options(request, checked.target.family)
    return checked


def _check_budget_options(request: BuildRequest, family: str) -> None:
    if request.min_agreement_percent is not None:
        if request.max_drop_points is not None:
            raise UsageError("--max-drop and --min-agreement are two budgets: give one of them")
        if request.eval_data is None:
            raise UsageError("--min-agreement needs images to compare answers on: give --eval DATA")
        if family != "cpu":
            raise UsageError(
                "--min-agreement is for --target cpu; for a device, `edgefold validate --as` measures it emulated"
            )
    if not request.meet_budget:
        return
    if request.max_drop_points is None and request.min_agreement_percent is None:
        raise UsageError("--meet-budget needs a budget: give --max-drop POINTS or --min-agreement PERCENT")
    if family != "cpu" or request.precision != "int8":
        raise UsageError(
            "--meet-budget searches the layers that int8 has to leave out on a CPU, timed here: give --target cpu and "
            "--precision int8. For a device, `edgefold finish` times the candidates of the bundle there"
        )


def _resolve(request: BuildRequest) -> ResolvedModel:
    from pipeline.datasets import read_labels
    from pipeline.models.resolve import resolve_model

    model = resolve_model(
        request.model,
        weights=request.weights,
        num_classes=request.num_classes,
        input_size=request.input_size,
        preprocess_file=request.preprocess,
    )
    if request.labels is None:
        return model
    names = read_labels(request.labels)
    if len(names) != model.num_classes:
        raise DataError(
            f"{str(request.labels)!r} names {len(names)} classes, but {model.name} has {model.num_classes}: "
            "give one name a class, in the order of the model's outputs"
        )
    return dataclasses.replace(model, labels=names)


def _open_evaluation(request: BuildRequest, model: ResolvedModel) -> Dataset | None:
    if request.eval_data is None:
        return None
    from apps.validating import open_images, open_labelled

    opener = open_labelled if request.min_agreement_percent is None else open_images
    return opener(request.eval_data, model.labels, model.num_classes, request.eval_limit)


def _with_labels(model: ResolvedModel, evaluation: Dataset | None) -> ResolvedModel:
    """The model with names for its classes: its own, else those of the data it is judged on."""
    names = evaluation.class_names if evaluation is not None else None
    if model.labels or names is None or len(names) != model.num_classes:
        return model
    console.print(f"labels: from {evaluation.name if evaluation else ''}, in sorted order", markup=False)
    for index, name in list(enumerate(names))[:12]:
        console.print(f"  {index:4d} {name}", markup=False)
    if len(names) > 12:
        console.print(f"  … {len(names) - 12} more, all in the manifest")
    return dataclasses.replace(model, labels=names)


def _open_calibration(request: BuildRequest) -> Dataset | None:
    if request.calib is None or request.precision != "int8":
        return None
    from pipeline.datasets import MIN_CALIBRATION_IMAGES, open_dataset, require_minimum

    dataset = open_dataset(request.calib, limit=request.calib_limit)
    require_minimum(dataset, MIN_CALIBRATION_IMAGES)
    return dataset


def open_quantizer(material: Material, dataset: Dataset, placement: str) -> tuple[StaticQuantizer, Batches]:
    """The quantizer that the request names, and the passes over its images."""
    from apps.cache import cache_dir
    from calibration.correction import parse_corrections
    from calibration.quantizer import StaticQuantizer
    from engines.openvino import fp32_runner

    quantizer = StaticQuantizer(
        material.request.method,
        placement,
        runner_factory=fp32_runner,
        cache_dir=cache_dir("calibration"),
        corrections=parse_corrections(material.request.corrections),
        tools=calibration_tools(),
        work_dir=material.work_dir,
    )
    return quantizer, open_passes(material.model, dataset)


def open_passes(model: ResolvedModel, dataset: Dataset) -> Batches:
    """Passes over calibration images, as the folded graph takes them."""
    from pipeline.datasets import MIN_CALIBRATION_IMAGES, batches

    return batches(dataset, model.preprocess, INPUT_COLOR, _CALIBRATION_BATCH, minimum=MIN_CALIBRATION_IMAGES)


def _report_skipped(dataset: Dataset) -> None:
    for key, reason in dataset.skipped:
        console.print(f"skipped {key}: {reason}", style="yellow", markup=False)


def _judge(
    request: BuildRequest,
    model: ResolvedModel,
    compiled: Compiled,
    evaluation: Dataset,
    calibrated_on: Dataset | None,
    backend: EngineBackend,
    progress: Progress,
) -> ValidationResult | AgreementResult:
    """Judge the engine before anything is published; the PyTorch model is in memory anyway."""
    from apps.validating import Reference, compare_subject, subject_of_models, validate_subject
    from pipeline.validation_result import check_agreement, check_budget

    subject = subject_of_models(
        compiled.folded,
        compiled.final,
        backend,
        precision=request.precision,
        num_classes=model.num_classes,
    )
    if request.min_agreement_percent is not None:
        agreed = compare_subject(subject, evaluation, backend, Reference(model), progress=progress)
        check_agreement(agreed.total, agreed.n_images, request.min_agreement_percent)
        return agreed
    result = validate_subject(
        subject, evaluation, backend, Reference(model), progress=progress, calibrated_on=calibrated_on
    )
    if request.max_drop_points is not None:
        check_budget(result, request.max_drop_points)
    return result
