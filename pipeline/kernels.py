"""What was compiled of ``resample.c`` and ``planar.c`` at installation. Without a C compiler there is nothing, and what it
would do is done by Pillow and NumPy.

A module of its own, for a capture process asks for it too, and has no use for Pillow.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

__all__ = ["kernels"]


@functools.cache
def kernels() -> ctypes.CDLL | None:
    """What was compiled of ``resample.c`` and ``planar.c``; ``None`` where nothing was."""
    for path in sorted(Path(__file__).parent.glob("_resample*.so")):
        try:
            library = ctypes.CDLL(str(path))
            resample, planes = library.edgefold_resample, library.edgefold_resize_planes
            to_bgr = library.edgefold_planes_to_bgr
        except (OSError, AttributeError):  # of another machine, or older than this file
            continue
        pointer, word = ctypes.c_void_p, ctypes.c_int32
        image = (pointer, ctypes.c_int64, word, word, word, word)
        resample.argtypes = (*image, pointer, pointer, word, word, pointer)
        planes.argtypes = (pointer, pointer, word, pointer)
        to_bgr.argtypes = (pointer, word, word, pointer, pointer)
        return library
    return None
