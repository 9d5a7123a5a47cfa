"""Image files that were made elsewhere: found, checked before decoding, converted exactly.

Photographs as people keep them are truncated, empty, CMYK, rotated by a tag, or a few kilobytes that
unfold into gigapixels. `read_image` either gives the pixels that were meant or says why it cannot.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from pipeline.errors import DataError

__all__ = ["MAX_IMAGE_PIXELS", "find_images", "find_unsupported_images", "read_image"]

MAX_IMAGE_PIXELS = 64 * 1024 * 1024
"""Width times height above which an image is not decoded (192 MiB as RGB); a 48-megapixel camera
phone passes."""

# Named, so that a file never reaches a decoder that runs a program (Pillow hands EPS to Ghostscript).
# JPEG includes the multi-picture files of cameras.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
)
_SUFFIXES_UNSUPPORTED = frozenset({".heic", ".heif", ".avif", ".jxl", ".jp2", ".dng", ".cr2", ".nef", ".arw"})
_MIN_SIDE = 2


def find_images(folder: Path) -> list[Path]:
    """Every image file at or below `folder`, by its name, sorted; hidden files and folders left out."""
    return _find(folder, _SUFFIXES)


def find_unsupported_images(folder: Path) -> list[Path]:
    """Files at or below `folder` whose names say image but which are not decoded here (HEIC, raw, …)."""
    return _find(folder, _SUFFIXES_UNSUPPORTED)


def read_image(path: Path) -> NDArray[np.uint8]:
    """Decode one image file.

    The EXIF orientation is applied. Gray is repeated into three channels, palettes are looked up,
    alpha is dropped and CMYK converted as `PIL.Image.Image.convert` documents. 16-bit gray becomes
    8-bit as the PNG specification scales samples: ``round(value * 255 / 65535)``.

    Returns:
        uint8, HWC, RGB, contiguous.

    Raises:
        DataError: the reason alone, without the path: unreadable, empty, truncated, too large, or of
            a pixel type without a defined range.
    """
    try:
        if path.stat().st_size == 0:
            raise DataError("empty file")
        with Image.open(path, formats=_FORMATS) as image:
            width, height = image.size  # from the header: nothing has been decoded yet
            if width * height > MAX_IMAGE_PIXELS:
                raise DataError(f"{width}×{height} pixels; the limit is {MAX_IMAGE_PIXELS} pixels")
            if min(width, height) < _MIN_SIDE:
                raise DataError(f"{width}×{height} pixels is no image")
            image.load()
            return np.array(_upright_rgb(image), dtype=np.uint8, order="C")
    except DataError:
        raise
    except Exception as error:  # on corrupt bytes the decoders raise almost any type
        text = str(error).replace(repr(str(path)), "the file") or type(error).__name__
        raise DataError(f"unreadable: {text}") from error


def _upright_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        wide = np.asarray(image).astype(np.uint32)
        upright = _upright(image, Image.fromarray(((wide * 255 + 32767) // 65535).astype(np.uint8)))
    elif image.mode in ("I", "F"):
        raise DataError(
            f"{image.format} with 32-bit pixels, whose range is not defined; convert it to 8 bits"
        )
    else:
        upright = _upright(image, image)
    return upright.convert("RGB")


def _upright(tagged: Image.Image, pixels: Image.Image) -> Image.Image:
    """`pixels` turned as the EXIF orientation of `tagged` says; unturned where that is corrupt."""
    try:
        if tagged.getexif().get(0x0112, 1) == 1:
            return pixels
        if pixels is not tagged:
            pixels.getexif()[0x0112] = tagged.getexif()[0x0112]
        return ImageOps.exif_transpose(pixels)
    except Exception:  # an orientation that cannot be read is no reason to lose the photograph
        return pixels


def _find(folder: Path, suffixes: frozenset[str]) -> list[Path]:
    found = []
    for directory, names, files in os.walk(folder):
        names[:] = [name for name in names if not name.startswith(".")]
        found += [
            Path(directory, name)
            for name in files
            if not name.startswith(".") and Path(name).suffix.lower() in suffixes
        ]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())
