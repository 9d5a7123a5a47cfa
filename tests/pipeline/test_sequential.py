"""Early stops: their error over simulated judgements, and what they save."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from tolerances import SIMULATED_MEASUREMENTS, WRONG_EARLY_STOPS

from pipeline.sequential import ALPHA, look_confidence, looks_of, verdict_so_far
from pipeline.statistics import paired_drop_interval

N_IMAGES = 2000


def stopped(changes, limit):
    """The verdict of an early stop and where, or ``None`` and all images."""
    for look in looks_of(len(changes)):
        lost, gained = int(np.sum(changes[:look] > 0)), int(np.sum(changes[:look] < 0))
        verdict = verdict_so_far(
            functools.partial(paired_drop_interval, lost, gained, look), look, len(changes), limit
        )
        if verdict != "open":
            return verdict, look
    return None, len(changes)


def judgements(lost_rate, gained_rate, limit, seed=0):
    """Early verdict, final truth and images used, of judgements drawn at random."""
    rng = np.random.default_rng(seed)
    for _ in range(SIMULATED_MEASUREMENTS):
        uniform = rng.random(N_IMAGES)
        changes = (uniform < lost_rate).astype(int) - (uniform > 1 - gained_rate).astype(int)
        verdict, n = stopped(changes, limit)
        yield verdict, "within" if changes.sum() <= limit * N_IMAGES + 1e-9 else "past", n


@pytest.mark.parametrize("gained_rate", [0.0, 0.01])
def test_at_the_limit_itself_few_stops_are_wrong(gained_rate):
    """The hardest case: as many candidates end within the limit as past it."""
    limit = 0.01
    wrong = {"within": 0, "past": 0}
    for verdict, truth, _ in judgements(limit + gained_rate, gained_rate, limit):
        if verdict is not None and verdict != truth:
            wrong[verdict] += 1
    for side, count in wrong.items():
        assert count / SIMULATED_MEASUREMENTS < WRONG_EARLY_STOPS, side


def test_a_candidate_far_off_is_stopped_early_and_rightly():
    for rates, side in (((0.10, 0.0), "past"), ((0.0, 0.0), "within")):
        found = list(judgements(*rates, limit=0.02))
        assert all(verdict == side for verdict, _, _ in found)
        assert np.mean([n for _, _, n in found]) <= N_IMAGES / 4


def test_the_looks_spend_no_more_than_is_there():
    for n in (100, 500, N_IMAGES, 50_000):
        spent = [(1 - look_confidence(look, n)) / 2 for look in looks_of(n)]
        assert all(part > 0 for part in spent)
        assert sum(spent) < ALPHA


def test_few_images_are_not_looked_at_before_the_end():
    assert looks_of(60) == ()
    assert looks_of(100) == (50,)
    assert looks_of(1600) == (100, 200, 400, 800)
    with pytest.raises(ValueError, match="no look after 7"):
        look_confidence(7, 1600)
