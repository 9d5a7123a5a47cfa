import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tolerances import SAME_AVERAGE_ATOL

from apps.streaming.smoothing import ProbabilityAverage


def ns(seconds: float) -> int:
    return round(seconds * 1e9)


def step_response(times_s: list[float], tau_s: float) -> float:
    """From 0 at time 0 to 1 at every later frame."""
    average = ProbabilityAverage(tau_s, gap_s=100.0)
    average.update(0, np.array([0.0, 1.0]))
    for time_s in times_s:
        average.update(ns(time_s), np.array([1.0, 0.0]))
    assert average.value is not None
    return float(average.value[0])


def test_after_one_time_constant_it_has_moved_by_1_minus_1_over_e() -> None:
    assert step_response([0.5], tau_s=0.5) == pytest.approx(1 - math.exp(-1))
    assert step_response([1.0, 1.5], tau_s=0.5) == pytest.approx(1 - math.exp(-3))


@given(st.lists(st.floats(0.001, 1.999), max_size=30), st.floats(0.05, 10.0))
def test_how_the_time_is_divided_into_frames_makes_no_difference(times_s: list[float], tau_s: float) -> None:
    """5 FPS, 30 FPS and drops in between: the same average after two seconds."""
    found = step_response([*sorted(times_s), 2.0], tau_s)
    assert found == pytest.approx(step_response([2.0], tau_s), abs=SAME_AVERAGE_ATOL)


@given(st.integers(0, 2**32 - 1))
def test_it_stays_a_distribution(seed: int) -> None:
    random = np.random.default_rng(seed)
    average = ProbabilityAverage(0.5, gap_s=2.0)
    time_ns = 0
    for probabilities in random.dirichlet(np.ones(5), size=20):
        time_ns += int(random.integers(0, ns(0.3)))
        value = average.update(time_ns, probabilities)
        assert value.sum() == pytest.approx(1.0, abs=SAME_AVERAGE_ATOL)
        assert value.min() >= 0.0


def test_zero_takes_every_frame_as_it_is() -> None:
    average = ProbabilityAverage(0.0, gap_s=2.0)
    average.update(0, np.array([1.0, 0.0]))
    assert average.update(ns(0.01), np.array([0.25, 0.75])).tolist() == [0.25, 0.75]


def test_after_a_gap_it_starts_anew() -> None:
    average = ProbabilityAverage(10.0, gap_s=2.0)
    average.update(0, np.array([1.0, 0.0]))
    assert average.update(ns(2.0), np.array([0.0, 1.0]))[0] > 0.8  # not a gap yet
    assert average.update(ns(4.001), np.array([0.0, 1.0])).tolist() == [0.0, 1.0]


def test_a_frame_from_the_past_and_a_repeated_time_have_no_weight() -> None:
    average = ProbabilityAverage(0.5, gap_s=2.0)
    average.update(ns(1.0), np.array([1.0, 0.0]))
    assert average.update(ns(1.0), np.array([0.0, 1.0])).tolist() == [1.0, 0.0]
    assert average.update(ns(0.5), np.array([0.0, 1.0])).tolist() == [1.0, 0.0]


def test_what_was_given_and_what_was_returned_stay_as_they_are() -> None:
    average = ProbabilityAverage(0.5, gap_s=2.0)
    given_first = np.array([1.0, 0.0])
    first = average.update(0, given_first)
    average.update(ns(0.5), np.array([0.0, 1.0]))
    assert given_first.tolist() == first.tolist() == [1.0, 0.0]
