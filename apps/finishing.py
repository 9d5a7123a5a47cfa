"""What ``edgefold finish`` does: the plan of a bundle compiled on the device it is for, timed, audited, kept."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from apps.plans import Builder, Offer, Plans, TimingOptions, find_builder, make_plans
from apps.power_mode import read_power_mode
from engines.tensorrt.api import Flavour
from engines.tensorrt.audit import report_to_json
from engines.tensorrt.backend import PLAN_SIDE_FILES
from engines.tensorrt.options import TensorRtOptions
from pipeline.artifacts import ModelArtifact, StageRecord
from pipeline.bundle import Bundle, BundleWriter, open_bundle
from pipeline.contracts import Progress
from pipeline.errors import UsageError
from pipeline.manifest import CandidateRecord, Deployment, EngineRecord, Manifest
from pipeline.onnx_files import load_model, opset_of

__all__ = ["AUDIT_NAME", "FinishOptions", "Finished", "finish", "model_of_candidate", "stage_of_plans"]

AUDIT_NAME = "audit.json"


@dataclass(frozen=True, slots=True)
class FinishOptions:
    """The options of ``edgefold finish``, as given."""

    flavour: Flavour | None = None
    candidates: tuple[str, ...] = ()
    """Only these; empty: all that are within the budget."""
    on_fallback: Literal["fail", "warn"] = "fail"
    timing: TimingOptions = field(default_factory=TimingOptions)
    plan: TensorRtOptions = field(default_factory=TensorRtOptions)


@dataclass(frozen=True, slots=True)
class Finished:
    """The bundle with its plan, and how the plan was come by."""

    bundle: Bundle
    plans: Plans


def finish(path: Path, options: FinishOptions, progress: Progress) -> Finished:
    """Compile the plan of a bundle here, and put it into the bundle in one step.

    The bundle stays as it was unless everything succeeded.

    Raises:
        UsageError: the bundle is for a CPU, or has no such candidate.
        UnsupportedError: nothing here compiles for the bundle's target.
        EngineError: no candidate could be built, or the engine is not the int8 engine that was asked for.
        IntegrityError: the bundle is not what its manifest says.
    """
    bundle = open_bundle(path)
    deployment = bundle.manifest.deployment
    if deployment is None:
        raise UsageError(
            f"the bundle {str(path)!r} is for {bundle.manifest.target}: nothing is left to finish"
        )
    records = _candidates(deployment, options.candidates, path)
    builder = find_builder(deployment.sm, options.flavour)
    with ExitStack() as stack:
        # Opened first, as in a build: a folder that cannot be written is found before any work.
        writer = stack.enter_context(BundleWriter(path, overwrite=True))
        work_dir = Path(stack.enter_context(TemporaryDirectory(prefix="edgefold-finish-")))
        offers = [Offer(record, model_of_candidate(bundle, record)) for record in records]
        for name in bundle.manifest.files:
            if name not in _replaced(bundle.manifest):
                writer.add_file(name, bundle.file(name))
        began = time.perf_counter()
        plans = make_plans(
            offers,
            builder,
            writer.path,
            work_dir,
            options.plan,
            options.timing,
            on_fallback=options.on_fallback,
            progress=progress,
        )
        writer.add_file(AUDIT_NAME, report_to_json(plans.audit))
        stage = stage_of_plans(plans, time.perf_counter() - began)
        notes = (*_version_notes(deployment, builder), *plans.notes)
        manifest = dataclasses.replace(
            bundle.manifest,
            engine=EngineRecord(plans.engine.backend, plans.engine.path.name, plans.engine.fingerprint),
            precision=plans.chosen.precision,
            accuracy=plans.chosen.accuracy,
            stages=(*(s for s in bundle.manifest.stages if s.stage != stage.stage), stage),
            deployment=dataclasses.replace(
                deployment, chosen=plans.chosen.name, measurements=plans.measurements, notes=notes
            ),
        )
        return Finished(writer.commit(manifest), plans)


def model_of_candidate(bundle: Bundle, record: CandidateRecord) -> ModelArtifact:
    """The graph of a candidate, whose digest was verified when the bundle was opened."""
    manifest, path = bundle.manifest, bundle.file(record.file)
    return ModelArtifact(
        path=path,
        sha256=bundle.sha256(record.file),
        inputs=manifest.inputs,
        outputs=manifest.outputs,
        opset=opset_of(load_model(path)),
        preprocess=manifest.preprocess,
        input_color=manifest.input_color,
        labels=manifest.labels,
        history=manifest.stages,
    )


def stage_of_plans(plans: Plans, seconds: float) -> StageRecord:
    """The ``plan`` stage of a manifest: what was built from what, how fast it is, what its audit counted."""
    audit = plans.audit
    return StageRecord(
        "plan",
        inputs=(plans.engine.model_sha256,),
        outputs=(plans.engine.sha256,),
        seconds=round(seconds, 3),
        checks={
            "backend": plans.engine.backend,
            "candidate": plans.chosen.name,
            "timed": all(measurement.p50_ms is not None for measurement in plans.measurements),
            "power_mode": read_power_mode(),
            "audit": audit.source,
            "precisions": dict(audit.precisions),
            "adds_fused": [audit.adds.clean, audit.adds.total],
            "concats_free": [audit.concats.clean, audit.concats.total],
            "n_findings": len(audit.findings),
            "problems": list(plans.problems),
        },
    )


def _candidates(deployment: Deployment, names: Sequence[str], path: Path) -> list[CandidateRecord]:
    by_name = {record.name: record for record in deployment.candidates}
    unknown = [name for name in names if name not in by_name]
    if unknown:
        raise UsageError(
            f"the bundle {str(path)!r} has no candidate {unknown[0]!r}; it has {', '.join(by_name)}"
        )
    if names:
        return [by_name[name] for name in names]
    return [record for record in deployment.candidates if record.within_budget]


def _replaced(manifest: Manifest) -> set[str]:
    """The files of an earlier finish, or of the plan that the host made."""
    engine = set() if manifest.engine is None else {manifest.engine.file}
    return {*engine, AUDIT_NAME, *PLAN_SIDE_FILES}


def _version_notes(deployment: Deployment, builder: Builder) -> list[str]:
    version, expected = builder.api.version_text, deployment.tensorrt
    if builder.api.flavour == "tensorrt_rtx" or expected is None or version.startswith(expected):
        return []
    return [f"the bundle was made for TensorRT {expected}; the device has {version}"]
