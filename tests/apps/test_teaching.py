"""`edgefold train --teacher`: a real engine is asked, once, and what it says is learned."""

from __future__ import annotations

import json
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest
from numpy.typing import NDArray
from tinted import FACTORY, write_tinted_images

from apps.building import build
from apps.cli import main
from apps.publishing import BuildRequest
from apps.teaching import ask_teachers
from engines import get_backend
from pipeline.artifacts import EngineArtifact, EngineOptions
from pipeline.bundle import Bundle
from pipeline.contracts import Dataset
from pipeline.datasets import open_dataset
from pipeline.errors import DataError, UsageError
from pipeline.preprocess import to_network_pixels

pytest.importorskip("torch")

STUDENT = """
from torch import nn


def student(num_classes):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes),
    )
"""


def quiet(what: str, done: int, total: int | None) -> None:
    """A progress callback that draws nothing."""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tinted_images(tmp_path_factory.mktemp("images"))


def built(folder: Path, factory: str, images: Path, labels: Path | None = None) -> Bundle:
    (folder / "model.py").write_text(factory)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEFOLD_CACHE", str(folder / "cache"))
        request = BuildRequest(
            f"{folder / 'model.py'}:classifier",
            folder / "bundle",
            calib=str(images),
            input_size=32,
            labels=labels,
        )
        return build(request, quiet).bundle


@pytest.fixture(scope="module")
def teacher(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return built(tmp_path_factory.mktemp("teacher"), FACTORY, images)


def answers(bundle: Bundle, dataset: Dataset) -> NDArray[np.float64]:
    """Logits of every image as it is and mirrored, [2, n, classes], less those of the first class."""
    manifest, engine = bundle.manifest, bundle.manifest.ready_engine()
    sha256, backend = bundle.sha256(engine.file), get_backend(engine.backend)
    artifact = EngineArtifact(bundle.file(engine.file), sha256, sha256, backend.name, backend.fingerprint())
    rows = []
    with backend.load(artifact, EngineOptions()) as runner:
        for sample in dataset:
            pixels = to_network_pixels(sample.image, "RGB", manifest.preprocess, manifest.input_color)
            views = [np.ascontiguousarray(view)[None] for view in (pixels, pixels[:, ::-1])]
            rows.append([runner.infer({runner.inputs[0].name: view})["logits"][0] for view in views])
    logits = np.array(rows, np.float64).transpose(1, 0, 2)
    return logits - logits[..., :1]


def test_an_answer_is_the_mean_over_engines_and_mirrors(
    teacher: Bundle, images: Path, tmp_path: Path
) -> None:
    second = built(tmp_path, FACTORY.replace("weight[1, 1] = 1.0", "weight[1, 1] = 3.0"), images)
    dataset = open_dataset(str(images))
    ours, others = answers(teacher, dataset), answers(second, dataset)
    assert np.abs(ours[0] - ours[1]).max() > 1e-3, "a mirror changes something"
    assert np.abs(ours - others).max() > 0.1, "and so does another network"
    for bundles, mirror, truth in (
        ([teacher], False, ours[0]),
        ([teacher], True, ours.mean(0)),
        ([teacher, second], True, (ours.mean(0) + others.mean(0)) / 2),
    ):
        paths = [bundle.path for bundle in bundles]
        taught_by = ask_teachers(paths, dataset, tmp_path / "kept", quiet, mirror=mirror)
        said = taught_by.log_probabilities
        np.testing.assert_allclose(said - said[:, :1], truth, atol=1e-3)
        assert [name for name, _ in taught_by.engines] == [path.name for path in paths]


def test_classes_are_matched_by_name(teacher: Bundle, images: Path, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("b_blue\na_red\n")
    swapped = built(tmp_path, FACTORY, images, labels=names)
    dataset = open_dataset(str(images))
    by_order, by_name = (
        ask_teachers([bundle.path], dataset, tmp_path / "kept", quiet, mirror=False).log_probabilities
        for bundle in (teacher, swapped)
    )
    np.testing.assert_array_equal(by_name, by_order[:, ::-1])


def test_it_is_asked_once(
    teacher: Bundle, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = open_dataset(str(images))
    first = ask_teachers([teacher.path], dataset, tmp_path, quiet, mirror=True)
    monkeypatch.setattr("apps.teaching.load_judge", None)
    again = ask_teachers([teacher.path], dataset, tmp_path, quiet, mirror=True)
    np.testing.assert_array_equal(again.log_probabilities, first.log_probabilities)


def test_a_student_learns_what_the_teacher_says_where_labels_say_otherwise(
    teacher: Bundle, images: Path, tmp_path: Path
) -> None:
    (tmp_path / "model.py").write_text(STUDENT)
    swapped = tmp_path / "swapped"
    copytree(images / "b_blue", swapped / "a_red")
    copytree(images / "a_red", swapped / "b_blue")
    for name, teaching, right in (("alone", [], 100.0), ("taught", ["--teacher", str(teacher.path)], 0.0)):
        arguments = ["--data", str(swapped), "--holdout", "4", "--epochs", "60", "--batch-size", "8"]
        network = [f"{tmp_path / 'model.py'}:student", "--input-size", "16", "--shift", "1"]
        with pytest.raises(SystemExit) as done:
            main(["train", *network, *arguments, "--out", str(tmp_path / name), *teaching])
        assert done.value.code == 0
        card = json.loads((tmp_path / name / "card.json").read_text())
        assert card["held_out_top1_percent"] == right, name
        assert bool(card["teacher"]) == bool(teaching)


def test_a_teacher_of_other_classes_is_refused(teacher: Bundle, images: Path, tmp_path: Path) -> None:
    for name in ("a_red", "b_blue", "c_green"):
        copytree(images / "a_red", tmp_path / "three" / name)
    with pytest.raises(DataError, match="c_green"):
        ask_teachers([teacher.path], open_dataset(str(tmp_path / "three")), tmp_path, quiet, mirror=True)


def test_a_teacher_that_is_no_bundle_is_refused(images: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no bundle"):
        ask_teachers([tmp_path / "nothing"], open_dataset(str(images)), tmp_path, quiet, mirror=True)
