"""Several sources under one engine, and another engine while they run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from waiting import PATIENCE_S, eventually

from apps.streaming import session
from apps.streaming.config import SourceConfig, StreamConfig
from apps.streaming.session import StreamSession, StreamSummary
from pipeline.errors import IntegrityError, UsageError


def sources(*uris: str, **options: Any) -> tuple[SourceConfig, ...]:
    return tuple(SourceConfig(uri, name=f"camera {index}", **options) for index, uri in enumerate(uris))


@pytest.mark.parametrize("streams", [None, 2])
def test_several_sources_in_batches_are_each_right(
    make_bundle: Callable[..., Path], bundle: Path, folder: Path, open_feed: Any, streams: int | None
) -> None:
    config = StreamConfig(
        bundle, sources(*[str(folder)] * 3), max_batch=3, batch_wait_ms=50, streams=streams, headless=True
    )
    summary = session.run_stream(config, open_feed=open_feed)
    assert [(one.source, one.frames_inferred, one.top1) for one in summary.sources] == [
        (f"camera {index}", 12, 11 / 12) for index in range(3)
    ]
    assert (summary.frames_inferred, summary.labelled, summary.correct) == (36, 36, 33)
    assert summary.latency["age"].count == 36
    assert summary.mean_batch > 1.5
    assert summary.to_json()["sources"][2]["source"] == "camera 2"


def test_two_sources_of_one_name_are_refused(bundle: Path, folder: Path, open_feed: Any) -> None:
    twice = (SourceConfig(str(folder)), SourceConfig(str(folder)))
    with pytest.raises(UsageError, match="the same URI already"):
        session.run_stream(StreamConfig(bundle, twice, headless=True), open_feed=open_feed)

    def nameless(source: SourceConfig, *arguments: Any) -> Any:
        feed = open_feed(source, *arguments)
        feed.source_id = "rtsp://***@pole"  # two that differ in what is not shown
        return feed

    config = StreamConfig(bundle, sources("synthetic:1:2", "synthetic:2:2"), headless=True)
    with pytest.raises(UsageError, match=r"two sources are called rtsp://\*\*\*@pole"):
        session.run_stream(config, open_feed=nameless)


def test_a_graph_with_a_fixed_batch_takes_no_larger_one(
    make_bundle: Callable[..., Path], folder: Path, open_feed: Any, tmp_path: Path
) -> None:
    fixed = """
    <ir_version: 10, opset_import: ["" : 18]>
    fixed (uint8[1, 16, 16, 3] input) => (float[1, 3] logits) {
        pixels = Cast <to = 1> (input)
        axes = Constant <value = int64[2] {1, 2}> ()
        logits = ReduceMean <keepdims = 0> (pixels, axes)
    }
    """
    path = make_bundle(tmp_path / "fixed", fixed)
    config = StreamConfig(path, sources(str(folder)), max_batch=4, headless=True)
    with pytest.raises(UsageError, match="takes 1 image a request, --batch 4"):
        session.run_stream(config, open_feed=open_feed)


SWAPPED = """
<ir_version: 10, opset_import: ["" : 18]>
inverted (uint8[batch, 16, 16, 3] input) => (float[batch, 3] logits) {
    pixels = Cast <to = 1> (input)
    axes = Constant <value = int64[2] {1, 2}> ()
    means = ReduceMean <keepdims = 0> (pixels, axes)
    scale = Constant <value = float {-0.05}> ()
    logits = Mul (means, scale)
}
"""


class Running:
    """A session in a thread of its own, until it is told to stop."""

    def __init__(self, config: StreamConfig, open_feed: Any) -> None:
        self.session = StreamSession(config, open_feed=open_feed)
        self.summary: StreamSummary | None = None
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        self.summary = self.session.run()

    def __enter__(self) -> Running:
        self._thread.start()
        return self

    def wait_for(self, condition: Callable[[], bool]) -> None:
        eventually(lambda: condition() or not self._thread.is_alive())
        assert self._thread.is_alive()

    def n_lines(self, log: Path) -> int:
        return log.read_text().count("\n") if log.exists() else 0

    def __exit__(self, *_: object) -> None:
        self.session._runtime.request_stop("test")
        self._thread.join(PATIENCE_S)


def test_a_link_to_another_bundle_is_reloaded_and_a_bad_one_is_refused(
    make_bundle: Callable[..., Path], open_feed: Any, tmp_path: Path
) -> None:
    first = make_bundle(tmp_path / "first")
    second = make_bundle(tmp_path / "second", SWAPPED, ("not blue", "not green", "not red"))
    bad = tmp_path / "bad"
    shutil.copytree(first, bad)
    with (bad / "model.int8.onnx").open("ab") as file:
        file.write(b"x")
    link, log = tmp_path / "current", tmp_path / "out.jsonl"
    link.symlink_to(first)
    config = StreamConfig(link, sources("synthetic:4:100000", fps=200.0), headless=True, predictions=log)
    with Running(config, open_feed) as running:
        running.wait_for(lambda: running.n_lines(log) > 10)
        before = running.session.view().engine
        link.unlink()
        link.symlink_to(bad)
        with pytest.raises(IntegrityError):
            running.session.reload()
        refused = running.session.view().engine
        assert (refused.reloads, refused.reload_failures) == (0, 1)
        assert "model.int8.onnx" in (refused.last_reload_error or "")
        assert refused.bundle_digest == before.bundle_digest
        link.unlink()
        link.symlink_to(second)
        running.session.reload()
        after = running.session.view()
        assert (after.engine.reloads, after.engine.last_reload_error) == (1, None)
        assert after.engine.bundle == str(second)
        assert after.engine.bundle_digest != before.bundle_digest
        n_after = running.n_lines(log)
        running.wait_for(lambda: running.n_lines(log) > n_after + 20)
        assert running.session.check() == running.session.view().preprocessing
    summary = running.summary
    assert summary is not None
    assert summary.frames_read == summary.frames_inferred + sum(summary.dropped.values())
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["frame"] for line in lines] == list(range(len(lines)))  # none lost over the swap
    named = [line["top"][0]["label"].startswith("not ") for line in lines]
    assert named == sorted(named)
    assert named[0] is False
    assert named[-1] is True


def test_sighup_reloads(bundle: Path, open_feed: Any) -> None:
    before = signal.getsignal(signal.SIGHUP)
    config = StreamConfig(bundle, sources("synthetic:4"), headless=True, max_seconds=PATIENCE_S)
    streaming = StreamSession(config, open_feed=open_feed)

    def hang_up_then_stop() -> None:
        while not hasattr(streaming, "_runtime") or not streaming._runtime.batches:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGHUP)
        while not streaming.view().engine.reloads:
            time.sleep(0.01)
        streaming._runtime.request_stop("done")

    helper = threading.Thread(target=hang_up_then_stop, daemon=True)
    helper.start()
    summary = streaming.run()
    helper.join(PATIENCE_S)
    assert (summary.ended, summary.reloads) == ("done", 1)
    assert signal.getsignal(signal.SIGHUP) is before
