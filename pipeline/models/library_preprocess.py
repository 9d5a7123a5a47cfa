"""The preprocessing that timm and torchvision models bring, as `PreprocessSpec`.

Each comes with the library's own evaluation transform, against which the one implementation
(`pipeline.preprocess`) is measured.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from pipeline.artifacts import Interpolation, PreprocessSpec
from pipeline.errors import ModelSpecError, UnsupportedError

__all__ = [
    "Preprocessing",
    "ReferenceTransform",
    "import_library",
    "timm_preprocessing",
    "torchvision_preprocessing",
]

ReferenceTransform = Callable[[Image.Image], NDArray[np.float32]]
"""A library's own evaluation transform: an image to float32 CHW, as the network takes it."""

_RESIZE_OF_CROP_MODE = {"center": "shorter", "squash": "squash"}


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """A spec, where it is from, and the library's transform it was read off (``None``: no library).

    ``assumed`` says that nothing ties it to these weights: a default that may not be what they were
    trained with.
    """

    spec: PreprocessSpec
    source: str
    reference: ReferenceTransform | None = None
    assumed: bool = False


def import_library(name: str) -> Any:
    """timm or torchvision, or a submodule of theirs; imported late, because it takes seconds.

    Raises:
        UnsupportedError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise UnsupportedError(
            f"{package} is not installed ({error}); pip install 'edgefold[build]'"
        ) from error


def timm_preprocessing(module: nn.Module, input_size: int | None) -> Preprocessing:
    """From ``module.pretrained_cfg``, as timm's own validation script reads it.

    Args:
        module: built by timm.
        input_size: overrides the configuration's, pixels.

    Raises:
        ModelSpecError: it wants something `PreprocessSpec` cannot express (``crop_mode`` border, an
            interpolation Pillow does not have, other than three channels).
    """
    data = import_library("timm.data")
    arguments = None if input_size is None else {"input_size": (3, input_size, input_size)}
    config = data.resolve_model_data_config(module, args=arguments)
    channels, height, width = config["input_size"]
    crop_mode, interpolation = config["crop_mode"], config["interpolation"]
    if channels != 3 or crop_mode not in _RESIZE_OF_CROP_MODE or interpolation not in get_args(Interpolation):
        raise ModelSpecError(
            f"timm's preprocessing of this model ({channels} channels, crop mode {crop_mode!r}, interpolation "
            f"{interpolation!r}) is not supported: 3 channels, crop mode center or squash, and "
            f"{', '.join(get_args(Interpolation))} are; give your own with --preprocess FILE"
        )
    spec = PreprocessSpec(
        input_hw=(height, width),
        resize=_RESIZE_OF_CROP_MODE[crop_mode],  # type: ignore[arg-type]
        interpolation=interpolation,
        crop_fraction=float(config["crop_pct"]),
        mean=_triple(config["mean"]),
        std=_triple(config["std"]),
    )
    transform = data.create_transform(**config)
    name = getattr(module, "pretrained_cfg", {}).get("architecture", "module")
    return Preprocessing(spec, f"timm pretrained_cfg of {name}", _as_reference(transform))


def torchvision_preprocessing(
    name: str, weights: Any, input_size: int | None, transform_input: bool
) -> Preprocessing:
    """From ``weights.transforms()`` of a torchvision weights enum member.

    Args:
        name: torchvision's name of the model.
        weights: the enum member.
        input_size: overrides the crop size, pixels; the resize keeps its ratio to the crop.
        transform_input: whether torchvision would normalize once more inside the model, from ImageNet's
            mean and std to 0.5 and 0.5. The composition is 0.5 and 0.5 on the pixels, which is what the
            spec then says; the module must be built without it.
    """
    standard = weights.transforms()
    crop, resize = int(standard.crop_size[0]), int(standard.resize_size[0])
    fraction = crop / resize
    if input_size is not None and input_size != crop:
        crop = input_size
        standard = weights.transforms(crop_size=crop, resize_size=math.floor(crop / fraction + 1e-6))
    mean, std = _triple(standard.mean), _triple(standard.std)
    spec = PreprocessSpec(
        input_hw=(crop, crop),
        interpolation=standard.interpolation.value,
        crop_fraction=fraction,
        mean=(0.5, 0.5, 0.5) if transform_input else mean,
        std=(0.5, 0.5, 0.5) if transform_input else std,
    )
    reference = _as_reference(standard)
    if transform_input:
        reference = _renormalized(reference, mean, std)
    return Preprocessing(spec, f"torchvision {type(weights).__name__}.{weights.name} of {name}", reference)


def _triple(values: Any) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue


def _as_reference(transform: Callable[[Image.Image], Any]) -> ReferenceTransform:
    def apply(image: Image.Image) -> NDArray[np.float32]:
        return np.asarray(transform(image.convert("RGB")), dtype=np.float32)

    return apply


def _renormalized(
    reference: ReferenceTransform, mean: tuple[float, ...], std: tuple[float, ...]
) -> ReferenceTransform:
    """`reference` followed by torchvision's ``transform_input``: ``x * (std / 0.5) + (mean - 0.5) / 0.5``."""
    scale = (np.asarray(std) / 0.5).astype(np.float32).reshape(3, 1, 1)
    shift = ((np.asarray(mean) - 0.5) / 0.5).astype(np.float32).reshape(3, 1, 1)

    def apply(image: Image.Image) -> NDArray[np.float32]:
        return reference(image) * scale + shift

    return apply
