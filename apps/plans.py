"""Plans for a device: candidates built, timed where the device is here, and the fastest within the budget kept."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

from engines.measure import run_alternating, worker_command
from engines.tensorrt.api import Flavour, TensorRtApi, load_api
from engines.tensorrt.audit import AuditReport, check_int8, require_int8
from engines.tensorrt.backend import INSPECTOR_NAME, KERNEL_LOG_NAME, TensorRtBackend, read_build_record
from engines.tensorrt.builder import find_device
from engines.tensorrt.device import DeviceIdentity
from engines.tensorrt.inspected import audit_build_log, audit_engine
from engines.tensorrt.options import TensorRtOptions
from engines.tensorrt.predict import predict_audit
from pipeline.artifacts import EngineArtifact, EngineOptions, ModelArtifact
from pipeline.contracts import Progress
from pipeline.errors import EngineError, UnsupportedError
from pipeline.manifest import CandidateRecord, Measurement
from pipeline.onnx_files import load_model

__all__ = ["RTX_ONLY", "Builder", "Offer", "Plans", "TimingOptions", "find_builder", "make_plans"]

RTX_ONLY = "the plan loads in TensorRT-RTX only; edgefold finish with TensorRT on the device replaces it"
_FLAVOURS: tuple[Flavour, ...] = ("tensorrt", "tensorrt_rtx")


@dataclass(frozen=True, slots=True)
class Offer:
    """A candidate graph, and what the manifest says of it."""

    record: CandidateRecord
    model: ModelArtifact


@dataclass(frozen=True, slots=True)
class Builder:
    """What compiles plans here for a compute capability. ``device`` is ``None`` on a machine without it."""

    api: TensorRtApi
    sm: int
    device: DeviceIdentity | None


@dataclass(frozen=True, slots=True)
class TimingOptions:
    """How candidates are timed: ``rounds`` processes each, in turns, of ``seconds`` each."""

    seconds: float = 3.0
    rounds: int = 3


@dataclass(frozen=True, slots=True)
class Plans:
    """The plan that was kept, every one that was built, and what speaks against the one that was kept."""

    engine: EngineArtifact
    chosen: CandidateRecord
    measurements: tuple[Measurement, ...]
    audit: AuditReport
    problems: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Built:
    offer: Offer
    engine: EngineArtifact
    folder: Path
    measurement: Measurement


def find_builder(sm: int, asked: Flavour | None = None) -> Builder:
    """What can compile for `sm` on this machine: TensorRT on the device itself, else TensorRT-RTX.

    Args:
        sm: compute capability of the target, times ten.
        asked: only this flavour.

    Raises:
        UnsupportedError: nothing here can; says why of each flavour.
    """
    device = find_device()
    obstacles = []
    for flavour in (asked,) if asked else _FLAVOURS:
        try:
            return _builder(flavour, sm, device)
        except UnsupportedError as error:
            obstacles.append(str(error))
    raise UnsupportedError(
        f"nothing here compiles a plan for SM {sm}: "
        + "; ".join(obstacles)
        + ". Run `edgefold finish` on the "
        "target itself, with its TensorRT"
    )


def _builder(flavour: Flavour, sm: int, device: DeviceIdentity | None) -> Builder:
    api = load_api(flavour)
    if api.compute_capabilities:
        if sm not in api.compute_capabilities:
            raise UnsupportedError(
                f"{api.title} compiles for SM {', '.join(map(str, api.compute_capabilities))}, not for {sm}"
            )
        return Builder(api, sm, device if device is not None and device.sm == sm else None)
    if device is None:
        raise UnsupportedError(f"{api.title} compiles only for the GPU it finds, and finds none")
    if device.sm != sm:
        raise UnsupportedError(
            f"{api.title} compiles only for the GPU it finds: {device.name}, SM {device.sm}; the bundle is for SM {sm}"
        )
    return Builder(api, sm, device)


def make_plans(
    offers: Sequence[Offer],
    builder: Builder,
    out_dir: Path,
    work_dir: Path,
    options: TensorRtOptions,
    timing: TimingOptions,
    *,
    on_fallback: Literal["fail", "warn"],
    progress: Progress,
) -> Plans:
    """Build the candidates and keep one plan, with its build record, in `out_dir`.

    On the device every candidate is built and timed, and the fastest is kept. Without it there is nothing to
    choose by: the first candidate is built, and not timed.

    Args:
        offers: candidates within the budget, the preferred first.
        builder: what compiles.
        out_dir: gets the kept plan and its record.
        work_dir: for the plans that are not kept.
        options: for every plan alike.
        timing: how they are timed.
        on_fallback: whether an engine that is not the int8 engine asked for is an error or a note.
        progress: told of every build and measurement.

    Raises:
        EngineError: no candidate could be built, or `on_fallback` is ``fail`` and the engine fell back.
        UnsupportedError: an option that this TensorRT does not have.
    """
    timed = builder.device is not None
    built, failed = _build_all(offers if timed else offers[:1], builder, work_dir, options, progress)
    if timed:
        built = _time_all(built, builder.api.flavour, timing, progress)
    kept = min(built, key=lambda plan: plan.measurement.p50_ms or 0.0)
    audit, unread = _audit(kept)
    fastest = {
        precision: min(
            (
                b.measurement.p50_ms
                for b in built
                if b.offer.record.precision == precision and b.measurement.p50_ms
            ),
            default=None,
        )
        for precision in ("int8", "fp16")
    }
    problems: tuple[str, ...] = ()
    if any(offer.record.precision == "int8" for offer in offers):
        problems = check_int8(audit, int8_ms=fastest["int8"], fp16_ms=fastest["fp16"])
    if on_fallback == "fail":
        require_int8(problems)
    for file in kept.folder.iterdir():
        shutil.move(file, out_dir / file.name)
    engine = dataclasses.replace(kept.engine, path=out_dir / kept.engine.path.name)
    notes = (*failed, *unread, *((RTX_ONLY,) if builder.api.flavour == "tensorrt_rtx" else ()))
    return Plans(engine, kept.offer.record, tuple(b.measurement for b in built), audit, problems, notes)


def _build_all(
    offers: Sequence[Offer], builder: Builder, work_dir: Path, options: TensorRtOptions, progress: Progress
) -> tuple[list[_Built], list[str]]:
    backend = TensorRtBackend(builder.api.flavour, dataclasses.replace(options, sms=(builder.sm,)), progress)
    built: list[_Built] = []
    failed: list[str] = []
    error: EngineError | None = None
    for index, offer in enumerate(offers):
        progress("plans", index, len(offers))
        folder = work_dir / offer.record.name
        folder.mkdir()
        try:
            engine = backend.build(offer.model, folder, EngineOptions())
        except EngineError as failure:
            # Another candidate may still compile; which one did not is kept in the notes.
            error = error or failure
            failed.append(f"{offer.record.name} could not be built: {failure}")
            continue
        record = read_build_record(folder)
        measurement = Measurement(offer.record.name, record.size_bytes, record.seconds, None, None)
        built.append(_Built(offer, engine, folder, measurement))
    progress("plans", len(offers), len(offers))
    if error is not None and not built:
        raise error
    return built, failed


def _time_all(
    built: Sequence[_Built], flavour: Flavour, timing: TimingOptions, progress: Progress
) -> list[_Built]:
    options = EngineOptions(mode="latency", batch=1)
    commands = {
        plan.offer.record.name: worker_command(
            plan.engine.path, plan.engine.sha256, flavour, options, timing.seconds
        )
        for plan in built
    }
    total, done = len(commands) * timing.rounds, 0

    def advance(name: str, index: int) -> None:
        nonlocal done
        done += 1
        progress("timing", done, total)

    runs = run_alternating(commands, timing.rounds, advance)
    return [
        dataclasses.replace(
            plan,
            measurement=dataclasses.replace(
                plan.measurement,
                p50_ms=median(run["p50_ms"] for run in runs[plan.offer.record.name]),
                p99_ms=median(run["p99_ms"] for run in runs[plan.offer.record.name]),
            ),
        )
        for plan in built
    ]


def _audit(plan: _Built) -> tuple[AuditReport, tuple[str, ...]]:
    """What the library said of the kernels, from the engine or from its build log; else the prediction, and why."""
    graph = load_model(plan.offer.model.path)
    for name, audit in ((INSPECTOR_NAME, audit_engine), (KERNEL_LOG_NAME, audit_build_log)):
        if (plan.folder / name).is_file():
            try:
                return audit((plan.folder / name).read_text(encoding="utf-8"), graph), ()
            except EngineError as error:
                # A form of the output that is not known yet must not cost the user the plan.
                return predict_audit(graph), (f"the audit is predicted: {error}",)
    return predict_audit(graph), ()
