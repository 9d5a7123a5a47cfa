import numpy as np
import pytest

from apps.streaming.predictions import TOP_K, predict
from pipeline.artifacts import Frame
from pipeline.errors import EngineError

LABELS = ("a", "b", "c", "d")


def frame(label: int | None = None) -> Frame:
    return Frame(np.zeros((2, 2, 3), np.uint8), "RGB", "cam", 7, 123, label)


def test_logits_become_ranked_confidences() -> None:
    prediction = predict(np.array([[0.0, 2.0, 1.0, -1.0]], np.float32), LABELS, frame(label=1))
    assert [c.label for c in prediction.top] == ["b", "c", "a"]
    assert len(prediction.top) == TOP_K
    softmax = np.exp([2.0, 1.0, 0.0]) / np.exp([0.0, 2.0, 1.0, -1.0]).sum()
    assert [c.confidence for c in prediction.top] == pytest.approx(softmax)
    assert prediction.correct is True
    assert predict(np.array([0.0, 2.0, 1.0, -1.0]), LABELS, frame(label=2)).correct is False
    assert predict(np.array([0.0, 2.0, 1.0, -1.0]), LABELS, frame()).correct is None


def test_equal_scores_rank_as_argmax_does() -> None:
    scores = np.array([1.0, 3.0, 3.0, 3.0])
    assert predict(scores, LABELS, frame()).top[0].class_index == int(np.argmax(scores)) == 1


def test_a_distribution_is_not_flattened_by_a_second_softmax() -> None:
    prediction = predict(np.array([0.05, 0.9, 0.03, 0.02], np.float32), LABELS, frame())
    assert prediction.top[0].confidence == pytest.approx(0.9)


def test_huge_logits_do_not_overflow() -> None:
    top = predict(np.array([1e4, 9e3, 0, 0], np.float32), LABELS, frame()).top
    assert top[0].confidence == 1.0
    assert sum(c.confidence for c in top) == pytest.approx(1.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_an_error_and_not_a_label(bad: float) -> None:
    with pytest.raises(EngineError, match=r"frame 7 of cam: the engine gave -?(nan|inf) for class 2 \('c'\)"):
        predict(np.array([0, 1, bad, 2], np.float32), LABELS, frame())


def test_json_line() -> None:
    line = predict(np.array([0.0, 2.0, 1.0, -1.0]), LABELS, frame(label=3)).to_json()
    assert line["source"] == "cam"
    assert line["frame"] == 7
    assert line["timestamp_ns"] == 123
    assert line["truth"] == 3
    assert line["top"][0]["class"] == 1
    assert line["top"][0]["label"] == "b"
    assert "truth" not in predict(np.array([0.0, 2.0, 1.0, -1.0]), LABELS, frame()).to_json()
