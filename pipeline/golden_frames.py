"""The golden frames themselves: rendered by a build, kept in the bundle, read back.

They are chosen so that no usual mistake passes: colours that differ in every channel, levels from 0 to 255, sizes above and
below the network's, wide, upright and odd ones, and stripes finer than any filter resolves.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.artifacts import PreprocessSpec
from pipeline.bundle import Bundle
from pipeline.errors import IntegrityError
from pipeline.preprocess import to_network_pixels
from pipeline.synthetic import SyntheticCamera

__all__ = ["GOLDEN_NAME", "GoldenFrames", "golden_to_bytes", "make_golden", "read_golden"]

GOLDEN_NAME = "golden.npz"

_SCENE_HW, _BARS_HW, _RAMPS_HW, _GRAY_HW = (240, 320), (720, 1280), (203, 135), (97, 131)
_CAMERA_SEED, _CAMERA_MIN_PX = 2026, 32
_MAX_UNPACKED_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class GoldenFrames:
    """Frames, and what they become.

    Attributes:
        names: of the frames.
        images: uint8 HWC RGB, each of its own size.
        pixels: uint8 NHWC at the network's size, in the bundle's ``input_color``: after resize, crop and
            channel order, before normalization.
        logits: float32 (N, C) by the graph that gave them, a file of the bundle.
    """

    names: tuple[str, ...]
    images: tuple[NDArray[np.uint8], ...]
    pixels: NDArray[np.uint8]
    logits: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)


def make_golden(spec: PreprocessSpec, color: Literal["RGB", "BGR"]) -> GoldenFrames:
    """Renders the frames and takes them through the canonical preprocessing; without logits.

    Args:
        spec: of the bundle. Where it does not resize, all frames have the network's size.
        color: the channel order of `GoldenFrames.pixels`: the bundle's ``input_color``.
    """
    fixed = spec.input_hw if spec.resize == "none" else None
    images = {
        "scene": _scene(fixed or _SCENE_HW),
        "bars": _bars(fixed or _BARS_HW),
        "ramps": _ramps(fixed or _RAMPS_HW),
        "gray": _gray(fixed or _GRAY_HW),
    }
    pixels = np.stack([to_network_pixels(image, "RGB", spec, color) for image in images.values()])
    return GoldenFrames(tuple(images), tuple(images.values()), pixels)


def golden_to_bytes(golden: GoldenFrames) -> bytes:
    """The content of `GOLDEN_NAME`; equal frames give equal bytes."""
    arrays: dict[str, NDArray[Any]] = {"pixels": golden.pixels}
    for name, image in zip(golden.names, golden.images, strict=True):
        arrays[f"frame.{name}"] = image
    for file, logits in golden.logits.items():
        arrays[f"logits.{file}"] = logits
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]  # names that are no identifiers
    return buffer.getvalue()


def read_golden(bundle: Bundle) -> GoldenFrames | None:
    """The golden frames of a bundle; ``None`` of one that was built before there were any.

    Raises:
        IntegrityError: the file is not what a build writes.
    """
    if GOLDEN_NAME not in bundle.manifest.files:
        return None
    data = bundle.read_bytes(GOLDEN_NAME)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > _MAX_UNPACKED_BYTES:
            raise ValueError(f"it unpacks to {unpacked} bytes (limit {_MAX_UNPACKED_BYTES})")
        with np.load(io.BytesIO(data), allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        images = {name[6:]: array for name, array in arrays.items() if name.startswith("frame.")}
        logits = {name[7:]: array for name, array in arrays.items() if name.startswith("logits.")}
        golden = GoldenFrames(tuple(images), tuple(images.values()), arrays["pixels"], logits)
        _require_consistent(golden, bundle)
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise IntegrityError(
            f"{GOLDEN_NAME} of bundle {str(bundle.path)!r} holds no golden frames: {error}; build the bundle again"
        ) from error
    return golden


def _require_consistent(golden: GoldenFrames, bundle: Bundle) -> None:
    n_frames, hw = len(golden.names), bundle.manifest.preprocess.input_hw
    if n_frames == 0:
        raise ValueError("it has no frames")
    if golden.pixels.dtype != np.uint8 or golden.pixels.shape != (n_frames, *hw, 3):
        raise ValueError(
            f"its pixels are {golden.pixels.dtype} of shape {golden.pixels.shape}, not uint8 {(n_frames, *hw, 3)}"
        )
    for name, image in zip(golden.names, golden.images, strict=True):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or min(image.shape[:2]) < 2:
            raise ValueError(f"frame {name!r} is {image.dtype} of shape {image.shape}, not uint8 HWC RGB")
    for file, logits in golden.logits.items():
        if logits.dtype != np.float32 or logits.ndim != 2 or logits.shape[0] != n_frames:
            raise ValueError(f"the answers of {file!r} are {logits.dtype} of shape {logits.shape}")


def _scene(hw: tuple[int, int]) -> NDArray[np.uint8]:
    """A frame of the synthetic camera: texture, noise, blur, as a real one has them."""
    height, width = hw
    camera = SyntheticCamera(_CAMERA_SEED, (max(height, _CAMERA_MIN_PX), max(width, _CAMERA_MIN_PX)))
    return np.ascontiguousarray(camera.frame(0)[0][:height, :width])


def _bars(hw: tuple[int, int]) -> NDArray[np.uint8]:
    """Colour bars over a staircase of grays from 0 to 255, over stripes two, three and five pixels wide."""
    height, width = hw
    colors = np.array(
        [(255, 0, 0), (0, 0, 255), (0, 255, 0), (255, 255, 0), (0, 255, 255), (255, 0, 128), (255, 128, 0)],
        np.uint8,
    )
    x = np.arange(width)
    image = np.empty((height, width, 3), np.uint8)
    half, three_quarters = height // 2, 3 * height // 4
    image[:half] = colors[x * len(colors) // width]
    image[half:three_quarters] = (x * 16 // width * 17).astype(np.uint8)[:, np.newaxis]
    pitch = np.array([2, 3, 5])[x * 3 // width]
    stripes = np.where(x // pitch % 2 == 0, 255, 0).astype(np.uint8)
    image[three_quarters:] = stripes[:, np.newaxis] * np.array([1, 1, 0], np.uint8)
    return image


def _ramps(hw: tuple[int, int]) -> NDArray[np.uint8]:
    """Red grows to the right, green downwards, blue the other way: no flip and no turn leaves it as it is."""
    height, width = hw
    across = np.linspace(0, 255, width)[np.newaxis, :].repeat(height, axis=0)
    down = np.linspace(0, 255, height)[:, np.newaxis].repeat(width, axis=1)
    blue = 255 - 0.7 * across - 0.3 * down
    return np.rint(np.stack([across, down, blue], axis=2)).astype(np.uint8)


def _gray(hw: tuple[int, int]) -> NDArray[np.uint8]:
    """Rings that grow finer outwards, without colour: what a monochrome camera gives."""
    height, width = hw
    y, x = np.mgrid[0:height, 0:width]
    radius2 = (y - height / 3) ** 2 + (x - width / 4) ** 2
    rings = np.rint(127.5 + 127.5 * np.cos(radius2 * (math.pi / (2 * max(hw))))).astype(np.uint8)
    return np.repeat(rings[:, :, np.newaxis], 3, axis=2)
