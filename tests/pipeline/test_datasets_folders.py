"""Folders by class, flat ones, and those with a table; the pictures taken from them."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path

import pytest
from picture_folders import SPEC, seen, write_csv, write_image

from pipeline.datasets import (
    batches,
    open_dataset,
    require_minimum,
)
from pipeline.errors import DataError


@pytest.fixture
def by_class(tmp_path: Path) -> Path:
    """Three classes of four images; pixel value 10 × class + number."""
    for index, name in enumerate(["ant", "bee", "cat"]):
        for number in range(4):
            write_image(tmp_path / "photos" / name / f"{number}.png", 10 * index + number)
    return tmp_path / "photos"


class TestFolderByClass:
    def test_classes_are_the_sorted_folder_names(self, by_class: Path) -> None:
        dataset = open_dataset(str(by_class))
        assert dataset.name == "photos"
        assert dataset.class_names == ("ant", "bee", "cat")
        assert len(dataset) == 12
        assert seen(dataset)[:5] == [
            ("ant/0.png", 0, 0),
            ("ant/1.png", 0, 1),
            ("ant/2.png", 0, 2),
            ("ant/3.png", 0, 3),
            ("bee/0.png", 1, 10),
        ]
        assert seen(dataset) == seen(dataset)

    def test_labels_give_the_index_and_may_name_more_classes(self, by_class: Path) -> None:
        dataset = open_dataset(str(by_class), labels=["dog", "cat", "bee", "ant"], num_classes=4)
        assert dataset.class_names == ("dog", "cat", "bee", "ant")
        assert {key.split("/")[0]: label for key, label, _ in seen(dataset)} == {"ant": 3, "bee": 2, "cat": 1}

    def test_a_folder_without_a_label_is_refused_not_guessed(self, by_class: Path) -> None:
        with pytest.raises(DataError, match=r"'bee'.*labels\.csv"):
            open_dataset(str(by_class), labels=["ant", "wasp", "cat"])

    def test_a_class_count_that_is_not_the_models_is_refused(self, by_class: Path) -> None:
        with pytest.raises(DataError, match=r"3 classes.*model has 10.*--labels"):
            open_dataset(str(by_class), num_classes=10)
        with pytest.raises(DataError, match=r"3 labels.*10 classes"):
            open_dataset(str(by_class), labels=["ant", "bee", "cat"], num_classes=10)
        assert len(open_dataset(str(by_class), num_classes=3)) == 12

    def test_images_in_folders_below_a_class_are_of_that_class(self, by_class: Path) -> None:
        write_image(by_class / "bee" / "more" / "9.png", 99)
        assert ("bee/more/9.png", 1, 99) in seen(open_dataset(str(by_class)))

    def test_an_image_beside_the_folders_is_listed(self, by_class: Path) -> None:
        write_image(by_class / "stray.png", 1)
        dataset = open_dataset(str(by_class))
        assert len(dataset) == 12
        assert [key for key, _ in dataset.skipped] == ["stray.png"]

    def test_the_parts_of_a_data_set_are_not_taken_for_classes(self, by_class: Path, tmp_path: Path) -> None:
        shutil.copytree(by_class, tmp_path / "root" / "train")
        shutil.copytree(by_class, tmp_path / "root" / "val")
        with pytest.raises(DataError, match=r"train, val.*root/train"):
            open_dataset(str(tmp_path / "root"))


class TestFlatFolderAndCsv:
    def test_a_flat_folder_has_no_labels(self, tmp_path: Path) -> None:
        for value in (3, 1, 2):
            write_image(tmp_path / f"{value}.png", value)
        dataset = open_dataset(str(tmp_path), num_classes=1000)
        assert dataset.class_names is None
        assert seen(dataset) == [("1.png", None, 1), ("2.png", None, 2), ("3.png", None, 3)]

    def test_class_index_and_name(self, tmp_path: Path) -> None:
        for value in (1, 2, 3):
            write_image(tmp_path / "images" / f"{value}.png", value)
        write_csv(
            tmp_path,
            "file,class_index,wnid,name\nimages/2.png,4,n04,fox\nimages/1.png,0,n00,eel\nimages/3.png,4,n04,fox\n",
        )
        dataset = open_dataset(str(tmp_path))
        assert dataset.class_names == ("eel", "1", "2", "3", "fox")
        assert seen(dataset) == [("images/2.png", 4, 2), ("images/1.png", 0, 1), ("images/3.png", 4, 3)]
        # Indices are explicit, so a model may have more classes, but not fewer.
        assert len(open_dataset(str(tmp_path), num_classes=1000).class_names or ()) == 1000
        with pytest.raises(DataError, match=r"class_index 4.*4 classes"):
            open_dataset(str(tmp_path), num_classes=4)
        with pytest.raises(DataError, match=r"class_index 4.*2 classes"):
            open_dataset(str(tmp_path), labels=["eel", "fox"])

    @pytest.mark.parametrize("column", ["label", "name"])
    def test_names_are_sorted_or_looked_up(self, tmp_path: Path, column: str) -> None:
        for value in (1, 2):
            write_image(tmp_path / f"{value}.png", value)
        write_csv(tmp_path, f"file,{column}\n1.png,fox\n2.png,eel\n")
        assert [label for _, label, _ in seen(open_dataset(str(tmp_path)))] == [1, 0]
        dataset = open_dataset(str(tmp_path), labels=["fox", "owl", "eel"])
        assert [label for _, label, _ in seen(dataset)] == [0, 2]
        with pytest.raises(DataError, match="'eel'"):
            open_dataset(str(tmp_path), labels=["fox", "owl"])

    def test_files_that_are_not_there_are_listed(self, tmp_path: Path) -> None:
        write_image(tmp_path / "1.png", 1)
        write_csv(tmp_path, "file,class_index\n1.png,0\ngone.png,1\n")
        dataset = open_dataset(str(tmp_path))
        assert len(dataset) == 1
        assert dataset.skipped == (("gone.png", "no such file"),)

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("", "columns none"),
            ("path,label\n1.png,a\n", "needs `file`"),
            ("file,wnid\n1.png,n0\n", "`class_index`"),
            ("file,label\n", "lists no images"),
            ("file,class_index\n1.png,first\n", "line 2.*'first'"),
            ("file,class_index\n1.png,0\n1.png,-1\n", "line 3.*'-1'"),
            ("file,class_index\n1.png\n", "line 2.*''"),
            ("file,label\n../1.png,a\n", "line 2.*'../1.png'"),
            ("file,label\n/etc/1.png,a\n", "line 2.*'/etc/1.png'"),
            ("file,label\n,a\n", "line 2"),
            ("file,label\ngone.png,a\n", "none of the 1 files"),
        ],
    )
    def test_a_malformed_table_is_refused(self, tmp_path: Path, text: str, words: str) -> None:
        write_image(tmp_path / "1.png", 1)
        write_csv(tmp_path, text)
        with pytest.raises(DataError, match=words):
            open_dataset(str(tmp_path))

    def test_a_table_that_is_not_text_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "labels.csv").write_bytes(b"file,label\n\xff\xfe,a\n")
        with pytest.raises(DataError, match="cannot read"):
            open_dataset(str(tmp_path))


class TestSkipping:
    def test_what_cannot_be_decoded_is_skipped_and_listed_once(self, by_class: Path) -> None:
        (by_class / "ant" / "0.png").write_bytes(b"")
        (by_class / "bee" / "1.png").write_bytes((by_class / "bee" / "1.png").read_bytes()[:40])
        dataset = open_dataset(str(by_class))
        assert len(seen(dataset)) == 10
        assert len(list(dataset)) == 10
        assert [key for key, _ in dataset.skipped] == ["ant/0.png", "bee/1.png"]
        assert dataset.skipped[0][1] == "empty file"
        assert str(by_class) not in str(dataset.skipped)

    def test_types_not_supported_are_listed(self, by_class: Path) -> None:
        (by_class / "ant" / "x.heic").touch()
        assert open_dataset(str(by_class)).skipped[0][0] == "ant/x.heic"

    def test_too_few_are_refused_with_the_reasons(self, by_class: Path) -> None:
        dataset = open_dataset(str(by_class))
        require_minimum(dataset, 12)
        with pytest.raises(DataError, match=r"12 usable images, and at least 13"):
            require_minimum(dataset, 13)
        (by_class / "ant" / "0.png").write_bytes(b"")
        start = batches(dataset, SPEC, "RGB", 5, minimum=12)
        with pytest.raises(DataError, match=r"11 usable.*\n  ant/0.png: empty file"):
            list(start())
        assert sum(len(pixels) for pixels in batches(dataset, SPEC, "RGB", 5, minimum=11)()) == 11

    def test_too_few_candidates_are_refused_before_any_is_decoded(self, by_class: Path) -> None:
        passes = batches(open_dataset(str(by_class)), SPEC, "RGB", 5, minimum=13)()
        with pytest.raises(DataError, match="at least 13"):
            next(passes)


class TestSubset:
    def test_classes_share_it_equally_in_the_order_of_the_whole(self, by_class: Path) -> None:
        chosen = seen(open_dataset(str(by_class), limit=7))
        assert sorted(Counter(label for _, label, _ in chosen).values()) == [2, 2, 3]
        everything = seen(open_dataset(str(by_class)))
        assert [item for item in everything if item in chosen] == chosen

    def test_a_class_with_few_images_gives_them_all(self, by_class: Path) -> None:
        for number in range(1, 4):
            (by_class / "bee" / f"{number}.png").unlink()
        chosen = open_dataset(str(by_class), limit=7)
        assert Counter(label for _, label, _ in seen(chosen)) == {0: 3, 1: 1, 2: 3}

    def test_the_seed_decides_and_nothing_else(self, by_class: Path, tmp_path: Path) -> None:
        moved = shutil.copytree(by_class, tmp_path / "elsewhere")
        first = seen(open_dataset(str(by_class), limit=5, seed=1))
        assert seen(open_dataset(str(moved), limit=5, seed=1)) == first
        others = [seen(open_dataset(str(by_class), limit=5, seed=seed)) for seed in range(2, 8)]
        assert any(other != first for other in others)

    def test_the_choice_of_seed_0_is_the_same_for_ever(self, by_class: Path) -> None:
        keys = [key for key, _, _ in seen(open_dataset(str(by_class), limit=4))]
        assert keys == ["ant/1.png", "ant/3.png", "bee/3.png", "cat/2.png"]

    def test_a_limit_above_the_number_takes_all(self, by_class: Path) -> None:
        assert len(open_dataset(str(by_class), limit=99)) == 12

    @pytest.mark.parametrize("limit", [0, -1])
    def test_a_limit_of_nothing_is_refused(self, by_class: Path, limit: int) -> None:
        with pytest.raises(DataError, match="at least 1"):
            open_dataset(str(by_class), limit=limit)


class TestDigest:
    def test_it_is_of_the_content_not_of_the_path(self, by_class: Path, tmp_path: Path) -> None:
        moved = shutil.copytree(by_class, tmp_path / "elsewhere")
        os.utime(moved / "ant" / "0.png", (0, 0))
        assert open_dataset(str(moved)).sha256 == open_dataset(str(by_class)).sha256

    def test_pixels_labels_and_subset_change_it(self, by_class: Path) -> None:
        before = open_dataset(str(by_class)).sha256
        assert open_dataset(str(by_class), limit=6).sha256 != before
        assert open_dataset(str(by_class), labels=["cat", "bee", "ant"]).sha256 != before
        write_image(by_class / "cat" / "3.png", 77)
        assert open_dataset(str(by_class)).sha256 != before

    def test_a_dangling_link_does_not_stop_it(self, by_class: Path) -> None:
        (by_class / "ant" / "9.png").symlink_to(by_class / "nowhere.png")
        dataset = open_dataset(str(by_class))
        assert len(dataset.sha256) == 64
        assert len(seen(dataset)) == 12
