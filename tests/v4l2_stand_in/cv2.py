"""OpenCV with cameras that a test plugs in: put this folder on PYTHONPATH, and the cameras' in V4L2_STAND_IN.

A file ``videoN`` there is camera N, and what it holds is the colour that it shows (BGR, three numbers). A read fails
once the file is gone, as a read from an unplugged camera does. Everything else is the installed OpenCV.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

_HERE = str(Path(__file__).parent)
_FPS = 20.0


def _installed() -> Any:
    """The module that this one stands in front of; `import cv2` gives it from now on."""
    stood_in = sys.modules.pop("cv2")
    found = [path for path in sys.path if path == _HERE]
    sys.path[:] = [path for path in sys.path if path != _HERE]
    try:
        return importlib.import_module("cv2")
    except ImportError:
        sys.modules["cv2"] = stood_in
        raise
    finally:
        # A capture process is started with this path, and must find the stand-in too.
        sys.path[:0] = found


_cv2 = _installed()
_VideoCapture = _cv2.VideoCapture


class _Camera:
    """As much of a capture as `apps.streaming.sources.captures.V4l2Camera` uses."""

    def __init__(self, number: int) -> None:
        self._file = Path(os.environ["V4L2_STAND_IN"]) / f"video{number}"
        self._index = 0

    def isOpened(self) -> bool:
        return self._file.exists()

    def get(self, _: int) -> float:
        return _FPS

    def set(self, _: int, __: float) -> bool:
        return True

    def grab(self) -> bool:
        time.sleep(1 / _FPS)
        return self._file.exists()

    def retrieve(self, into: Any = None) -> tuple[bool, Any]:
        try:
            color = np.array([int(value) for value in self._file.read_text().split()], np.uint8)
        except (OSError, ValueError):
            return False, None
        self._index += 1
        picture = np.tile(color, (48, 64, 1))
        picture[0, 0] = self._index % 251  # a living camera never gives one picture twice
        if into is None or into.shape != picture.shape:
            return True, picture
        into[...] = picture
        return True, into

    def release(self) -> None:
        pass


def _open(*arguments: Any) -> Any:
    if len(arguments) == 2 and arguments[1] == _cv2.CAP_V4L2:
        return _Camera(arguments[0])
    return _VideoCapture(*arguments)


_cv2.VideoCapture = _open
