"""What ``edgefold build`` does for a device that runs a TensorRT plan.

The host does everything that needs the model, the images and a lot of memory: export, folding, calibration,
the candidate graphs, their emulated accuracy, the static audit. What needs the device, the plan, is left to
``edgefold finish`` there, unless something on this machine compiles for it.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from apps.audit_view import print_dla
from apps.building import INPUT_COLOR, Material, open_passes, open_quantizer
from apps.calibrating import open_modelopt
from apps.console import console
from apps.emulation import EMULATOR, emulated
from apps.finishing import AUDIT_NAME, stage_of_plans
from apps.plans import Builder, Offer, TimingOptions, find_builder, make_plans
from apps.publishing import Made, accuracy_summary
from apps.validating import Reference, subject_of_models, validate_subject
from engines.tensorrt.audit import report_to_json
from engines.tensorrt.options import TensorRtOptions
from engines.tensorrt.predict import predict_audit
from pipeline.artifacts import CalibrationTable, ModelArtifact
from pipeline.compile import prepare
from pipeline.contracts import Progress
from pipeline.errors import AccuracyGateError, UnsupportedError
from pipeline.manifest import AccuracySummary, CandidateRecord, Deployment, EngineRecord
from pipeline.onnx_files import load_model

if TYPE_CHECKING:
    from calibration.candidates import Candidate
    from pipeline.targets import Preflight
    from pipeline.validation_result import ValidationResult

__all__ = ["DLA_CACHE_NAME", "DLA_GRAPH_NAME", "DLA_REPORT_NAME", "make_for_device"]

DLA_CACHE_NAME = "dla.calibration.cache"
DLA_GRAPH_NAME = "dla.onnx"
DLA_REPORT_NAME = "dla.json"
DLA_TENSORRT = "10.3"
"""Of JetPack 6, where no other was named: a cache is read by the version in its first line only."""


def make_for_device(material: Material, preflight: Preflight, progress: Progress) -> Made:
    """Everything of a bundle for `preflight`'s target that this machine can make.

    Raises:
        AccuracyGateError: no candidate keeps the budget; nothing is published.
        EdgefoldError: the stage that failed.
    """
    prepared = prepare(
        material.model,
        work_dir=material.work_dir,
        bundle_dir=material.bundle_dir,
        input_color=INPUT_COLOR,
        progress=progress,
    )
    candidates, calibrated, table = _candidates(material, prepared.folded, progress)
    records, validation = _judge_all(material, prepared.folded, candidates, progress)
    offers = [
        Offer(record, candidate.model)
        for record, candidate in zip(records, candidates, strict=True)
        if record.within_budget
    ]
    target = preflight.target
    assert target.sm is not None, "a target of TensorRT has a GPU"
    deployment = Deployment(
        sm=target.sm,
        jetpack=None if preflight.jetpack is None else preflight.jetpack.version,
        tensorrt=preflight.tensorrt,
        max_drop_points=material.request.max_drop_points,
        candidates=tuple(records),
        notes=preflight.notes,
    )
    if material.request.dla and table is not None:
        _write_dla_files(material, calibrated, table, preflight)
    made = Made(offers[0].model, table, validation, None, deployment)
    try:
        builder = find_builder(target.sm)
    except UnsupportedError as error:
        if target.tensorrt_rtx:
            console.print(f"note: no plan was built here: {error}", style="yellow", markup=False)
        audit = predict_audit(load_model(made.final.path))
        (material.bundle_dir / AUDIT_NAME).write_bytes(report_to_json(audit))
        return dataclasses.replace(made, audit=audit)
    return _with_plan(material, made, deployment, offers, builder, progress)


def _write_dla_files(
    material: Material, folded: ModelArtifact, table: CalibrationTable, preflight: Preflight
) -> None:
    """A graph without Q/DQ, the calibration cache for it, and what of it a DLA would not run.

    The weights are those before the corrections: TensorRT rounds them for a DLA, on grids of its own.
    """
    from calibration.tensorrt_form import TensorRTForms
    from engines.tensorrt.calibration_cache import cache_to_text, make_cache
    from engines.tensorrt.dla import report_dla

    graph_file, _ = TensorRTForms(folded, table).float32(material.bundle_dir / DLA_GRAPH_NAME)
    graph = load_model(graph_file.path)
    report = report_dla(graph)
    (material.bundle_dir / DLA_REPORT_NAME).write_text(json.dumps(report.as_json(), indent=2) + "\n")
    numbers = [int(part) for part in (preflight.tensorrt or DLA_TENSORRT).split(".")]
    major, minor, patch = (*numbers, 0, 0)[:3]
    cache = cache_to_text(make_cache(graph, table, (major, minor, patch)))
    (material.bundle_dir / DLA_CACHE_NAME).write_text(cache, encoding="utf-8")
    print_dla(report, console)


def _candidates(
    material: Material, folded: ModelArtifact, progress: Progress
) -> tuple[Sequence[Candidate], ModelArtifact, CalibrationTable | None]:
    """The graphs to be timed, and what they were calibrated as: the model and the ranges, before corrections."""
    from calibration.candidates import float_candidate, tensorrt_candidates
    from calibration.reuse import check_reuse, ranges_alone

    if material.reused is not None:
        check_reuse(material.reused.table, folded, material.reused.reuse)
        table = ranges_alone(material.reused.table)
        return tensorrt_candidates(folded, table, material.bundle_dir), folded, table
    data = material.calibration_data
    precision = material.request.precision
    if data is None:
        assert precision != "int8", "a build without calibration images is refused before"
        return (float_candidate(folded, material.bundle_dir, precision),), folded, None
    if material.request.calibrator == "modelopt":
        table = open_modelopt("tensorrt").table(
            folded, open_passes(material.model, data), data.sha256, progress
        )
        return tensorrt_candidates(folded, table, material.bundle_dir), folded, table
    quantizer, batches = open_quantizer(material, data, placement="tensorrt")
    made = quantizer.correct(folded, batches, data.sha256, progress)
    candidates = tensorrt_candidates(
        made.original,
        made.table,
        material.bundle_dir,
        statistics=made.statistics,
        corrected=made.model,
    )
    return candidates, made.original, made.table


def _judge_all(
    material: Material, folded: ModelArtifact, candidates: Sequence[Candidate], progress: Progress
) -> tuple[list[CandidateRecord], ValidationResult | None]:
    """What each candidate costs, emulated here; the first one's judgement is the bundle's report.

    The first is judged against PyTorch, in parts. The others differ from it in precision only, so they are
    judged against the folded fp32 graph, which takes a fraction of the time.
    """
    budget, evaluation = material.request.max_drop_points, material.evaluation
    records, first = [], None
    for index, candidate in enumerate(candidates):
        accuracy: AccuracySummary | None = None
        if evaluation is not None:
            progress("candidates judged", index, len(candidates))
            subject = subject_of_models(
                folded,
                emulated(candidate.model, material.work_dir),
                EMULATOR,
                precision=candidate.precision,
                num_classes=material.model.num_classes,
            )
            subject = dataclasses.replace(subject, emulates=material.request.target)
            reference = (
                Reference(material.model)
                if index == 0
                else Reference(None, "the first candidate was judged against it")
            )
            result = validate_subject(
                subject,
                evaluation,
                EMULATOR,
                reference,
                progress=progress,
                calibrated_on=material.calibration_data if index == 0 else None,
            )
            accuracy = accuracy_summary(evaluation, result)
            first = first or result
        records.append(
            CandidateRecord(
                name=candidate.name,
                file=candidate.model.path.name,
                precision=candidate.precision,
                reason=candidate.reason,
                accuracy=accuracy,
                within_budget=budget is None or (accuracy is not None and accuracy.drop_points <= budget),
            )
        )
    if not any(record.within_budget for record in records):
        best = min(records, key=lambda record: record.accuracy.drop_points if record.accuracy else 0.0)
        assert best.accuracy is not None, "a budget is only given with data to judge by"
        raise AccuracyGateError(
            f"no candidate keeps the budget of {budget:g} points: the best, {best.name}, loses "
            f"{best.accuracy.drop_points:.2f} (95% interval {best.accuracy.drop_low:.2f} to {best.accuracy.drop_high:.2f}) "
            f"on {best.accuracy.n_images} images. Nothing was published; calibrate on more images like those of the "
            "camera, try another --calibrator, or raise --max-drop"
        )
    return records, first


def _with_plan(
    material: Material,
    made: Made,
    deployment: Deployment,
    offers: Sequence[Offer],
    builder: Builder,
    progress: Progress,
) -> Made:
    """`made` with the plan that `builder` makes of the offers."""
    began = time.perf_counter()
    plans = make_plans(
        offers,
        builder,
        material.bundle_dir,
        material.work_dir,
        TensorRtOptions(),
        TimingOptions(),
        on_fallback="warn",
        progress=progress,
    )
    (material.bundle_dir / AUDIT_NAME).write_bytes(report_to_json(plans.audit))
    stage = stage_of_plans(plans, time.perf_counter() - began)
    final = next(offer.model for offer in offers if offer.record.name == plans.chosen.name)
    notes = (*deployment.notes, *plans.notes, *plans.problems)
    return dataclasses.replace(
        made,
        final=dataclasses.replace(final, history=(*final.history, stage)),
        engine=EngineRecord(plans.engine.backend, plans.engine.path.name, plans.engine.fingerprint),
        audit=plans.audit,
        deployment=dataclasses.replace(
            deployment, chosen=plans.chosen.name, measurements=plans.measurements, notes=notes
        ),
    )
