"""Pillow's resampling as integers: the taps of each axis, the order of the passes, and a fast CPU kernel for them.

With antialiasing, Pillow filters along one axis and then along the other, with weights of 22 fractional bits, and
rounds to bytes in between. The same integers are computed here (``precompute_coeffs`` and ``normalize_coeffs_8bpc``
of Pillow's ``Resample.c``), so that whoever filters with them gives Pillow's pixels bit for bit but where a sine of
ours rounds otherwise (lanczos). Which axis comes first depends on Pillow's version, and on noise the two orders differ
by a level, or by twenty where one axis shrinks and the other grows: `rows_first` asks the Pillow that is installed.
``nearest`` is the case of one tap.

Three kernels use them: the CUDA kernel of `engines.tensorrt.preprocess`, and two in C, `resample` here and that of
`pipeline.planar`. `resample` reads a camera's buffer as it lies (three or four bytes a pixel, rows apart) and computes
the crop alone. Where they were not compiled (no C compiler at installation), `pipeline.preprocess` asks Pillow: the
same pixels, several times the work.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.kernels import kernels

__all__ = [
    "CTaps",
    "Taps",
    "cropped",
    "filtered",
    "identity",
    "nearest",
    "resample",
    "rows_first",
]

_FRACTION_BITS = 22


class Taps(NamedTuple):
    """For each output position along an axis: which source positions count, and how much."""

    first: NDArray[np.int32]
    """The first source position."""
    counts: NDArray[np.int32]
    """How many follow; 0 outside of the image, which Pillow fills with 0."""
    weights: NDArray[np.int32]
    """(positions, taps) with 22 fractional bits; beyond `counts` they are 0."""


def identity(size: int) -> Taps:
    """An axis that is left alone."""
    ones = np.ones(size, np.int32)
    return Taps(np.arange(size, dtype=np.int32), ones, np.full((size, 1), 1 << _FRACTION_BITS, np.int32))


def nearest(size: int, resized: int) -> Taps:
    """Pillow's ``NEAREST``, which has no filter."""
    step = size / resized
    # Pillow adds up the steps; a product would round otherwise.
    positions = np.add.accumulate(np.array([step * 0.5, *[step] * (resized - 1)]))
    _, ones, weights = identity(resized)
    return Taps(np.minimum(positions.astype(np.int32), size - 1), ones, weights)


def filtered(
    interpolation: Literal["bilinear", "bicubic", "lanczos"], shift: float = 0.0
) -> Callable[[int, int], Taps]:
    """The taps of an axis from its size and the size it is resized to, with antialiasing.

    Args:
        interpolation: the filter.
        shift: how far the samples lie before where Pillow has them, in source positions (chroma).
    """
    function, reach = _FILTERS[interpolation]

    def make(size: int, resized: int) -> Taps:
        if size == resized and not shift:  # Pillow leaves such an axis alone
            return identity(size)
        scale = size / resized
        stretch = max(scale, 1.0)
        support = reach * stretch
        centers = (np.arange(resized) + 0.5) * scale + shift
        first = np.maximum((centers - support + 0.5).astype(np.int64), 0)
        last = np.minimum((centers + support + 0.5).astype(np.int64), size)
        offsets = np.arange(math.ceil(support) * 2 + 1)
        distances = (offsets + first[:, np.newaxis] - centers[:, np.newaxis] + 0.5) * (1.0 / stretch)
        weights = np.where(offsets < (last - first)[:, np.newaxis], function(distances), 0.0)
        totals = np.add.accumulate(weights, axis=1)[:, -1:]  # one after the other, as Pillow adds
        weights = np.divide(weights, totals, out=weights, where=totals != 0)
        fixed = np.trunc(np.where(weights < 0, -0.5, 0.5) + weights * (1 << _FRACTION_BITS))
        return Taps(first.astype(np.int32), (last - first).astype(np.int32), fixed.astype(np.int32))

    return make


def _bilinear(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.maximum(1.0 - np.abs(x), 0.0)


def _bicubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    a, x = -0.5, np.abs(x)
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


def _lanczos(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where((x >= -3.0) & (x < 3.0), np.sinc(x) * np.sinc(x / 3), 0.0)


_FILTERS: dict[str, tuple[Callable[[NDArray[np.float64]], NDArray[np.float64]], float]] = {
    "bilinear": (_bilinear, 1.0),
    "bicubic": (_bicubic, 2.0),
    "lanczos": (_lanczos, 3.0),
}
"""Each filter with its reach in pixels of the smaller image."""


def cropped(taps: Taps, start: int, length: int) -> Taps:
    """The taps of `length` positions from `start`; outside of the image there are none."""
    first, count, weights = taps
    wanted = np.arange(start, start + length)
    inside = (wanted >= 0) & (wanted < len(first))
    index = np.clip(wanted, 0, len(first) - 1)
    return Taps(first[index], np.where(inside, count[index], 0).astype(np.int32), weights[index])


def rows_first(source_hw: tuple[int, int], resized_hw: tuple[int, int]) -> bool:
    """Whether the Pillow that is installed filters vertically before it filters horizontally."""
    (height, width), (resized_h, resized_w) = source_hw, resized_hw
    # ImagingResampleInner of Pillow 13: where the height loses more than twice what the width loses.
    by_size = height > resized_h and height - resized_h > 2 * (width - resized_w)
    return by_size and _pillow_orders_by_size()


@functools.cache
def _pillow_orders_by_size() -> bool:
    """Whether this Pillow has the rule of `rows_first`; older ones always begin with the horizontal pass.

    A white pixel among black ones, two rows to one and two columns to six. Horizontally first, the overshoot beside
    the edge is cut off at white, whose half is 128; vertically first, it is one of gray and stays (141).
    """
    image = Image.fromarray(np.array([[255, 0], [0, 0]], np.uint8))
    return int(np.asarray(image.resize((6, 1), Image.Resampling.BICUBIC)).max()) > 128


class CTaps(ctypes.Structure):
    """``struct taps`` of ``resample.h``; keeps its tables in memory."""

    _fields_ = (
        ("first", ctypes.c_void_p),
        ("count", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("length", ctypes.c_int32),
        ("width", ctypes.c_int32),
    )

    def __init__(self, taps: Taps) -> None:
        self.tables = [np.ascontiguousarray(table, np.int32) for table in taps]
        super().__init__(*(table.ctypes.data for table in self.tables), *self.tables[2].shape)


def _kernel() -> Callable[..., int] | None:
    """``edgefold_resample``; ``None`` where it was not compiled."""
    library = kernels()
    return None if library is None else library.edgefold_resample


def resample(
    image: NDArray[np.uint8],
    across: Taps,
    down: Taps,
    *,
    vertical_first: bool,
    reverse: bool,
    out: NDArray[np.uint8],
) -> None:
    """Filter `image` into `out`, the pixels being Pillow's.

    Args:
        image: uint8 HW or HW3 (perhaps a view of more channels); channels side by side, any row stride.
        across: taps of the columns of `out`, inside the width of `image`.
        down: of its rows, inside the height.
        vertical_first: see `rows_first`.
        reverse: the channels of `out` in opposite order.
        out: uint8, contiguous, as many rows and columns as there are taps, channels as `image`.

    Raises:
        ValueError: an array is not what is said above.
        MemoryError: there is no room for the pixels between the passes.
    """
    channels = 1 if image.ndim == 2 else image.shape[2]
    steps = image.strides[1:]
    if image.strides[0] < 0 or not (steps == (1,) or (steps[1:] == (1,) and steps[0] in (3, 4))):
        image = np.ascontiguousarray(image)
    expected = (len(down.first), len(across.first), *image.shape[2:])
    inside = all(
        int((taps.first + taps.counts).max()) <= size and int(taps.first.min()) >= 0
        for taps, size in ((across, image.shape[1]), (down, image.shape[0]))
    )
    bytes_only = image.dtype == out.dtype == np.uint8 and channels in (1, 3)
    if not (bytes_only and inside and out.shape == expected and out.flags.c_contiguous):
        raise ValueError(
            f"resample: {image.dtype} {image.shape} to {out.dtype} {out.shape}, expected uint8 to uint8 {expected}, "
            f"contiguous; taps inside the image: {inside}"
        )
    kernel = _kernel()
    assert kernel is not None
    axes = CTaps(across), CTaps(down)
    failed = kernel(
        image.ctypes.data, image.strides[0], image.strides[1], channels, *image.shape[:2],
        ctypes.addressof(axes[0]), ctypes.addressof(axes[1]), vertical_first, reverse, out.ctypes.data,
    )  # fmt: skip
    if failed:
        raise MemoryError(f"no memory to resize an image of {image.shape[1]}×{image.shape[0]}")
