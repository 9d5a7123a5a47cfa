"""Which of the calibration images corrections are made from: as many as help and fit into memory, from all over."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from calibration.correction.layerwise import bytes_per_image
from pipeline.contracts import Batches

__all__ = ["FEWEST", "images_that_fit", "spread", "take_images"]

FEWEST = 8
_MAX_IMAGES = 1024
"""As many as the paper on adaptive rounding takes."""
_HELD_BYTES = 2 * 2**30
"""What the images of a reconstruction may take at once, in both of its runs: with PyTorch in the same process, a build
stays within 4 GB."""


def take_images(batches: Batches, share: float, at_most: int, multiple_of: int) -> NDArray[np.uint8]:
    """An even selection of the images of a pass, as one array.

    Args:
        batches: uint8 NHWC.
        share: of the images, at most 1; at least `FEWEST` are taken.
        at_most: however many there are.
        multiple_of: the model's batch size, where that is fixed; else 1.
    """
    taken: list[NDArray[np.uint8]] = []
    n_seen = 0
    every = 1
    for image in (image for batch in batches() for image in batch):
        if n_seen % every == 0:
            taken.append(image.copy())
        n_seen += 1
        if len(taken) > 2 * at_most:  # every second of them, and from now on half as many
            taken, every = taken[::2], 2 * every
    wanted = min(at_most, len(taken), max(round(share * n_seen), FEWEST))
    wanted = wanted // multiple_of * multiple_of
    chosen = np.linspace(0, len(taken), wanted, endpoint=False).astype(np.int64)
    return np.stack([taken[index] for index in chosen]) if wanted else np.empty((0, 1, 1, 3), np.uint8)


def images_that_fit(model: ir.Model) -> int:
    """How many images a reconstruction can hold between two layers."""
    # Two runs: float32 in the reference, a quarter of that where values are quantized.
    each = bytes_per_image(model) * 5 // 4
    return max(FEWEST, min(_MAX_IMAGES, _HELD_BYTES // max(each, 1)))


def spread(images: NDArray[np.uint8], wanted: int) -> NDArray[np.uint8]:
    """`wanted` of the images, from all over: a data set often comes class by class."""
    wanted = min(wanted, len(images))
    chosen: NDArray[np.uint8] = images[np.linspace(0, len(images), wanted, endpoint=False).astype(np.int64)]
    return chosen
