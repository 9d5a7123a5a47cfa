"""What the CUDA kernel does, worked out on the CPU once for a frame size: taps, weights, tiles.

The kernel must give the pixels of `pipeline.preprocess`, which are Pillow's: with antialiasing it filters with the
integers of `pipeline.resampling`. Without, Pillow's affine transform interpolates in double and truncates
(``Geometry.c``), and so does the kernel: in float a value that is a whole number would often fall a level short. GPUs
for graphics are slow at double, but it is a few dozen operations for each of the network's pixels.

Only the crop is computed, and nothing outside of what its pixels need is read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.artifacts import PixelFormat, PreprocessSpec, YuvCoding, YuvMatrix
from pipeline.errors import DataError
from pipeline.preprocess import affine, crop_start, resized_hw
from pipeline.resampling import Taps, cropped, filtered, identity, nearest, rows_first
from pipeline.yuv import color_factors

__all__ = ["CameraFormat", "KernelPlan", "Window", "bytes_per_pixel", "make_plan"]

CameraFormat = PixelFormat | Literal["NV12"]
"""``NV12``: a plane of luma, then one of half the size with U and V in turns; what Jetson's cameras deliver."""

_PIXEL_BYTES: dict[str, tuple[int, str]] = {
    "RGB": (3, "RGB"),
    "BGR": (3, "BGR"),
    "RGBA": (4, "RGB"),
    "BGRA": (4, "BGR"),
    "GRAY": (1, "GRAY"),
}
_MIN_SIDE = 2
_THREADS = 256
_SHARED_LIMIT_BYTES = 48 << 10
"""What every GPU gives a block without being asked for more."""
_TILES_HW = ((8, 32), (4, 32), (4, 16), (2, 16), (2, 8), (1, 8), (1, 4), (1, 1))
"""Output pixels of a block, best first. Smaller ones are for frames shrunk so far that the
source rows of a large tile do not fit into shared memory."""


@dataclass(frozen=True, slots=True)
class Window:
    """A part of a frame, in pixels."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True, slots=True)
class KernelPlan:
    """One launch of the kernel for frames of one size."""

    kernel: Literal["resample_filtered", "resample_neighbours"]
    words: NDArray[np.int32]
    """``struct Plan`` of ``preprocess.cu`` with its tables."""
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    output_bytes: int
    window: Window
    """Outside of it nothing of the frame is read. Of NV12 its numbers are even, for the chroma's sake."""


def make_plan(
    spec: PreprocessSpec,
    frame_hw: tuple[int, int],
    pixel_format: CameraFormat,
    *,
    color: Literal["RGB", "BGR"],
    folded: bool,
    yuv: YuvMatrix,
) -> KernelPlan:
    """Plan the kernel for one size of frame.

    Args:
        spec: the preprocessing.
        frame_hw: height and width of the frames.
        pixel_format: of the frames.
        color: the channel order that the graph takes.
        folded: the graph takes uint8 NHWC pixels; else float32, normalized, in ``spec.layout``.
        yuv: the matrix of NV12 frames, in limited range (luma 16 to 235). Cameras and SD video: BT.601; HD video: BT.709.

    Raises:
        DataError: a format or size that cannot be, or a spec that does not fit the frame; as
            `pipeline.preprocess.to_network_pixels`.
    """
    source_h, source_w = frame_hw
    _check_frame(source_h, source_w, pixel_format)
    target_h, target_w = spec.input_hw
    neighbours = not spec.antialias and spec.interpolation != "nearest" and spec.resize != "none"
    across, down = _axes(spec, source_h, source_w, neighbours)
    vertical_first = not neighbours and _vertical_first(spec, source_h, source_w)
    tile_h, tile_w, starts, counts, shared_bytes = _tiles(across, down, vertical_first, neighbours, frame_hw)
    scale, shift = affine(spec)
    header = [
        source_h, source_w, int(pixel_format == "NV12"), *_channels(pixel_format, color),
        *color_factors(YuvCoding(yuv))[1:],
        target_h, target_w, across[2].shape[1], down[2].shape[1], tile_h, tile_w, int(vertical_first),
        0 if folded else 1 if spec.layout == "NHWC" else 2,
    ]  # fmt: skip
    floats = np.concatenate([scale, shift]).astype(np.float32)
    tables = [table.ravel() for table in (*across, *down, starts, counts)]
    return KernelPlan(
        kernel="resample_neighbours" if neighbours else "resample_filtered",
        words=np.concatenate([np.array(header, np.int32), floats.view(np.int32), *tables]).astype(np.int32),
        grid=(math.ceil(target_w / tile_w), math.ceil(target_h / tile_h), 1),
        block=(_THREADS, 1, 1),
        shared_bytes=shared_bytes,
        output_bytes=target_h * target_w * 3 * (1 if folded else 4),
        window=_window(across, down, frame_hw, 2 if pixel_format == "NV12" else 1),
    )


def bytes_per_pixel(pixel_format: CameraFormat) -> int:
    """Bytes from one pixel of a row to the next; of the luma where there are planes."""
    return 1 if pixel_format == "NV12" else _PIXEL_BYTES[pixel_format][0]


def _check_frame(height: int, width: int, pixel_format: str) -> None:
    if pixel_format != "NV12" and pixel_format not in _PIXEL_BYTES:
        raise DataError(f"unknown pixel format {pixel_format!r}; known: {', '.join([*_PIXEL_BYTES, 'NV12'])}")
    if min(height, width) < _MIN_SIDE:
        raise DataError(f"a frame of {width}×{height} pixels is no image; the source is broken")
    if pixel_format == "NV12" and (height % 2 or width % 2):
        raise DataError(f"an NV12 frame of {width}×{height} cannot be: its sides are even")


def _channels(pixel_format: str, color: str) -> list[int]:
    """``pixel_bytes`` and ``channel`` of the plan."""
    if pixel_format == "NV12":
        return [1, *("RGB".index(letter) for letter in color)]
    n_bytes, letters = _PIXEL_BYTES[pixel_format]
    return [n_bytes, *(0 if letters == "GRAY" else letters.index(letter) for letter in color)]


def _axes(spec: PreprocessSpec, height: int, width: int, neighbours: bool) -> tuple[Taps, Taps]:
    """The taps of columns and of rows."""
    target_h, target_w = spec.input_hw
    if spec.resize == "none":
        if (height, width) != (target_h, target_w):
            raise DataError(
                f"a frame is {width}×{height}, the network takes {target_w}×{target_h} and its preprocessing "
                "does not resize: set the camera to that size, or set resize in the --preprocess file"
            )
        return identity(width), identity(height)
    if neighbours and spec.interpolation == "lanczos":
        raise DataError("lanczos interpolation exists only with antialias=true; use bicubic or set antialias")
    resized_h, resized_w = resized_hw(height, width, spec)
    if min(resized_h, resized_w) < 1:
        raise DataError(
            f"a frame of {width}×{height} would be resized to {resized_w}×{resized_h}; correct input_hw or "
            "crop_fraction in the --preprocess file"
        )
    left, top = crop_start(resized_w, target_w), crop_start(resized_h, target_h)
    if neighbours:
        n_taps = 2 if spec.interpolation == "bilinear" else 4
        return (
            _neighbours(width, resized_w, left, target_w, n_taps),
            _neighbours(height, resized_h, top, target_h, n_taps),
        )
    make = nearest if spec.interpolation == "nearest" else filtered(spec.interpolation)
    return (
        cropped(make(width, resized_w), left, target_w),
        cropped(make(height, resized_h), top, target_h),
    )


def _neighbours(size: int, resized: int, start: int, length: int, n_taps: int) -> Taps:
    """Where the interpolated positions begin (perhaps outside: the kernel clamps), and their fractions as words."""
    step = size / resized
    positions = (np.arange(length) + 0.5) * step + start * step
    inside = (positions >= 0.0) & (positions < size)
    centers = positions - 0.5
    first = np.floor(centers)
    words = np.zeros((length, n_taps), np.int32)
    words[:, :2] = (centers - first).view(np.int32).reshape(length, 2)
    first = np.clip(first - (n_taps // 2 - 1), -n_taps, size)
    return Taps(first.astype(np.int32), np.where(inside, n_taps, 0).astype(np.int32), words)


def _vertical_first(spec: PreprocessSpec, height: int, width: int) -> bool:
    if spec.resize == "none" or spec.interpolation == "nearest":
        return False
    return rows_first((height, width), resized_hw(height, width, spec))


def _window(across: Taps, down: Taps, frame_hw: tuple[int, int], multiple: int) -> Window:
    """What the taps reach, clamped as the kernel clamps them, on whole `multiple`s of pixels."""
    spans = []
    for (first, count, _), size in zip((down, across), frame_hw, strict=True):
        inside = count > 0
        begin = int(np.clip(first[inside].min(initial=size), 0, size - 1))
        end = int(np.clip((first + count)[inside].max(initial=0), begin + 1, size))
        begin -= begin % multiple
        spans.append((begin, end + -end % multiple - begin))
    (top, height), (left, width) = spans
    return Window(top, left, height, width)


def _tiles(
    across: Taps, down: Taps, vertical_first: bool, neighbours: bool, frame_hw: tuple[int, int]
) -> tuple[int, int, NDArray[np.int32], NDArray[np.int32], int]:
    """A block's tile (height, width), the part of the source each row or column of tiles uses, and its shared memory.

    The part is of the axis filtered last: the pixels between the passes are kept in shared memory.
    """
    first, count, _ = across if vertical_first else down
    for tile_h, tile_w in _TILES_HW:
        along, aside = (tile_w, tile_h) if vertical_first else (tile_h, tile_w)
        starts, counts = [], []
        for begin in range(0, len(first), along):
            inside = count[begin : begin + along] > 0
            starts_here = first[begin : begin + along][inside]
            ends_here = starts_here + count[begin : begin + along][inside]
            starts.append(int(starts_here.min()) if inside.any() else 0)
            counts.append(int(ends_here.max()) - starts[-1] if inside.any() else 0)
        shared_bytes = 0 if neighbours else max(counts) * aside * 3
        if shared_bytes <= _SHARED_LIMIT_BYTES:
            return tile_h, tile_w, np.array(starts, np.int32), np.array(counts, np.int32), shared_bytes
    raise DataError(
        f"frames of {frame_hw[1]}×{frame_hw[0]} cannot be shrunk to {len(across[0])}×{len(down[0])} in one step on "
        f"the GPU: one output pixel needs {max(counts)} source pixels along one axis; set the camera to a smaller size"
    )
