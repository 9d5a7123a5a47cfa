"""OpenCV where it is needed, and what to do where it is not there."""

from __future__ import annotations

import os
from types import ModuleType

from pipeline.errors import UnsupportedError

__all__ = ["available", "load"]

_V4L_SELECT_TIMEOUT_S = 5


def load(purpose: str) -> ModuleType:
    """Imports ``cv2``, or says what to install.

    Args:
        purpose: what needs it, for the message: ``"reading a video"``.

    Raises:
        UnsupportedError: OpenCV cannot be imported here.
    """
    # The V4L2 back-end has no timeout among its open parameters; this variable, read once when the
    # library is loaded, bounds how long one read waits for a camera that has gone quiet.
    os.environ.setdefault("OPENCV_VIDEOIO_V4L_SELECT_TIMEOUT", str(_V4L_SELECT_TIMEOUT_S))
    try:
        import cv2
    except ImportError as error:
        raise UnsupportedError(
            f"{purpose} needs OpenCV, which cannot be imported here ({error}): pip install edgefold[opencv], "
            "or, to keep the system's build (JetPack, Debian), apt install python3-opencv in an "
            "environment made with --system-site-packages"
        ) from error
    return cv2


def available() -> bool:
    """Whether `load` would succeed."""
    try:
        load("this")
    except UnsupportedError:
        return False
    return True
