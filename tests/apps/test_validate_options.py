"""What `edgefold validate` can be asked for: crops, ensembles, images without labels, going on after a kill."""

import json
import subprocess
import sys
import time

import numpy as np
import pytest
import typer
from colour_bundles import LABELS, images, write_colour_bundle, write_folders
from PIL import Image
from typer.testing import CliRunner

from apps.validate import validate_command
from pipeline.artifacts import PreprocessSpec
from pipeline.datasets import open_dataset
from pipeline.errors import AccuracyGateError, DataError, IntegrityError, UsageError
from pipeline.manifest import CalibrationSummary, ModelSource

RESIZED = PreprocessSpec((8, 8))


def run(*arguments):
    app = typer.Typer()
    app.command()(validate_command)
    return CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)


def found(*arguments):
    return json.loads(run(*arguments, "--json").stdout)


@pytest.fixture
def data(tmp_path):
    pixels, labels = images()
    np.savez(tmp_path / "data.npz", images=pixels, labels=labels)
    return tmp_path / "data.npz"


@pytest.fixture
def flat(tmp_path):
    """Thirty images without labels."""
    (tmp_path / "flat").mkdir()
    for i, image in enumerate(images(30)[0]):
        Image.fromarray(image).save(tmp_path / "flat" / f"{i:02}.png")
    return tmp_path / "flat"


class TestCrops:
    @pytest.mark.parametrize("crops", [10, 12, 144])
    def test_the_engines_see_every_crop(self, tmp_path, data, crops):
        bundle = write_colour_bundle(tmp_path / "b", preprocess=RESIZED)
        tree = found(bundle, "--data", data, "--crops", crops, "--limit", 9)
        assert (tree["crops"], tree["n_images"]) == (crops, 9)
        # The colour of an image is that of its crops.
        assert tree["stages"][0]["top1"] == 1.0
        assert tree["total"]["sqnr_db"] > 10

    def test_the_terminal_and_the_report_say_so(self, tmp_path, data):
        bundle = write_colour_bundle(tmp_path / "b", preprocess=RESIZED)
        report = tmp_path / "r.html"
        result = run(bundle, "--data", data, "--crops", 12, "--limit", 9, "--report", report)
        assert "9 images, 12 crops each" in result.stderr
        assert ", 12 crops each" in report.read_text()

    def test_preprocessing_that_does_not_resize_has_none(self, tmp_path, data):
        with pytest.raises(UsageError, match="does not resize"):
            run(write_colour_bundle(tmp_path / "b"), "--data", data, "--crops", 12)
        with pytest.raises(UsageError, match="--crops is one of 1, 10, 12, 144, got 7"):
            run(write_colour_bundle(tmp_path / "b"), "--data", data, "--crops", 7)


class TestEnsemble:
    def test_bundles_of_different_inputs_answer_together(self, tmp_path, data):
        # One leans to red, the other to blue as much: the mean leans to neither.
        red = write_colour_bundle(tmp_path / "red", bias=(0.06, 0.0, 0.0), preprocess=RESIZED)
        blue = write_colour_bundle(tmp_path / "blue", bias=(0.0, 0.0, 0.06), side=12)
        tree = found(red, blue, "--ensemble", "--data", data)
        assert [stage["name"] for stage in tree["stages"]] == ["fp32 ensemble of 2", "int8 ensemble of 2"]
        assert [member["name"] for member in tree["members"]] == ["red", "blue"]
        alone = [member["after"]["top1"] for member in tree["members"]]
        assert max(alone) < tree["stages"][1]["top1"]
        assert all(member["to_ensemble"]["gained"] > 0 for member in tree["members"])
        assert all(len(member["identity"].split()[0]) == 64 for member in tree["members"])

    def test_the_terminal_and_the_report_show_each_network(self, tmp_path, data):
        red = write_colour_bundle(tmp_path / "red", bias=(0.06, 0.0, 0.0))
        green = write_colour_bundle(tmp_path / "green", bias=(0.0, 0.06, 0.0))
        report = tmp_path / "r.html"
        result = run(red, green, "--ensemble", "--data", data, "--report", report, "--max-drop", 99)
        assert "Each network by itself" in result.stderr
        page = report.read_text()
        assert "Edgefold report: red + green" in page
        assert 'id="members"' in page

    def test_what_is_no_ensemble_is_refused(self, tmp_path, data):
        one = write_colour_bundle(tmp_path / "one")
        two = write_colour_bundle(tmp_path / "two")
        with pytest.raises(UsageError, match="2 bundles were given: add --ensemble"):
            run(one, two, "--data", data)
        with pytest.raises(UsageError, match="two bundles or more, got 1"):
            run(one, "--ensemble", "--data", data)
        with pytest.raises(UsageError, match="given twice"):
            run(one, one, "--ensemble", "--data", data)
        with pytest.raises(UsageError, match="--against torch is of one bundle"):
            run(one, two, "--ensemble", "--data", data, "--against", "torch")

    def test_other_classes_are_named(self, tmp_path, data):
        one = write_colour_bundle(tmp_path / "one")
        swapped = write_colour_bundle(tmp_path / "swapped", labels=("red", "blue", "green"))
        with pytest.raises(
            DataError,
            match=r"2 of the 3 outputs are other classes in swapped than in one: output 1 is 'green' in one",
        ):
            run(one, swapped, "--ensemble", "--data", data)
        more = write_colour_bundle(
            tmp_path / "more", labels=(), model=ModelSource("a.onnx", "in the ONNX file", None, 7)
        )
        with pytest.raises(DataError, match="one has 3 classes and more 7"):
            run(one, more, "--ensemble", "--data", data)

    def test_a_bundle_without_names_takes_those_of_the_others(self, tmp_path, data):
        named = write_colour_bundle(tmp_path / "named")
        nameless = write_colour_bundle(tmp_path / "nameless", bias=(0.0, 0.0, 0.02), labels=())
        tree = found(nameless, named, "--ensemble", "--data", data)
        assert [row["label"] for row in tree["classes"]] == list(LABELS)


class TestWithoutLabels:
    def test_agreement_instead_of_accuracy(self, tmp_path, flat):
        bundle = write_colour_bundle(tmp_path / "b")
        tree = found(bundle, "--data", flat, "--min-agreement", 0)
        assert tree["stages"] == ["OpenVINO fp32, folded", "OpenVINO int8"]
        assert "top1" not in json.dumps(tree)
        assert 0.5 < tree["total"]["agreement"] < 1.0
        assert all(flip["after"] == "red" for flip in tree["flips"])  # what the bias leads to

    def test_too_little_of_it_is_exit_3_after_everything_was_shown(self, tmp_path, flat):
        bundle, report = write_colour_bundle(tmp_path / "b"), tmp_path / "r.html"
        with pytest.raises(
            AccuracyGateError, match=r"OpenVINO int8 gives .* fewer than the 99% of --min-agreement"
        ):
            run(bundle, "--data", flat, "--min-agreement", 99, "--report", report)
        assert "Too few answers kept" in report.read_text()
        result = run(bundle, "--data", flat, "--min-agreement", 50)
        assert "of the answers kept, 50% asked for" in result.stderr

    def test_it_has_to_be_asked_for(self, tmp_path, flat):
        with pytest.raises(DataError, match=r"has no labels, and accuracy needs them.*--min-agreement"):
            run(write_colour_bundle(tmp_path / "b"), "--data", flat)
        with pytest.raises(UsageError, match="--max-drop needs labels"):
            run(write_colour_bundle(tmp_path / "b"), "--data", flat, "--min-agreement", 1, "--max-drop", 1)

    def test_labelled_images_have_both(self, tmp_path, data):
        bundle = write_colour_bundle(tmp_path / "b")
        tree = found(bundle, "--data", data, "--min-agreement", 0)
        assert tree["stages"][0]["top1"] == 1.0
        with pytest.raises(AccuracyGateError, match="of --min-agreement"):
            run(bundle, "--data", data, "--min-agreement", 100)


def test_one_class_warns_and_judges_no_budget(tmp_path):
    folder = write_folders(tmp_path / "all", LABELS)
    for name in ("green", "blue"):
        for file in (folder / name).iterdir():
            file.unlink()
    bundle = write_colour_bundle(tmp_path / "b")
    tree = found(bundle, "--data", folder)
    assert "all images are of the class 'red'" in tree["notes"][0]
    with pytest.raises(DataError, match=r"cannot judge --max-drop; give images of all 3 classes"):
        run(bundle, "--data", folder, "--max-drop", 1)


def test_the_images_of_the_calibration_are_recognized(tmp_path, data):
    digest = open_dataset(str(data)).sha256
    summary = CalibrationSummary("minmax", 90, "a" * 64, "b" * 64, digest, "data.npz")
    note = "these are the 90 images that the engine was calibrated on"
    tree = found(write_colour_bundle(tmp_path / "b", calibration=summary), "--data", data)
    assert tree["notes"][0].startswith(note)
    assert not any(
        note in other for other in found(write_colour_bundle(tmp_path / "c"), "--data", data)["notes"]
    )


SLOW = """
import functools, sys, time
import apps.validating_request as request
from pipeline import npz
read = npz.NpzDataset._read

def slowly(self, indices):
    for item in read(self, indices):
        time.sleep(0.02)
        yield item

npz.NpzDataset._read = slowly
request.ResumeFile = functools.partial(request.ResumeFile, save_every_s=0)
from apps.cli import main
main(sys.argv[1:])
"""


class TestResume:
    def test_killed_and_started_again_it_finds_the_same(self, tmp_path, data):
        bundle, state = write_colour_bundle(tmp_path / "b"), tmp_path / "state.json"
        command = [
            "validate",
            str(bundle),
            "--data",
            str(data),
            "--batch",
            "4",
            "--resume",
            str(state),
            "--json",
        ]
        process = subprocess.Popen([sys.executable, "-c", SLOW, *command], stdout=subprocess.PIPE)
        try:
            deadline = time.monotonic() + 120
            while not state.exists():
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.01)
        finally:
            process.kill()
            process.communicate()
        kept = json.loads(state.read_text())["tally"]["meters"][0]["n_images"]
        assert 0 < kept < 90
        resumed = json.loads(run(*command[1:]).stdout)
        whole = found(bundle, "--data", data, "--batch", 4)
        assert f"{kept} of the images were judged before" in resumed["notes"][0]
        for tree in (resumed, whole):
            del tree["seconds"], tree["notes"]
        assert resumed == whole
        assert not state.exists()

    def test_a_state_of_another_bundle_or_other_images_is_refused(self, tmp_path, data, monkeypatch):
        state = tmp_path / "state.json"
        monkeypatch.setattr("pipeline.validation_state.ResumeFile.remove", lambda self: None)
        run(write_colour_bundle(tmp_path / "b"), "--data", data, "--resume", state)
        other = write_colour_bundle(tmp_path / "other", bias=(0.05, 0.0, 0.0))
        with pytest.raises(IntegrityError, match="of other graph or engine of OpenVINO int8") as caught:
            run(other, "--data", data, "--resume", state)
        assert caught.value.exit_code == 5
        with pytest.raises(IntegrityError, match="of other images"):
            run(write_colour_bundle(tmp_path / "b"), "--data", data, "--limit", 9, "--resume", state)
        with pytest.raises(IntegrityError, match="graph or engine of ONNX Runtime int8"):
            run(
                write_colour_bundle(tmp_path / "b"),
                "--data",
                data,
                "--engine",
                "onnxruntime",
                "--resume",
                state,
            )
