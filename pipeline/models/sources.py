"""What a model spec names: a built-in network, a timm or torchvision model, a factory in a file.

Each becomes a `ModelSource`: how to build the module with a class count, where its public weights
are, and which preprocessing it brings. `pipeline.models.resolve` does the rest in one way for all.
"""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from pipeline.artifacts import PreprocessSpec
from pipeline.errors import ModelSpecError, WeightsError
from pipeline.models.checkpoints import load_state
from pipeline.models.factories import load_factory
from pipeline.models.library_preprocess import (
    Preprocessing,
    import_library,
    timm_preprocessing,
    torchvision_preprocessing,
)
from pipeline.models.registry import NETWORKS, Network
from pipeline.models.weights import ModelCard, bundled_tags, bundled_weights, card_beside, download

__all__ = ["ModelSource", "Pretrained", "imagenet_default", "open_source"]

_N_NEAR = 5
_IMAGENET_CLASSES = 1000
_DEFAULT_INPUT = 224
_DEFAULT_PREPROCESS = PreprocessSpec(
    (_DEFAULT_INPUT, _DEFAULT_INPUT),
    crop_fraction=0.875,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)
"""What most ImageNet training code does; printed as an assumption wherever it is used."""

# Auxiliary heads serve training alone. transform_input normalizes a second time inside the model;
# `torchvision_preprocessing` says it once, on the pixels, where it folds.
_TORCHVISION_ARGUMENTS: dict[str, dict[str, bool]] = {
    name: {"aux_logits": False, "init_weights": False, "transform_input": False}
    for name in ("googlenet", "inception_v3")
}
_AUXILIARY = ("AuxLogits.", "aux1.", "aux2.")


@dataclass(frozen=True, slots=True)
class Pretrained:
    """A module with its public weights."""

    module: nn.Module
    origin: str
    labels: tuple[str, ...] = ()
    preprocess: Preprocessing | None = None
    """Where these weights want another one than their architecture's default."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model spec understood, nothing built yet.

    Attributes:
        spec: as the user wrote it.
        name: short name for reports.
        build: ``build(num_classes)``; ``None`` leaves the count to the model.
        preprocess: of a module that `build` made.
        pretrained: fetches the public weights; ``None`` where there are none.
        dropped: key prefixes of heads in its checkpoints that inference does not use.
        bundled: the weights file that the name itself stands for.
        card: the model card of those weights, or of the weights file that was named.
        has_own_weights: whether the module may be used as `build` made it.
        tags: bundled weights of the same network, to offer.
        notes: what the user should know about the choice.
    """

    spec: str
    name: str
    build: Callable[[int | None], nn.Module]
    preprocess: Callable[[nn.Module], Preprocessing]
    pretrained: Callable[[], Pretrained] | None = None
    dropped: tuple[str, ...] = ()
    bundled: Path | None = None
    card: ModelCard | None = None
    has_own_weights: bool = False
    tags: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def open_source(spec: str, input_size: int | None, weights_file: Path | None) -> ModelSource:
    """Understands a model spec other than an ONNX file.

    Args:
        spec: a built-in name, ``timm:NAME``, ``torchvision:NAME``, ``path/to/file.py:factory``.
        input_size: side of the input, pixels; ``None``: the model's default.
        weights_file: the weights named, whose model card says how a built-in network was trained.

    Raises:
        ModelSpecError: it names nothing; near names are offered.
        UnsupportedError: timm or torchvision is not installed.
    """
    library, colon, name = spec.partition(":")
    if colon and library == "timm":
        return _timm_source(spec, name, input_size)
    if colon and library == "torchvision":
        return _torchvision_source(spec, name, input_size)
    path, colon, factory = spec.rpartition(":")
    if colon and path.endswith(".py"):
        return _factory_source(spec, Path(path), factory, input_size)
    network, dot, tag = spec.partition(".")
    if network in NETWORKS:
        if dot:
            own_weights, card = bundled_weights(network, tag)
            return _builtin_source(spec, NETWORKS[network], input_size, card, own_weights)
        beside = None if weights_file is None else card_beside(weights_file, network)
        return _builtin_source(spec, NETWORKS[network], input_size, beside, None)
    raise _unknown(spec)


# --- built-in networks ------------------------------------------------------------------------------


def _builtin_source(
    spec: str, network: Network, input_size: int | None, card: ModelCard | None, bundled: Path | None
) -> ModelSource:
    arguments: dict[str, Any] = {}
    notes = []
    if card is not None:
        # The stem is the one that was trained, whatever the size asked for now.
        trained_size, num_classes = card.input_size, card.num_classes
        arguments = {"width": card.width} if network.has_width else {}
        base, source = card.preprocess, f"model card of the {spec} weights"
        if bundled is None:
            notes.append("preprocessing and labels are those of the model card beside the weights")
    else:
        trained_size, num_classes = input_size or network.input_size, network.num_classes
        base, source = network.preprocess, f"default of {network.name}"
    preprocess = Preprocessing(_resized(base, input_size), source, assumed=card is None)

    def build(wanted: int | None) -> nn.Module:
        return network.build(wanted or num_classes, trained_size, **arguments)

    def pretrained() -> Pretrained:
        timm = import_library("timm")
        donor = download(network.name, lambda: timm.create_model(network.timm_name, pretrained=True))
        module = build(None)
        origin = f"pretrained ({donor.pretrained_cfg['architecture']}.{donor.pretrained_cfg['tag']} of timm)"
        dropped = load_state(module, donor.state_dict(), origin, network.dropped)
        public = timm_preprocessing(donor, input_size)
        return Pretrained(module, origin, _timm_labels(donor), public, dropped)

    if network.has_low_resolution_stem(trained_size):
        notes.append(
            f"at {trained_size} pixels {network.name} takes the low-resolution stem of arXiv 1512.00567 "
            "(section 8): weights trained with the 299-pixel stem load but mean something else"
        )
    return ModelSource(
        spec,
        spec,
        build,
        lambda _: preprocess,
        pretrained if network.timm_name else None,
        network.dropped,
        bundled,
        card,
        tags=bundled_tags(network.name),
        notes=tuple(notes),
    )


def imagenet_default(input_hw: tuple[int, int]) -> Preprocessing:
    """The preprocessing of a model that declares none."""
    return Preprocessing(replace(_DEFAULT_PREPROCESS, input_hw=input_hw), "ImageNet defaults", assumed=True)


def _resized(spec: PreprocessSpec, input_size: int | None) -> PreprocessSpec:
    return spec if input_size is None else replace(spec, input_hw=(input_size, input_size))


# --- timm and torchvision ---------------------------------------------------------------------------


def _timm_source(spec: str, name: str, input_size: int | None) -> ModelSource:
    timm = import_library("timm")
    if not timm.is_model(name):
        raise _no_such(spec, "timm model", (f"timm:{known}" for known in _timm_names()))
    try:
        config = timm.get_pretrained_cfg(name)
    except RuntimeError as error:  # an unknown tag of a known model
        base = name.partition(".")[0]
        known = (f"timm:{known}" for known in timm.list_pretrained(f"{base}*"))
        raise _no_such(spec, "timm model", known) from error
    # Vision transformers hold a position embedding of one grid; timm resamples it to another.
    is_fixed = input_size is not None and bool(config.fixed_input_size)
    arguments: dict[str, Any] = {"img_size": input_size} if is_fixed else {}

    def build(num_classes: int | None) -> nn.Module:
        classes = num_classes or config.num_classes or _IMAGENET_CLASSES
        module: nn.Module = timm.create_model(name, num_classes=classes, **arguments)
        return module

    def pretrained() -> Pretrained:
        if not config.num_classes:
            raise WeightsError(
                f"timm publishes {name} as a feature extractor without a classifier; give weights that were "
                "fine-tuned, with --weights FILE"
            )
        module = download(name, lambda: timm.create_model(name, pretrained=True, **arguments))
        return Pretrained(module, f"pretrained (timm {name}, tag {config.tag})", _timm_labels(module))

    return ModelSource(
        spec,
        name,
        build,
        lambda module: timm_preprocessing(module, input_size),
        pretrained if config.has_weights else None,
        _AUXILIARY,
    )


def _timm_labels(module: Any) -> tuple[str, ...]:
    data = import_library("timm.data")
    subset = data.infer_imagenet_subset(module)
    return tuple(data.ImageNetInfo(subset).label_descriptions()) if subset else ()


def _torchvision_source(spec: str, name: str, input_size: int | None) -> ModelSource:
    models = import_library("torchvision").models
    if name not in _torchvision_names():
        raise _no_such(spec, "torchvision model", (f"torchvision:{known}" for known in _torchvision_names()))
    arguments = _TORCHVISION_ARGUMENTS.get(name, {})
    weights = models.get_model_weights(name).DEFAULT
    preprocess = torchvision_preprocessing(name, weights, input_size, "transform_input" in arguments)

    def build(num_classes: int | None) -> nn.Module:
        classes = num_classes or len(weights.meta["categories"])
        module: nn.Module = models.get_model(name, weights=None, num_classes=classes, **arguments)
        return module

    def pretrained() -> Pretrained:
        # weights_only: torchvision's own default would unpickle.
        state = download(
            name, lambda: weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
        )
        module = build(None)
        origin = f"pretrained (torchvision {type(weights).__name__}.{weights.name})"
        dropped = load_state(module, state, origin, _AUXILIARY)
        return Pretrained(module, origin, tuple(weights.meta["categories"]), notes=dropped)

    notes: tuple[str, ...] = ()
    if arguments:
        notes = (
            f"torchvision's {name} normalizes once more inside (transform_input); that is said in the "
            "preprocessing instead: mean 0.5, std 0.5",
        )
    return ModelSource(
        spec, name, build, lambda _: preprocess, pretrained, _AUXILIARY if arguments else (), notes=notes
    )


# --- a factory in a Python file ---------------------------------------------------------------------


def _factory_source(spec: str, path: Path, name: str, input_size: int | None) -> ModelSource:
    factory = load_factory(path, name)

    def preprocess(module: nn.Module) -> Preprocessing:
        declared = factory.declared(module, "edgefold_preprocess")
        if declared is not None:
            own = _validated_preprocess(spec, declared)
            return Preprocessing(_resized(own, input_size), f"edgefold_preprocess of {path.name}")
        if isinstance(getattr(module, "pretrained_cfg", None), dict):  # a timm model inside the factory
            return timm_preprocessing(module, input_size)
        size = input_size or _DEFAULT_INPUT
        return imagenet_default((size, size))

    return ModelSource(
        spec, f"{path.stem}:{name}", factory.build, preprocess, dropped=_AUXILIARY, has_own_weights=True
    )


def _validated_preprocess(spec: str, declared: Any) -> PreprocessSpec:
    from pydantic import TypeAdapter, ValidationError

    if isinstance(declared, PreprocessSpec):
        return declared
    try:
        return TypeAdapter(PreprocessSpec).validate_python(declared)
    except ValidationError as error:
        raise ModelSpecError(f"edgefold_preprocess of {spec} is not a PreprocessSpec: {error}") from error


# --- names that are not there -----------------------------------------------------------------------


def _no_such(spec: str, kind: str, known: Iterable[str]) -> ModelSpecError:
    # Names are compared without their library, which every candidate here has in common.
    by_name = {candidate.partition(":")[2]: candidate for candidate in known}
    near = difflib.get_close_matches(spec.partition(":")[2], by_name, n=_N_NEAR, cutoff=0.5)
    hint = f"; near: {', '.join(by_name[name] for name in near)}" if near else ""
    return ModelSpecError(f"no {kind} is called {spec!r}{hint}")


def _unknown(spec: str) -> ModelSpecError:
    path = Path(spec)
    if path.suffix == ".py":
        return ModelSpecError(f"{spec!r} names a file but no factory in it: write {spec}:FACTORY")
    if path.is_file():
        return ModelSpecError(
            f"{spec!r} is not a model: give a name or path/to/file.py:factory, and weights with --weights {spec}"
        )
    builtin = [*NETWORKS, *(f"{name}.{tag}" for name in NETWORKS for tag in bundled_tags(name))]
    near = difflib.get_close_matches(spec, builtin, n=_N_NEAR)
    for library, names in (("timm", _timm_names), ("torchvision", _torchvision_names)):
        near += [f"{library}:{name}" for name in difflib.get_close_matches(spec, names(), n=2, cutoff=0.8)]
    hint = f"; near: {', '.join(near)}" if near else ""
    return ModelSpecError(
        f"no model is called {spec!r}{hint}. A model is a built-in name ({', '.join(NETWORKS)}), timm:NAME, "
        "torchvision:NAME, path/to/file.py:factory, or an existing .onnx file"
    )


def _timm_names() -> list[str]:
    return list(import_library("timm").list_models()) if importlib.util.find_spec("timm") else []


def _torchvision_names() -> list[str]:
    if not importlib.util.find_spec("torchvision"):
        return []
    models = import_library("torchvision").models
    return list(models.list_models(module=models))
