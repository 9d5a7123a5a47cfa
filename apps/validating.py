"""What ``edgefold validate`` and ``edgefold build --eval`` do: real engines put into a validation chain."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.artifacts import EngineArtifact, EngineOptions, ModelArtifact, PreprocessSpec, StageRecord
from pipeline.bundle import Bundle
from pipeline.compile import FOLDED_NAME
from pipeline.contracts import Dataset, EngineBackend, Progress
from pipeline.datasets import open_dataset
from pipeline.errors import DataError, EdgefoldError, UnsupportedError, UsageError, WeightsError
from pipeline.judges import engine_judge, module_judge, transform_judge
from pipeline.validation import Judge, judge_chain
from pipeline.validation_result import AssumedPart, ValidationResult

if TYPE_CHECKING:
    from pipeline.manifest import Manifest
    from pipeline.models.resolve import ResolvedModel

__all__ = [
    "Against",
    "Reference",
    "Subject",
    "build_judges",
    "find_reference",
    "open_labelled",
    "subject_of_bundle",
    "subject_of_models",
    "validate_subject",
]

Against = Literal["auto", "torch", "onnx"]

_DISPLAY_NAMES = {"openvino": "OpenVINO", "onnxruntime": "ONNX Runtime"}


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


@dataclass(frozen=True, slots=True)
class Reference:
    """The PyTorch module to start the chain from, or why there is none."""

    model: ResolvedModel | None
    why_not: str = ""


def validate_subject(
    subject: Subject,
    dataset: Dataset,
    backend: EngineBackend,
    reference: Reference,
    *,
    batch_size: int = 16,
    progress: Progress | None = None,
    notes: Sequence[str] = (),
) -> ValidationResult:
    """Judge the chain from the reference to what ships.

    Args:
        subject: `subject_of_bundle` or `subject_of_models`.
        dataset: `open_labelled`.
        backend: runs both graphs.
        reference: `find_reference`, or the module that is in memory anyway.
        batch_size: images a call.
        progress: called after every batch.
        notes: carried into the result.

    Raises:
        UsageError: nothing to compare: no reference, and one graph only.
        DataError, EngineError: as `pipeline.validation.judge_chain`.
    """
    with ExitStack() as stack:
        judges, assumed = build_judges(stack, subject, backend, reference, batch_size)
        return judge_chain(
            judges,
            dataset,
            spec=subject.preprocess,
            color=subject.input_color,
            labels=_display_labels(subject, dataset),
            batch_size=batch_size,
            progress=progress,
            assumed=assumed,
            notes=notes,
        )


def build_judges(
    stack: ExitStack, subject: Subject, backend: EngineBackend, reference: Reference, batch_size: int
) -> tuple[list[Judge], list[AssumedPart]]:
    """The chain, and the parts that it does not measure; `stack` closes the engines.

    Raises:
        UsageError: fewer than two candidates.
        EngineError, IntegrityError: an engine cannot be loaded.
    """
    spec, color = subject.preprocess, subject.input_color
    judges, assumed = _torch_judges(subject, reference)
    engine = _DISPLAY_NAMES.get(backend.name, backend.name)
    graphs = [(subject.fp32, f"{engine} fp32, folded", "export")]
    if subject.final is not None:
        graphs.append((subject.final, f"{engine} {subject.precision}", subject.precision.upper()))
    if len(judges) + len(graphs) < 2:
        raise UsageError(
            f"nothing to compare: the bundle holds an fp32 graph only, and PyTorch cannot take part: "
            f"{reference.why_not}"
        )
    # One stream that has every core: the batch itself is the parallelism. A batch size the engine
    # knows beforehand is faster than a free one.
    options = EngineOptions(mode="latency", batch=None if subject.fixed_batch else batch_size)
    for artifact, name, part in graphs:
        runner = stack.enter_context(backend.load(artifact, options))
        part = part if judges else "reference"
        judges.append(engine_judge(runner, name=name, part=part, spec=spec, color=color))
    return judges, assumed


def find_reference(manifest: Manifest, against: Against) -> Reference:
    """Load the PyTorch module a bundle was built from, if that can be done and proved.

    Weights from a file must have the SHA-256 that the manifest records. A model built by a Python
    file of the user's runs that file: only ``against="torch"`` does, so that looking at somebody
    else's bundle runs no code that it names.

    Args:
        manifest: of the bundle.
        against: ``torch`` insists, ``auto`` gives the reason where it cannot, ``onnx`` never tries.

    Raises:
        UnsupportedError, ModelSpecError, WeightsError: ``against="torch"`` and it cannot be done.
    """
    if against == "onnx":
        return Reference(None, "left out with --against onnx")
    try:
        if against == "auto" and manifest.model.spec.rpartition(":")[0].endswith(".py"):
            raise UsageError(
                f"the model is built by {manifest.model.spec}, Python code that runs only if you ask for it "
                "with --against torch"
            )
        return Reference(_load_reference(manifest))
    except EdgefoldError as error:
        if against == "torch":
            raise
        return Reference(None, str(error))


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
    dataset = _open_under(data, labels, limit) if labels else None
    dataset = dataset or open_dataset(data, limit=limit)
    if dataset.class_names is None:
        raise DataError(
            f"{data!r} has no labels, and accuracy needs them: give one folder a class, a folder with labels.csv, "
            "an .npz with labels, or synthetic:SEED[:COUNT]"
        )
    if not labels and len(dataset.class_names) != num_classes:
        numbered = _open_under(data, tuple(map(str, range(num_classes))), limit)
        return numbered or dataset
    return dataset


def _open_under(data: str, names: Sequence[str], limit: int | None) -> Dataset | None:
    try:
        return open_dataset(data, labels=tuple(names), limit=limit)
    except DataError:
        return None


def _display_labels(subject: Subject, dataset: Dataset) -> tuple[str, ...]:
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


def _torch_judges(subject: Subject, reference: Reference) -> tuple[list[Judge], list[AssumedPart]]:
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
    shared = module_judge(model.module, name="PyTorch fp32", part="reference", spec=spec, color=color)
    if model.reference_transform is None or model.preprocess != spec:
        reason = "same by construction: the model brings no transform of its own to differ from"
        if model.preprocess != spec:
            reason = "not measured: the bundle was built with other preprocessing than the model's own"
        return [shared], [AssumedPart("preprocessing", reason)]
    own = transform_judge(
        model.module,
        name="PyTorch fp32, library transform",
        part="reference",
        transform=model.reference_transform,
    )
    return [own, Judge("PyTorch fp32, shared preprocessing", "preprocessing", shared.logits)], []


def _parity(history: Sequence[StageRecord]) -> str:
    """What the build's own check of the export found."""
    checks: dict[str, Any] = next((record.checks for record in history if record.stage == "export"), {})
    if "max_abs_error" not in checks:
        return "The build kept no check of it"
    return (
        f"At the build the ONNX graph was checked against PyTorch on random inputs: largest error "
        f"{checks['max_abs_error']:.2g} (limit {checks['max_abs_error_limit']:.2g}), SQNR {checks['sqnr_db']:.0f} dB"
    )


def _load_reference(manifest: Manifest) -> ResolvedModel:
    source = manifest.model
    if source.spec.endswith(".onnx"):
        raise UsageError("the model came as an ONNX file")
    if importlib.util.find_spec("torch") is None:
        raise UnsupportedError("PyTorch is not installed here (pip install 'edgefold[build]')")
    from pipeline.models.resolve import resolve_model

    weights = source.weights_option
    if weights is not None and source.weights_sha256 is not None:
        _require_digest(Path(weights), source.weights_sha256)
    model = resolve_model(
        source.spec, weights=weights, num_classes=source.num_classes, input_size=source.input_size
    )
    if model.weights_sha256 != source.weights_sha256 or model.num_classes != source.num_classes:
        raise WeightsError(
            f"{source.spec} with weights {source.weights!r} is not what the bundle was built from (SHA-256 "
            f"{model.weights_sha256}, recorded {source.weights_sha256}); build the bundle again"
        )
    return model


def _require_digest(path: Path, expected: str) -> None:
    from pipeline.onnx_files import file_sha256

    if not path.is_file():
        raise WeightsError(f"the weights {str(path)!r} that the bundle was built from are not there")
    found = file_sha256(path)
    if found != expected:
        raise WeightsError(
            f"the weights {str(path)!r} have changed since the build (SHA-256 {found}, recorded {expected})"
        )
