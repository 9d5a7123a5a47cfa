from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from waiting import PATIENCE_S, SLACK_S, eventually

from apps.streaming.engine_slot import EngineSlot
from apps.streaming.predictions import Prediction
from apps.streaming.runtime import (
    END_OF_SOURCE,
    FRAME_LIMIT,
    TIME_LIMIT,
    Answer,
    RuntimeLimits,
    StreamRuntime,
)
from apps.streaming.scheduling import RuntimeFeed
from pipeline.artifacts import Frame
from pipeline.errors import DataError, DeviceFaultError, EdgefoldError, EngineError

LABELS = ("blue", "green", "red")


def picture(bgr: tuple[int, int, int] = (0, 0, 255)) -> NDArray[np.uint8]:
    return np.full((16, 16, 3), bgr, np.uint8)


def mean_color(pixels: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(pixels.mean(axis=(1, 2)) * 0.05, np.float32)


def copy_into(frame: Frame, row: NDArray[Any]) -> None:
    row[...] = frame.image


class Stream:
    """A runtime around fakes, and what came out of it."""

    def __init__(
        self,
        parts: Parts,
        sources: Any,
        runner: Any,
        policy: str = "every",
        prepare: Callable[[Frame, NDArray[Any]], None] = copy_into,
        on_prediction: Callable[[Frame, Prediction], None] = lambda frame, prediction: None,
        max_batch: int = 1,
        pace_fps: float | None = None,
        **limits: Any,
    ) -> None:
        self.feeds = parts.feeds(
            sources if isinstance(sources, list) else [sources], policy, pace_fps=pace_fps
        )
        self.metrics = self.feeds[0].metrics
        self.answers: list[Answer] = []
        self.slot = parts.slot(runner, prepare=prepare, max_batch=max_batch)
        self.runtime = StreamRuntime(self.feeds, self.slot, RuntimeLimits(**limits))
        self._on_prediction = on_prediction

    @property
    def predictions(self) -> list[Prediction]:
        return [answer.prediction for answer in self.answers]

    def run(self, on_tick: Callable[[], None] = lambda: None) -> str:
        def take(answer: Answer) -> None:
            self.answers.append(answer)
            self._on_prediction(answer.frame, answer.prediction)

        try:
            return self.runtime.run(take, on_tick)
        finally:
            for source in self.feeds:
                source.feed.close()

    def balanced(self) -> bool:
        """Every frame that was read is accounted for, and every buffer came back."""
        states = [source.metrics.snapshot() for source in self.feeds]
        counted = all(s.frames_read == s.frames_inferred + sum(s.dropped.values()) for s in states)
        return counted and all(source.feed.n_out == 0 for source in self.feeds)  # type: ignore[attr-defined]


@dataclass
class Parts:
    feeds: Callable[..., list[RuntimeFeed]]
    slot: Callable[..., EngineSlot]


@pytest.fixture
def parts(feeds_of: Callable[..., list[RuntimeFeed]], slot_around: Callable[..., EngineSlot]) -> Parts:
    return Parts(feeds_of, slot_around)


def test_every_frame_is_inferred_in_order(parts, list_source, fake_runner) -> None:
    colors = [tuple(255 * (i == channel) for i in range(3)) for channel in (2, 0, 1, 1, 0, 2, 2)] * 5
    truth = [color.index(255) for color in colors]
    source = list_source([picture(color) for color in colors], labels=truth)
    with fake_runner(mean_color) as runner:
        stream = Stream(parts, source, runner)
        assert stream.run() == END_OF_SOURCE
    assert [p.top[0].class_index for p in stream.predictions] == truth
    assert [p.frame_index for p in stream.predictions] == list(range(35))
    state = stream.metrics.snapshot()
    assert (state.frames_inferred, state.dropped, state.top1) == (35, {}, 1.0)
    assert {latency.count for latency in state.latency.values()} == {35}


def n_futures() -> int:
    return sum(issubclass(type(thing), Future) for thing in gc.get_objects())


def test_answered_requests_leave_nothing_for_the_collector(parts, list_source, fake_runner) -> None:
    """A cycle would keep each frame, and the memory it lies in, until a full collection minutes later."""
    gc.collect()
    gc.disable()
    try:
        before = n_futures()
        with fake_runner(mean_color) as runner:
            Stream(parts, list_source([picture()] * 60), runner).run()
        left = n_futures() - before
    finally:
        gc.enable()
    assert left <= 3  # the last, still in the hands of a thread


def test_a_wrong_engine_shows_in_the_accuracy(parts, list_source, fake_runner) -> None:
    source = list_source([picture((0, 0, 255))] * 10, labels=[2] * 9 + [0])
    with fake_runner(lambda pixels: mean_color(pixels)[:, ::-1]) as runner:  # colours swapped
        stream = Stream(parts, source, runner)
        stream.run()
    assert stream.metrics.snapshot().top1 == 0.1


def test_every_holds_back_the_source_instead_of_dropping(parts, list_source, fake_runner) -> None:
    ahead: list[int] = []
    with fake_runner(lambda pixels: (time.sleep(0.005), mean_color(pixels))[1]) as runner:
        source = list_source([picture()] * 40, before_read=lambda index: ahead.append(index - runner.n_done))
        stream = Stream(parts, source, runner)
        stream.run()
    assert stream.metrics.snapshot().frames_inferred == 40
    assert max(ahead) < 12  # the queues' sizes, not the source's length


@pytest.mark.keeps_time
def test_newest_drops_and_stays_fresh_when_the_engine_is_slow(parts, list_source, fake_runner) -> None:
    engine_s, period_s = 0.04, 0.004
    source = list_source([picture()] * 150, live=True, before_read=lambda _: time.sleep(period_s))
    with fake_runner(lambda pixels: (time.sleep(engine_s), mean_color(pixels))[1]) as runner:
        stream = Stream(parts, source, runner, "newest")
        stream.run()
    state = stream.metrics.snapshot()
    assert state.dropped["newer frame"] > 100
    assert state.frames_inferred >= 10
    assert stream.balanced()
    # A frame waits for at most the one before it, then is inferred; `every` would let it grow stale.
    assert state.latency["age"].p50_ms < 1e3 * (2 * engine_s + period_s) * 1.6
    indices = [p.frame_index for p in stream.predictions]
    assert indices == sorted(indices)


@pytest.mark.keeps_time
def test_slow_output_under_newest_stays_bounded(parts, list_source, fake_runner) -> None:
    source = list_source([picture()] * 100, live=True, before_read=lambda _: time.sleep(0.004))
    with fake_runner(mean_color) as runner:
        stream = Stream(parts, source, runner, "newest", on_prediction=lambda *_: time.sleep(0.03))
        stream.run()
    state = stream.metrics.snapshot()
    assert state.dropped["newer frame"] > 50
    assert state.latency["age"].p95_ms < 30 * 7  # three outputs and a little; the source is 100 frames
    assert stream.balanced()


@pytest.mark.keeps_time
def test_stages_overlap(parts, list_source, fake_runner) -> None:
    """Capture, preprocessing, inference and output of 20 ms each: 80 ms in sequence, 20 overlapped."""

    def prepare(frame: Frame, row: NDArray[Any]) -> None:
        time.sleep(0.02)
        copy_into(frame, row)

    source = list_source([picture()] * 20, before_read=lambda _: time.sleep(0.02))
    started = time.monotonic()
    with fake_runner(lambda pixels: (time.sleep(0.02), mean_color(pixels))[1]) as runner:
        Stream(parts, source, runner, prepare=prepare, on_prediction=lambda *_: time.sleep(0.02)).run()
    assert time.monotonic() - started < 20 * 0.08 * 0.6


@pytest.mark.keeps_time
def test_infer_time_excludes_the_wait_for_the_engine(parts, list_source, fake_runner) -> None:
    with fake_runner(lambda pixels: (time.sleep(0.02), mean_color(pixels))[1]) as runner:
        stream = Stream(parts, list_source([picture()] * 12), runner)
        stream.run()
    latency = stream.metrics.snapshot().latency
    assert 19 < latency["infer"].p50_ms < 45
    assert latency["queue"].p50_ms > 30  # two requests wait ahead under `every`


def test_unusable_frames_are_counted_and_never_inferred(parts, list_source, fake_runner) -> None:
    items = [
        picture(),
        None,
        np.zeros((0, 0, 3), np.uint8),
        np.zeros((640, 1), np.uint8),
        np.zeros((4, 4), np.uint16),
        picture(),
    ]
    with fake_runner(mean_color) as runner:
        stream = Stream(parts, list_source(items), runner)
        stream.run()
        assert runner.n_done == 2
    state = stream.metrics.snapshot()
    assert state.dropped == {"no image": 1, "empty image": 1, "bad shape": 1, "uint16 samples": 1}
    assert [p.frame_index for p in stream.predictions] == [0, 5]
    assert stream.balanced()


def test_frame_limit_is_exact(parts, list_source, fake_runner) -> None:
    with fake_runner(mean_color) as runner:
        stream = Stream(parts, list_source([picture()] * 50), runner, max_frames=7)
        assert stream.run() == FRAME_LIMIT
    assert len(stream.predictions) == 7
    assert stream.balanced()


def test_time_limit_and_pace(parts, list_source, fake_runner) -> None:
    with fake_runner(mean_color) as runner:
        stream = Stream(
            parts,
            list_source([picture()] * 10_000, live=True),
            runner,
            "newest",
            pace_fps=50,
            max_seconds=0.5,
        )
        started = time.monotonic()
        assert stream.run() == TIME_LIMIT
        seconds = time.monotonic() - started
    assert 0.5 <= seconds < 0.5 + SLACK_S
    assert 1 <= len(stream.predictions) <= 50 * seconds + 1  # fewer on a busy machine
    assert stream.balanced()


def test_a_requested_stop_finishes_what_is_in_flight(parts, list_source, fake_runner) -> None:
    source = list_source([picture()] * 10_000, before_read=lambda _: time.sleep(0.001))
    with fake_runner(mean_color) as runner:
        stream = Stream(parts, source, runner)

        def stop_after_20() -> None:
            if len(stream.predictions) >= 20:
                stream.runtime.request_stop("SIGTERM")

        assert stream.run(stop_after_20) == "SIGTERM"
    assert 20 <= len(stream.predictions) < 40
    assert stream.balanced()


def no_stream_threads() -> bool:
    return not [t for t in threading.enumerate() if t.name.startswith("stream-")]


@pytest.mark.parametrize("stage", ["capture", "preprocess", "engine", "output"])
@pytest.mark.parametrize("policy", ["every", "newest"])
def test_an_error_in_any_stage_ends_the_run(stage: str, policy: str, parts, list_source, fake_runner) -> None:
    def fail_at_5(where: str, error: Exception) -> Callable[[int], None]:
        def check(index: int) -> None:
            time.sleep(0.002)
            if where == stage and index >= 5:
                raise error

        return check

    n_prepared = iter(range(10_000))
    n_inferred = iter(range(10_000))
    in_prepare, in_engine = fail_at_5("preprocess", DataError("no")), fail_at_5("engine", ValueError("boom"))
    in_output = fail_at_5("output", EdgefoldError("disk full"))
    source = list_source([picture()] * 10_000, before_read=fail_at_5("capture", OSError("gone")))
    with fake_runner(lambda pixels: (in_engine(next(n_inferred)), mean_color(pixels))[1]) as runner:
        stream = Stream(
            parts,
            source,
            runner,
            policy,
            prepare=lambda frame, row: (in_prepare(next(n_prepared)), copy_into(frame, row))[1],
            on_prediction=lambda frame, prediction: in_output(frame.index),
        )
        expected = {
            "capture": (EdgefoldError, "capture of list failed: OSError: gone", 1),
            "preprocess": (DataError, "no", 2),
            "engine": (EngineError, "the engine failed on frame .*boom", 1),
            "output": (EdgefoldError, "disk full", 1),
        }[stage]
        started = time.monotonic()
        with pytest.raises(expected[0], match=expected[1]) as caught:
            stream.run()
        assert caught.value.exit_code == expected[2]
        assert time.monotonic() - started < SLACK_S  # and not the 20 s that the source would last
    eventually(no_stream_threads)


def test_an_engine_that_times_out_by_itself_is_not_waited_for(parts, list_source, fake_runner) -> None:
    def time_out(pixels: NDArray[Any]) -> NDArray[Any]:
        raise TimeoutError("driver")

    with fake_runner(time_out) as runner, pytest.raises(EngineError, match="frame 0 of list: driver"):
        Stream(parts, list_source([picture()]), runner).run()


def test_nan_scores_end_the_run(parts, list_source, fake_runner) -> None:
    with fake_runner(lambda pixels: np.full((1, 3), np.nan, np.float32)) as runner:
        stream = Stream(parts, list_source([picture()]), runner)
        with pytest.raises(EngineError, match="nan for class 0"):
            stream.run()
    assert stream.predictions == []


def test_an_engine_that_never_answers_is_a_device_fault(parts, list_source, fake_runner) -> None:
    release = threading.Event()
    runner = fake_runner(lambda pixels: (release.wait(PATIENCE_S), mean_color(pixels))[1])
    stream = Stream(parts, list_source([picture()] * 5), runner, engine_stall_s=0.3)
    with pytest.raises(DeviceFaultError, match="engine has not answered"):
        stream.run()
    assert stream.runtime.engine_stuck
    release.set()
    runner.close()


@pytest.mark.keeps_time
def test_several_engine_streams_run_side_by_side(parts, list_source, fake_runner) -> None:
    with fake_runner(lambda pixels: (time.sleep(0.03), mean_color(pixels))[1], n_streams=3) as runner:
        stream = Stream(parts, list_source([picture()] * 24, labels=[2] * 24), runner)
        started = time.monotonic()
        stream.run()
        assert time.monotonic() - started < 24 * 0.03 * 0.7
    assert [p.frame_index for p in stream.predictions] == list(range(24))
    assert stream.metrics.snapshot().latency["infer"].p50_ms == pytest.approx(30, rel=0.4)
