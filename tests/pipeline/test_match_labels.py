import pytest
from judged import LABELS, SPEC, Images, one_hot_logits, replay

from pipeline.errors import DataError
from pipeline.validation import judge_chain, match_labels


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
