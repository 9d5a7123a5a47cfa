from __future__ import annotations

import datetime
import math
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apps.streaming.clock import UtcAnchor, process_anchor
from apps.streaming.config import EventConfig
from apps.streaming.contracts import Event
from apps.streaming.events import EventTracker, check_event_config
from pipeline.artifacts import Frame
from pipeline.errors import UsageError

LABELS = ("cat", "dog", "background")
SHARP = EventConfig(smoothing_s=0.0, enter=0.7, leave=0.4, hold_s=0.5)
NOON = datetime.datetime(2026, 11, 25, 12, tzinfo=datetime.timezone.utc)
ANCHOR = UtcAnchor(monotonic_ns=0, utc_ns=round(NOON.timestamp()) * 10**9)


def frame(seconds: float, index: int = 0) -> Frame:
    return Frame(np.zeros((2, 2, 3), np.uint8), "BGR", "cam", index, round(seconds * 1e9))


def tracker(config: EventConfig = SHARP, silence_s: float = 2.0) -> EventTracker:
    return EventTracker(config, LABELS, "cam", silence_s=silence_s, anchor=ANCHOR)


def cat(confidence: float) -> np.ndarray:
    return np.array([confidence, 0.0, 1.0 - confidence])


def play(tracked: EventTracker, frames: list[tuple[float, float]]) -> list[tuple[str, float]]:
    """(time, confidence of the cat) to (event, time)."""
    events: list[Event] = []
    for index, (seconds, confidence) in enumerate(frames):
        events += tracked.update(frame(seconds, index), cat(confidence))
    return [(event.kind, event.timestamp_ns / 1e9) for event in events if event.label == "cat"]


def test_a_label_enters_at_the_upper_threshold_and_leaves_below_the_lower_one() -> None:
    frames = [
        (0.0, 0.69),
        (0.1, 0.7),
        (0.2, 0.4),
        (0.3, 0.39),
        (0.7, 0.1),
        (0.8, 0.1),
        (0.9, 0.69),
        (1.0, 0.7),
    ]
    assert play(tracker(), frames) == [("enter", 0.1), ("leave", 0.8), ("enter", 1.0)]


def test_it_must_stay_below_for_the_whole_hold_time() -> None:
    frames = [(0.0, 0.9), (0.1, 0.3), (0.5, 0.3), (0.55, 0.41), (0.6, 0.3), (1.0, 0.3), (1.1, 0.3)]
    assert play(tracker(), frames) == [("enter", 0.0), ("leave", 1.1)]


def test_without_hold_it_leaves_with_the_first_frame_below() -> None:
    frames = [(0.0, 0.9), (0.1, 0.39)]
    assert play(tracker(replace(SHARP, hold_s=0.0)), frames) == [("enter", 0.0), ("leave", 0.1)]


@given(st.lists(st.floats(0.4, 0.6999), min_size=1, max_size=50))
def test_noise_between_the_thresholds_makes_no_event(noise: list[float]) -> None:
    frames = [(0.1 * index, confidence) for index, confidence in enumerate(noise)]
    assert play(tracker(), frames) == []
    later = [(1.0 + seconds, confidence) for seconds, confidence in frames]
    assert play(tracker(), [(0.9, 0.8), *later]) == [("enter", 0.9)]


@given(st.lists(st.tuples(st.floats(0.0, 3.0), st.floats(0.0, 1.0)), max_size=60), st.floats(0.0, 1.0))
def test_enter_and_leave_alternate_in_order_whatever_comes(
    steps: list[tuple[float, float]], smoothing_s: float
) -> None:
    tracked = tracker(replace(SHARP, smoothing_s=smoothing_s))
    now, events = 0.0, []
    for index, (step_s, confidence) in enumerate(steps):
        now += step_s
        events += tracked.update(frame(now, index), cat(confidence))
    events += tracked.close(round(now * 1e9))
    assert tracked.present == ()
    for label in LABELS:
        kinds = [event.kind for event in events if event.label == label]
        assert kinds == ["enter", "leave"] * (len(kinds) // 2)
    times = [event.timestamp_ns for event in events]
    assert times == sorted(times)
    assert [event.time_utc for event in events] == sorted(event.time_utc for event in events)


def test_what_an_event_says() -> None:
    tracked = tracker()
    assert tracked.present == ()
    (entered,) = tracked.update(frame(10.0, 3), cat(0.8))
    assert tracked.present == ("cat",)
    tracked.update(frame(10.5, 4), cat(0.95))
    tracked.update(frame(11.0, 5), np.array([0.1, 0.2, 0.1]))
    (left,) = tracked.update(frame(11.5, 6), np.array([0.1, 0.2, 0.1]))
    assert entered == Event("enter", "cam", "cat", 0, 0.8, 3, 10**10, "2026-11-25T12:00:10.000Z", None)
    assert left == Event("leave", "cam", "cat", 0, 0.95, 6, 11_500_000_000, "2026-11-25T12:00:11.500Z", 1.5)
    assert tracked.present == ()


def test_what_left_comes_before_what_entered() -> None:
    tracked = tracker(replace(SHARP, hold_s=0.0))
    tracked.update(frame(0.0), np.array([0.0, 0.9, 0.1]))
    events = tracked.update(frame(0.1), np.array([0.9, 0.1, 0.0]))
    assert [(event.kind, event.label) for event in events] == [("leave", "dog"), ("enter", "cat")]


def test_smoothing_decides_when() -> None:
    """From 0 to 1 at once: 0.7 is reached after tau ln(1 / 0.3), at the first frame after that."""
    tracked = tracker(replace(SHARP, smoothing_s=0.5))
    frames = [(0.0, 0.0), *((0.02 * step, 1.0) for step in range(1, 50))]
    ((_, entered_s),) = play(tracked, frames)
    exact_s = 0.5 * math.log(1 / 0.3)
    assert exact_s <= entered_s < exact_s + 0.02
    assert tracked.top(1)[0].label == "cat"
    assert tracked.top(1)[0].confidence == pytest.approx(1 - math.exp(-0.98 / 0.5))


def test_of_a_silent_source_everything_leaves_as_of_its_last_frame() -> None:
    tracked = tracker()
    tracked.update(frame(0.0, 0), cat(0.9))
    tracked.update(frame(1.0, 1), cat(0.9))
    assert tracked.tick(3_000_000_000) == []
    (left,) = tracked.tick(3_000_000_001)
    assert (left.kind, left.timestamp_ns, left.frame_index, left.seconds) == ("leave", 10**9, 1, 1.0)
    assert tracked.tick(4_000_000_000) == []
    assert tracked.top() == ()
    assert [event.kind for event in tracked.update(frame(9.0, 2), cat(0.9))] == ["enter"]


def test_a_gap_that_nobody_ticked_through_is_one_nevertheless() -> None:
    tracked = tracker()
    tracked.update(frame(0.0), cat(0.9))
    events = tracked.update(frame(5.0, 1), cat(0.9))
    assert [(event.kind, event.timestamp_ns) for event in events] == [("leave", 0), ("enter", 5 * 10**9)]


def test_at_the_end_of_a_source_everything_leaves() -> None:
    tracked = tracker()
    assert tracked.close(0) == []
    tracked.update(frame(0.0), cat(0.9))
    (left,) = tracked.close(1_500_000_000)
    assert (left.timestamp_ns, left.seconds) == (1_500_000_000, 1.5)
    assert tracked.close(1_600_000_000) == []


def test_a_frame_from_the_past_changes_nothing() -> None:
    tracked = tracker(replace(SHARP, hold_s=0.0))
    tracked.update(frame(1.0), cat(0.9))
    assert tracked.update(frame(0.5), cat(0.0)) == []
    assert tracked.present == ("cat",)


def test_ignored_labels_make_no_events() -> None:
    tracked = tracker(replace(SHARP, ignore=("background",)))
    assert tracked.update(frame(0.0), np.array([0.0, 0.0, 1.0])) == []
    assert tracked.present == ()


def test_a_label_to_ignore_must_exist() -> None:
    with pytest.raises(UsageError, match="no label 'backgruond' to ignore; near: background"):
        tracker(replace(SHARP, ignore=("backgruond",)))
    with pytest.raises(UsageError, match="no label '17' to ignore; it has 3, the first is 'cat'"):
        tracker(replace(SHARP, ignore=("17",)))


@pytest.mark.parametrize(
    "wrong",
    [
        {"enter": 0.4},
        {"enter": 1.01},
        {"leave": 0.0},
        {"leave": 0.7},
        {"enter": math.nan},
        {"smoothing_s": -1.0},
        {"smoothing_s": math.inf},
        {"hold_s": math.nan},
    ],
)
def test_thresholds_and_times_that_make_no_sense(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=r"^events: "):
        check_event_config(replace(SHARP, **wrong))
    check_event_config(replace(SHARP, enter=1.0))


def test_a_clock_set_back_does_not_reorder_events(monkeypatch: pytest.MonkeyPatch) -> None:
    tracked = EventTracker(replace(SHARP, hold_s=0.0), LABELS, "cam")
    start_ns = time.monotonic_ns()
    (entered,) = tracked.update(frame(start_ns / 1e9), cat(0.9))
    monkeypatch.setattr(time, "time_ns", lambda: 0)  # 1970
    monkeypatch.setattr(time, "time", lambda: 0.0)
    (left, _) = tracked.update(frame(start_ns / 1e9 + 1.0), cat(0.0))
    times = [datetime.datetime.fromisoformat(e.time_utc.replace("Z", "+00:00")) for e in (entered, left)]
    assert (times[1] - times[0]).total_seconds() == pytest.approx(1.0, abs=0.002)
    assert process_anchor() is process_anchor()


def test_utc_to_the_millisecond() -> None:
    assert ANCHOR.iso(1_234_999_999) == "2026-11-25T12:00:01.234Z"
    assert ANCHOR.iso(-1_000_000) == "2026-11-25T11:59:59.999Z"
