"""Frames to record, and what was recorded, decoded."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from apps.streaming.clock import UtcAnchor
from apps.streaming.predictions import Prediction, RankedClass
from pipeline.artifacts import Frame

ANCHOR = UtcAnchor(monotonic_ns=0, utc_ns=1_795_608_000 * 10**9)  # 2026-11-25T12:00:00Z
PREDICTION = Prediction("cam", 0, 0, (RankedClass(0, "stop", 0.5),), None)
HW = (96, 128)


def frame(seconds: float) -> Frame:
    return Frame(np.zeros((2, 2, 3), np.uint8), "BGR", "cam", 0, round(seconds * 1e9))


def picture(value: int = 100, hw: tuple[int, int] = HW) -> np.ndarray:
    return np.full((*hw, 3), value, np.uint8)


def noise(hw: tuple[int, int] = HW) -> Iterator[np.ndarray]:
    """Pictures without end that cannot be compressed."""
    random = np.random.default_rng(0)
    return itertools.cycle([random.integers(0, 255, (*hw, 3), np.uint8) for _ in range(7)])


def segments(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("[!.]*.mp4"))


def n_frames(path: Path) -> int:
    """By decoding every one of them."""
    video, count = cv2.VideoCapture(str(path)), 0
    while video.read()[0]:
        count += 1
    return count
