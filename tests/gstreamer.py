"""What Debian's packages must bring for a test: its OpenCV with GStreamer, and GStreamer's RTSP server.

Tests that need it are marked ``gstreamer`` and skip, with the reason, where it is missing; ``make test-gstreamer`` runs
them, and fails there.
"""

from __future__ import annotations

import subprocess
from functools import cache
from typing import Any

import pytest
import rtsp_server

__all__ = ["SYSTEM_PYTHON", "needs_rtsp", "needs_system_opencv"]

SYSTEM_PYTHON = "/usr/bin/python3"


@cache
def _without_opencv() -> str | None:
    check = "import cv2, sys; sys.exit('GStreamer:                   YES' not in cv2.getBuildInformation())"
    try:
        done = subprocess.run([SYSTEM_PYTHON, "-c", check], capture_output=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return "the system's python3-opencv, with GStreamer, is not installed" if done.returncode else None


def _marks(missing: str | None) -> list[pytest.MarkDecorator]:
    return [pytest.mark.gstreamer, pytest.mark.skipif(missing is not None, reason=str(missing))]


def needs_rtsp(test: Any) -> Any:
    """Marks a test that looks at GStreamer's RTSP server."""
    for mark in _marks(rtsp_server.missing()):
        test = mark(test)
    return test


def needs_system_opencv() -> list[pytest.MarkDecorator]:
    """The ``pytestmark`` of a file whose tests read cameras with the system's OpenCV."""
    return _marks(_without_opencv())
