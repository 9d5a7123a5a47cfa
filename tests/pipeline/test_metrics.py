import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pipeline.metrics import (
    agreement,
    cosine_similarity,
    log_probabilities,
    max_abs_error,
    probabilities,
    sqnr_db,
    sqnr_db_from_energies,
    top_k_correct,
)

# Squares of values below 1e-154 are 0 in float64; no logit is that small and means something.
finite = st.integers(-(10**9), 10**9).map(lambda i: i / 1000)
vectors = hnp.arrays(np.float64, hnp.array_shapes(max_dims=2, max_side=12), elements=finite)


def test_sqnr_of_a_known_ratio():
    reference = np.array([3.0, 4.0])  # energy 25
    assert sqnr_db(reference, np.array([3.0, 4.5])) == pytest.approx(20.0)  # noise 0.25


def test_sqnr_at_the_ends():
    ones, zeros = np.ones(3), np.zeros(3)
    assert sqnr_db(ones, ones) == math.inf
    assert sqnr_db(zeros, zeros) == math.inf
    assert sqnr_db(zeros, ones) == -math.inf
    assert math.isnan(sqnr_db(np.array([math.nan]), np.array([1.0])))


@settings(deadline=None)
@given(vectors, st.floats(1e-3, 1e3))
def test_sqnr_and_cosine_ignore_a_common_scale(x, scale):
    noisy = x + 0.01 * (1 + np.abs(x))
    assert sqnr_db(scale * x, scale * noisy) == pytest.approx(sqnr_db(x, noisy), abs=1e-3)
    assert cosine_similarity(x, scale * x) == pytest.approx(1.0)


@settings(deadline=None)
@given(vectors)
def test_energies_of_batches_add_up_to_the_whole(x):
    approximation = np.round(x)
    rows = [(r, a) for r, a in zip(x, approximation, strict=True)]
    signal = sum(float(np.sum(r * r)) for r, _ in rows)
    noise = sum(float(np.sum((r - a) ** 2)) for r, a in rows)
    assert sqnr_db_from_energies(signal, noise) == pytest.approx(sqnr_db(x, approximation), nan_ok=True)


def test_sqnr_drops_6_db_when_the_noise_doubles():
    rng = np.random.default_rng(0)
    x, noise = rng.normal(size=1000), rng.normal(size=1000) * 0.01
    assert sqnr_db(x, x + noise) - sqnr_db(x, x + 2 * noise) == pytest.approx(20 * math.log10(2))


def test_cosine():
    assert cosine_similarity(np.array([1.0, 0.0]), np.array([0.0, 2.0])) == 0.0
    assert cosine_similarity(np.array([1.0, 2.0]), np.array([-2.0, -4.0])) == -1.0
    assert cosine_similarity(np.zeros(2), np.zeros(2)) == 1.0
    assert cosine_similarity(np.zeros(2), np.ones(2)) == 0.0
    assert cosine_similarity(np.full(4, 1e200), np.full(4, 1e-200)) == pytest.approx(1.0)


def test_max_abs_error_is_of_the_wider_type():
    reference = np.array([0, 255], dtype=np.uint8)
    assert max_abs_error(reference, np.array([255, 0], dtype=np.uint8)) == 255.0
    assert max_abs_error(np.zeros(0), np.zeros(0)) == 0.0
    assert math.isnan(max_abs_error(np.array([math.nan]), np.array([0.0])))


@pytest.mark.parametrize("measure", [sqnr_db, cosine_similarity, max_abs_error, agreement])
def test_differing_shapes_are_refused_instead_of_broadcast(measure):
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(1, 3\)"):
        measure(np.ones((2, 3)), np.ones((1, 3)))


def test_agreement_counts_rows():
    a = np.array([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    b = np.array([[1.0, 9.0], [0.0, 3.0], [0.5, 0.6], [0.0, 2.0]])
    assert agreement(a, b) == 0.75
    with pytest.raises(ValueError, match="N >= 1"):
        agreement(np.zeros((0, 3)), np.zeros((0, 3)))


@settings(deadline=None)
@given(
    hnp.arrays(np.float32, st.tuples(st.integers(1, 20), st.integers(1, 8)), elements=st.integers(-3, 3)),
    st.randoms(use_true_random=False),
)
def test_top_k_is_the_membership_in_a_stable_ranking(logits, random):
    n, n_classes = logits.shape
    labels = np.array([random.randrange(n_classes) for _ in range(n)])
    order = np.argsort(-logits, axis=1, kind="stable")
    for k in range(1, n_classes + 1):
        expected = [labels[i] in order[i, :k] for i in range(n)]
        assert top_k_correct(logits, labels, k).tolist() == expected
    assert np.array_equal(top_k_correct(logits, labels, 1), logits.argmax(axis=1) == labels)


def test_a_constant_answer_is_not_correct_for_every_label():
    assert top_k_correct(np.zeros((4, 4)), np.arange(4), 1).sum() == 1


@pytest.mark.parametrize(
    ("labels", "k", "message"),
    [
        (np.array([0, 1]), 0, "k must be 1 to 3"),
        (np.array([0, 1]), 4, "k must be 1 to 3"),
        (np.array([0, 3]), 1, "labels must be 0 to 2, got 0 to 3"),
        (np.array([-1, 0]), 1, "labels must be 0 to 2"),
        (np.array([0]), 1, "need logits"),
    ],
)
def test_top_k_refuses(labels, k, message):
    with pytest.raises(ValueError, match=message):
        top_k_correct(np.zeros((2, 3)), labels, k)


def test_probabilities_are_the_softmax_of_each_row():
    logits = np.array([[1.0, 2.0, 3.0], [800.0, 0.0, -800.0]])
    found = probabilities(logits)
    expected = np.exp([1.0, 2.0, 3.0]) / np.exp([1.0, 2.0, 3.0]).sum()
    np.testing.assert_allclose(found[0], expected, rtol=1e-12)
    np.testing.assert_array_equal(found[1], [1.0, 0.0, 0.0])  # and no overflow
    np.testing.assert_allclose(probabilities(logits[:1] + 1000), found[:1], rtol=1e-12)


def test_a_row_that_is_a_distribution_stays_one():
    rows = np.array([[0.7, 0.2, 0.1], [0.7, 0.2, 0.2], [1.2, -0.1, -0.1]])
    found = probabilities(rows)
    np.testing.assert_array_equal(found[0], rows[0])
    # The second does not sum to 1, the third is negative: logits.
    np.testing.assert_allclose(found[1:], np.exp(rows[1:]) / np.exp(rows[1:]).sum(axis=1, keepdims=True))


def test_log_probabilities_are_finite_and_give_the_same_probabilities():
    logits = np.array([[2000.0, 0.0, -5.0], [0.1, 0.2, 0.3]])
    logarithms = log_probabilities(logits)
    assert np.isfinite(logarithms).all()
    np.testing.assert_allclose(probabilities(logarithms), probabilities(logits), atol=1e-15)
