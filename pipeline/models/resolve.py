"""From a model spec and a weights option to a module that is ready to export.

Nothing is guessed in silence: where the weights and the preprocessing came from, what was unwrapped,
dropped or assumed is in `ResolvedModel.weights`, ``preprocess_source`` and ``notes``.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from pipeline.artifacts import PreprocessSpec
from pipeline.errors import ModelSpecError, WeightsError
from pipeline.models.checkpoints import head_size, load_state, read_checkpoint, refuse_non_finite, unwrap
from pipeline.models.library_preprocess import Preprocessing, ReferenceTransform
from pipeline.models.sources import ModelSource, imagenet_default, open_source
from pipeline.models.weights import (
    PretrainedWeights,
    RandomWeights,
    WeightsFile,
    WeightsOption,
    parse_weights,
    randomize,
    seeded,
    weights_required,
)
from pipeline.onnx_files import file_sha256, interface, load_model

__all__ = ["ResolvedModel", "read_preprocess", "resolve_model"]


@dataclass(frozen=True)
class ResolvedModel:
    """A model, its weights and its preprocessing.

    Attributes:
        spec: as the user wrote it.
        name: short name for reports.
        module: in eval mode, float32 NCHW to logits ``(N, num_classes)``; ``None`` for an ONNX file.
        onnx_path: the ONNX file; ``None`` for a module.
        preprocess: how an image becomes its input.
        preprocess_source: where that is from.
        reference_transform: the library's own evaluation transform (a PIL image to float32 CHW), where
            the preprocessing was read off one.
        num_classes: outputs.
        labels: class names where the weights bring them, else empty.
        weights: where the weights are from, in words.
        weights_sha256: of the weights file, where they are one.
        notes: what the user should be told.
    """

    spec: str
    name: str
    module: nn.Module | None
    onnx_path: Path | None
    preprocess: PreprocessSpec
    preprocess_source: str
    reference_transform: ReferenceTransform | None
    num_classes: int
    labels: tuple[str, ...]
    weights: str
    weights_sha256: str | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Weighted:
    """A module with weights in it."""

    module: nn.Module
    origin: str
    sha256: str | None = None
    labels: tuple[str, ...] = ()
    preprocess: Preprocessing | None = None
    notes: tuple[str, ...] = ()


def resolve_model(
    spec: str,
    *,
    weights: str | None,
    num_classes: int | None = None,
    input_size: int | None = None,
    preprocess_file: Path | None = None,
) -> ResolvedModel:
    """Loads the model that `spec` names.

    Args:
        spec: a built-in name (``inception_v3``), a bundled network (``inception_resnet_lite.signs``),
            ``timm:NAME``, ``torchvision:NAME``, ``path/to/file.py:factory``, or an ``.onnx`` file.
        weights: a file, ``pretrained``, ``random:SEED``; ``None`` where the spec brings its own.
        num_classes: the class count, where the weights do not tell it; checked where they do.
        input_size: side of the square input, pixels; ``None``: the model's default.
        preprocess_file: JSON of `PreprocessSpec` fields, which then overrides the model's own.

    Raises:
        ModelSpecError: the spec names nothing, the model is not an image classifier of one input, or
            it does not take the input size.
        WeightsError: no weights were named, or they are not this model's.
        UnsupportedError: public weights cannot be fetched, or a library is missing.
    """
    override = None if preprocess_file is None else read_preprocess(preprocess_file, input_size)
    if override is not None and override.input_hw[0] == override.input_hw[1]:
        input_size = override.input_hw[0]
    _check_counts(num_classes, input_size)
    if spec.endswith(".onnx"):
        return _resolve_onnx(spec, weights, num_classes, input_size, override, preprocess_file)

    option = None if weights is None else parse_weights(weights)
    source = open_source(spec, input_size, option.path if isinstance(option, WeightsFile) else None)
    weighted = _with_weights(source, option, num_classes, override)
    module = weighted.module.eval().requires_grad_(False)
    refuse_non_finite(module.state_dict(), weighted.origin)
    if override is not None:
        preprocess = Preprocessing(override, str(preprocess_file))
    else:
        preprocess = weighted.preprocess or source.preprocess(module)
    # What is fed to random weights is of no consequence.
    assumptions = () if isinstance(option, RandomWeights) else _preprocess_notes(preprocess)
    outputs = count_outputs(spec, module, preprocess.spec)
    _check_outputs(spec, outputs, num_classes)
    return ResolvedModel(
        spec=spec,
        name=source.name,
        module=module,
        onnx_path=None,
        preprocess=preprocess.spec,
        preprocess_source=preprocess.source,
        reference_transform=preprocess.reference,
        num_classes=outputs,
        labels=weighted.labels,
        weights=weighted.origin,
        weights_sha256=weighted.sha256,
        notes=(*source.notes, *weighted.notes, *assumptions),
    )


# --- weights ----------------------------------------------------------------------------------------


def _with_weights(
    source: ModelSource,
    option: WeightsOption | None,
    num_classes: int | None,
    override: PreprocessSpec | None,
) -> _Weighted:
    if source.bundled is not None:
        if option is not None:
            raise WeightsError(
                f"{source.spec} names its own weights, and --weights others: drop one of the two"
            )
        return _from_file(source, source.bundled, num_classes, f"bundled {source.spec}")
    if option is None:
        if not source.has_own_weights:
            raise weights_required(source.spec, source.tags, source.pretrained is not None)
        note = "no --weights: the weights are those the factory gave the module"
        return _Weighted(source.build(num_classes), "as built by the factory", notes=(note,))
    if isinstance(option, WeightsFile):
        return _from_file(source, option.path, num_classes, str(option.path))
    if isinstance(option, PretrainedWeights):
        return _from_hub(source, num_classes)
    return _from_seed(source, option, num_classes, override)


def _from_file(source: ModelSource, path: Path, num_classes: int | None, origin: str) -> _Weighted:
    checkpoint = read_checkpoint(path)
    module = source.build(num_classes)
    expected = module.state_dict()
    state, notes = unwrap(checkpoint, expected)
    main_head = {key: tensor for key, tensor in state.items() if not key.startswith(source.dropped)}
    sizes = head_size(expected, main_head)
    if sizes is not None:
        model_classes, file_classes = sizes
        if num_classes is not None or source.card is not None:
            who = "the model card" if num_classes is None else "--num-classes"
            raise WeightsError(
                f"the head in {origin} has {file_classes} classes and {who} says {model_classes}: correct {who}, "
                "or give weights of that many classes"
            )
        module = source.build(file_classes)
        notes = (
            *notes,
            f"{file_classes} classes, read from the head in the weights (default {model_classes})",
        )
    notes = (*notes, *load_state(module, state, origin, source.dropped))
    labels = () if source.card is None else source.card.labels
    return _Weighted(module, origin, checkpoint.sha256, labels, notes=notes)


def _from_hub(source: ModelSource, num_classes: int | None) -> _Weighted:
    if source.pretrained is None:
        raise WeightsError(
            f"there are no public weights of {source.spec} to fetch; give --weights FILE or random:SEED"
        )
    public = source.pretrained()
    count = len(public.labels)
    if num_classes is not None and count and count != num_classes:
        raise WeightsError(
            f"the public weights of {source.spec} have {count} classes and --num-classes says {num_classes}; "
            "give weights fine-tuned to yours with --weights FILE"
        )
    return _Weighted(public.module, public.origin, None, public.labels, public.preprocess, public.notes)


def _from_seed(
    source: ModelSource, option: RandomWeights, num_classes: int | None, override: PreprocessSpec | None
) -> _Weighted:
    module = seeded(option.seed, lambda: source.build(num_classes))
    input_hw = (override or source.preprocess(module).spec).input_hw
    with _refusing_input(source.spec, input_hw):
        randomize(module, option.seed, input_hw)
    note = "random weights: speed is real, predictions mean nothing"
    return _Weighted(module, f"random:{option.seed}", notes=(note,))


# --- checks -----------------------------------------------------------------------------------------


def _check_counts(num_classes: int | None, input_size: int | None) -> None:
    if num_classes is not None and num_classes < 2:
        raise ModelSpecError(f"--num-classes {num_classes}: a classifier has at least 2 classes")
    if input_size is not None and input_size < 1:
        raise ModelSpecError(f"--input-size {input_size}: the side of the input in pixels is positive")


@contextlib.contextmanager
def _refusing_input(spec: str, input_hw: tuple[int, int]) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever the model raises: shapes, assertions, its own checks
        reason = str(error).strip().splitlines() or ["no message"]
        height, width = input_hw
        raise ModelSpecError(
            f"{spec} does not take an input of {height}×{width} pixels ({type(error).__name__}: {reason[0]}); "
            "give the size it was made for with --input-size"
        ) from error


def count_outputs(spec: str, module: nn.Module, preprocess: PreprocessSpec) -> int:
    """Runs one image of noise through `module`, in eval mode, and counts the logits.

    Raises:
        ModelSpecError: it does not take the input, or returns something else than logits.
        WeightsError: they are not finite.
    """
    noise = torch.randn((1, 3, *preprocess.input_hw), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), _refusing_input(spec, preprocess.input_hw):
        output = module(noise)
    if not isinstance(output, torch.Tensor):
        raise ModelSpecError(
            f"{spec} returns {type(output).__name__}; wrap it in a module whose forward returns the logits alone"
        )
    if output.ndim != 2 or output.shape[0] != 1 or output.shape[1] < 2:
        raise ModelSpecError(
            f"{spec} returns shape {tuple(output.shape)} for one image; an image classifier returns (1, classes) "
            "with at least 2 classes"
        )
    if not bool(torch.isfinite(output).all()):
        raise WeightsError(
            f"{spec} returns NaN or infinite logits for an ordinary input; its weights are broken"
        )
    return int(output.shape[1])


def _check_outputs(spec: str, outputs: int, num_classes: int | None) -> None:
    if num_classes is not None and outputs != num_classes:
        raise ModelSpecError(f"{spec} has {outputs} outputs and --num-classes says {num_classes}; drop it")


# --- preprocessing ----------------------------------------------------------------------------------


def read_preprocess(path: Path, input_size: int | None = None) -> PreprocessSpec:
    """The PreprocessSpec in a JSON file.

    Raises:
        ModelSpecError: unreadable, not a PreprocessSpec, or another size than `input_size`.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        spec = TypeAdapter(PreprocessSpec).validate_python(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ModelSpecError(f"--preprocess {path} cannot be read: {error.strerror}") from error
    except (ValueError, ValidationError) as error:
        raise ModelSpecError(
            f"--preprocess {path} is not a JSON object of PreprocessSpec: {error}"
        ) from error
    if min(spec.input_hw) < 1 or not 0 < spec.crop_fraction <= 1 or 0 in spec.std:
        raise ModelSpecError(
            f"--preprocess {path}: input_hw {spec.input_hw}, crop_fraction {spec.crop_fraction}, std {spec.std}; "
            "sizes must be positive, crop_fraction above 0 and at most 1, and no std 0"
        )
    if input_size is not None and spec.input_hw != (input_size, input_size):
        height, width = spec.input_hw
        raise ModelSpecError(
            f"--input-size {input_size} and input_hw {height}×{width} of --preprocess {path} disagree; give one"
        )
    return spec


def _preprocess_notes(preprocess: Preprocessing) -> tuple[str, ...]:
    if not preprocess.assumed:
        return ()
    spec = preprocess.spec
    height, width = spec.input_hw
    return (
        f"preprocessing is assumed, not known ({preprocess.source}): {spec.resize} resize, {spec.interpolation}, "
        f"crop fraction {spec.crop_fraction:g} to {height}×{width}, {spec.color}, mean {spec.mean}, std "
        f"{spec.std}. A wrong one can cost 10 points of accuracy in silence: give --preprocess FILE",
    )


# --- ONNX files -------------------------------------------------------------------------------------


def _resolve_onnx(
    spec: str,
    weights: str | None,
    num_classes: int | None,
    input_size: int | None,
    override: PreprocessSpec | None,
    preprocess_file: Path | None,
) -> ResolvedModel:
    path = Path(spec)
    if not path.is_file():
        raise ModelSpecError(f"no such file: {path}")
    if weights is not None:
        raise WeightsError(f"{path} holds its own weights; drop --weights {weights}")
    inputs, outputs = interface(load_model(path))
    if len(inputs) != 1 or len(outputs) != 1:
        raise ModelSpecError(
            f"{path} has {len(inputs)} inputs and {len(outputs)} outputs; an image classifier has one of each"
        )
    shape = inputs[0].shape
    layout: Literal["NCHW", "NHWC"] | None = None
    if len(shape) == 4 and 3 in (shape[1], shape[3]):
        layout = "NCHW" if shape[1] == 3 else "NHWC"
    if inputs[0].dtype != "float32" or layout is None:
        raise ModelSpecError(
            f"the input {inputs[0].name!r} of {path} is {inputs[0].dtype} {shape}; float32 images are taken, as "
            "(N, 3, H, W) or (N, H, W, 3)"
        )
    sides = shape[2:] if layout == "NCHW" else shape[1:3]
    wanted = override.input_hw if override else (input_size, input_size)
    hw = tuple(side if isinstance(side, int) else want for side, want in zip(sides, wanted, strict=True))
    if any(want is not None and side != want for side, want in zip(hw, wanted, strict=True)):
        raise ModelSpecError(
            f"{path} takes {hw[0]}×{hw[1]} pixels, and {wanted[0]}×{wanted[1]} were asked for; drop --input-size"
        )
    height, width = hw
    if height is None or width is None:
        raise ModelSpecError(f"{path} takes images of any size {shape}; say which with --input-size N")

    classes = outputs[0].shape[-1]
    count = classes if isinstance(classes, int) else num_classes
    if count is None:
        raise ModelSpecError(
            f"{path} does not declare its class count {outputs[0].shape}; give --num-classes N"
        )
    _check_outputs(spec, count, num_classes)
    if override is None:
        preprocess = imagenet_default((height, width))
    else:
        preprocess = Preprocessing(override, str(preprocess_file))
    preprocess = replace(preprocess, spec=replace(preprocess.spec, layout=layout))
    return ResolvedModel(
        spec=spec,
        name=path.stem,
        module=None,
        onnx_path=path,
        preprocess=preprocess.spec,
        preprocess_source=preprocess.source,
        reference_transform=None,
        num_classes=count,
        labels=(),
        weights="in the ONNX file",
        weights_sha256=file_sha256(path),
        notes=_preprocess_notes(preprocess),
    )
