"""Recorders that wait for nothing, and a small disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from recorded import ANCHOR
from small_disk import small_disk

from apps.streaming import recording
from apps.streaming.config import RecordConfig
from apps.streaming.recording import SegmentRecorder


@pytest.fixture
def record(tmp_path: Path) -> Iterator[Callable[..., SegmentRecorder]]:
    """Opens recorders that wait for nothing; all are closed after the test."""
    opened: list[SegmentRecorder] = []

    def start(
        by_time: bool = True, name: str = "cam", fps: float = 10.0, **options: object
    ) -> SegmentRecorder:
        config = RecordConfig(tmp_path / "rec", segment_s=1.0)
        config = replace(
            config, **{key: options.pop(key) for key in ("segment_s", "quota_mb", "path") if key in options}
        )
        opened.append(SegmentRecorder(config, fps, by_time, name, anchor=ANCHOR, **options))  # type: ignore[arg-type]
        return opened[-1]

    yield start
    for recorder in opened:
        recorder.close()


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "_PAUSE_S", (0.1, 0.2))
    monkeypatch.setattr(recording, "_CHECK_S", 0.0)
    monkeypatch.setattr(recording, "_POLL_S", 0.02)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """32 MiB, of which `Recorder` keeps 16 free."""
    with small_disk(tmp_path / "disk", 32) as path:
        yield path
