"""`edgefold train --teacher`: a real engine is asked, once, and what it says is learned."""

from __future__ import annotations

import json
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest
from tinted import FACTORY, write_tinted_images

from apps.building import build
from apps.cli import main
from apps.publishing import BuildRequest
from apps.teaching import ask_teacher
from engines import get_backend
from pipeline.artifacts import EngineArtifact, EngineOptions
from pipeline.bundle import Bundle
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


@pytest.fixture(scope="module")
def teacher(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("teacher")
    (folder / "model.py").write_text(FACTORY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEFOLD_CACHE", str(folder / "cache"))
        request = BuildRequest(
            f"{folder / 'model.py'}:classifier", folder / "bundle", calib=str(images), input_size=32
        )
        return build(request, quiet).bundle


def test_every_image_and_its_mirror_has_the_engines_answer(
    teacher: Bundle, images: Path, tmp_path: Path
) -> None:
    dataset = open_dataset(str(images))
    taught_by = ask_teacher(teacher.path, dataset, tmp_path, quiet)
    manifest, engine = teacher.manifest, teacher.manifest.ready_engine()
    assert taught_by.sha256 == teacher.sha256(engine.file)
    backend = get_backend(engine.backend)
    artifact = EngineArtifact(
        *(teacher.file(engine.file), taught_by.sha256, taught_by.sha256, backend.name, backend.fingerprint())
    )
    with backend.load(artifact, EngineOptions()) as runner:
        for i, sample in enumerate(dataset):
            pixels = to_network_pixels(sample.image, "RGB", manifest.preprocess, manifest.input_color)
            for mirrored, view in enumerate((pixels, pixels[:, ::-1])):
                (logits,) = runner.infer({runner.inputs[0].name: np.ascontiguousarray(view)[None]}).values()
                said = taught_by.log_probabilities[mirrored, i]
                np.testing.assert_allclose(said - said[0], logits[0] - logits[0, 0], atol=1e-4)
    assert np.ptp(taught_by.log_probabilities, axis=0).max() > 1e-3, "a mirror changes something"


def test_it_is_asked_once(
    teacher: Bundle, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = open_dataset(str(images))
    first = ask_teacher(teacher.path, dataset, tmp_path, quiet)
    monkeypatch.setattr("apps.teaching.load_judge", None)
    again = ask_teacher(teacher.path, dataset, tmp_path, quiet)
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
        assert (card["teacher"] or {}).get("bundle") == (teacher.path.name if teaching else None)


def test_a_teacher_of_other_classes_is_refused(teacher: Bundle, images: Path, tmp_path: Path) -> None:
    for name in ("a_red", "b_blue", "c_green"):
        copytree(images / "a_red", tmp_path / "three" / name)
    with pytest.raises(DataError, match="c_green"):
        ask_teacher(teacher.path, open_dataset(str(tmp_path / "three")), tmp_path, quiet)


def test_a_teacher_that_is_no_bundle_is_refused(images: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no bundle"):
        ask_teacher(tmp_path / "nothing", open_dataset(str(images)), tmp_path, quiet)
