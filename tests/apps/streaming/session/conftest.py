"""`run_stream` on one source that is captured in a thread; pictures and a video of three colours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from apps.streaming import session
from apps.streaming.config import RecordConfig, SourceConfig, StreamConfig
from apps.streaming.session import StreamSummary

RGB = {"blue": (20, 30, 220), "green": (10, 200, 40), "red": (230, 40, 10)}


@pytest.fixture
def run_stream(open_feed: Callable[..., Any]) -> Callable[..., StreamSummary]:
    """One source through `run_stream`, captured in a thread."""

    def run(
        bundle: Path,
        source: str,
        *,
        record: Path | None = None,
        policy: Any = None,
        fps: float | None = None,
        cache_dir: Path | None = None,
        **options: Any,
    ) -> StreamSummary:
        recorded = None if record is None else RecordConfig(record)
        asked = SourceConfig(source, policy=policy, fps=fps, record=recorded)
        config = StreamConfig(bundle, (asked,), **{"headless": True, **options})
        return session.run_stream(config, cache_dir=cache_dir, open_feed=open_feed)

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve one-coloured pictures; one blue one lies in the red folder."""
    root = tmp_path_factory.mktemp("colors")
    for name, rgb in RGB.items():
        (root / name).mkdir()
        for index in range(4):
            shown = RGB["blue"] if (name, index) == ("red", 2) else rgb
            Image.new("RGB", (40 + index, 30), shown).save(root / name / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten blue, ten green, ten red frames."""
    path = tmp_path_factory.mktemp("video") / "colors.mp4"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 25.0, (64, 48))
    for rgb in RGB.values():
        for _ in range(10):
            writer.write(np.full((48, 64, 3), rgb[::-1], np.uint8))
    writer.release()
    return path
