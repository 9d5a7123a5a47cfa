"""Our own sources in a thread, and what open_feed chooses."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from waiting import PATIENCE_S, eventually

from apps.streaming.capture import open_feed
from apps.streaming.capture.supervisor import ProcessFeed
from apps.streaming.capture.threaded import ThreadFeed
from apps.streaming.config import CaptureLimits, SourceConfig
from apps.streaming.contracts import SourceState
from apps.streaming.metrics import StreamMetrics
from apps.streaming.sources import ModelClasses, parse_source
from pipeline.errors import DataError, EdgefoldError

CLASSES = ModelClasses((), 3)


def feed_of(uri: str, metrics: StreamMetrics, opener: Callable[..., Any] | None = None, **config: Any) -> Any:
    more = {} if opener is None else {"opener": opener}
    source = SourceConfig(uri, **config)
    return open_feed(source, parse_source(uri), CLASSES, CaptureLimits(), metrics, buffers=2, **more)


def drain(feed: Any, metrics: StreamMetrics) -> list[Any]:
    frames = []
    deadline_s = time.monotonic() + PATIENCE_S
    while not feed.exhausted:
        assert time.monotonic() < deadline_s
        captured = feed.take()
        if captured is None:
            time.sleep(0.001)
            continue
        frames.append(captured.frame)
        metrics.frame_inferred(None)
        captured.release()
    return frames


def test_own_sources_get_a_thread_and_foreign_ones_a_process(tmp_path: Path) -> None:
    video = tmp_path / "clip.mp4"
    video.write_bytes(b"x")
    assert isinstance(feed_of("synthetic:1", StreamMetrics()), ThreadFeed)
    feed = feed_of(str(video), StreamMetrics(), name="gate")
    assert isinstance(feed, ProcessFeed)
    assert (feed.source_id, feed.policy, feed.live) == ("gate", "every", False)


def test_every_frame_of_a_finite_source_in_order() -> None:
    metrics = StreamMetrics()
    ready = threading.Event()
    feed = feed_of("synthetic:3:20", metrics)
    feed.start(ready.set)
    frames = drain(feed, metrics)
    assert ready.is_set()
    assert [frame.index for frame in frames] == list(range(20))
    assert all(frame.source_id == "synthetic:3:20" for frame in frames)
    assert feed.status().state is SourceState.ENDED
    assert feed.failure() is None
    feed.close()


def test_every_waits_for_buffers(list_source: Any) -> None:
    source = list_source([None, *([np.zeros((4, 4, 3), np.uint8)] * 9)])
    metrics = StreamMetrics()
    feed = feed_of("synthetic:1:9", metrics, lambda *_: source)
    feed.start(lambda: None)
    eventually(lambda: metrics.snapshot().frames_read == 3)
    time.sleep(0.05)
    assert metrics.snapshot().frames_read == 3  # one was no image, two lie in the buffers
    assert len(drain(feed, metrics)) == 9
    assert metrics.snapshot().dropped == {"no image": 1}
    feed.close()


def test_what_fails_is_the_feeds_failure(list_source: Any) -> None:
    def fail(index: int) -> None:
        raise ZeroDivisionError("a bug")

    def refuse(*_: Any) -> Any:
        raise DataError("no images here")

    for opener, kind in ((lambda *_: list_source([], before_read=fail), EdgefoldError), (refuse, DataError)):
        feed = feed_of("synthetic:1", StreamMetrics(), opener)
        feed.start(lambda: None)
        assert drain(feed, StreamMetrics()) == []
        assert type(feed.failure()) is kind
        assert feed.status().reason == str(feed.failure())
        feed.close()


def test_a_live_source_plays_at_its_rate_and_closes_at_once() -> None:
    metrics = StreamMetrics()
    feed = feed_of("synthetic:1", metrics, fps=50.0)
    feed.start(lambda: None)
    start_s = time.monotonic()
    eventually(lambda: metrics.snapshot().frames_read >= 11)
    assert time.monotonic() - start_s >= 0.2
    assert feed.status().state is SourceState.LIVE
    feed.close()
    snapshot = metrics.snapshot()
    assert snapshot.dropped.pop("stopped") >= 1
    assert snapshot.dropped["newer frame"] >= 8
    assert feed.exhausted
    assert feed.take() is None
