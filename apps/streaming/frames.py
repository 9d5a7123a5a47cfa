"""What may enter the stream: the check at the boundary between a source and everything after it.

A camera driver, a decoder or a pipeline can hand over nothing at all, an empty array, a single
column of bytes, or 16-bit samples. Such a frame has no right answer, so it is dropped and counted
under its reason and never reaches the engine.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.artifacts import PixelFormat, YuvCoding

__all__ = ["as_image", "defect", "picture_hw"]

_FORMATS: dict[tuple[str, int], PixelFormat] = {
    ("RGB", 1): "GRAY",
    ("RGB", 3): "RGB",
    ("RGB", 4): "RGBA",
    ("BGR", 1): "GRAY",
    ("BGR", 3): "BGR",
    ("BGR", 4): "BGRA",
}


def defect(pixels: object) -> str | None:
    """Says why `pixels` cannot be a frame, as a short reason to count it under; ``None`` if it can.

    A frame is a uint8 array of shape (H, W) or (H, W, C) with H, W ≥ 2 and C in 1, 3, 4. Wider
    samples are refused, not narrowed: dropping the low bits of a 10-, 12- or 16-bit sensor needs to
    know which bits it uses. One-pixel-wide arrays are what a GStreamer pipeline delivers when it
    could not negotiate raw video.
    """
    if pixels is None:
        return "no image"
    if not isinstance(pixels, np.ndarray):
        return "not an array"
    if pixels.size == 0:
        return "empty image"
    if pixels.dtype != np.uint8:
        return f"{pixels.dtype} samples"
    channels = 1 if pixels.ndim == 2 else pixels.shape[-1]
    if pixels.ndim not in (2, 3) or channels not in (1, 3, 4) or min(pixels.shape[:2]) < 2:
        return "bad shape"
    return None


def as_image(
    pixels: NDArray[np.uint8], color: Literal["RGB", "BGR"], yuv: YuvCoding | None = None
) -> tuple[NDArray[np.uint8], PixelFormat]:
    """Names the format of an array that `defect` accepts, and makes it contiguous (values unchanged).

    Args:
        pixels: uint8 (H, W) or (H, W, C).
        color: the order in which the source delivers three channels.
        yuv: the coding of planes, which lie as a decoder's reader has put them.

    Returns:
        uint8 (H, W) with ``GRAY``, or (H, W, C) with the format of its channels; (3H/2, W) with ``I420``.
    """
    if yuv is not None:
        return np.ascontiguousarray(pixels), "I420"
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    channels = 1 if pixels.ndim == 2 else pixels.shape[2]
    return np.ascontiguousarray(pixels), _FORMATS[color, channels]


def picture_hw(image: NDArray[np.uint8], pixel_format: PixelFormat) -> tuple[int, int]:
    """Height and width of the picture that an array of `as_image` holds."""
    height, width = image.shape[:2]
    return (height * 2 // 3, width) if pixel_format == "I420" else (height, width)
