"""The crops on which the Inception papers judged their networks, made by the one preprocessing.

========  ==========================================================================================
crops     of one image
========  ==========================================================================================
1         the model's own preprocessing, as calibration and streaming have it
10        the shorter side resized to 8/7 of the input (256 for 224), its central square, and of that
          the four corners and the center, each also mirrored: Krizhevsky, Sutskever and Hinton, NIPS
          2012, section 4.1, to which arXiv 1409.4842 counts its 10
12        the same square, and besides the five crops the whole square resized to the input; mirrored
144       four scales (8/7, 9/7, 10/7 and 11/7: 256, 288, 320 and 352 for 224), of each the left,
          central and right square (top, central and bottom of an upright image), of each the same
          12: arXiv 1409.4842, section 7
========  ==========================================================================================

arXiv 1512.00567 (table 4) and 1602.07261 (tables 3 to 5) report 12 and 144 "as described in" 1409.4842, which
spells out the 144 only. 12 is taken to be one of its 4 x 3 squares, the central one of the smallest scale. For
inputs other than 224 no paper gives the scales; here they keep their ratio to the input, so that 299 has 342,
384, 427 and 470. The softmax is averaged over the crops, and over the networks of an ensemble (ibid.).

Interpolation, antialiasing and colour are the model's. Squares are cut from the whole resized image, as
`pipeline.preprocess` cuts its own crop.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.artifacts import PreprocessSpec, Sample
from pipeline.datasets import one_ahead
from pipeline.errors import DataError, UsageError
from pipeline.preprocess import crop_start, resized_hw, to_network_pixels

__all__ = ["CROP_COUNTS", "Crops", "View", "check_crops", "crops_of", "pixels_a_call", "seen_batches"]

Crops = Literal[1, 10, 12, 144]
CROP_COUNTS: tuple[Crops, ...] = (1, 10, 12, 144)

_SCALES_IN_SEVENTHS = (8, 9, 10, 11)

_Pixels = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class View:
    """How a network sees an image: the pixels of a preprocessing, in a channel order."""

    spec: PreprocessSpec
    color: Literal["RGB", "BGR"]


def check_crops(crops: int, spec: PreprocessSpec) -> Crops:
    """The number of crops, if there is such a protocol and this preprocessing can be cropped.

    Raises:
        UsageError: another number, an input that is not square, or preprocessing that does not resize.
    """
    if crops not in CROP_COUNTS:
        raise UsageError(f"--crops is one of {', '.join(map(str, CROP_COUNTS))}, got {crops}")
    height, width = spec.input_hw
    if crops > 1 and height != width:
        raise UsageError(
            f"--crops {crops} cuts squares, but the network takes {width}×{height} pixels; give --crops 1"
        )
    if crops > 1 and spec.resize == "none":
        raise UsageError(
            f"--crops {crops} resizes images to {8 * width // 7} pixels and more, but the preprocessing of this "
            'network does not resize; give --crops 1, or build with resize "shorter" in --preprocess FILE'
        )
    return crops


def pixels_a_call(batch_size: int, crops: Crops) -> int:
    """The largest batch up to `batch_size` that whole images fill, so that an engine compiled for one
    batch size never runs on filled-up places: of 12 crops and a batch of 16 it is 12, of 144 it is 16."""
    together = max(1, batch_size // crops) * crops
    return max(size for size in range(1, min(batch_size, together) + 1) if together % size == 0)


def crops_of(image: _Pixels, view: View, crops: Crops) -> Iterator[_Pixels]:
    """The crops of an image, one at a time.

    Args:
        image: uint8 HWC, RGB, of any size.
        view: the network's preprocessing, of a square input unless `crops` is 1.
        crops: how many.

    Yields:
        uint8 HWC pixels of ``view.spec.input_hw``, channels in order ``view.color``.

    Raises:
        DataError: as `pipeline.preprocess.to_network_pixels`.
    """
    if crops == 1:
        yield to_network_pixels(image, "RGB", view.spec, view.color)
        return
    side = view.spec.input_hw[0]
    for sevenths in _SCALES_IN_SEVENTHS if crops == 144 else _SCALES_IN_SEVENTHS[:1]:
        scaled = _scaled(image, round(side * sevenths / 7), view)
        squares = _squares(scaled)
        for square in squares if crops == 144 else squares[1:2]:
            parts = _five(square, side)
            if crops != 10:
                whole = replace(view.spec, resize="squash", crop_fraction=1.0)
                parts.append(to_network_pixels(square, view.color, whole, view.color))
            for part in parts:
                yield part
                yield part[:, ::-1]


def seen_batches(
    samples: Iterable[Sample], views: Sequence[View], crops: Crops, n_images: int
) -> Iterator[tuple[list[Sample], dict[View, _Pixels]]]:
    """One pass: `n_images` samples at a time, and their pixels in each view.

    Decoding, resizing and cropping run one batch ahead in a thread of their own (Pillow releases the GIL).

    Yields:
        The samples, and for each view uint8 ``[samples * crops, H, W, 3]``, the crops of an image together.

    Raises:
        DataError: an image that cannot be preprocessed; names it.
    """

    def seen(batch: list[Sample]) -> tuple[list[Sample], dict[View, _Pixels]]:
        return batch, {view: _stacked(batch, view, crops) for view in views}

    def made() -> Iterator[tuple[list[Sample], dict[View, _Pixels]]]:
        batch: list[Sample] = []
        for sample in samples:
            batch.append(sample)
            if len(batch) == n_images:
                yield seen(batch)
                batch = []
        if batch:
            yield seen(batch)

    return one_ahead(made())


def _stacked(batch: Sequence[Sample], view: View, crops: Crops) -> _Pixels:
    pixels: list[_Pixels] = []
    for sample in batch:
        try:
            pixels += crops_of(sample.image, view, crops)
        except DataError as error:
            raise DataError(f"{sample.key}: {error}") from error
    return np.stack(pixels)


def _scaled(image: _Pixels, shorter: int, view: View) -> _Pixels:
    """The whole image with its shorter side at `shorter` pixels."""
    square = replace(view.spec, input_hw=(shorter, shorter), resize="shorter", crop_fraction=1.0)
    whole_hw = resized_hw(image.shape[0], image.shape[1], square)
    return to_network_pixels(image, "RGB", replace(square, input_hw=whole_hw, resize="squash"), view.color)


def _squares(image: _Pixels) -> list[_Pixels]:
    """Left, central and right; of an upright image top, central and bottom."""
    height, width = image.shape[:2]
    side = min(height, width)
    starts = [0, crop_start(max(height, width), side), max(height, width) - side]
    if width >= height:
        return [image[:, start : start + side] for start in starts]
    return [image[start : start + side] for start in starts]


def _five(square: _Pixels, side: int) -> list[_Pixels]:
    """The four corners and the center."""
    last = square.shape[0] - side
    middle = crop_start(square.shape[0], side)
    starts = [(0, 0), (0, last), (last, 0), (last, last), (middle, middle)]
    return [square[top : top + side, left : left + side] for top, left in starts]
