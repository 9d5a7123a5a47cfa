import math
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import FALSE_ALARM_ATOL, PLANNED_POWER_ATOL, SIMULATED_MEASUREMENTS

from pipeline.statistics import (
    Interval,
    holm_adjusted,
    images_to_show,
    mcnemar_exact_p,
    paired_drop_interval,
    wilson_interval,
)

Z = 1.959963984540054
counts = st.tuples(st.integers(0, 60), st.integers(0, 60), st.integers(1, 3000)).map(
    lambda t: (t[0], t[1], t[0] + t[1] + t[2])
)


def constrained_score(b, c, n, drop):
    """Tango's Z with the likelihood maximized by search: independent of the closed form."""
    low, high = max(0.0, -drop), (1 - drop) / 2

    def log_likelihood(q):
        cells = [(b, q + drop), (c, q), (n - b - c, 1 - 2 * q - drop)]
        return sum(k * math.log(max(p, 1e-300)) for k, p in cells if k)

    golden = (math.sqrt(5) - 1) / 2
    for _ in range(100):  # concave in q
        left, right = high - golden * (high - low), low + golden * (high - low)
        if log_likelihood(left) < log_likelihood(right):
            low = left
        else:
            high = right
    q = (low + high) / 2
    return (b - c - n * drop) / math.sqrt(n * (2 * q + drop - drop**2))


def test_published_examples():
    # Airway hyper-responsiveness, Fagerland et al. 2014: table (1, 1, 7, 12).
    interval = paired_drop_interval(1, 7, 21)
    assert (round(interval.low, 3), round(interval.high, 3)) == (-0.517, -0.026)
    assert mcnemar_exact_p(1, 7) == pytest.approx(0.0703, abs=5e-5)
    # 0 of 10: the upper Wilson limit is z^2 / (n + z^2).
    assert wilson_interval(0, 10) == Interval(0.0, pytest.approx(Z * Z / (10 + Z * Z)))


@settings(max_examples=40, deadline=None)
@given(counts)
def test_the_limits_are_where_the_score_test_rejects(bcn):
    b, c, n = bcn
    interval = paired_drop_interval(b, c, n)
    for limit, sign in ((interval.low, 1), (interval.high, -1)):
        assert constrained_score(b, c, n, limit) == pytest.approx(sign * Z, rel=1e-4)


@settings(deadline=None)
@given(counts)
def test_the_interval_holds_the_estimate_and_mirrors(bcn):
    b, c, n = bcn
    interval = paired_drop_interval(b, c, n)
    assert -1 <= interval.low < (b - c) / n < interval.high <= 1
    mirrored = paired_drop_interval(c, b, n)
    assert (mirrored.low, mirrored.high) == (
        pytest.approx(-interval.high, abs=1e-9),
        pytest.approx(-interval.low, abs=1e-9),
    )


@settings(deadline=None)
@given(counts, st.floats(0.5, 0.98))
def test_more_confidence_is_wider_and_more_images_narrower(bcn, confidence):
    b, c, n = bcn
    interval = paired_drop_interval(b, c, n, confidence)
    assert paired_drop_interval(b, c, n, confidence + 0.01).half_width > interval.half_width
    assert paired_drop_interval(4 * b, 4 * c, 4 * n, confidence).half_width < interval.half_width


def test_no_discordant_image_still_has_a_width():
    interval = paired_drop_interval(0, 0, 2000)
    assert interval.high == pytest.approx(Z * Z / (2000 + Z * Z))
    assert interval.low == -interval.high


def test_everything_lost():
    interval = paired_drop_interval(5, 0, 5)
    assert interval.high == 1.0
    assert interval.low > 0


def coverage(method, n, q_lost, q_gained, rounds=3000):
    draws = np.random.default_rng(7).multinomial(n, [q_lost, q_gained, 1 - q_lost - q_gained], rounds)
    distinct, times = np.unique(draws[:, :2], axis=0, return_counts=True)
    hits = 0
    for (b, c), t in zip(distinct.tolist(), times.tolist(), strict=True):
        interval = method(b, c, n)
        hits += t * (interval.low <= q_lost - q_gained <= interval.high)
    return hits / rounds


def wald(b, c, n):
    drop = (b - c) / n
    half = Z * math.sqrt(((b + c) / n - drop**2) / n)
    return Interval(drop - half, drop + half)


@pytest.mark.parametrize(("q_lost", "q_gained"), [(0.004, 0.002), (0.01, 0.01), (0.06, 0.03)])
def test_coverage_is_near_95_percent(q_lost, q_gained):
    # Three standard errors of a simulated 95% are 1.2 points; the method itself is off by up to 0.6.
    assert coverage(paired_drop_interval, 1000, q_lost, q_gained) == pytest.approx(0.95, abs=0.018)


def test_coverage_holds_for_one_or_two_discordant_images_where_wald_fails():
    assert coverage(wald, 1000, 0.001, 0.0005) < 0.80
    assert coverage(paired_drop_interval, 1000, 0.001, 0.0005) >= 0.94


def test_paired_is_narrower_than_two_separate_intervals():
    paired = paired_drop_interval(8, 5, 2000)
    separate = wilson_interval(1900, 2000).half_width + wilson_interval(1897, 2000).half_width
    assert paired.half_width < separate / 4


def test_the_figures_of_the_documentation():
    text = (Path(__file__).parents[2] / "docs" / "validation.md").read_text()
    rows = re.findall(r"\| ([\d,]+) \| ±([\d.]+) points \|", text)
    assert len(rows) == 4
    for images, stated in rows:
        n = int(images.replace(",", ""))
        assert f"{100 * paired_drop_interval(n // 200, n // 200, n).half_width:.2f}" == stated
    planned = re.findall(r"\| ([\d.]+) points \| ([\d.]+)% \| ([\d,]+) \|", text)
    assert len(planned) == 5
    for budget, changed, images in planned:
        rate = float(changed) / 200
        assert images_to_show(float(budget) / 100, rate, rate) == int(images.replace(",", ""))
    assert f"± {100 * paired_drop_interval(8, 5, 2000).half_width:.2f} points paired" in text
    separate = math.sqrt(2) * wilson_interval(1900, 2000).half_width
    assert f"± {100 * separate:.2f} were each" in text
    assert f"still allows a drop of {100 * paired_drop_interval(0, 0, 2000).high:.2f} points" in text


@settings(deadline=None)
@given(st.integers(1, 500), st.integers(0, 500))
def test_wilson_solves_its_equation(n, k):
    k = min(k, n)
    interval, p = wilson_interval(k, n), k / n
    assert 0 <= interval.low <= p <= interval.high <= 1
    for limit in (interval.low, interval.high):
        assert (p - limit) ** 2 == pytest.approx(Z * Z * limit * (1 - limit) / n, abs=1e-12)


@settings(deadline=None)
@given(st.integers(0, 40), st.integers(0, 40))
def test_mcnemar_is_the_binomial_sum(b, c):
    n = b + c
    tail = sum(math.comb(n, k) for k in range(min(b, c) + 1)) / 2**n
    assert mcnemar_exact_p(b, c) == pytest.approx(min(1.0, 2 * tail))
    assert mcnemar_exact_p(b, c) == mcnemar_exact_p(c, b)


def test_mcnemar_at_the_ends():
    assert mcnemar_exact_p(0, 0) == 1.0
    assert mcnemar_exact_p(10, 10) == 1.0
    assert mcnemar_exact_p(0, 10) == pytest.approx(2 / 1024)
    assert 0 <= mcnemar_exact_p(6000, 4000) < 1e-80  # large counts neither overflow nor vanish to NaN


@pytest.mark.parametrize(
    ("margin", "lost", "gained"),
    [(0.005, 0.005, 0.005), (0.01, 0.01, 0.005), (0.02, 0.001, 0.001), (0.03, 0.02, 0.005)],
)
def test_planned_images_show_a_small_drop_in_four_of_five_measurements(margin, lost, gained):
    n = images_to_show(margin, lost, gained)
    rng = np.random.default_rng(0)

    def shown(images):
        draws = rng.multinomial(images, [lost, gained, 1 - lost - gained], size=SIMULATED_MEASUREMENTS)
        return np.mean([paired_drop_interval(int(b), int(c), images).high < margin for b, c, _ in draws])

    assert shown(n) == pytest.approx(0.8, abs=PLANNED_POWER_ATOL)
    assert shown(n // 2) < 0.65


def test_planned_images_where_no_answer_changes():
    # No flip among n images still allows z^2 / (n + z^2) of them: solved for n.
    margin = 0.005
    n = images_to_show(margin, 0.0, 0.0)
    assert n == math.ceil(Z * Z * (1 - margin) / margin)
    assert paired_drop_interval(0, 0, n).high <= margin < paired_drop_interval(0, 0, n - 1).high


def test_planned_images_grow_with_all_that_makes_it_harder():
    n = images_to_show(0.01, 0.01, 0.01)
    assert images_to_show(0.005, 0.01, 0.01) > n
    assert images_to_show(0.01, 0.02, 0.02) > n
    assert images_to_show(0.01, 0.012, 0.008) > n
    assert images_to_show(0.01, 0.01, 0.01, power=0.9) > n
    assert images_to_show(0.01, 0.01, 0.01, confidence=0.99) > n


def test_holm_by_its_definition():
    # Smallest times 4, next times 3, …; none below the one before it: Holm 1979.
    assert holm_adjusted([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm_adjusted([0.9, 0.8]) == [1.0, 1.0]
    assert holm_adjusted([]) == []


def test_holm_bounds_the_chance_of_any_false_alarm():
    rng = np.random.default_rng(1)
    p_values = rng.uniform(size=(2000, 20))
    false_alarms = np.mean([min(holm_adjusted(row.tolist())) < 0.05 for row in p_values])
    assert false_alarms == pytest.approx(0.05, abs=FALSE_ALARM_ATOL)
    assert np.mean(p_values.min(axis=1) < 0.05) > 0.6  # what it would be without


@pytest.mark.parametrize(
    "call",
    [
        lambda: wilson_interval(3, 2),
        lambda: wilson_interval(0, 0),
        lambda: wilson_interval(1, 2, 1.0),
        lambda: paired_drop_interval(3, 3, 5),
        lambda: paired_drop_interval(-1, 0, 5),
        lambda: mcnemar_exact_p(-1, 2),
        lambda: images_to_show(0.01, 0.02, 0.01),
        lambda: images_to_show(0.0, 0.0, 0.01),
        lambda: images_to_show(0.1, 0.6, 0.6),
        lambda: images_to_show(0.1, 0.01, 0.01, power=1.0),
    ],
)
def test_impossible_counts_are_refused(call):
    with pytest.raises(ValueError, match="got"):
        call()
