"""Pictures in planes of Y, U and V (``I420``): what their bytes mean, and the same picture in BGR.

The factors are those of every conversion here, the CUDA kernel's included (`engines.tensorrt.preprocess_plan`).
"""

from __future__ import annotations

import ctypes
import functools

import numpy as np
from numpy.typing import NDArray

from pipeline.artifacts import YuvCoding
from pipeline.kernels import kernels

__all__ = ["color_factors", "planes_of", "planes_to_bgr", "rgb_to_planes"]

_BITS = 20
_KR_KB = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722)}


@functools.cache
def color_factors(coding: YuvCoding) -> tuple[int, ...]:
    """Level of black, then Y, V→R, U→G, V→G, U→B times 2^20.

    Limited range has 219 levels of luma and 224 of chroma. BT.601 in it has OpenCV's own integers (1.164, 1.596,
    −0.391, −0.813, 2.018), so that a frame which `cv2.cvtColor` converts gives the same pixels. The others follow from
    Kr and Kb [ITU-R BT.709-6, 3.2 and 3.4; ITU-T T.871, 7].
    """
    if coding.matrix == "bt601" and not coding.full_range:
        return 16, 1220542, 1673527, -409993, -852492, 2116026
    kr, kb = _KR_KB[coding.matrix]
    kg = 1 - kr - kb
    black, luma, chroma = (0, 1.0, 1.0) if coding.full_range else (16, 255 / 219, 255 / 224)
    red, blue = 2 * (1 - kr) * chroma, 2 * (1 - kb) * chroma
    factors = (luma, red, -blue * kb / kg, -red * kr / kg, blue)
    return black, *(round(factor * 2**_BITS) for factor in factors)


def planes_of(image: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8]]:
    """Y (H, W), U and V (H/2, W/2) of an ``I420`` image (3H/2, W), contiguous; views."""
    height, width = image.shape[0] * 2 // 3, image.shape[1]
    flat, n_luma = image.reshape(-1), height * width
    half = (height // 2, width // 2)
    return (
        flat[:n_luma].reshape(height, width),
        flat[n_luma : n_luma * 5 // 4].reshape(half),
        flat[n_luma * 5 // 4 :].reshape(half),
    )


def planes_to_bgr(image: NDArray[np.uint8], coding: YuvCoding) -> NDArray[np.uint8]:
    """An ``I420`` image (3H/2, W) as uint8 (H, W, 3) BGR; chroma is repeated for the pixels that share it."""
    image = np.ascontiguousarray(image)
    height, width = image.shape[0] * 2 // 3, image.shape[1]
    library = kernels()
    if library is None:
        return _planes_to_bgr(image, coding)
    out = np.empty((height, width, 3), np.uint8)
    factors = (ctypes.c_int32 * 6)(*color_factors(coding))
    if library.edgefold_planes_to_bgr(image.ctypes.data, height, width, factors, out.ctypes.data):
        raise MemoryError(f"no memory to convert an image of {width}×{height}")
    return out


def _planes_to_bgr(image: NDArray[np.uint8], coding: YuvCoding) -> NDArray[np.uint8]:
    """The same integers in NumPy."""
    black, luma, v_red, u_green, v_green, u_blue = color_factors(coding)
    y, u, v = (plane.astype(np.int32) for plane in planes_of(image))
    u, v = (np.repeat(np.repeat(plane - 128, 2, axis=0), 2, axis=1) for plane in (u, v))
    base = np.maximum(y - black, 0) * luma + (1 << (_BITS - 1))
    channels = (base + u_blue * u, base + u_green * u + v_green * v, base + v_red * v)
    bgr: NDArray[np.uint8] = np.clip(np.stack(channels, axis=2) >> _BITS, 0, 255).astype(np.uint8)
    return bgr


def rgb_to_planes(image: NDArray[np.uint8], coding: YuvCoding) -> NDArray[np.uint8]:
    """A picture (H, W, 3) in RGB with even sides, as the planes that a camera's encoder is given: ``I420`` (3H/2, W).

    Chroma is the mean of four pixels, which lies in the middle of them.
    """
    kr, kb = _KR_KB[coding.matrix]
    red, green, blue = (image[..., channel].astype(np.float64) for channel in range(3))
    luma = kr * red + (1 - kr - kb) * green + kb * blue
    black, luma_scale, chroma_scale = (0, 1.0, 1.0) if coding.full_range else (16, 219 / 255, 224 / 255)
    height, width = luma.shape
    planes = [black + luma * luma_scale]
    for color, share in ((blue, kb), (red, kr)):
        difference = (color - luma) / (2 * (1 - share))
        means = difference.reshape(height // 2, 2, width // 2, 2).mean(axis=(1, 3))
        planes.append(128 + means * chroma_scale)
    flat = np.concatenate([plane.reshape(-1) for plane in planes])
    levels: NDArray[np.uint8] = np.clip(np.rint(flat), 0, 255).astype(np.uint8)
    return levels.reshape(height * 3 // 2, width)
