"""From an image to the network's input: the one implementation.

Calibration, validation and streaming all come through `to_network_pixels`; no second copy of
resize, crop, colour order or normalization exists. Two halves, as `PreprocessSpec` says:

* *Geometry* on uint8 pixels. Pillow's resampling is canonical, because the evaluation transforms of
  timm and torchvision run on Pillow images: `to_network_pixels` gives the same pixels bit for bit.
  The whole image is resized and then cropped, although `PIL.Image.Image.resize` can compute the crop
  alone through its ``box``: that box is float32 and may change the order of the two passes, and the
  pixels then differ (measured with Pillow 13 on noise: one level in 0.1% of the pixels, and up to 24
  levels in a quarter of them for some sizes), for about half of the time.
  What is antialiased, the usual case, goes through `pipeline.resampling`, which gives those pixels in a
  quarter of the time and for the crop alone; the rest through Pillow itself.
  Planes of a decoder are resized as planes (`pipeline.planar`): nearly, not exactly, what Pillow makes of the
  same picture in colour.
* *Normalization*, affine per channel, which the build folds into the graph.

The CUDA kernel (`engines.tensorrt.preprocess`) follows the geometry computed here and is held to these pixels by tests.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline import resampling
from pipeline.artifacts import PixelFormat, PreprocessSpec, YuvCoding
from pipeline.errors import DataError
from pipeline.kernels import kernels
from pipeline.planar import PlanarResampler
from pipeline.yuv import planes_to_bgr

__all__ = ["affine", "crop_start", "normalize", "preprocess_sha256", "resized_hw", "to_network_pixels"]

_CHANNELS: dict[str, int] = {"RGB": 3, "BGR": 3, "GRAY": 1, "RGBA": 4, "BGRA": 4}
_RESAMPLE = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
# What a camera delivers when its format negotiation failed: GStreamer hands over N×1 arrays.
_MIN_SIDE = 2


def to_network_pixels(
    image: NDArray[np.uint8],
    pixel_format: PixelFormat,
    spec: PreprocessSpec,
    color: Literal["RGB", "BGR"],
    out: NDArray[np.uint8] | None = None,
    yuv: YuvCoding | None = None,
) -> NDArray[np.uint8]:
    """Resize, crop and order the channels of one image.

    Gray becomes three equal channels; alpha is dropped, not blended. Wider pixels (16-bit, float)
    are refused: how many of their bits are used is the camera's secret.

    Args:
        image: uint8, HWC in `pixel_format`, HW for ``GRAY``, planes for ``I420``; any strides; at least 2×2.
        pixel_format: what the channels of `image` are.
        spec: the geometry: resize mode, interpolation, antialiasing, crop fraction and size.
        color: the channel order wanted.
        out: where to write the result (its place in a batch); a new array if not given.
        yuv: the coding of ``I420`` planes.

    Returns:
        `out`; uint8, HWC, contiguous, ``spec.input_hw`` × 3, channels in order `color`.

    Raises:
        DataError: not an image, not 8-bit, a channel count other than `pixel_format`'s, degenerate
            size, or (``resize="none"``) a size other than ``spec.input_hw``.
    """
    pixels = _checked(image, pixel_format, yuv)
    target = np.empty((*spec.input_hw, 3), np.uint8) if out is None else out
    if yuv is not None and pixel_format == "I420":
        planar = _planar(spec, pixels.shape[0] * 2 // 3, pixels.shape[1], yuv)
        if planar is not None:
            planar.resample(pixels, color, target)
            return target
        pixels, pixel_format = planes_to_bgr(pixels, yuv), "BGR"
    swap = pixel_format[:3] != color
    plan = None if spec.resize == "none" else _resampling(spec, *pixels.shape[:2])
    if plan is None:
        if pixels.shape[:2] == spec.input_hw and spec.resize == "none":
            cropped = pixels
        else:
            # Channels do not mix in resampling, so the colours are swapped afterwards, on the small image.
            cropped = np.asarray(_resize_and_crop(Image.fromarray(np.ascontiguousarray(pixels)), spec))
        target[...] = (
            cropped[:, :, np.newaxis] if cropped.ndim == 2 else cropped[:, :, ::-1] if swap else cropped
        )
    elif pixels.ndim == 2:
        gray = np.empty(spec.input_hw, np.uint8)
        resampling.resample(pixels, *plan[:2], vertical_first=plan[2], reverse=False, out=gray)
        target[...] = gray[:, :, np.newaxis]
    else:
        resampling.resample(pixels, *plan[:2], vertical_first=plan[2], reverse=swap, out=target)
    return target


def affine(spec: PreprocessSpec) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Normalization as ``x = pixel * scale + shift``.

    From ``x = (pixel / 255 * (hi - lo) + lo - mean) / std`` with ``value_range = (lo, hi)``.

    Returns:
        ``(scale, shift)``: float64, shape (3,), in ``spec.color`` order.

    Raises:
        DataError: a standard deviation is zero, or a number is not finite.
    """
    low, high = spec.value_range
    mean = np.asarray(spec.mean, np.float64)
    std = np.asarray(spec.std, np.float64)
    if not np.all(np.isfinite([low, high, *mean, *std])) or np.any(std == 0):
        raise DataError(
            f"preprocessing has mean {spec.mean}, std {spec.std}, range {spec.value_range}: every number "
            "must be finite and no std zero; correct the --preprocess file"
        )
    return (high - low) / (255.0 * std), (low - mean) / std


def normalize(
    pixels_nhwc: NDArray[np.uint8], spec: PreprocessSpec, color: Literal["RGB", "BGR"]
) -> NDArray[np.float32]:
    """The network's float input from pixels that `to_network_pixels` made.

    Args:
        pixels_nhwc: uint8, NHWC, channels in order `color`.
        spec: the normalization, layout and channel order of the network.
        color: the channel order of `pixels_nhwc`.

    Returns:
        float32, contiguous, in ``spec.layout``, channels in ``spec.color`` order.

    Raises:
        DataError: as `affine`; or the pixels are not uint8 NHWC with three channels.
    """
    if pixels_nhwc.dtype != np.uint8 or pixels_nhwc.ndim != 4 or pixels_nhwc.shape[3] != 3:
        raise DataError(
            f"normalize takes uint8 NHWC pixels with 3 channels, not {pixels_nhwc.dtype} of shape "
            f"{pixels_nhwc.shape}"
        )
    scale, shift = affine(spec)
    ordered = pixels_nhwc if color == spec.color else pixels_nhwc[..., ::-1]
    values = ordered * scale.astype(np.float32) + shift.astype(np.float32)
    if spec.layout == "NCHW":
        values = values.transpose(0, 3, 1, 2)
    return np.ascontiguousarray(values, dtype=np.float32)


def preprocess_sha256(spec: PreprocessSpec) -> str:
    """SHA-256 (hex) of what the spec says: equal specs, equal digests, on every machine."""
    values: dict[str, Any] = dataclasses.asdict(spec)
    values["input_hw"] = [int(side) for side in spec.input_hw]
    values["crop_fraction"] = float(spec.crop_fraction)
    for name in ("value_range", "mean", "std"):
        values[name] = [float(number) for number in values[name]]  # 1 and 1.0 are the same number
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _checked(image: NDArray[Any], pixel_format: PixelFormat, yuv: YuvCoding | None) -> NDArray[np.uint8]:
    """`image` as uint8 HW (gray), HW3 with alpha dropped, or planes; a view, but for planes that lie apart."""
    if not isinstance(image, np.ndarray):
        raise DataError(f"a frame must be a numpy array, not {type(image).__name__}")
    if image.dtype != np.uint8:
        raise DataError(
            f"a frame has {image.dtype} pixels; only 8-bit ones are taken, because the range of wider "
            "ones is unknown: convert them to uint8 first"
        )
    if pixel_format == "I420":
        return _checked_planes(image, yuv)
    if pixel_format not in _CHANNELS:
        raise DataError(f"unknown pixel format {pixel_format!r}; known: {', '.join([*_CHANNELS, 'I420'])}")
    channels = _CHANNELS[pixel_format]
    pixels = image[:, :, 0] if channels == 1 and image.ndim == 3 and image.shape[2] == 1 else image
    expected_ndim = 2 if channels == 1 else 3
    if pixels.ndim != expected_ndim or (channels > 1 and pixels.shape[2] != channels):
        raise DataError(f"a {pixel_format} frame has shape {image.shape}; expected height×width×{channels}")
    if min(pixels.shape[:2]) < _MIN_SIDE:
        raise DataError(
            f"a frame of {image.shape[1]}×{image.shape[0]} pixels is no image; the source is broken"
        )
    return pixels if channels == 1 else pixels[:, :, :3]


def _checked_planes(image: NDArray[np.uint8], yuv: YuvCoding | None) -> NDArray[np.uint8]:
    if yuv is None:
        raise DataError(
            "an I420 frame comes without its coding: say matrix and range (pipeline.artifacts.YuvCoding)"
        )
    height, width = (image.shape[0] * 2 // 3, image.shape[1]) if image.ndim == 2 else (0, 0)
    if image.ndim != 2 or height % 2 or width % 2 or image.shape[0] != height * 3 // 2 or height < _MIN_SIDE:
        raise DataError(
            f"an I420 frame has shape {image.shape}; expected 1.5·height×width, both sides even and at least 2"
        )
    return np.ascontiguousarray(image)


@functools.lru_cache(maxsize=64)
def _planar(spec: PreprocessSpec, height: int, width: int, yuv: YuvCoding) -> PlanarResampler | None:
    """What resizes planes of a size; ``None``: they are turned into BGR and take its way."""
    if spec.resize == "none" or _resampling(spec, height, width) is None:
        return None
    resized = resized_hw(height, width, spec)
    crop = (crop_start(resized[0], spec.input_hw[0]), crop_start(resized[1], spec.input_hw[1]))
    made = PlanarResampler(spec, (height, width), yuv, resized, crop)
    return made if made.fits else None


@functools.lru_cache(maxsize=64)
def _resampling(
    spec: PreprocessSpec, height: int, width: int
) -> tuple[resampling.Taps, resampling.Taps, bool] | None:
    """Taps of columns and rows and whether rows come first, for our kernel; ``None``: Pillow does it."""
    # Lanczos weights depend on the last bit of a sine; an affine map is not a filter.
    if spec.interpolation not in ("bilinear", "bicubic") or not spec.antialias:
        return None
    if kernels() is None:
        return None
    resized = resized_hw(height, width, spec)
    if min(resized) < 1:
        return None
    target_h, target_w = spec.input_hw
    make = resampling.filtered(spec.interpolation)
    across, down = (
        resampling.cropped(make(size, to), crop_start(to, target), target)
        for size, to, target in ((width, resized[1], target_w), (height, resized[0], target_h))
    )
    return across, down, resampling.rows_first((height, width), resized)


def _resize_and_crop(image: Image.Image, spec: PreprocessSpec) -> Image.Image:
    target_h, target_w = spec.input_hw
    if spec.resize == "none":
        if (image.height, image.width) != (target_h, target_w):
            raise DataError(
                f"an image is {image.width}×{image.height}, the network takes {target_w}×{target_h} and its "
                "preprocessing does not resize: resize the images, or set resize in the --preprocess file"
            )
        return image
    resized_h, resized_w = resized_hw(image.height, image.width, spec)
    left = crop_start(resized_w, target_w)
    top = crop_start(resized_h, target_h)
    resample = _RESAMPLE[spec.interpolation]
    if spec.antialias or spec.interpolation == "nearest":
        resized = image
        if (resized_w, resized_h) != image.size:
            resized = image.resize((resized_w, resized_h), resample)
        # Pillow fills what lies outside the image with 0, as torchvision's center_crop pads.
        return resized.crop((left, top, left + target_w, top + target_h))
    if spec.interpolation == "lanczos":
        raise DataError("lanczos interpolation exists only with antialias=true; use bicubic or set antialias")
    # An affine map interpolates between neighbours however far it shrinks, and crops (or pads with 0)
    # by its offset. Its coordinates are pixel centres, like those of resize.
    step_x, step_y = image.width / resized_w, image.height / resized_h
    return image.transform(
        (target_w, target_h),
        Image.Transform.AFFINE,
        (step_x, 0.0, left * step_x, 0.0, step_y, top * step_y),
        resample,
    )


def resized_hw(height: int, width: int, spec: PreprocessSpec) -> tuple[int, int]:
    """Size after the resize and before the crop, as timm's and torchvision's eval transforms have it."""
    # 0.875 × 256 = 224 must give 256 again, whatever the division rounds to.
    scaled_h, scaled_w = (math.floor(side / spec.crop_fraction + 1e-6) for side in spec.input_hw)
    if spec.resize == "squash":
        return scaled_h, scaled_w
    if scaled_h == scaled_w:  # torchvision Resize(int): the longer side is truncated
        if height <= width:
            return scaled_h, int(scaled_h * width / height)
        return int(scaled_w * height / width), scaled_w
    ratio = min(height / scaled_h, width / scaled_w)  # timm ResizeKeepRatio: cover the target
    return round(height / ratio), round(width / ratio)


def crop_start(size: int, target: int) -> int:
    """Where torchvision's center_crop starts; negative where the image is padded."""
    return -((target - size) // 2) if target > size else round((size - target) / 2.0)
