import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from judged import LABELS, SPEC, Images, judged, one_hot_logits, replay
from pydantic import TypeAdapter, ValidationError

from pipeline.errors import DataError, EngineError
from pipeline.metrics import sqnr_db
from pipeline.statistics import holm_adjusted, mcnemar_exact_p, paired_drop_interval
from pipeline.validation import MAX_FLIPS, Judge, judge_chain
from pipeline.validation_result import (
    AssumedPart,
    ValidationResult,
)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(2, 4), st.integers(1, 7), st.integers(0, 2**32 - 1))
def test_running_sums_equal_the_formulas_on_all_logits_at_once(n, n_stages, batch_size, seed):
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 3, n)
    first = rng.normal(size=(n, 3)).astype(np.float32)
    chain = [first] + [first + 0.5 * rng.normal(size=(n, 3)).astype(np.float32) for _ in range(n_stages - 1)]
    result = judged(chain, truth.tolist(), batch_size=batch_size)

    right = [rows.argmax(1) == truth for rows in chain]
    assert [s.top1_correct for s in result.stages] == [int(r.sum()) for r in right]
    assert all(s.top_k == 1.0 for s in result.stages)  # three classes: top-3
    for before, after, drop in [
        *zip(range(n_stages - 1), range(1, n_stages), result.drops, strict=True),
        (0, -1, result.total),
    ]:
        lost, gained = int((right[before] & ~right[after]).sum()), int((~right[before] & right[after]).sum())
        assert (drop.lost, drop.gained) == (lost, gained)
        assert drop.drop_points == pytest.approx(100 * (right[before].mean() - right[after].mean()))
        assert drop.interval_points == paired_drop_interval(lost, gained, n).scaled(100)
        assert drop.mcnemar_p == mcnemar_exact_p(lost, gained)
        assert drop.agreement == (chain[before].argmax(1) == chain[after].argmax(1)).mean()
        assert drop.sqnr_db == pytest.approx(sqnr_db(chain[before], chain[after]))
        assert drop.max_abs_error == pytest.approx(np.abs(chain[before] - chain[after].astype(float)).max())
    assert result.total.drop_points == pytest.approx(sum(drop.drop_points for drop in result.drops))
    assert result.stages[-1].sqnr_from_first_db == pytest.approx(sqnr_db(chain[0], chain[-1]))
    p_values = []
    for row in result.classes:
        mine = truth == row.index
        assert (row.n_images, row.before_correct, row.after_correct) == (
            int(mine.sum()),
            int(right[0][mine].sum()),
            int(right[-1][mine].sum()),
        )
        assert row.lost == int((mine & right[0] & ~right[-1]).sum())
        assert row.gained == int((mine & ~right[0] & right[-1]).sum())
        assert row.interval_points == paired_drop_interval(row.lost, row.gained, row.n_images).scaled(100)
        p_values.append(mcnemar_exact_p(row.lost, row.gained))
    assert [row.adjusted_p for row in result.classes] == holm_adjusted(p_values)
    assert sum(row.n_images for row in result.classes) == n
    assert result.n_flips == int((chain[0].argmax(1) != chain[-1].argmax(1)).sum())


def test_a_drop_in_its_parts():
    truth = np.arange(100) % 3
    pre, export, int8 = truth.copy(), truth.copy(), truth.copy()
    pre[:4] = (truth[:4] + 1) % 3  # the shared preprocessing loses 4
    export[:4] = pre[:4]
    int8[2:7] = (truth[2:7] + 2) % 3  # int8 regains 2 of them and loses 3 more (two stay wrong)
    result = judged([one_hot_logits(a) for a in (truth, pre, export, int8)], truth.tolist())
    assert [(d.part, d.drop_points) for d in result.drops] == [
        ("preprocessing", 4.0),
        ("export", 0.0),
        ("INT8", 1.0),
    ]
    assert (result.drops[2].lost, result.drops[2].gained) == (3, 2)
    assert result.total.drop_points == 5.0
    assert result.drops[1].sqnr_db is None  # identical logits
    assert result.drops[1].agreement == 1.0


def test_top_k_is_five_for_more_classes():
    labels = tuple(f"c{i}" for i in range(10))
    ranked = np.tile(np.arange(10, 0, -1, dtype=np.float32), (10, 1))  # always answers c0, c1, c2, …
    chain = [replay("a", "reference", ranked), replay("b", "INT8", ranked)]
    result = judge_chain(
        chain, Images(list(range(10)), labels), spec=SPEC, color="BGR", labels=labels, batch_size=3
    )
    assert (result.top_k, result.stages[0].top_k, result.stages[0].top1) == (5, 0.5, 0.1)


def test_pixels_are_preprocessed_once_and_in_the_order_asked():
    seen = []

    def spy(samples, pixels):
        seen.append(pixels)
        return one_hot_logits([0] * len(samples))

    judge_chain(
        [Judge("a", "reference", spy), Judge("b", "INT8", spy)],
        Images([0, 1, 2]),
        spec=SPEC,
        color="BGR",
        labels=LABELS,
        batch_size=2,
    )
    assert [p.shape for p in seen] == [(2, 4, 4, 3)] * 2 + [(1, 4, 4, 3)] * 2
    assert seen[0] is seen[1]
    assert seen[0].dtype == np.uint8


def test_flips_are_bounded_most_confident_first():
    n = 4 * MAX_FLIPS
    truth = np.zeros(n, int)
    before, after = one_hot_logits(truth), one_hot_logits(truth + 1)
    before *= np.linspace(0.1, 0.9, n)[:, None].astype(np.float32)  # later images: more confident
    result = judged([before, after], truth.tolist())
    assert result.n_flips == n
    assert [flip.key for flip in result.flips] == [str(i) for i in range(n - 1, n - 1 - MAX_FLIPS, -1)]
    confidences = [flip.confidence for flip in result.flips]
    assert confidences == sorted(confidences, reverse=True)
    first = result.flips[0]
    assert (first.truth, first.before, first.after, first.kind) == ("ant", "ant", "bee", "lost")
    assert first.thumbnail_jpeg is not None
    assert first.thumbnail_jpeg.startswith(b"\xff\xd8\xff")


def test_of_equally_confident_flips_the_earlier_stay():
    n = 2 * MAX_FLIPS
    result = judged([one_hot_logits([0] * n), one_hot_logits([1] * n)], [0] * n)
    assert [flip.key for flip in result.flips] == [str(i) for i in range(MAX_FLIPS)]


def test_kinds_of_flips_and_confusion_changes():
    truth = [0, 0, 0, 1]
    result = judged([one_hot_logits([0, 1, 1, 1]), one_hot_logits([2, 0, 2, 1])], truth)
    assert {flip.key: flip.kind for flip in result.flips} == {"0": "lost", "1": "gained", "2": "changed"}
    assert {(c.truth, c.predicted): (c.before, c.after) for c in result.confusion} == {
        ("ant", "bee"): (2, 0),
        ("ant", "cat"): (0, 2),
    }


def test_equal_engines_show_nothing():
    rows = one_hot_logits(np.arange(30) % 3)
    result = judged([rows, rows])
    assert result.total.drop_points == 0
    assert result.total.mcnemar_p == 1
    assert result.flips == result.confusion == ()
    assert result.total.interval_points.high > 0  # 30 images prove little


def test_a_reference_no_better_than_guessing_is_noted():
    truth = np.arange(90) % 3
    right, shuffled = one_hot_logits(truth), one_hot_logits((truth + np.arange(90) // 30) % 3)
    assert judged([right, right], truth.tolist()).notes == ()
    (note,) = judged([shuffled, shuffled], truth.tolist()).notes
    assert "stage 0 gets 33.33% right, which guessing among 3 classes can reach on 90 images" in note


def test_labels_in_another_order_are_noticed_by_what_they_are_called():
    truth = np.arange(90) % 3
    shifted = one_hot_logits((truth + 1) % 3)
    shifted[:5] = one_hot_logits(truth[:5])
    (note,) = judged([shifted, shifted], truth.tolist()).notes
    assert note.startswith(
        "the labels seem to be in another order than the model's: 5 of 90 answers are right"
    )
    assert "28 images of 'ant' are called 'bee'" in note or "of 30 images of 'cat' are called 'ant'" in note
    assert "--labels FILE" in note
    # A network that has collapsed to one answer is poor, and no other order.
    collapsed = one_hot_logits([0] * 90)
    (note,) = judged([collapsed, collapsed], truth.tolist()).notes
    assert "another order" not in note


def test_json_is_strict_and_complete():
    rng = np.random.default_rng(1)
    first = rng.normal(size=(20, 3)).astype(np.float32)
    result = judged(
        [first, first, first + rng.normal(size=(20, 3)).astype(np.float32)],
        assumed=[AssumedPart("preprocessing", "same by construction")],
        notes=["a note"],
    )
    text = json.dumps(result.to_json(), allow_nan=False)
    adapter = TypeAdapter(ValidationResult)
    without_pictures = replace(
        result, flips=tuple(replace(flip, thumbnail_jpeg=None) for flip in result.flips)
    )
    assert len(result.flips) > 0
    assert adapter.validate_json(text, strict=True) == without_pictures
    with pytest.raises(ValidationError, match="n_pictures"):
        adapter.validate_json(text.replace('"n_images"', '"n_pictures": 1, "n_images"', 1))


def test_progress_reaches_the_end():
    calls = []
    rows = one_hot_logits([0] * 10)
    judged([rows, rows], progress=lambda *call: calls.append(call))
    assert calls == [("judging", 4, 10), ("judging", 8, 10), ("judging", 10, 10)]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_an_error_not_a_label(bad):
    good, rows = one_hot_logits([0] * 6), one_hot_logits([0] * 6)
    rows[5, 1] = bad
    with pytest.raises(EngineError, match=r"stage 1 gives NaN or infinite logits for 1 of 2 images, first 5"):
        judged([good, rows])


def test_logits_of_another_class_count_are_refused():
    with pytest.raises(EngineError, match=r"\[4, 2\] for 4 images, where 3 labels make \[4, 3\]"):
        judged([np.zeros((6, 2), np.float32)] * 2)


def test_unlabelled_and_mislabelled_and_empty_data_are_refused():
    rows = one_hot_logits([0, 0])
    chain = [replay("a", "reference", rows), replay("b", "INT8", rows)]

    def judge(dataset):
        return judge_chain(chain, dataset, spec=SPEC, color="BGR", labels=LABELS)

    with pytest.raises(DataError, match="made has no labels"):
        judge(Images([None, None], class_names=None))
    with pytest.raises(DataError, match="1 has label None"):
        judge(Images([0, None]))
    with pytest.raises(DataError, match="1 has label 3, not one of its 3 classes"):
        judge(Images([0, 3]))
    with pytest.raises(DataError, match=r"no usable image \(x.png: truncated\)"):
        judge(Images([], skipped=[("x.png", "truncated")]))
