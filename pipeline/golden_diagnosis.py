"""What went wrong between a camera and the network's input: the known mistakes, tried one by one.

Every mistake is a place in one of four lists (what the values mean, the picture's geometry, its colours, its range).
The combination that explains what came out, with the fewest mistakes, is named. What the live path gave is read back
into levels of 0 to 255, so that one limit holds for all of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.artifacts import PreprocessSpec
from pipeline.errors import DataError
from pipeline.preprocess import affine, to_network_pixels

__all__ = ["Handed", "diagnose", "to_levels"]

_EXPLAINED_LEVELS = 3.0
"""Mean difference at which a mistake explains the pixels: other libraries' filters differ from Pillow's by less, a wrong
channel or crop by ten times more."""
_MISTAKE_LEVELS = 0.25
"""What each further mistake has to explain, in mean levels."""
_STRIDE = 3
"""Every third pixel each way is compared: a hundred combinations in a tenth of the time."""

Levels = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Handed:
    """A golden frame (uint8 HWC RGB), its right pixels (uint8 HWC in the bundle's order), and what came out."""

    image: NDArray[np.uint8]
    expected: NDArray[np.uint8]
    result: NDArray[Any]


def to_levels(
    result: NDArray[Any],
    expected: NDArray[np.uint8],
    spec: PreprocessSpec,
    color: Literal["RGB", "BGR"],
    takes_pixels: bool,
) -> Levels | None:
    """A right result as pixels in the order of `expected`, float32 HWC; ``None`` where dtype or shape exclude it.

    Args:
        result: without the batch dimension.
        expected: uint8 HWC in order `color`.
        spec: of the bundle.
        color: the bundle's ``input_color``.
        takes_pixels: whether the engine takes uint8 HWC in order `color`; else it takes normalized float32 in
            ``spec.layout`` and ``spec.color``.
    """
    if takes_pixels:
        return (
            result.astype(np.float32) if result.dtype == np.uint8 and result.shape == expected.shape else None
        )
    hwc = result.transpose(1, 2, 0) if spec.layout == "NCHW" and result.ndim == 3 else result
    if hwc.shape != expected.shape or hwc.dtype.kind != "f":
        return None
    scale, shift = affine(spec)
    levels = ((hwc - shift) / scale).astype(np.float32)
    return levels if color == spec.color else levels[..., ::-1]


def diagnose(
    handed: Sequence[Handed], spec: PreprocessSpec, color: Literal["RGB", "BGR"], takes_pixels: bool
) -> str:
    """A sentence that names the mistake, with what to change; or what was tried in vain."""
    layout = "NHWC" if takes_pixels else spec.layout
    first = handed[0]
    hwc = [_as_hwc(item.result, item.expected.shape) for item in handed]
    if any(array is None for array in hwc):
        wanted = first.expected.shape if layout == "NHWC" else (3, *first.expected.shape[:2])
        return (
            f"The size is wrong: it gives {first.result.dtype} of shape {first.result.shape}, the engine takes "
            f"{wanted}; resize and crop with pipeline.preprocess.to_network_pixels"
        )
    results = [array[::_STRIDE, ::_STRIDE].astype(np.float64) for array in hwc if array is not None]
    best: tuple[float, float, tuple[str, ...]] | None = None
    values = dict(_readings(spec, color, takes_pixels))
    for picture, order, brightness in itertools.product(_pictures(handed, spec, color), (1, -1), _RANGES):
        geometry, pixels = picture
        shown = [
            _RANGES[brightness](array[::_STRIDE, ::_STRIDE, ::order].astype(np.float64)) for array in pixels
        ]
        for meaning, read in values.items():
            difference = _distance([read(array) for array in results], shown)
            swapped = "channels swapped: red and blue have changed places" if order == -1 else ""
            mistakes = tuple(filter(None, (meaning, swapped, brightness, geometry)))
            score = difference + _MISTAKE_LEVELS * len(mistakes)
            if best is None or score < best[0]:
                best = (score, difference, mistakes)
    assert best is not None, "there is always the right picture to compare with"
    low, high = min(float(a.min()) for a in results), max(float(a.max()) for a in results)
    found = f"{first.result.dtype} values from {low:.3g} to {high:.3g}"
    transposed = first.result.shape != hwc[0].shape if hwc[0] is not None else False
    mistakes = best[2]
    if transposed != (layout == "NCHW"):
        mistakes = (*mistakes, f"axes in the wrong order: the engine takes {layout}")
    if best[1] > _EXPLAINED_LEVELS:
        nearest = ", ".join(best[2]) or "the right preprocessing"
        return (
            f"No known mistake explains it ({found}); nearest is {nearest}, {best[1]:.0f} levels off on average. "
            "Prepare frames with pipeline.preprocess.to_network_pixels"
        )
    if not mistakes:
        if first.result.dtype.kind == "f" and takes_pixels:
            return f"The values are right, the type is not: {found}, the engine takes uint8"
        return (
            f"The picture is right on average ({best[1]:.2f} levels off, {found}): it is resampled or rounded otherwise. "
            "Prepare frames with pipeline.preprocess.to_network_pixels"
        )
    return f"What explains it: {'; '.join(mistakes)} ({found})"


def _as_hwc(result: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any] | None:
    """The result as height, width, channels, from either order of axes; ``None`` of another size."""
    if result.shape == shape:
        return result
    if result.ndim == 3 and (*result.shape[1:], result.shape[0]) == shape:
        transposed: NDArray[Any] = result.transpose(1, 2, 0)
        return transposed
    return None


def _readings(
    spec: PreprocessSpec, color: Literal["RGB", "BGR"], takes_pixels: bool
) -> Iterator[tuple[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]]]:
    """Ways to read values back into levels in order `color`; the right one has no name."""
    scale, shift = affine(spec)

    def denormalized(x: NDArray[np.float64]) -> NDArray[np.float64]:
        return (x - shift) / scale

    def in_order(x: NDArray[np.float64]) -> NDArray[np.float64]:
        """From the network's order, in which normalized values come, to the bundle's."""
        return x if color == spec.color else x[..., ::-1]

    if takes_pixels:
        yield "", lambda x: x
        yield "range: values from 0 to 1 where the engine takes 0 to 255", lambda x: x * 255.0
        yield "range: values from −1 to 1 where the engine takes 0 to 255", lambda x: (x + 1.0) * 127.5
        yield (
            "normalization twice: the values are normalized already, and the engine normalizes by itself",
            lambda x: in_order(denormalized(x)),
        )
        return
    yield "", lambda x: in_order(denormalized(x))
    yield "normalization missing: values from 0 to 255 that the engine takes normalized", in_order
    yield (
        "normalization missing: values from 0 to 1, mean and standard deviation were not applied",
        lambda x: in_order(x * 255.0),
    )
    yield (
        "normalization twice: the normalized values were normalized again",
        lambda x: in_order(denormalized(denormalized(x))),
    )


def _pictures(
    handed: Sequence[Handed], spec: PreprocessSpec, color: Literal["RGB", "BGR"]
) -> Iterator[tuple[str, list[NDArray[np.uint8]]]]:
    """The right pixels, and what each mistake of geometry would have made of the frames."""
    expected = [item.expected for item in handed]
    yield "", expected
    yield "the picture is upside down", [array[::-1] for array in expected]
    yield "the picture is mirrored", [array[:, ::-1] for array in expected]
    yield "the picture is turned by 180°", [array[::-1, ::-1] for array in expected]
    for mistake, wrong in _wrong_specs(spec).items():
        try:
            yield mistake, [to_network_pixels(item.image, "RGB", wrong, color) for item in handed]
        except DataError:
            continue  # a combination that Pillow does not have is not what happened


def _wrong_specs(spec: PreprocessSpec) -> dict[str, PreprocessSpec]:
    """The bundle's geometry with one thing wrong, by what is wrong."""
    if spec.resize == "none":
        return {}
    other: Literal["shorter", "squash"] = "squash" if spec.resize == "shorter" else "shorter"
    asked = f"{spec.interpolation}, {'' if spec.antialias else 'not '}antialiased"
    wrong = {
        "crop: the frame is squashed to the network's size instead of resized and cropped": replace(
            spec, resize="squash", crop_fraction=1.0
        ),
        "crop and interpolation: squashed to the network's size with plain bilinear, as cv2.resize does by itself": replace(
            spec, resize="squash", crop_fraction=1.0, interpolation="bilinear", antialias=False
        ),
        f"resize: {other} where the bundle has {spec.resize}": replace(spec, resize=other),
        f"crop: the whole frame is taken where the bundle crops to {spec.crop_fraction:g}": replace(
            spec, crop_fraction=1.0
        ),
        f"interpolation: antialias={not spec.antialias} where the bundle has {asked}": replace(
            spec, antialias=not spec.antialias
        ),
    }
    for interpolation in ("nearest", "bilinear", "bicubic"):
        wrong[f"interpolation: {interpolation} where the bundle has {asked}"] = replace(
            spec, interpolation=interpolation
        )
    return {mistake: changed for mistake, changed in wrong.items() if changed != spec}


_RANGES: dict[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
    "": lambda x: x,
    "range: video levels (16 to 235) were not stretched to 0 to 255": lambda x: 16.0 + x * (219.0 / 255.0),
    "range: full levels were stretched as if they were video levels (16 to 235)": lambda x: np.clip(
        (x - 16.0) * (255.0 / 219.0), 0.0, 255.0
    ),
}


def _distance(results: Sequence[NDArray[np.float64]], shown: Sequence[NDArray[np.float64]]) -> float:
    """Mean difference in levels over all frames."""
    return float(np.mean([np.abs(a - b).mean() for a, b in zip(results, shown, strict=True)]))
