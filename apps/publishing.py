"""What a build is published as: the request, what the stages made of it, the manifest, report and summary."""

from __future__ import annotations

import dataclasses
import datetime
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from apps.console import console
from apps.corrections_view import print_corrections
from apps.device_view import print_deployment
from pipeline.artifacts import CalibrationTable, ModelArtifact
from pipeline.bundle import Bundle, BundleWriter
from pipeline.compile import FOLDED_NAME
from pipeline.contracts import Dataset
from pipeline.manifest import (
    AccuracySummary,
    CalibrationSummary,
    Deployment,
    EngineRecord,
    Manifest,
    ModelSource,
)

if TYPE_CHECKING:
    from apps.budgeting import Searched
    from engines.tensorrt.audit import AuditReport
    from pipeline.models.resolve import ResolvedModel
    from pipeline.validation_agreement import AgreementResult
    from pipeline.validation_result import ValidationResult

__all__ = [
    "DEFAULT_CALIBRATOR",
    "BuildOutcome",
    "BuildRequest",
    "Made",
    "accuracy_summary",
    "calibration_tools",
    "make_manifest",
    "print_build",
    "tool_versions",
    "write_report",
]

DEFAULT_CALIBRATOR = "mse"
_CALIBRATION_TOOLS = ("edgefold", "numpy", "openvino", "pillow")
"""What decodes, scales, runs and counts. What exported the model shows in its digest."""
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


@dataclass(frozen=True, slots=True)
class BuildRequest:
    """The options of ``edgefold build``, as given."""

    model: str
    out: Path
    calib: str | None = None
    weights: str | None = None
    eval_data: str | None = None
    max_drop_points: float | None = None
    min_agreement_percent: float | None = None
    meet_budget: bool = False
    target: str = "cpu"
    precision: Literal["int8", "fp16", "fp32"] = "int8"
    calibrator: Literal["minmax", "percentile", "entropy", "mse", "modelopt"] | None = None
    """``None``: `DEFAULT_CALIBRATOR`, or the method of `calibration`."""
    calibration: Path | None = None
    """A bundle or a ``calibration.json`` whose ranges are used again."""
    corrections: str = "auto"
    """``auto``: those that pay; names with commas between; ``none``."""
    calib_limit: int = 128
    eval_limit: int | None = None
    input_size: int | None = None
    num_classes: int | None = None
    labels: Path | None = None
    preprocess: Path | None = None
    engine: str | None = None
    jetpack: str | None = None
    tensorrt: str | None = None
    dla: bool = False
    overwrite: bool = True

    @property
    def method(self) -> str:
        """How ranges are chosen from images."""
        return self.calibrator or DEFAULT_CALIBRATOR


@dataclass(frozen=True, slots=True)
class BuildOutcome:
    """What a build made: the bundle and, where it was judged, the judgement."""

    bundle: Bundle
    validation: ValidationResult | None
    notes: tuple[str, ...]
    agreement: AgreementResult | None = None
    searched: Searched | None = None

    def to_json(self) -> str:
        """For ``--json``: path, accuracy and the seconds of every stage."""
        manifest = self.bundle.manifest
        return json.dumps(
            {
                "bundle": str(self.bundle.path),
                "name": manifest.name,
                "precision": manifest.precision,
                "engine": None if manifest.engine is None else manifest.engine.backend,
                "deployment": None
                if manifest.deployment is None
                else dataclasses.asdict(manifest.deployment),
                "accuracy": dataclasses.asdict(manifest.accuracy) if manifest.accuracy else None,
                "agreement": None if self.agreement is None else self.agreement.to_json(),
                "search": next((s.checks for s in manifest.stages if s.stage == "search"), None),
                "corrections": next((s.checks for s in manifest.stages if s.stage == "correct"), None),
                "stages": [{"stage": s.stage, "seconds": s.seconds} for s in manifest.stages],
                "files": {name: record.size_bytes for name, record in manifest.files.items()},
                "notes": list(self.notes),
            },
            indent=2,
        )


@dataclass(frozen=True, slots=True)
class Made:
    """What the stages made for a target, not published yet.

    ``final`` is the graph the engine runs, or is to run; ``engine`` is ``None`` where the device has
    to compile it, and ``deployment`` where it need not.
    """

    final: ModelArtifact
    table: CalibrationTable | None
    validation: ValidationResult | None
    engine: EngineRecord | None
    deployment: Deployment | None = None
    agreement: AgreementResult | None = None
    """Where it was judged without labels."""
    searched: Searched | None = None
    audit: AuditReport | None = None


def write_report(
    request: BuildRequest,
    writer: BundleWriter,
    manifest: Manifest,
    made: Made,
) -> None:
    """Write ``report.html`` into the bundle."""
    import shlex
    import sys

    from apps.report import render_report

    render_report(
        writer.path / "report.html",
        validation=made.validation,
        agreement=made.agreement,
        max_drop_points=request.max_drop_points,
        min_agreement_percent=request.min_agreement_percent,
        manifest=manifest,
        calibration=made.table,
        audit=made.audit,
        commands=(shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),),
    )


def print_build(outcome: BuildOutcome) -> None:
    """The result for a person: what was made, how long each stage took, what it cost."""
    from rich import box
    from rich.table import Table

    from apps.report import print_agreement, print_validation

    manifest = outcome.bundle.manifest
    table = Table(title="Stages", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("stage")
    table.add_column("seconds", justify="right")
    for stage in manifest.stages:
        table.add_row(stage.stage, f"{stage.seconds:.1f}")
    console.print(table)
    print_corrections(manifest, console)
    if outcome.validation is not None:
        print_validation(outcome.validation, console)
    if outcome.agreement is not None:
        print_agreement(outcome.agreement, console)
    if outcome.searched is not None:
        from apps.budgeting import print_search

        print_search(outcome.searched)
    sizes = {name: record.size_bytes / 1e6 for name, record in manifest.files.items()}
    print_deployment(manifest, console)
    built = f"[bold green]built[/] {manifest.name}, {manifest.precision} for {manifest.target}"
    if manifest.engine is not None:
        file = manifest.engine.file
        built += f": {file} {sizes[file]:.1f} MB (fp32 ONNX {sizes[FOLDED_NAME]:.1f} MB)"
    console.print(built)
    console.print(f"bundle: {outcome.bundle.path}", markup=False, soft_wrap=True)
    console.print(f"report: {outcome.bundle.file('report.html')}", markup=False, soft_wrap=True)
    if outcome.validation is None and outcome.agreement is None:
        console.print("not judged: give --eval DATA with labels to see what it cost", style="yellow")


def make_manifest(
    request: BuildRequest,
    model: ResolvedModel,
    made: Made,
    calibration_name: str,
    evaluation: Dataset | None,
) -> Manifest:
    """All that is known of the build; the files are added when it is committed.

    Args:
        request: as given.
        model: what was built.
        made: what the stages made.
        calibration_name: of the images whose ranges it has, in words.
        evaluation: what it was judged on.
    """
    final = made.final
    calibration = None
    if made.table is not None:
        from calibration.table import table_sha256

        calibration = CalibrationSummary(
            method=made.table.method,
            n_samples=made.table.n_samples,
            table_sha256=table_sha256(made.table),
            statistics_sha256=made.table.statistics_sha256,
            dataset_sha256=made.table.dataset_sha256,
            dataset_name=calibration_name,
        )
    return Manifest(
        name=model.name,
        created_utc=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        edgefold_version=installed_version("edgefold"),
        tools=tool_versions(),
        target=request.target,
        precision=request.precision,
        model=ModelSource(
            spec=request.model,
            weights=model.weights,
            weights_sha256=model.weights_sha256,
            num_classes=model.num_classes,
            input_size=request.input_size,
            weights_option=request.weights,
        ),
        inputs=final.inputs,
        outputs=final.outputs,
        preprocess=model.preprocess,
        preprocess_folded=final.preprocess_folded,
        input_color=final.input_color,
        labels=final.labels,
        calibration=calibration,
        accuracy=accuracy_summary(evaluation, made.validation),
        stages=final.history,
        engine=made.engine,
        deployment=made.deployment,
    )


def accuracy_summary(
    evaluation: Dataset | None, validation: ValidationResult | None
) -> AccuracySummary | None:
    """The figures of a judgement that the manifest keeps; ``None`` where nothing was judged."""
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


def tool_versions() -> dict[str, str]:
    """Name to version of everything installed that takes part in a build."""
    return {"python": platform.python_version(), **_versions(_TOOLS)}


def calibration_tools() -> dict[str, str]:
    """Name to version of what the ranges of a calibration depend on."""
    return _versions(_CALIBRATION_TOOLS)


def _versions(names: Sequence[str]) -> dict[str, str]:
    versions = {}
    for name in names:
        try:
            versions[name] = installed_version(name)
        except PackageNotFoundError:
            continue
    return versions
