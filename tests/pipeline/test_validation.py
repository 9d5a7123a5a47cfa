import json
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from pipeline.artifacts import PreprocessSpec, Sample, TensorSpec
from pipeline.errors import AccuracyGateError, DataError, EngineError, UsageError
from pipeline.judges import engine_judge, module_judge, transform_judge
from pipeline.metrics import sqnr_db
from pipeline.preprocess import normalize
from pipeline.statistics import holm_adjusted, images_to_show, mcnemar_exact_p, paired_drop_interval
from pipeline.validation import MAX_FLIPS, Judge, judge_chain, match_labels
from pipeline.validation_result import (
    AssumedPart,
    ValidationResult,
    check_agreement,
    check_budget,
    interval_warning,
)

SPEC = PreprocessSpec(input_hw=(4, 4), resize="none", mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
LABELS = ("ant", "bee", "cat")


@dataclass
class Images:
    """A dataset in memory; image `i` has the pixel value `i % 256` everywhere."""

    labels: list[int | None]
    class_names: tuple[str, ...] | None = LABELS
    name: str = "made"
    sha256: str = "0" * 64
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self):
        for i, label in enumerate(self.labels):
            yield Sample(np.full((4, 4, 3), i % 256, np.uint8), label, str(i))


def replay(name: str, part: str, logits) -> Judge:
    """A judge that gives the row of `logits` with the sample's key."""
    return Judge(name, part, lambda samples, pixels: logits[[int(s.key) for s in samples]])


def judged(chain, labels=None, **options) -> ValidationResult:
    labels = labels if labels is not None else [i % 3 for i in range(len(chain[0]))]
    parts = ["reference", "preprocessing", "export", "INT8"]
    judges = [replay(f"stage {i}", parts[i], rows) for i, rows in enumerate(chain)]
    options = {"batch_size": 4, **options}
    return judge_chain(judges, Images(labels), spec=SPEC, color="BGR", labels=LABELS, **options)


def one_hot_logits(answers, sure=5.0):
    return (np.eye(3, dtype=np.float32)[answers] * sure).astype(np.float32)


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


class TestMatchLabels:
    def test_by_name_in_any_order_and_spelling(self):
        index, note = match_labels(["Polar_Bear", "ant"], ["ant", "bee", "polar bear"], "made")
        assert index.tolist() == [2, 0]
        assert note is None

    def test_by_index_where_names_say_nothing(self):
        index, note = match_labels(["n01", "n02", "n03"], LABELS, "made")
        assert index.tolist() == [0, 1, 2]
        assert "matched by index ('n01' is 'ant')" in note

    def test_equal_counts_with_some_names_in_common_are_not_guessed(self):
        with pytest.raises(DataError, match=r"1 of the 3 classes of made are not among .* 'dog'"):
            match_labels(["bee", "ant", "dog"], LABELS, "made")

    def test_count_mismatch_lists_the_names(self):
        with pytest.raises(DataError, match=r"2 of the 4 classes of made .* 'dog', 'elk'"):
            match_labels(["ant", "bee", "dog", "elk"], LABELS, "made")

    def test_a_name_that_two_outputs_carry_is_refused(self):
        labels = ["crane", "crane", "ant"]
        assert match_labels(labels, labels, "made")[0].tolist() == [0, 1, 2]
        with pytest.raises(DataError, match=r"unique among .* 'crane'"):
            match_labels(["ant", "crane"], labels, "made")

    def test_two_folders_that_would_be_one_class_are_refused(self):
        with pytest.raises(DataError, match="unique among"):
            match_labels(["Ant", "ant"], LABELS, "made")

    def test_matched_labels_reach_the_truth(self):
        rows = one_hot_logits([2, 2])  # the model says cat
        chain = [replay("a", "reference", rows), replay("b", "INT8", rows)]
        dataset = Images([0, 1], class_names=("cat", "ant"))  # the data calls cat 0
        result = judge_chain(chain, dataset, spec=SPEC, color="BGR", labels=LABELS)
        assert [(c.label, c.before_accuracy) for c in result.classes] == [("ant", 0.0), ("cat", 1.0)]


class TestBudget:
    @staticmethod
    def result(lost: int, n: int = 1000, part: int = -1) -> ValidationResult:
        truth = np.arange(n) % 3
        after = truth.copy()
        after[:lost] = (truth[:lost] + 1) % 3
        chain = [truth, after, after, after] if part == 1 else [truth, truth, truth, after]
        return judged([one_hot_logits(a) for a in chain], truth.tolist(), batch_size=256)

    def test_at_the_budget_passes_and_past_it_fails(self):
        check_budget(self.result(5), 0.5)
        with pytest.raises(AccuracyGateError, match=r"past the budget of 0.5") as caught:
            check_budget(self.result(6), 0.5)
        message = str(caught.value)
        assert caught.value.exit_code == 3
        assert (
            "falls by 0.60 points from stage 0 to stage 3 (95% interval +0.22 to +1.30, 1,000 images)"
            in message
        )
        assert "INT8 (+0.60)" in message
        assert "--calibrator" in message

    def test_the_remedy_is_of_the_part_that_costs_most(self):
        with pytest.raises(AccuracyGateError, match=r"preprocessing \(\+2.00\).*--preprocess"):
            check_budget(self.result(20, part=1), 0.5)

    def test_a_gain_passes(self):
        truth = [0] * 9 + [1]
        check_budget(judged([one_hot_logits([1] * 10), one_hot_logits([0] * 10)], truth), 0.0)

    def test_too_few_images_to_judge(self):
        result = self.result(1, n=200)
        warning = interval_warning(result, 0.3)
        assert warning.startswith("200 images measure the drop to ±2.09 points, wider than the budget of 0.3")
        needed = int(warning.split("about ")[1].split(" images")[0].replace(",", ""))
        assert needed == pytest.approx(images_to_show(0.003, 0.0025, 0.0025), rel=0.05)
        assert interval_warning(result, 4.0) is None

    def test_an_interval_that_reaches_past_the_budget(self):
        result = self.result(3, n=1000)  # 0.30, and up to 0.88
        warning = interval_warning(result, 0.7)
        assert warning.startswith("The interval reaches past the budget of 0.7; about ")
        needed = int(warning.split("about ")[1].split(" images")[0].replace(",", ""))
        assert needed == pytest.approx(images_to_show(0.007, 0.003, 0.0), rel=0.05)
        assert needed > 1000
        assert interval_warning(result, 0.95) is None
        check_budget(result, 0.7)  # the gate is on what was measured

    def test_a_budget_that_fp32_itself_misses(self):
        with pytest.raises(
            AccuracyGateError,
            match=r"fp32 itself misses it: stage 2 has lost 2\.00 points before anything is quantized, which no "
            r"precision wins back. Most of that comes from preprocessing \(\+2\.00\).*--preprocess",
        ):
            check_budget(self.result(20, part=1), 0.5)
        with pytest.raises(AccuracyGateError) as caught:
            check_budget(self.result(20), 0.5)
        assert "fp32 itself" not in str(caught.value)

    def test_images_of_one_class_cannot_judge(self):
        rows = one_hot_logits([1] * 30)
        result = judged([rows, rows], [1] * 30)
        assert any("all images are of the class 'bee'" in note for note in result.notes)
        with pytest.raises(
            DataError, match=r"all 30 images of made are of the class 'bee': a network that .* all 3"
        ):
            check_budget(result, 0.5)

    def test_agreement(self):
        result = self.result(10)
        check_agreement(result.total, result.n_images, 99.0)
        with pytest.raises(
            AccuracyGateError,
            match=r"stage 3 gives 99\.00% of 1,000 images the answer of stage 0, fewer than the 99\.5%",
        ):
            check_agreement(result.total, result.n_images, 99.5)
        for percent in (-1, 100.5, float("nan")):
            with pytest.raises(UsageError, match="--min-agreement is a percentage"):
                check_agreement(result.total, result.n_images, percent)

    @pytest.mark.parametrize("points", [-0.1, float("nan"), float("inf"), 101])
    def test_a_budget_that_is_no_number_of_points(self, points):
        with pytest.raises(UsageError, match="--max-drop is in points"):
            check_budget(self.result(0), points)


class FakeRunner:
    """Logits are the mean of the input per channel."""

    reuses_outputs = True
    n_streams = 1

    def __init__(self, dtype: str, batch: int | str) -> None:
        shape = (batch, 4, 4, 3) if dtype == "uint8" else (batch, 3, 4, 4)
        self.inputs = (TensorSpec("input", dtype, shape),)
        self.outputs = (TensorSpec("logits", "float32", (batch, 3)),)
        self.batches: list[int] = []

    def submit(self, inputs) -> Future:
        values = inputs["input"]
        assert values.dtype == self.inputs[0].dtype
        self.batches.append(len(values))
        future: Future = Future()
        axes = (1, 2) if values.dtype == np.uint8 else (2, 3)
        future.set_result({"logits": values.mean(axis=axes, dtype=np.float32)})
        return future


def test_engine_judge_feeds_pixels_or_normalized_floats():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3)).astype(np.uint8)
    on_pixels = engine_judge(FakeRunner("uint8", "N"), name="a", part="INT8", spec=SPEC, color="BGR")
    np.testing.assert_allclose(on_pixels.logits([], pixels), pixels.mean(axis=(1, 2)), rtol=1e-6)
    on_floats = engine_judge(FakeRunner("float32", "N"), name="a", part="INT8", spec=SPEC, color="BGR")
    expected = normalize(pixels, SPEC, "BGR").mean(axis=(2, 3))
    np.testing.assert_allclose(on_floats.logits([], pixels), expected, rtol=1e-6)


def test_engine_judge_fills_up_a_fixed_batch():
    runner = FakeRunner("uint8", 2)
    pixels = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8)
    judge = engine_judge(runner, name="a", part="INT8", spec=SPEC, color="BGR")
    assert judge.logits([], pixels)[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert runner.batches == [2, 2, 2]


def test_engine_judge_refuses_two_inputs():
    runner = FakeRunner("uint8", "N")
    runner.inputs *= 2
    with pytest.raises(EngineError, match="2 inputs"):
        engine_judge(runner, name="a", part="INT8", spec=SPEC, color="BGR")


def test_torch_judges_give_the_module_the_network_input():
    torch = pytest.importorskip("torch")

    class Means(torch.nn.Module):
        def forward(self, x):
            assert not self.training
            return x.mean(dim=(2, 3))

    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3)).astype(np.uint8)
    expected = normalize(pixels, SPEC, "RGB").mean(axis=(2, 3))
    shared = module_judge(Means(), name="a", part="reference", spec=SPEC, color="RGB")
    np.testing.assert_allclose(shared.logits([], pixels), expected, rtol=1e-5)
    samples = [Sample(image, 0, str(i)) for i, image in enumerate(pixels)]
    own = transform_judge(
        Means(),
        name="b",
        part="preprocessing",
        transform=lambda image: normalize(np.asarray(image)[None], SPEC, "RGB")[0],
    )
    np.testing.assert_allclose(own.logits(samples, np.zeros_like(pixels)), expected, rtol=1e-5)
