from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import harness


def test_paired_ratio_cancels_what_slows_both_sides():
    drift = np.linspace(1, 5, 15)
    interval = harness.paired_ratio(list(2.0 * drift), list(drift))
    assert (interval.median, interval.low, interval.high) == pytest.approx((2.0, 2.0, 2.0))
    # unpaired, the same scores say nothing
    shuffled = np.random.default_rng(0).permutation(drift)
    unpaired = harness.paired_ratio(list(2.0 * drift), list(shuffled))
    assert unpaired.high / unpaired.low > 1.2


def test_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = 0
    for seed in range(100):
        noise = np.exp(rng.normal(0, 0.05, 15))
        interval = harness.paired_ratio(list(1.1 * noise), [1.0] * 15, seed=seed)
        covered += interval.low <= 1.1 <= interval.high
    assert covered >= 88  # nominal 95; the bootstrap of a median of 15 is a little narrow


def test_paired_ratio_refuses_what_is_no_pair():
    for sides in (([1.0], [1.0, 2.0]), ([], [])):
        with pytest.raises(ValueError, match="no pairs"):
            harness.paired_ratio(*sides)


def test_results_are_json_with_the_stamp(tmp_path):
    stamp = harness.machine_stamp(Path(sys.executable))
    assert stamp["cpus"] >= 1
    assert stamp["versions"]["numpy"] == stamp["peer_versions"]["numpy"] == np.__version__
    path = harness.write_results(
        "x", {"machine": stamp, "ratio": harness.Interval(1, 0, 2)}, tmp_path / "new"
    )
    tree = json.loads(path.read_text())
    assert tree["ratio"] == {"median": 1, "low": 0, "high": 2}
    assert [entry.name for entry in path.parent.iterdir()] == ["x.json"]
