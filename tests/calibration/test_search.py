"""The search over plans, with engines made up: what it asks, what it finds, what it refuses."""

from __future__ import annotations

import json

import numpy as np
import pytest

from calibration.budget import Budget
from calibration.search import MAX_RETURNS, SearchState, plan_key, search_precision
from calibration.sensitivity import LayerSensitivity
from pipeline.errors import AccuracyGateError, DataError, UsageError

N_IMAGES = 1000


def layer(index, noise=None, macs=100):
    return LayerSensitivity(f"l{index}", "Conv", 0.01, 1.0 / (index + 1) if noise is None else noise, macs)


class Engines:
    """`lost_of(plan)` images are lost, spread evenly; `ms_of(plan)` is the latency. Everything asked is kept."""

    def __init__(self, lost_of, ms_of=lambda plan: 1.0 + 0.1 * len(plan), gained_of=lambda plan: 0):
        self.lost_of, self.ms_of, self.gained_of = lost_of, ms_of, gained_of
        self.judged, self.timed, self.n_seen, self.n_closed = [], [], 0, 0

    def judge(self, plan):
        self.judged.append(plan)
        changes = np.zeros(N_IMAGES, np.int8)
        lost = self.lost_of(plan)
        changes[:lost] = 1
        changes[lost : lost + self.gained_of(plan)] = -1
        changes = np.random.default_rng(0).permutation(changes)
        try:
            for start in range(0, N_IMAGES, 16):
                self.n_seen += len(changes[start : start + 16])
                yield changes[start : start + 16]
        finally:
            self.n_closed += 1

    def time(self, plans):
        self.timed.append(list(plans))
        return [self.ms_of(plan) for plan in plans]


def first_needed(count):
    """An engine that loses 60 images while any of the first `count` layers is in int8."""
    needed = {f"l{i}" for i in range(count)}
    return lambda plan: 0 if needed <= plan else 60


def search(engines, ranking, budget=Budget.of_drop(1.0), **options):  # noqa: B008
    return search_precision(ranking, budget, N_IMAGES, engines.judge, engines.time, **options)


def test_int8_within_the_budget_is_kept_and_nothing_else_is_judged():
    engines = Engines(lambda plan: 3, ms_of=lambda plan: 1.0 + len(plan))
    result = search(engines, [layer(i) for i in range(20)])
    assert result.plan == frozenset()
    assert result.kept == ()
    assert set(engines.judged) == {frozenset()}
    assert (result.judged.lost, result.judged.complete) == (3, True)
    assert result.plan_ms == result.int8_ms
    assert result.latency_given_up_ms == 0.0


@pytest.mark.parametrize("needed", [1, 2, 7, 63, 64])
def test_the_fewest_layers_are_found_in_logarithmic_judgements(needed):
    ranking = [layer(i) for i in range(64)]
    engines = Engines(first_needed(needed), ms_of=lambda plan: 1.0 + 0.1 * len(plan))
    result = search(engines, ranking)
    assert [kept.layer for kept in result.kept] == [f"l{i}" for i in range(needed)]
    assert result.n_evaluations <= 1 + 6 + 1 + 2 * MAX_RETURNS
    assert (result.judged.lost, result.judged.n_images, result.judged.complete) == (0, N_IMAGES, True)
    assert result.n_evaluations == len(engines.judged)
    assert engines.n_closed == len(engines.judged), "every pass is closed"


def test_hopeless_plans_are_not_judged_to_the_end():
    engines = Engines(lambda plan: 0 if len(plan) >= 32 else 300)
    result = search(engines, [layer(i, macs=0) for i in range(64)])
    assert len(result.plan) == 32
    assert result.n_images_judged < 0.5 * N_IMAGES * result.n_evaluations


def test_a_plan_called_within_too_early_is_caught_by_all_images():
    """The first half of the images loses nothing, the second too much, of plans under four layers."""

    class Late(Engines):
        def judge(self, plan):
            self.judged.append(plan)
            half = np.zeros(N_IMAGES // 2, np.int8)
            yield half
            yield half if len(plan) >= 4 else half + 1

    engines = Late(None, ms_of=lambda plan: 1.0)
    result = search(engines, [layer(i) for i in range(16)], Budget.of_drop(5.0))
    assert len(result.plan) == 4
    assert result.judged.complete
    assert result.judged.within


def test_a_costly_layer_that_is_not_needed_returns_to_int8():
    ranking = [layer(0), layer(1, macs=9000), layer(2), layer(3)]
    needed = {"l0", "l2"}
    engines = Engines(
        lambda plan: 0 if needed <= plan else 60,
        ms_of=lambda plan: 1.0 + 2.0 * ("l1" in plan) + 0.1 * len(plan),
    )
    result = search(engines, ranking)
    assert result.plan == needed
    assert result.plan_ms == pytest.approx(1.2)
    assert result.latency_given_up_ms == pytest.approx(0.2)
    assert any("l1 returned to int8: 3.30 to 1.20 ms" in note for note in result.notes)
    reasons = {kept.layer: kept.reason for kept in result.kept}
    assert "without it the budget is missed" in reasons["l0"]
    assert "of the logits' noise" in reasons["l0"]


def test_a_layer_that_int8_would_not_make_faster_stays_where_it_is_accurate():
    engines = Engines(first_needed(2), ms_of=lambda plan: 1.0 + 0.004 * len(plan))
    result = search(engines, [layer(i) for i in range(8)])
    assert len(result.plan) == 2
    judged_after = [plan for plan in engines.judged if plan == frozenset({"l1"})]
    assert judged_after == [], "what would not be faster is not judged"
    assert "int8 would not be faster" in {kept.layer: kept.reason for kept in result.kept}["l0"]


def test_float_throughout_is_taken_where_the_plan_is_slower():
    engines = Engines(first_needed(3), ms_of=lambda plan: 5.0 if 0 < len(plan) < 8 else 2.0 - 0.1 * len(plan))
    result = search(engines, [layer(i) for i in range(8)])
    assert len(result.plan) == 8
    assert result.plan_ms == result.float_ms
    assert any("int8 gains nothing" in note for note in result.notes)


def test_a_budget_that_float_misses_is_said_to_be_no_fault_of_int8():
    engines = Engines(lambda plan: 60)
    with pytest.raises(AccuracyGateError, match="all 8 layers in float, 60 of 1,000"):
        search(engines, [layer(i) for i in range(8)])


def test_a_broken_off_search_goes_on():
    ranking = [layer(i) for i in range(64)]
    kept = SearchState()

    class Broken(Exception):
        pass

    engines = Engines(first_needed(9))
    n_allowed = 3

    def keep(state):
        if len(state.judged) == n_allowed:
            raise Broken

    with pytest.raises(Broken):
        search(engines, ranking, state=kept, keep=keep)
    done = set(engines.judged)
    again = Engines(first_needed(9))
    result = search(again, ranking, state=kept)
    whole = search(Engines(first_needed(9)), ranking)
    assert not done & set(again.judged), "nothing is judged twice"
    assert (result.plan, result.n_evaluations) == (whole.plan, whole.n_evaluations)


def test_gained_answers_count_against_lost_ones_in_a_drop_only():
    engines = Engines(lambda plan: 30, gained_of=lambda plan: 25, ms_of=lambda plan: 1.0)
    assert search(engines, [layer(0)]).judged.within
    assert Budget.of_drop(1.0).is_met(30, 25, N_IMAGES)
    assert not Budget.of_drop(0.4).is_met(30, 25, N_IMAGES)
    assert Budget.of_agreement(97.0).is_met(30, 0, N_IMAGES)
    assert not Budget.of_agreement(97.1).is_met(30, 0, N_IMAGES)


def test_images_that_do_not_show_it_are_noted_with_how_many_would():
    engines = Engines(lambda plan: 8, gained_of=lambda plan: 4, ms_of=lambda plan: 1.0)
    (note,) = search(engines, [layer(0)]).notes
    assert note.startswith("1,000 images do not show that the budget is met: the 95% interval ends at 1.")
    assert "would" in note
    at_the_limit = Engines(lambda plan: 10, ms_of=lambda plan: 1.0)
    (note,) = search(at_the_limit, [layer(0)]).notes
    assert "would" not in note, "no number of images shows that a drop at the limit is below it"


def test_bad_requests_are_refused():
    engines = Engines(lambda plan: 0)
    with pytest.raises(DataError, match="At least 2,000 are needed"):
        search(engines, [layer(0)], Budget.of_drop(0.05))
    with pytest.raises(UsageError, match="no quantized layer"):
        search(engines, [])
    with pytest.raises(UsageError, match="--max-drop is from 0 to 100, got -1"):
        Budget.of_drop(-1.0)
    with pytest.raises(UsageError, match="--min-agreement"):
        Budget.of_agreement(101.0)
    with pytest.raises(UsageError):
        Budget.of_drop(float("nan"))


def test_a_judgement_that_ends_short_is_an_error():
    def short(plan):
        yield np.zeros(10, np.int8)

    with pytest.raises(DataError, match="saw 10 images where 1,000"):
        search_precision([layer(0)], Budget.of_drop(1.0), N_IMAGES, short, lambda plans: [1.0 for _ in plans])


def test_the_record_is_json_and_names_budget_interval_and_latency():
    record = search(Engines(first_needed(2)), [layer(i) for i in range(8)]).to_json()
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["budget"] == "a drop of at most 1 points"
    assert record["change_interval_percent"][0] <= 0.0 <= record["change_interval_percent"][1]
    assert record["latency_given_up_ms"] == pytest.approx(0.2)
    assert [entry["layer"] for entry in record["kept_in_float"]] == ["l0", "l1"]


def test_a_plan_is_known_by_its_layers_whatever_their_order():
    assert plan_key(frozenset(["b", "a"])) == plan_key(frozenset(["a", "b"]))
    assert plan_key(frozenset(["ab"])) != plan_key(frozenset(["a", "b"]))
