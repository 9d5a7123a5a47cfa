"""What ``edgefold build`` does: the stages wired to real engines and quantizers, published as a bundle."""

from __future__ import annotations

import dataclasses
import datetime
import json
import platform
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Literal

from apps.console import console
from pipeline.artifacts import EngineOptions
from pipeline.bundle import Bundle, BundleWriter
from pipeline.compile import FOLDED_NAME, Calibration, Compiled, compile_model
from pipeline.contracts import Dataset, EngineBackend, Progress
from pipeline.errors import DataError, UnsupportedError, UsageError
from pipeline.manifest import AccuracySummary, CalibrationSummary, EngineRecord, Manifest, ModelSource

if TYPE_CHECKING:
    from pipeline.models.resolve import ResolvedModel
    from pipeline.validation_result import ValidationResult

__all__ = ["BuildOutcome", "BuildRequest", "build", "print_build"]

_TOOLS = (
    "torch",
    "timm",
    "torchvision",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "openvino",
    "onnxruntime",
    "numpy",
    "pillow",
)
_CALIBRATION_BATCH = 1
_INPUT_COLOR: Literal["BGR"] = "BGR"
"""What OpenCV and V4L2 deliver: the frames of a stream need no reordering."""


@dataclass(frozen=True, slots=True)
class BuildRequest:
    """The options of ``edgefold build``, as given."""

    model: str
    out: Path
    calib: str | None = None
    weights: str | None = None
    eval_data: str | None = None
    max_drop_points: float | None = None
    target: str = "cpu"
    precision: Literal["int8", "fp16", "fp32"] = "int8"
    calibrator: Literal["minmax", "percentile", "entropy", "mse"] = "percentile"
    calib_limit: int = 128
    eval_limit: int | None = None
    input_size: int | None = None
    num_classes: int | None = None
    labels: Path | None = None
    preprocess: Path | None = None
    engine: str = "openvino"
    overwrite: bool = True


@dataclass(frozen=True, slots=True)
class BuildOutcome:
    """What a build made: the bundle and, where it was judged, the judgement."""

    bundle: Bundle
    validation: ValidationResult | None
    notes: tuple[str, ...]

    def to_json(self) -> str:
        """For ``--json``: path, accuracy and the seconds of every stage."""
        manifest = self.bundle.manifest
        return json.dumps(
            {
                "bundle": str(self.bundle.path),
                "name": manifest.name,
                "precision": manifest.precision,
                "engine": manifest.engine.backend,
                "accuracy": dataclasses.asdict(manifest.accuracy) if manifest.accuracy else None,
                "stages": [{"stage": s.stage, "seconds": s.seconds} for s in manifest.stages],
                "files": {name: record.size_bytes for name, record in manifest.files.items()},
                "notes": list(self.notes),
            },
            indent=2,
        )


def build(request: BuildRequest, progress: Progress) -> BuildOutcome:
    """Build, judge and publish.

    Raises:
        UsageError: the request contradicts itself.
        UnsupportedError: the target, precision or engine is not available.
        AccuracyGateError: the drop is past ``max_drop_points``; nothing was published.
        EdgefoldError: the stage that failed; nothing was published.
    """
    from engines import get_backend

    _check(request)
    backend = get_backend(request.engine)
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
        calibration = None
        if calibration_data is not None:
            calibration = _calibration(request, model, calibration_data)
        compiled = compile_model(
            model,
            work_dir=work_dir,
            bundle_dir=writer.path,
            calibration=calibration,
            input_color=_INPUT_COLOR,
            backend=backend,
            options=EngineOptions(),
            progress=progress,
        )
        if calibration_data is not None:
            _report_skipped(calibration_data)
        validation = None
        if evaluation is not None:
            validation = _judge(request, model, compiled, evaluation, calibration_data, backend, progress)
        if compiled.table is not None:
            from calibration.table import table_to_json

            writer.add_file("calibration.json", table_to_json(compiled.table))
        manifest = _manifest(request, model, compiled, calibration_data, evaluation, validation)
        _report(request, writer, manifest, compiled, validation)
        bundle = writer.commit(manifest)
    return BuildOutcome(bundle, validation, model.notes)


def _check(request: BuildRequest) -> None:
    if request.target != "cpu":
        raise UnsupportedError(f"target {request.target!r} is not supported; this version builds for 'cpu'")
    if request.precision == "fp16":
        raise UnsupportedError("fp16 is no precision of the 'cpu' target; give --precision int8 or fp32")
    if request.precision == "int8" and request.calib is None:
        raise UsageError(
            "int8 needs images to calibrate on: give --calib DATA (about 128 images like those of the camera), "
            "or --precision fp32"
        )
    if request.max_drop_points is not None and request.eval_data is None:
        raise UsageError("--max-drop needs labelled images to measure the drop on: give --eval DATA")


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
    from apps.validating import open_labelled

    return open_labelled(request.eval_data, model.labels, model.num_classes, request.eval_limit)


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
    if request.calib is None or request.precision == "fp32":
        return None
    from pipeline.datasets import MIN_CALIBRATION_IMAGES, open_dataset, require_minimum

    dataset = open_dataset(request.calib, limit=request.calib_limit)
    require_minimum(dataset, MIN_CALIBRATION_IMAGES)
    return dataset


def _calibration(request: BuildRequest, model: ResolvedModel, dataset: Dataset) -> Calibration:
    from apps.cache import cache_dir
    from calibration.quantizer import StaticQuantizer
    from engines.openvino import fp32_runner
    from pipeline.datasets import MIN_CALIBRATION_IMAGES, batches

    quantizer = StaticQuantizer(
        request.calibrator, placement="cpu", runner_factory=fp32_runner, cache_dir=cache_dir("calibration")
    )
    passes = batches(
        dataset, model.preprocess, _INPUT_COLOR, _CALIBRATION_BATCH, minimum=MIN_CALIBRATION_IMAGES
    )
    return Calibration(quantizer, passes, dataset.sha256)


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
) -> ValidationResult:
    """Judge the engine before anything is published; the PyTorch model is in memory anyway."""
    from apps.validating import Reference, subject_of_models, validate_subject
    from pipeline.validation_result import check_budget

    subject = subject_of_models(
        compiled.folded,
        compiled.final,
        backend,
        precision=request.precision,
        num_classes=model.num_classes,
    )
    result = validate_subject(
        subject, evaluation, backend, Reference(model), progress=progress, calibrated_on=calibrated_on
    )
    if request.max_drop_points is not None:
        check_budget(result, request.max_drop_points)
    return result


def _report(
    request: BuildRequest,
    writer: BundleWriter,
    manifest: Manifest,
    compiled: Compiled,
    validation: ValidationResult | None,
) -> None:
    import shlex
    import sys

    from apps.report import render_report

    render_report(
        writer.path / "report.html",
        validation=validation,
        max_drop_points=request.max_drop_points,
        manifest=manifest,
        calibration=compiled.table,
        commands=(shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),),
    )


def print_build(outcome: BuildOutcome) -> None:
    """The result for a person: what was made, how long each stage took, what it cost."""
    from rich import box
    from rich.table import Table

    from apps.report import print_validation

    manifest = outcome.bundle.manifest
    table = Table(title="Stages", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("stage")
    table.add_column("seconds", justify="right")
    for stage in manifest.stages:
        table.add_row(stage.stage, f"{stage.seconds:.1f}")
    console.print(table)
    if outcome.validation is not None:
        print_validation(outcome.validation, console)
    sizes = {name: record.size_bytes / 1e6 for name, record in manifest.files.items()}
    engine_mb, fp32_mb = sizes[manifest.engine.file], sizes[FOLDED_NAME]
    console.print(
        f"[bold green]built[/] {manifest.name}, {manifest.precision} for {manifest.target}: "
        f"{manifest.engine.file} {engine_mb:.1f} MB (fp32 {fp32_mb:.1f} MB)"
    )
    console.print(f"bundle: {outcome.bundle.path}", markup=False, soft_wrap=True)
    console.print(f"report: {outcome.bundle.file('report.html')}", markup=False, soft_wrap=True)
    if outcome.validation is None:
        console.print("not judged: give --eval DATA with labels to see what it cost", style="yellow")


def _manifest(
    request: BuildRequest,
    model: ResolvedModel,
    compiled: Compiled,
    calibration_data: Dataset | None,
    evaluation: Dataset | None,
    validation: ValidationResult | None,
) -> Manifest:
    final = compiled.final
    calibration = None
    if compiled.table is not None and calibration_data is not None:
        from calibration.table import table_sha256

        calibration = CalibrationSummary(
            method=compiled.table.method,
            n_samples=compiled.table.n_samples,
            table_sha256=table_sha256(compiled.table),
            statistics_sha256=compiled.table.statistics_sha256,
            dataset_sha256=calibration_data.sha256,
            dataset_name=calibration_data.name,
        )
    return Manifest(
        name=model.name,
        created_utc=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        edgefold_version=installed_version("edgefold"),
        tools=_tool_versions(),
        target=request.target,
        precision=request.precision,
        model=ModelSource(
            spec=request.model,
            weights=model.weights,
            weights_sha256=model.weights_sha256,
            num_classes=model.num_classes,
            input_size=request.input_size,
        ),
        inputs=final.inputs,
        outputs=final.outputs,
        preprocess=model.preprocess,
        preprocess_folded=final.preprocess_folded,
        input_color=final.input_color,
        labels=final.labels,
        calibration=calibration,
        accuracy=_accuracy(evaluation, validation),
        stages=final.history,
        engine=EngineRecord(compiled.engine.backend, compiled.engine.path.name, compiled.engine.fingerprint),
    )


def _accuracy(evaluation: Dataset | None, validation: ValidationResult | None) -> AccuracySummary | None:
    if evaluation is None or validation is None:
        return None
    total = validation.total
    return AccuracySummary(
        dataset_name=evaluation.name,
        dataset_sha256=evaluation.sha256,
        n_images=validation.n_images,
        fp32_top1=validation.stages[0].top1,
        int8_top1=validation.stages[-1].top1,
        drop_points=total.drop_points,
        drop_low=total.interval_points.low,
        drop_high=total.interval_points.high,
        agreement=total.agreement,
        sqnr_db=total.sqnr_db,
    )


def _tool_versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in _TOOLS:
        try:
            versions[name] = installed_version(name)
        except PackageNotFoundError:
            continue
    return versions
