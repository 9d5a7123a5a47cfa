"""The rules of health and restarts, with the time given."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from apps.streaming.capture.health import RestartPolicy, SourceHealth
from apps.streaming.config import CaptureLimits
from apps.streaming.contracts import SourceState

LIMITS = CaptureLimits()
S = 1_000_000_000


class Highest(random.Random):
    """Draws the upper end: the schedule without its jitter."""

    def uniform(self, a: float, b: float) -> float:
        return b


def test_the_wait_doubles_up_to_the_longest() -> None:
    policy = RestartPolicy(LIMITS, Highest())
    assert [policy.failed(now_s, "soon").seconds for now_s in range(7)] == [1, 2, 4, 8, 16, 30, 30]


def test_jitter_keeps_the_upper_half_and_differs() -> None:
    waits = [RestartPolicy(LIMITS, random.Random(seed)).failed(0.0, "soon").seconds for seed in range(100)]
    assert min(waits) >= 0.5
    assert max(waits) <= 1.0
    assert len(set(waits)) == 100


def test_frames_for_as_long_as_the_longest_wait_start_it_anew() -> None:
    policy = RestartPolicy(LIMITS, Highest())
    for now_s in range(3):
        policy.failed(now_s, "soon")
    policy.frame_came(10.0)
    policy.frame_came(39.0)
    assert policy.failed(39.9, "soon").seconds == 8.0  # 29.9 s of frames are not enough
    policy.frame_came(50.0)
    assert policy.failed(80.0, "soon").seconds == 1.0


def test_a_spent_budget_is_lost_until_a_frame_comes() -> None:
    policy = RestartPolicy(replace(LIMITS, restart_budget=3), Highest())
    assert [policy.failed(float(i), "soon").lost for i in range(3)] == [False] * 3
    assert policy.failed(3.0, "soon").seconds == LIMITS.lost_retry_s
    # The window is over, but nothing says that the source is any better.
    assert policy.failed(10_000.0, "soon").lost
    policy.frame_came(10_001.0)
    assert not policy.failed(10_002.0, "soon").lost


def test_restarts_behind_the_window_are_forgiven() -> None:
    policy = RestartPolicy(replace(LIMITS, restart_budget=2, budget_window_s=100.0), Highest())
    assert [policy.failed(float(at_s), "soon").lost for at_s in (0, 60, 110, 150)] == [
        False,
        False,
        False,
        True,
    ]


@pytest.mark.parametrize("retry", ["seldom", "never"])
def test_what_trying_again_will_not_mend_is_lost_at_once(retry: str) -> None:
    assert RestartPolicy(LIMITS).failed(0.0, retry).lost  # type: ignore[arg-type]


def opened() -> SourceHealth:
    health = SourceHealth("camera", LIMITS, 0)
    health.started(0, again=False)
    health.opened(1 * S, 30.0)
    health.frame(2 * S, (640, 480), 1)
    return health


def test_silence_degrades_then_kills() -> None:
    health = opened()
    assert health.check(2 * S + 1_999_999_999) is None
    assert health.status().state is SourceState.LIVE
    assert health.check(4 * S) is None
    assert health.status().state is SourceState.DEGRADED
    assert health.check(7 * S - 1) is None
    assert "no usable frame for 5.0 s" in (health.check(7 * S) or "")
    assert health.status().stalls == 1


def test_a_slow_source_is_not_silent_between_its_frames() -> None:
    health = opened()
    health.opened(2 * S, 0.1)
    assert health.check(31 * S) is None
    assert health.status().state is SourceState.LIVE
    assert health.check(32 * S) is not None


def test_opening_has_its_own_limit() -> None:
    health = SourceHealth("camera", LIMITS, 0)
    health.started(100 * S, again=False)
    assert health.check(115 * S - 1) is None
    assert "did not open" in (health.check(115 * S) or "")
    assert health.status().state is SourceState.CONNECTING


def test_identical_frames_are_frozen_after_their_time_only() -> None:
    health = opened()
    for second in range(3, 12):
        health.frame(second * S, (640, 480), 1)
    assert not health.status().frozen
    health.frame(12 * S, (640, 480), 1)
    assert health.status().frozen
    assert health.status().state is SourceState.DEGRADED
    health.frame(13 * S, (640, 480), 2)
    assert not health.status().frozen
    assert health.status().state is SourceState.LIVE


def test_a_lost_source_stays_lost_while_it_is_tried() -> None:
    health = opened()
    health.failed(3 * S, "401", lost=True)
    health.started(4 * S, again=True)
    health.failed(5 * S, "refused", lost=False)
    status = health.status()
    assert (status.state, status.since_ns, status.restarts) == (SourceState.LOST, 3 * S, 1)
    health.frame(6 * S, (640, 480), 3)
    assert health.status().state is SourceState.LIVE
