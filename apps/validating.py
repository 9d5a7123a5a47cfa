"""What ``edgefold validate`` and ``edgefold build --eval`` do: real engines put into a validation chain."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from apps.validating_reference import Against, Reference, find_reference
from pipeline.artifacts import EngineArtifact, EngineOptions, ModelArtifact, PreprocessSpec, StageRecord
from pipeline.bundle import Bundle
from pipeline.compile import FOLDED_NAME
from pipeline.contracts import Dataset, EngineBackend, Progress
from pipeline.datasets import open_dataset
from pipeline.errors import DataError, UsageError
from pipeline.judges import engine_judge, module_judge, module_sha256, transform_judge
from pipeline.overlap import OverlapWatch, image_digests
from pipeline.validation import Judge, judge_chain
from pipeline.validation_agreement import AgreementResult, judge_agreement
from pipeline.validation_crops import Crops, check_crops, pixels_a_call
from pipeline.validation_result import AssumedPart, ValidationResult
from pipeline.validation_state import ResumeFile

if TYPE_CHECKING:
    from pipeline.manifest import Manifest

__all__ = [
    "Against",
    "Reference",
    "Subject",
    "build_judges",
    "calibration_note",
    "compare_subject",
    "display_labels",
    "find_reference",
    "load_judge",
    "open_images",
    "open_labelled",
    "subject_of_bundle",
    "subject_of_models",
    "validate_subject",
]

_DISPLAY_NAMES = {
    "openvino": "OpenVINO",
    "onnxruntime": "ONNX Runtime",
    "tensorrt": "TensorRT",
    "tensorrt_rtx": "TensorRT-RTX",
}


@dataclass(frozen=True, slots=True)
class Subject:
    """What is judged: the graphs of a bundle, or of a build under way."""

    fp32: EngineArtifact
    """The folded graph."""
    final: EngineArtifact | None
    """What ships, where that is another graph than `fp32`."""
    precision: str
    """Of `final`: ``int8``."""
    preprocess: PreprocessSpec
    input_color: Literal["RGB", "BGR"]
    labels: tuple[str, ...]
    """By logit; empty where the model has no names for its classes."""
    num_classes: int
    fixed_batch: bool
    """Whether the graph takes one batch size only."""
    history: tuple[StageRecord, ...]
    final_backend: EngineBackend | None = None
    """What runs `final`, where another engine does than the fp32 graph."""
    emulates: str | None = None
    """The device whose accuracy `final` shows, where it only stands for the engine there."""


def validate_subject(
    subject: Subject,
    dataset: Dataset,
    backend: EngineBackend,
    reference: Reference,
    *,
    batch_size: int = 16,
    progress: Progress | None = None,
    notes: Sequence[str] = (),
    crops: Crops = 1,
    resume: ResumeFile | None = None,
    calibrated_on: Dataset | None = None,
) -> ValidationResult:
    """Judge the chain from the reference to what ships.

    Args:
        subject: `subject_of_bundle` or `subject_of_models`.
        dataset: `open_labelled`.
        backend: runs both graphs.
        reference: `find_reference`, or the module that is in memory anyway.
        batch_size: images (or crops) a call.
        progress: called after every batch.
        notes: carried into the result.
        crops: of each image: `pipeline.validation_crops`.
        resume: where the sums are kept meanwhile.
        calibrated_on: the calibration images; those among `dataset` are counted, and a note warns of them.

    Raises:
        UsageError: nothing to compare: no reference, and one graph only; or crops that cannot be cut.
        DataError, EngineError, IntegrityError: as `pipeline.validation.judge_chain`.
    """
    watch = None if calibrated_on is None else OverlapWatch(dataset, image_digests(calibrated_on))
    batch_size = pixels_a_call(batch_size, check_crops(crops, subject.preprocess))
    with ExitStack() as stack:
        judges, assumed = build_judges(
            stack, subject, backend, reference, batch_size, crops=crops, identified=resume is not None
        )
        result = judge_chain(
            judges,
            watch or dataset,
            spec=subject.preprocess,
            color=subject.input_color,
            labels=display_labels(subject, dataset),
            batch_size=batch_size,
            progress=progress,
            assumed=assumed,
            notes=notes,
            crops=crops,
            resume=resume,
        )
    overlap = watch.warning() if watch else None
    return dataclasses.replace(result, notes=(overlap, *result.notes)) if overlap else result


def compare_subject(
    subject: Subject,
    dataset: Dataset,
    backend: EngineBackend,
    reference: Reference,
    *,
    batch_size: int = 16,
    progress: Progress | None = None,
    notes: Sequence[str] = (),
    crops: Crops = 1,
    resume: ResumeFile | None = None,
) -> AgreementResult:
    """`validate_subject` on images without labels: what agrees with the reference, and how far logits moved.

    Raises:
        UsageError, DataError, EngineError, IntegrityError: as `validate_subject`.
    """
    batch_size = pixels_a_call(batch_size, check_crops(crops, subject.preprocess))
    with ExitStack() as stack:
        judges, assumed = build_judges(
            stack, subject, backend, reference, batch_size, crops=crops, identified=resume is not None
        )
        return judge_agreement(
            judges,
            dataset,
            spec=subject.preprocess,
            color=subject.input_color,
            labels=display_labels(subject, dataset),
            batch_size=batch_size,
            progress=progress,
            assumed=assumed,
            notes=notes,
            crops=crops,
            resume=resume,
        )


def build_judges(
    stack: ExitStack,
    subject: Subject,
    backend: EngineBackend,
    reference: Reference,
    batch_size: int,
    *,
    crops: Crops = 1,
    identified: bool = False,
) -> tuple[list[Judge], list[AssumedPart]]:
    """The chain, and the parts that it does not measure; `stack` closes the engines.

    Args:
        stack: closes the engines.
        subject: what is judged.
        backend: runs its graphs.
        reference: where the chain starts.
        batch_size: what the engines are compiled for, where they may be.
        crops: more than one leaves out the library's own transform.
        identified: digest the PyTorch module too, as `ResumeFile` needs.

    Raises:
        UsageError: fewer than two candidates.
        EngineError, IntegrityError: an engine cannot be loaded.
    """
    judges, assumed = _torch_judges(subject, reference, crops, identified)
    graphs = [(subject.fp32, backend, "fp32, folded", "export")]
    if subject.final is not None:
        final_backend = subject.final_backend or backend
        graphs.append((subject.final, final_backend, subject.precision, subject.precision.upper()))
    if len(judges) + len(graphs) < 2:
        raise UsageError(
            f"nothing to compare: the bundle holds an fp32 graph only, and PyTorch cannot take part: "
            f"{reference.why_not}"
        )
    for artifact, runs_it, precision, part in graphs:
        part = part if judges else "reference"
        judges.append(load_judge(stack, subject, artifact, runs_it, precision, part, batch_size))
    return judges, assumed


def load_judge(
    stack: ExitStack,
    subject: Subject,
    artifact: EngineArtifact,
    backend: EngineBackend,
    precision: str,
    part: str,
    batch_size: int,
) -> Judge:
    """One graph of a subject in its engine; `stack` closes it.

    Raises:
        EngineError, IntegrityError: the engine cannot be loaded.
    """
    # One stream that has every core: the batch itself is the parallelism. A batch size the engine
    # knows beforehand is faster than a free one.
    options = EngineOptions(mode="latency", batch=None if subject.fixed_batch else batch_size)
    runner = stack.enter_context(backend.load(artifact, options))
    name = f"{_DISPLAY_NAMES.get(backend.name, backend.name)} {precision}"
    if subject.emulates is not None and artifact is subject.final:
        name = f"{subject.emulates} {precision}, emulated"
    judge = engine_judge(runner, name=name, part=part, spec=subject.preprocess, color=subject.input_color)
    engine = artifact.fingerprint
    where = ", ".join((f"{engine.engine} {engine.version}", engine.device, *engine.capabilities))
    return dataclasses.replace(judge, identity=f"{artifact.sha256} in {where}")


def subject_of_bundle(bundle: Bundle, backend: EngineBackend) -> Subject:
    """The graphs of a bundle, with the digests that were verified on opening it."""
    manifest = bundle.manifest

    def artifact(name: str) -> EngineArtifact:
        digest = bundle.sha256(name)
        return EngineArtifact(bundle.file(name), digest, digest, backend.name, backend.fingerprint())

    ships = manifest.ready_engine().file
    return Subject(
        fp32=artifact(FOLDED_NAME),
        final=None if ships == FOLDED_NAME else artifact(ships),
        precision=manifest.precision,
        preprocess=manifest.preprocess,
        input_color=manifest.input_color,
        labels=manifest.labels,
        num_classes=manifest.model.num_classes,
        fixed_batch=isinstance(manifest.inputs[0].shape[0], int),
        history=manifest.stages,
    )


def subject_of_models(
    folded: ModelArtifact, final: ModelArtifact, backend: EngineBackend, *, precision: str, num_classes: int
) -> Subject:
    """The graphs of a build under way; `final` is `folded` again where fp32 ships."""

    def artifact(model: ModelArtifact) -> EngineArtifact:
        return EngineArtifact(model.path, model.sha256, model.sha256, backend.name, backend.fingerprint())

    return Subject(
        fp32=artifact(folded),
        final=None if final.sha256 == folded.sha256 else artifact(final),
        precision=precision,
        preprocess=folded.preprocess,
        input_color=folded.input_color,
        labels=final.labels,
        num_classes=num_classes,
        fixed_batch=isinstance(folded.inputs[0].shape[0], int),
        history=final.history,
    )


def open_labelled(data: str, labels: Sequence[str], num_classes: int, limit: int | None) -> Dataset:
    """Open labelled images for a model.

    Folders named otherwise than the labels (synset numbers, other spelling) open under their own
    names; `pipeline.validation.match_labels` then matches them, or says what does not fit. Data that
    gives indices (``class_index``, ``.npz``) needs no names at all.

    Args:
        data: what the user typed.
        labels: the model's, by logit; empty where it has none.
        num_classes: its logits.
        limit: at most this many images.

    Raises:
        DataError: as `open_dataset`, or the images carry no labels.
    """
    dataset = open_images(data, labels, num_classes, limit)
    if dataset.class_names is None:
        raise DataError(
            f"{data!r} has no labels, and accuracy needs them: give one folder a class, a folder with labels.csv, "
            "an .npz with labels, or synthetic:SEED[:COUNT]. Without labels, `edgefold validate --min-agreement "
            "PERCENT` compares the answers with those of fp32"
        )
    return dataset


def open_images(data: str, labels: Sequence[str], num_classes: int, limit: int | None) -> Dataset:
    """`open_labelled`, of images that may also have no labels: then ``class_names`` is ``None``."""
    dataset = _open_under(data, labels, limit) if labels else None
    dataset = dataset or open_dataset(data, limit=limit)
    names = dataset.class_names
    if names is not None and not labels and len(names) != num_classes:
        numbered = _open_under(data, tuple(map(str, range(num_classes))), limit)
        return numbered or dataset
    return dataset


def _open_under(data: str, names: Sequence[str], limit: int | None) -> Dataset | None:
    try:
        return open_dataset(data, labels=tuple(names), limit=limit)
    except DataError:
        return None


def calibration_note(manifest: Manifest, dataset: Dataset) -> str | None:
    """Whether a bundle is judged on the very data it was calibrated on; a build compares image by image."""
    calibration = manifest.calibration
    if calibration is None or calibration.dataset_sha256 != dataset.sha256:
        return None
    return (
        f"these are the {len(dataset):,} images that the engine was calibrated on: it looks better on them than it "
        "is; judge it on other images"
    )


def display_labels(subject: Subject, dataset: Dataset) -> tuple[str, ...]:
    """A name for every output: the model's, else the data's where they are as many, else numbers.

    Raises:
        DataError: the model's names are not as many as its outputs.
    """
    if subject.labels:
        if len(subject.labels) != subject.num_classes:
            raise DataError(
                f"{len(subject.labels)} class names for a model of {subject.num_classes} outputs: give one name an "
                "output, in their order"
            )
        return subject.labels
    names = dataset.class_names
    if names is not None and len(names) == subject.num_classes:
        return names
    return tuple(map(str, range(subject.num_classes)))


def _torch_judges(
    subject: Subject, reference: Reference, crops: Crops, identified: bool
) -> tuple[list[Judge], list[AssumedPart]]:
    model, spec, color = reference.model, subject.preprocess, subject.input_color
    why_not = reference.why_not
    if model is not None and model.module is None:
        why_not = "the model came as an ONNX file"
    if model is None or model.module is None:
        return [], [
            AssumedPart("preprocessing", f"not measured: {why_not}"),
            AssumedPart(
                "export", f"not measured on these images, for the same reason. {_parity(subject.history)}"
            ),
        ]
    identity = f"{module_sha256(model.module)} in PyTorch" if identified else ""
    shared = module_judge(model.module, name="PyTorch fp32", part="reference", spec=spec, color=color)
    shared = dataclasses.replace(shared, identity=identity)
    if model.reference_transform is None or model.preprocess != spec or crops > 1:
        reason = "same by construction: the model brings no transform of its own to differ from"
        if crops > 1:
            reason = f"not measured: the {crops} crops are cut by the same preprocessing for every stage"
        elif model.preprocess != spec:
            reason = "not measured: the bundle was built with other preprocessing than the model's own"
        return [shared], [AssumedPart("preprocessing", reason)]
    own = transform_judge(
        model.module,
        name="PyTorch fp32, library transform",
        part="reference",
        transform=model.reference_transform,
    )
    own = dataclasses.replace(own, identity=identity and f"{identity}, library transform")
    return [
        own,
        dataclasses.replace(shared, name="PyTorch fp32, shared preprocessing", part="preprocessing"),
    ], []


def _parity(history: Sequence[StageRecord]) -> str:
    """What the build's own check of the export found."""
    checks: dict[str, Any] = next((record.checks for record in history if record.stage == "export"), {})
    if "max_abs_error" not in checks:
        return "The build kept no check of it"
    return (
        f"At the build the ONNX graph was checked against PyTorch on random inputs: largest error "
        f"{checks['max_abs_error']:.2g} (limit {checks['max_abs_error_limit']:.2g}), SQNR {checks['sqnr_db']:.0f} dB"
    )
