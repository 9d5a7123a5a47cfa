import numpy as np
import pytest
from judged import judged, one_hot_logits

from pipeline.errors import AccuracyGateError, DataError, UsageError
from pipeline.statistics import images_to_show
from pipeline.validation_result import (
    ValidationResult,
    check_agreement,
    check_budget,
    interval_warning,
)


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
