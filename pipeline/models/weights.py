"""Where weights come from: a file, the public hub, a seed, or the networks bundled here.

Weights are never guessed: every model says where its own came from, or the build is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.artifacts import PreprocessSpec
from pipeline.errors import ModelSpecError, UnsupportedError, WeightsError

__all__ = [
    "BUNDLED_DIR",
    "CARD_NAME",
    "ModelCard",
    "PretrainedWeights",
    "RandomWeights",
    "WeightsFile",
    "WeightsOption",
    "bundled_tags",
    "bundled_weights",
    "card_beside",
    "download",
    "noise_images",
    "parse_weights",
    "randomize",
    "seeded",
    "weights_required",
]

BUNDLED_DIR = Path(__file__).parent / "weights"
"""``<network>.<tag>.safetensors`` and, beside it, its model card ``<network>.<tag>.json``."""

CARD_NAME = "card.json"
"""The model card that `edgefold train` writes beside its weights."""

_CHOICES = "FILE (safetensors, or a torch checkpoint), pretrained, or random:SEED (for benchmarks)"
_N_IMAGES, _N_IMAGES_1D = 8, 16
"""Batch that random batch-norm statistics come from. A 1-d norm sees one value an image, so needs more."""
_CONTRAST = (0.3, 1.2)
"""Of those images; it must vary, as it does between photographs."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class WeightsFile:
    """``--weights FILE``."""

    path: Path


@dataclass(frozen=True, slots=True)
class PretrainedWeights:
    """``--weights pretrained``."""


@dataclass(frozen=True, slots=True)
class RandomWeights:
    """``--weights random:SEED``."""

    seed: int


WeightsOption = WeightsFile | PretrainedWeights | RandomWeights


def parse_weights(text: str) -> WeightsOption:
    """Reads the value of ``--weights``.

    Raises:
        WeightsError: no such file, or a seed that is not a non-negative integer.
    """
    if text == "pretrained":
        return PretrainedWeights()
    kind, colon, seed = text.partition(":")
    if kind == "random":
        if not colon or not seed.isdecimal():
            raise WeightsError(f"weights {text!r}: random weights need a seed, as in random:0")
        return RandomWeights(int(seed))
    path = Path(text)
    if not path.is_file():
        raise WeightsError(f"weights {text!r}: no such file; --weights takes {_CHOICES}")
    return WeightsFile(path)


def weights_required(spec: str, tags: tuple[str, ...], has_public: bool) -> WeightsError:
    """The error for a model whose weights nobody named."""
    choices = ["--weights FILE"]
    if has_public:
        choices.append("--weights pretrained (the public ones)")
    choices.append("--weights random:SEED (for benchmarks only)")
    choices += [f"the bundled network {spec}.{tag}" for tag in tags]
    return WeightsError(
        f"{spec} has no weights of its own and none are guessed: give {', or '.join(choices)}"
    )


# --- bundled networks -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What must be known of weights to run them; a card says more (data, recipe, accuracy)."""

    model: str
    input_size: int
    num_classes: int
    labels: tuple[str, ...]
    preprocess: PreprocessSpec
    width: float = 1.0


def bundled_tags(network: str) -> tuple[str, ...]:
    """The tags under which weights of `network` ship, sorted."""
    prefix, suffix = f"{network}.", ".safetensors"
    names = (path.name for path in BUNDLED_DIR.glob(f"{prefix}*{suffix}"))
    return tuple(sorted(name.removeprefix(prefix).removesuffix(suffix) for name in names))


def bundled_weights(network: str, tag: str) -> tuple[Path, ModelCard]:
    """The bundled weights ``network.tag`` and their card.

    Raises:
        ModelSpecError: there are none of that tag; names those there are.
        WeightsError: the card is missing or incomplete (a damaged installation).
    """
    tags = bundled_tags(network)
    if tag not in tags:
        known = ", ".join(f"{network}.{known}" for known in tags) or "none"
        raise ModelSpecError(f"no bundled weights {network}.{tag}; bundled for this network: {known}")
    path = BUNDLED_DIR / f"{network}.{tag}.safetensors"
    return path, _read_card(path.with_suffix(".json"), network)


def card_beside(weights: Path, network: str) -> ModelCard | None:
    """The card that `edgefold train` left beside a weights file, if it left one.

    Raises:
        WeightsError: there is one and it is incomplete, or of another network.
    """
    path = weights.with_name(CARD_NAME)
    return _read_card(path, network) if path.is_file() else None


def _read_card(path: Path, network: str) -> ModelCard:
    from pydantic import TypeAdapter

    try:
        # A plain dataclass ignores what else the card tells its reader.
        card = TypeAdapter(ModelCard).validate_python(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"the model card {path} cannot be used: {error}; restore it, or move it away from the weights"
        ) from error
    if card.model != network:
        raise WeightsError(
            f"the model card {path} is of {card.model}, and {network} was asked for: give that"
        )
    if len(card.labels) != card.num_classes:
        raise WeightsError(
            f"the model card {path} has {len(card.labels)} labels for {card.num_classes} classes"
        )
    return card


# --- public weights ---------------------------------------------------------------------------------


def download(what: str, fetch: Callable[[], T]) -> T:
    """Runs `fetch`, a library's own hub client.

    Raises:
        UnsupportedError: the hub cannot be reached and its cache does not have the file.
    """
    try:
        return fetch()
    except Exception as error:  # hub clients raise the types of whichever HTTP library they have
        reason = str(error).strip().splitlines()
        raise UnsupportedError(
            f"the public weights of {what} cannot be fetched ({type(error).__name__}: "
            f"{reason[0] if reason else 'no message'}); fetch them on a machine with a network and give the "
            "file with --weights FILE"
        ) from error


# --- random weights ---------------------------------------------------------------------------------


def seeded(seed: int, build: Callable[[], T]) -> T:
    """Runs `build` with torch's generator at `seed`, and puts the generator back."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def randomize(module: nn.Module, seed: int, input_hw: tuple[int, int]) -> None:
    """Gives a freshly built `module` batch norms that are worth folding, in place.

    Untouched ones (weight 1, bias 0, mean 0, variance 1) are the identity: the exporter drops every
    bias and activations shrink to nothing over the layers. Here weight and bias are drawn, and the
    statistics are those of one seeded batch, so that every layer's output keeps its spread (on
    photographs too: see `noise_images`).

    Args:
        module: built under `seeded`, so that its other weights follow from the seed too.
        seed: of the draws and of the batch.
        input_hw: input size, pixels.
    """
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d)]
    norms = [norm for norm in norms if norm.affine and norm.track_running_stats]
    if not norms:
        return
    count = _N_IMAGES_1D if any(isinstance(norm, nn.BatchNorm1d) for norm in norms) else _N_IMAGES
    generator = torch.Generator().manual_seed(seed)
    module.eval()
    momentum = [norm.momentum for norm in norms]
    with torch.no_grad():
        for norm in norms:
            norm.weight.uniform_(0.5, 1.5, generator=generator)
            norm.bias.normal_(0.0, 0.2, generator=generator)
            norm.momentum = 1.0  # the running statistics become the batch's
            norm.train()
        module(noise_images(generator, count, input_hw))
        for norm, original in zip(norms, momentum, strict=True):
            norm.momentum = original
            norm.eval()


def noise_images(generator: torch.Generator, count: int, input_hw: tuple[int, int]) -> Tensor:
    """``(count, 3, H, W)`` float32 within ±2: noise with the 1/f amplitude spectrum of photographs.

    Every octave has the same variance (Field 1987), colours are correlated, contrast varies. Statistics of
    flatter noise do not carry over to photographs: with them the last batch norm of a random Inception-v4
    had a standard deviation of 450 on photographs, with these one of 12.
    """
    height, width = input_hw
    octaves = []
    cell = max(input_hw)
    while cell >= 1:
        grid = (max(1, round(height / cell)), max(1, round(width / cell)))
        gray = torch.randn((count, 1, *grid), generator=generator)
        color = torch.randn((count, 3, *grid), generator=generator)
        octaves.append(functional.interpolate(0.8 * gray + 0.6 * color, size=input_hw, mode="bilinear"))
        cell //= 2
    contrast = torch.empty((count, 1, 1, 1)).uniform_(*_CONTRAST, generator=generator)
    images: Tensor = torch.stack(octaves).sum(0) / len(octaves) ** 0.5 * contrast
    return images.clamp(-2, 2)
