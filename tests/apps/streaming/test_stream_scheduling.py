"""Several feeds under one engine: turns, batches, the latency budget, and engines that are swapped."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from leaks import Held
from numpy.typing import NDArray
from tolerances import FAIR_SHARE_RTOL
from waiting import PATIENCE_S, eventually

from apps.streaming.engine_slot import EngineSlot
from apps.streaming.reload import Reloader
from apps.streaming.runtime import LATE, Answer, RuntimeLimits, StreamRuntime
from apps.streaming.scheduling import TOO_OLD, LatencyBudget, RuntimeFeed
from pipeline.errors import DataError, EdgefoldError, EngineError
from pipeline.metrics import probabilities

RED = np.full((16, 16, 3), (0, 0, 255), np.uint8)


def mean_color(pixels: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(pixels.mean(axis=(1, 2)) * 0.05, np.float32)


def slowly(seconds: float) -> Callable[[NDArray[Any]], NDArray[Any]]:
    return lambda pixels: (time.sleep(seconds), mean_color(pixels))[1]


def run(
    feeds: list[RuntimeFeed],
    slot: EngineSlot,
    on_answer: Callable[[Answer], None] = lambda answer: None,
    on_tick: Callable[[], None] = lambda: None,
    **limits: Any,
) -> StreamRuntime:
    runtime = StreamRuntime(feeds, slot, RuntimeLimits(**limits))
    try:
        runtime.run(on_answer, on_tick)
    finally:
        for source in feeds:
            source.feed.close()
    for source in feeds:
        state = source.metrics.snapshot()
        assert state.frames_read == state.frames_inferred + sum(state.dropped.values())
        assert source.feed.n_out == 0  # type: ignore[attr-defined]
    return runtime


def inferred(feeds: list[RuntimeFeed]) -> list[int]:
    return [source.metrics.snapshot().frames_inferred for source in feeds]


def every(seconds: float) -> Callable[[int], None]:
    return lambda index: time.sleep(seconds)


@pytest.mark.keeps_time
@pytest.mark.parametrize("max_batch", [1, 3])
def test_eight_feeds_get_a_fair_share_of_an_engine_too_slow_for_all(
    max_batch: int, feeds_of, slot_around, list_source, fake_runner
) -> None:
    """Feed 0 floods; the others come at 200 a second; the engine takes 100 a second in all, so that at its turn a
    feed has a frame waiting, though its thread may have been kept waiting itself."""
    sources = [
        list_source([RED] * 10**6, live=True, before_read=every(0.0005 if index == 0 else 0.005))
        for index in range(8)
    ]
    feeds = feeds_of(sources, "newest")
    with fake_runner(slowly(0.01 * max_batch)) as runner:
        run(feeds, slot_around(runner, max_batch=max_batch), max_frames=320)
    counts = inferred(feeds)
    assert sum(counts) == 320
    assert counts == pytest.approx([40] * 8, rel=FAIR_SHARE_RTOL)


@pytest.mark.keeps_time
def test_a_feed_with_nothing_waiting_gives_its_turn_away(
    feeds_of, slot_around, list_source, fake_runner
) -> None:
    seldom = list_source([RED] * 100, live=True, before_read=every(0.1))
    often = list_source([RED] * 10**6, live=True, before_read=every(0.001))
    feeds = feeds_of([seldom, often], "newest")
    started_s = time.monotonic()
    with fake_runner(slowly(0.002)) as runner:
        run(feeds, slot_around(runner), max_seconds=0.7)
    few, many = inferred(feeds)
    assert 1 <= few <= (time.monotonic() - started_s) / 0.1 + 1
    assert many > 5 * few


def test_a_batch_gathers_across_feeds_and_keeps_answers_apart(
    feeds_of, slot_around, list_source, fake_runner
) -> None:
    colors = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    sizes: Counter[int] = Counter()

    def work(pixels: NDArray[Any]) -> NDArray[Any]:
        sizes[len(pixels)] += 1
        time.sleep(0.01)
        return mean_color(pixels)

    sources = [
        list_source([np.full((16, 16, 3), color, np.uint8)] * 30, labels=[truth] * 30)
        for truth, color in enumerate(colors)
    ]
    feeds = feeds_of(sources)
    order: dict[str, list[int]] = {source.feed.source_id: [] for source in feeds}
    with fake_runner(work) as runner:
        runtime = run(
            feeds,
            slot_around(runner, max_batch=3),
            lambda answer: order[answer.frame.source_id].append(answer.frame.index),
            batch_wait_ms=50,
        )
    assert [source.metrics.snapshot().top1 for source in feeds] == [1.0] * 3
    assert list(order.values()) == [list(range(30))] * 3
    assert max(sizes) == 3
    assert runtime.batched_frames == 90
    assert runtime.batched_frames / runtime.batches > 2.5


@pytest.mark.keeps_time
def test_the_first_frame_of_a_batch_does_not_wait_past_its_limit(
    feeds_of, slot_around, list_source, fake_runner
) -> None:
    slow = list_source([RED] * 6, live=True, before_read=every(0.1))
    silent = list_source([RED], live=True, before_read=lambda index: time.sleep(2.0))
    feeds = feeds_of([slow, silent], "newest")
    with fake_runner(mean_color) as runner:
        runtime = run(feeds, slot_around(runner, max_batch=8), max_frames=4, batch_wait_ms=30)
    assert runtime.batches == 4
    age = feeds[0].metrics.snapshot().latency["age"]
    assert 25 <= age.p50_ms < 90  # the 30 ms that it waited for company, not the 100 ms until the next frame


@pytest.mark.keeps_time
def test_frames_past_the_budget_are_dropped_and_never_shown(
    feeds_of, slot_around, list_source, fake_runner
) -> None:
    """Four feeds of `every` queue behind an engine of 30 ms: each frame waits longer than 100 ms."""
    feeds = feeds_of([list_source([RED] * 40) for _ in range(4)])
    shown_ms: list[float] = []

    def show(answer: Answer) -> None:
        shown_ms.append((time.monotonic_ns() - answer.frame.timestamp_ns) / 1e6)

    with fake_runner(slowly(0.03)) as runner:
        run(feeds, slot_around(runner), show, max_age_ms=100)
    dropped = sum((Counter(source.metrics.snapshot().dropped) for source in feeds), Counter())
    assert dropped[TOO_OLD] > 40
    assert set(dropped) <= {TOO_OLD, LATE}
    assert shown_ms
    # Judged when the answer is there; reading the clock again comes after. Unjudged, the last would be 4.8 s old.
    assert max(shown_ms) < 100 + 400


@pytest.mark.keeps_time
def test_an_engine_slower_than_the_budget_shows_nothing_and_is_still_asked(
    feeds_of, slot_around, list_source, fake_runner
) -> None:
    feeds = feeds_of([list_source([RED] * 10**6, live=True, before_read=every(0.005))], "newest")
    shown: list[Answer] = []
    with fake_runner(slowly(0.06)) as runner:
        run(feeds, slot_around(runner), shown.append, max_age_ms=40, max_seconds=1.6)
    dropped = feeds[0].metrics.snapshot().dropped
    assert shown == []
    assert dropped[LATE] >= 2  # the first ones, and after a second another: it may have become faster
    assert dropped[TOO_OLD] + dropped.get("newer frame", 0) > 20


@pytest.mark.keeps_time
def test_no_frame_waits_for_an_engine_that_takes_half_the_budget(
    feeds_of, slot_around, list_source, fake_runner
) -> None:
    """Behind another it would be answered after 120 ms; taken when the engine is free, after a little more than 60."""
    feeds = feeds_of([list_source([RED] * 10**6, live=True, before_read=every(0.005))], "newest")
    with fake_runner(slowly(0.06)) as runner:
        run(feeds, slot_around(runner), max_age_ms=110, max_seconds=1.5)
    state = feeds[0].metrics.snapshot()
    assert state.frames_inferred >= 15
    # The second frame is taken before it is known what the engine takes.
    assert state.dropped.get(LATE, 0) <= 4
    assert state.dropped.get(TOO_OLD, 0) == 0


def test_the_budget_says_whether_a_frame_may_wait_for_the_engine() -> None:
    budget = LatencyBudget(300)
    assert budget.may_wait_for_engine
    for inferred_ms, may in ((100, True), (101, False), (20, True)):
        budget.answered(10**8, inferred_ms * 10**6)
        assert budget.may_wait_for_engine is may
    unbounded = LatencyBudget(None)
    unbounded.answered(10**12, 10**12)
    assert unbounded.may_wait_for_engine


def test_the_budget_expects_the_shortest_of_the_last_answers() -> None:
    budget = LatencyBudget(100_000)
    for took_s in (90, 400, 60):
        budget.answered(took_s * 10**9, 0)
    now_ns = time.monotonic_ns()
    assert not budget.is_hopeless(now_ns - 20 * 10**9)
    assert budget.is_hopeless(now_ns - 50 * 10**9)
    assert budget.is_late(now_ns - 101 * 10**9)
    assert not LatencyBudget(None).is_hopeless(0)


def test_a_feed_that_dies_is_a_state_and_the_others_go_on(
    feeds_of, slot_around, list_source, fake_runner
) -> None:
    def fail_at_3(index: int) -> None:
        if index == 3:
            raise OSError("gone")

    sources = [list_source([RED] * 50, before_read=fail_at_3), list_source([RED] * 50)]
    feeds = feeds_of(sources)
    with fake_runner(mean_color) as runner:
        run(feeds, slot_around(runner))
    assert inferred(feeds) == [3, 50]
    assert isinstance(feeds[0].feed.failure(), OSError)


def test_several_feeds_that_all_fail_are_an_error(feeds_of, slot_around, list_source, fake_runner) -> None:
    def fail(index: int) -> None:
        raise DataError("no video")

    feeds = feeds_of([list_source([RED], before_read=fail), list_source([RED], before_read=fail)])
    with fake_runner(mean_color) as runner, pytest.raises(DataError, match="no video"):
        run(feeds, slot_around(runner))


def test_a_frame_that_cannot_be_prepared_is_one_feed_s_loss(
    feeds_of, slot_around, list_source, fake_runner
) -> None:
    def prepare(frame: Any, row: NDArray[Any]) -> None:
        if frame.source_id == "camera-0":
            raise DataError("wrong size")
        row[...] = frame.image

    feeds = feeds_of([list_source([RED] * 9), list_source([RED] * 9)])
    with fake_runner(mean_color) as runner:
        run(feeds, slot_around(runner, prepare=prepare, max_batch=4))
    assert inferred(feeds) == [0, 9]
    assert feeds[0].metrics.snapshot().dropped == {"not preprocessed": 9}


def constant(class_index: int) -> Callable[[NDArray[Any]], NDArray[Any]]:
    scores = np.zeros(3, np.float32)
    scores[class_index] = 9.0

    def work(pixels: NDArray[Any]) -> NDArray[Any]:
        time.sleep(0.002)
        return np.tile(scores, (len(pixels), 1))

    return work


def test_engines_swapped_under_load_lose_no_frame_and_mix_no_labels(
    feeds_of, engine_around, list_source, fake_runner
) -> None:
    """Each engine answers its own class, and each has its own names for the classes, and its own size."""
    names = [("cat", "dog", "cow"), ("rose", "lily", "tulip"), ("ash", "oak", "elm")]
    runners = [fake_runner(constant(index), size=(16, 8, 4)[index]) for index in range(3)]

    def shrink(frame: Any, row: NDArray[Any]) -> None:
        row[...] = frame.image[: len(row), : len(row)]

    made = [
        engine_around(runner, labels=labels, prepare=shrink, max_batch=2)
        for runner, labels in zip(runners, names, strict=True)
    ]
    slot = EngineSlot(made[0])
    waiting = iter(made[1:])
    reloader = Reloader(slot, Path("link"), lambda path: next(waiting))
    seen: list[str] = []
    closed_after: list[int] = []
    helpers: list[threading.Thread] = []

    def reload_now() -> None:
        reloader.reload()
        closed_after.append(runners[reloader.reloads - 1].n_done)

    def show(answer: Answer) -> None:
        seen.append(answer.prediction.top[0].label)
        if len(seen) in (50, 250):  # of the 200 before the first wait, of the 100 before the second
            helpers.append(threading.Thread(target=reload_now))
            helpers[-1].start()

    def wait_for_the_reload(index: int) -> None:
        """So that every engine has its share, however long a busy machine takes to load one."""
        if index in (100, 150):
            eventually(lambda: len(closed_after) == index // 50 - 1)

    sources = [list_source([RED] * 200, labels=[0] * 200, before_read=wait_for_the_reload) for _ in range(2)]
    feeds = feeds_of(sources)
    run(feeds, slot, show)
    for helper in helpers:
        helper.join(PATIENCE_S)
    assert inferred(feeds) == [200, 200]
    assert [label for index, label in enumerate(seen) if index == 0 or seen[index - 1] != label] == [
        "cat",
        "lily",
        "elm",
    ]
    assert reloader.reloads == 2
    for runner, n_done in zip(runners, closed_after, strict=False):
        assert runner.n_done == n_done > 0  # nothing reached an engine after it was closed
        with pytest.raises(RuntimeError):
            runner.submit({"input": np.zeros((1, 4, 4, 3), np.uint8)})
    runners[2].close()


def test_the_truth_of_a_source_follows_its_class_by_name(
    feeds_of, engine_around, list_source, fake_runner
) -> None:
    """The source was opened for blue, green, red, and shows red; the new engine has red first and no blue."""
    source = list_source([RED] * 20, labels=[2] * 10 + [0] * 10)
    engine = engine_around(fake_runner(constant(0)), labels=("red", "green", "violet"))
    feeds = feeds_of([source])
    answers: list[Answer] = []
    run(feeds, EngineSlot(engine), answers.append)
    assert [a.prediction.truth for a in answers] == [0] * 10 + [None] * 10
    assert feeds[0].metrics.snapshot().top1 == 1.0
    engine.runner.close()


def test_a_refused_bundle_leaves_the_old_engine_running(
    feeds_of, engine_around, list_source, fake_runner
) -> None:
    old = engine_around(fake_runner(constant(1)))
    slot = EngineSlot(old)

    def refuse(path: Path) -> Any:
        raise EngineError(f"{path} is no engine")

    reloader = Reloader(slot, Path("bad"), refuse)
    feeds = feeds_of([list_source([RED] * 50)])
    answers: list[Answer] = []

    def show(answer: Answer) -> None:
        answers.append(answer)
        if len(answers) == 10:
            assert reloader.start()

    run(feeds, slot, show)
    assert len(answers) == 50
    assert {a.prediction.top[0].label for a in answers} == {"green"}
    eventually(lambda: not reloader.busy)
    assert slot.current is old
    assert (reloader.reloads, reloader.failures, reloader.last_error) == (0, 1, "bad is no engine")
    with pytest.raises(EngineError, match="other is no engine"):
        reloader.reload(Path("other"))
    old.runner.close()


def test_a_bug_in_loading_is_a_refusal_too(engine_around, fake_runner) -> None:
    with fake_runner(mean_color) as runner:
        slot = EngineSlot(engine_around(runner))
        reloader = Reloader(slot, Path("b"), lambda path: [][1])
        with pytest.raises(EdgefoldError, match="could not be loaded: IndexError"):
            reloader.reload()
        assert reloader.failures == 1


def test_threads_and_buffers_stay_as_many_as_they_were(
    feeds_of, engine_around, list_source, fake_runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: Held | None = None
    grown: set[str] = set()
    n_batches = 0

    with fake_runner(mean_color) as runner:
        engine = engine_around(runner, max_batch=2)
        new_batch = engine.feeder.new_batch

        def counted() -> Any:
            nonlocal n_batches
            n_batches += 1
            return new_batch()

        monkeypatch.setattr(engine.feeder, "new_batch", counted)
        feeds = feeds_of([list_source([RED] * 1500) for _ in range(2)])
        seen = iter(range(10**6))

        def show(answer: Answer) -> None:
            nonlocal held
            index = next(seen)
            if index == 200:
                held = Held()
            elif held is not None:
                grown.update(held.new_threads())

        run(feeds, EngineSlot(engine), show)
    assert n_batches <= 2 * runner.n_streams + 2
    assert not grown
    assert max(source.feed.max_out for source in feeds) <= 2 * (2 * runner.n_streams + 2)


def test_confidences_are_given_with_the_answer(feeds_of, slot_around, list_source, fake_runner) -> None:
    answers: list[Answer] = []
    with fake_runner(mean_color) as runner:
        run(feeds_of([list_source([RED])]), slot_around(runner), answers.append)
    shares = probabilities(answers[0].scores[np.newaxis])[0]
    assert shares[2] == pytest.approx(answers[0].prediction.top[0].confidence)
