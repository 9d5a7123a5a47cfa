"""A decoder's picture in planes of Y, U and V (``I420``), to the network's size.

Most of a picture's pixels are on their way to be averaged. So each plane is filtered to the network's size first, and
only the small picture is turned into colours: half the bytes to read, and no colour conversion of two million pixels.
The result is not that of the other order to the bit. Both are linear up to rounding and clipping, so where the colours
lie inside of what RGB can show they agree to a level or two, and where a picture's noise leaves it (saturated colours,
the ends of the range) the other order has clipped before it averaged. Chroma is interpolated from where its samples
lie by the filter itself, while a full conversion usually repeats each sample for four pixels. How far they differ is
measured by ``tests/pipeline/test_planar.py``.
"""

from __future__ import annotations

import ctypes
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipeline import resampling
from pipeline.artifacts import PreprocessSpec, YuvCoding
from pipeline.kernels import kernels
from pipeline.resampling import CTaps, Taps
from pipeline.yuv import color_factors

__all__ = ["PlanarResampler"]

_MIN_COLUMNS = 16
"""What the kernel reads at a time."""
_TAPS_A_GROUP = 4
_BYTES_A_WEIGHT = 3


class _Plane(ctypes.Structure):
    """``struct plane`` of ``planar.c``."""

    _fields_ = (
        ("pixels", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("across", ctypes.c_void_p),
        ("down", ctypes.c_void_p),
        ("across_groups", ctypes.c_void_p),
        ("down_groups", ctypes.c_void_p),
    )


class PlanarResampler:
    """Resizes ``I420`` images of one size. Made once, used by any thread.

    Args:
        spec: the geometry, antialiased, bilinear or bicubic.
        hw: height and width of the images.
        coding: of their planes.
        resized_hw: their size after the resize.
        crop: first row and column of the crop in it.
    """

    def __init__(
        self,
        spec: PreprocessSpec,
        hw: tuple[int, int],
        coding: YuvCoding,
        resized_hw: tuple[int, int],
        crop: tuple[int, int],
    ) -> None:
        assert spec.interpolation != "nearest"
        left_by = 0.25 if coding.chroma == "left" else 0.0
        axes: list[tuple[CTaps, ...]] = []
        self.fits = True
        """Whether the kernel takes images of this size."""
        for part in (1, 2):
            shifts = (left_by if part == 2 else 0.0, 0.0)
            across, down = (
                resampling.cropped(
                    resampling.filtered(spec.interpolation, shift)(size // part, resized), start, target
                )
                for shift, size, resized, start, target in zip(
                    shifts, hw[::-1], resized_hw[::-1], crop[::-1], spec.input_hw[::-1], strict=True
                )
            )
            self.fits = self.fits and _columns(across) >= _MIN_COLUMNS
            axes.append(
                tuple(map(CTaps, (across, down, _grouped(across, _begin(across)), _grouped(down, 0))))
            )
        self._axes = axes
        self._hw = hw
        self._out_shape = (*spec.input_hw, 3)
        self._factors = (ctypes.c_int32 * 6)(*color_factors(coding))
        self._pointers = [tuple(map(ctypes.addressof, tables)) for tables in axes]

    def resample(
        self, image: NDArray[np.uint8], color: Literal["RGB", "BGR"], out: NDArray[np.uint8]
    ) -> None:
        """Filters `image` into `out`.

        Args:
            image: uint8 (3H/2, W) of the size that was given, contiguous.
            color: the order of the channels of `out`.
            out: uint8 HWC of the network's size, contiguous.

        Raises:
            ValueError: an array is not what is said above, or the size is none that the kernel takes.
            MemoryError: there is no room for the pixels between the passes.
        """
        height, width = self._hw
        bytes_only = image.dtype == out.dtype == np.uint8
        contiguous = image.flags.c_contiguous and out.flags.c_contiguous
        shapes = image.shape == (height * 3 // 2, width) and out.shape == self._out_shape
        if not (bytes_only and contiguous and shapes and self.fits):
            raise ValueError(
                f"planes of {image.dtype} {image.shape} to {out.dtype} {out.shape}, expected uint8 "
                f"{(height * 3 // 2, width)} to {self._out_shape}, contiguous; the kernel takes such: {self.fits}"
            )
        at, n_luma = image.ctypes.data, height * width
        (luma, chroma) = self._pointers
        planes = (_Plane * 3)(
            _Plane(at, width, *luma),
            _Plane(at + n_luma, width // 2, *chroma),
            _Plane(at + n_luma * 5 // 4, width // 2, *chroma),
        )
        library = kernels()
        assert library is not None
        if library.edgefold_resize_planes(planes, self._factors, color == "RGB", out.ctypes.data):
            raise MemoryError(f"no memory to resize an image of {width}×{height}")


def _begin(across: Taps) -> int:
    """The first column of the source that any position uses."""
    used = across.counts > 0
    return int(across.first[used].min()) if used.any() else 0


def _columns(across: Taps) -> int:
    """How many columns of the source, from `_begin` on, lie up to the last that any position uses."""
    used = across.counts > 0
    return int((across.first + across.counts)[used].max()) - _begin(across) if used.any() else 0


def _grouped(taps: Taps, origin: int) -> Taps:
    """Taps for byte products, four at a time.

    Groups begin at multiples of four from `origin`. A weight is w0 + 2^8 w1 + 2^16 w2 with signed bytes, and a group has
    three words of four bytes: the w0 of its taps, their w1, their w2; 0 where there is no tap.

    Returns:
        The first group of each position, how many follow, and (positions, 3 · groups) words.
    """
    used, start = taps.counts > 0, np.where(taps.counts > 0, taps.first - origin, 0)
    n_positions, n_taps = taps.weights.shape
    table = np.zeros((n_positions, n_taps // _TAPS_A_GROUP + 2, _BYTES_A_WEIGHT, _TAPS_A_GROUP), np.int8)
    place = start[:, np.newaxis] % _TAPS_A_GROUP + np.arange(n_taps)
    rest = taps.weights
    for index in range(_BYTES_A_WEIGHT):
        low = rest.astype(np.int8)
        table[np.arange(n_positions)[:, np.newaxis], place // _TAPS_A_GROUP, index, place % _TAPS_A_GROUP] = (
            low
        )
        rest = (rest - low) >> 8
    first = start // _TAPS_A_GROUP
    counts = np.where(used, (start + taps.counts - 1) // _TAPS_A_GROUP - first + 1, 0)
    return Taps(
        first.astype(np.int32), counts.astype(np.int32), table.view(np.int32).reshape(n_positions, -1)
    )
