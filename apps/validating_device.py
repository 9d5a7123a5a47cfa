"""What ``edgefold validate`` judges of a bundle: the engine on its own device, or its graph emulated on this CPU.

`edgefold validate --as DEVICE` gives the accuracy that the bundle's network would have there, from the same
calibration, without the device. A bundle made for a device is emulated by itself where that device is not here.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from apps.emulation import EMULATOR, emulated
from apps.finishing import model_of_candidate
from apps.validating import Subject, subject_of_bundle, subject_of_models
from engines import get_backend
from pipeline.artifacts import ModelArtifact
from pipeline.bundle import Bundle
from pipeline.compile import FOLDED_NAME
from pipeline.contracts import EngineBackend
from pipeline.errors import UnsupportedError, UsageError
from pipeline.onnx_files import load_model, opset_of
from pipeline.targets import TARGETS, Target, find_target

__all__ = ["Judged", "folded_model", "judged_as", "judged_here"]

_CPU_ENGINE = "openvino"


@dataclass(frozen=True, slots=True)
class Judged:
    """What is judged, what runs its fp32 graph, and what the result has to say about it."""

    subject: Subject
    backend: EngineBackend
    notes: tuple[str, ...] = ()


def judged_here(bundle: Bundle, engine: str | None, work_dir: Path) -> Judged:
    """The bundle's engine; for a device's bundle without the device, its graph emulated.

    Args:
        bundle: opened.
        engine: a CPU's engine instead of the bundle's own.
        work_dir: for what emulation writes.

    Raises:
        UnsupportedError: the engine cannot be used here.
    """
    manifest = bundle.manifest
    if manifest.deployment is None:
        backend = get_backend(engine or manifest.ready_engine().backend)
        return Judged(subject_of_bundle(bundle, backend), backend)
    backend = get_backend(engine or _CPU_ENGINE)
    if manifest.engine is not None:
        try:
            plan_backend = get_backend(manifest.engine.backend)
            plan_backend.fingerprint()
        except UnsupportedError as error:
            why = str(error)
        else:
            subject = subject_of_bundle(bundle, backend)
            assert subject.final is not None, "a plan is never the folded graph"
            plan = dataclasses.replace(
                subject.final, backend=plan_backend.name, fingerprint=manifest.engine.fingerprint
            )
            return Judged(dataclasses.replace(subject, final=plan, final_backend=plan_backend), backend)
    else:
        why = "it has no plan yet"
    candidate = next(
        (record for record in manifest.deployment.candidates if record.name == manifest.deployment.chosen),
        manifest.deployment.candidates[0],
    )
    model = emulated(model_of_candidate(bundle, candidate), work_dir)
    note = f"emulated: candidate {candidate.name} for {manifest.target}, on this CPU as it is written, because {why}"
    return Judged(_emulation(bundle, backend, model, candidate.precision, manifest.target), backend, (note,))


def judged_as(bundle: Bundle, target_name: str, engine: str | None, work_dir: Path) -> Judged:
    """The bundle's network in the form it would have on another device, emulated.

    Args:
        bundle: opened; one with a calibration table.
        target_name: of `edgefold targets`, or what several such names begin with.
        engine: what runs the fp32 graph.
        work_dir: for what emulation writes.

    Raises:
        UnsupportedError: no such target.
        UsageError: the target is a CPU, or the bundle was never calibrated.
    """
    from calibration.table import table_from_json
    from calibration.tensorrt_form import TensorRTForms

    target = _target_like(target_name)
    if target.family != "tensorrt":
        raise UsageError(f"--as {target_name}: a CPU needs no emulation; leave --as out")
    if "calibration.json" not in bundle.manifest.files:
        raise UsageError(
            f"bundle {str(bundle.path)!r} has no calibration table, and int8 for {target_name} is derived from it; build "
            "the bundle with --precision int8"
        )
    backend = get_backend(engine or _CPU_ENGINE)
    forms = TensorRTForms(folded_model(bundle), table_from_json(bundle.read_bytes("calibration.json")))
    int8, _ = forms.int8(forms.placement(), work_dir / "model.int8.onnx")
    model = emulated(int8, work_dir)
    note = (
        f"emulated: int8 as {target_name} would run it (the rest in {forms.remainder}), on this CPU as it is written, "
        "from the bundle's own calibration"
    )
    return Judged(_emulation(bundle, backend, model, "int8", target_name), backend, (note,))


def _emulation(
    bundle: Bundle, backend: EngineBackend, model: ModelArtifact, precision: str, target: str
) -> Subject:
    subject = subject_of_models(
        folded_model(bundle),
        model,
        backend,
        precision=precision,
        num_classes=bundle.manifest.model.num_classes,
    )
    assert subject.final is not None, "an emulated graph is never the folded one"
    return dataclasses.replace(
        subject,
        labels=bundle.manifest.labels,
        final=dataclasses.replace(subject.final, backend=EMULATOR.name),
        final_backend=EMULATOR,
        emulates=target,
    )


def folded_model(bundle: Bundle) -> ModelArtifact:
    """The fp32 graph that a bundle carries."""
    manifest, path = bundle.manifest, bundle.file(FOLDED_NAME)
    return ModelArtifact(
        path=path,
        sha256=bundle.sha256(FOLDED_NAME),
        inputs=manifest.inputs,
        outputs=manifest.outputs,
        opset=opset_of(load_model(path)),
        preprocess=manifest.preprocess,
        input_color=manifest.input_color,
        labels=manifest.labels,
        history=manifest.stages,
    )


def _target_like(name: str) -> Target:
    """The target of that name, or the first of those whose names begin with it: all Orins compute alike."""
    try:
        return find_target(name)
    except UnsupportedError:
        family = [target for target in TARGETS if target.name.startswith(f"{name}-")]
        if not family:
            raise
        return family[0]
