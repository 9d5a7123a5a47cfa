"""A real video through a real capture process, against the same file read here."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from apps.streaming.capture import open_feed
from apps.streaming.config import CaptureLimits, SourceConfig
from apps.streaming.metrics import StreamMetrics
from apps.streaming.sources import ModelClasses, open_source, parse_source

cv2 = pytest.importorskip("cv2", reason="needs OpenCV")


@pytest.mark.skipif(os.uname().sysname != "Linux", reason="capture processes need Linux")
@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("planar", [False, True])
def test_frames_are_those_of_the_file_even_if_capture_is_killed(
    tmp_path: Path, killed: bool, planar: bool
) -> None:
    if planar:
        pytest.importorskip("av", reason="needs PyAV")
    path = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 30.0, (160, 120))
    rng = np.random.default_rng(0)
    for _ in range(40):
        writer.write(np.kron(rng.integers(0, 256, (6, 8, 3), np.uint8), np.ones((20, 20, 1), np.uint8)))
    writer.release()
    uri = parse_source(str(path) if planar else f"{path}#backend=ffmpeg")
    here = open_source(uri, ModelClasses((), 3))
    expected = [here.read() for _ in range(40)]
    here.close()

    metrics = StreamMetrics()
    limits = CaptureLimits(backoff_s=(0.01, 0.01))
    feed = open_feed(SourceConfig(str(path)), uri, ModelClasses((), 3), limits, metrics)
    feed.start(lambda: None)
    deadline_s = time.monotonic() + 30
    index = 0
    while not feed.exhausted:
        assert time.monotonic() < deadline_s, feed.status()
        captured = feed.take()
        if captured is None:
            time.sleep(0.001)
            continue
        assert captured.frame.index == index
        assert captured.frame.pixel_format == ("I420" if planar else "BGR")
        assert captured.frame.yuv == expected[index].yuv
        np.testing.assert_array_equal(captured.frame.image, expected[index].pixels)
        metrics.frame_inferred(None)
        captured.release()
        index += 1
        if killed and index == 10:
            os.kill(feed.pid, signal.SIGKILL)  # type: ignore[attr-defined]
    assert index == 40
    assert feed.failure() is None
    assert feed.status().restarts == killed
    assert feed.status().size_wh == (160, 120)
    feed.close()
    snapshot = metrics.snapshot()
    assert snapshot.frames_read == 40
    assert snapshot.dropped == {}
