import dataclasses
import hashlib
import json
import sys
from contextlib import ExitStack

import numpy as np
import pytest
import typer
from colour_bundles import (
    FACTORY,
    LABELS,
    SPEC,
    graph,
    images,
    manifest,
    write_colour_bundle,
    write_folders,
)
from PIL import Image
from typer.testing import CliRunner

from apps.validate import validate_command
from apps.validating import (
    Reference,
    build_judges,
    find_reference,
    open_labelled,
    subject_of_bundle,
    subject_of_models,
    validate_subject,
)
from engines import get_backend
from pipeline.artifacts import ModelArtifact, PreprocessSpec, TensorSpec
from pipeline.bundle import BundleWriter, open_bundle
from pipeline.errors import (
    AccuracyGateError,
    DataError,
    IntegrityError,
    UnsupportedError,
    UsageError,
    WeightsError,
)
from pipeline.manifest import ModelSource


@pytest.fixture
def factory(tmp_path):
    path = tmp_path / "colour_model.py"
    path.write_text(FACTORY)
    return f"{path}:colour"


@pytest.fixture
def make_bundle(tmp_path, factory):
    def make(bias=(0.04, 0.0, 0.0), **changes):
        return write_colour_bundle(tmp_path / "bundle", factory, bias, **changes)

    return make


@pytest.fixture
def data(tmp_path):
    pixels, labels = images()
    np.savez(tmp_path / "data.npz", images=pixels, labels=labels)
    return str(tmp_path / "data.npz")


def run(*arguments):
    app = typer.Typer()
    app.command()(validate_command)
    return CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)


def test_json_alone_on_standard_output_and_the_chain_from_pytorch(make_bundle, data):
    pytest.importorskip("torch")
    result = run(make_bundle(), "--data", data, "--against", "torch", "--json", "--batch", 32)
    assert result.exit_code == 0
    tree = json.loads(result.stdout)
    assert [stage["part"] for stage in tree["stages"]] == ["reference", "export", "INT8"]
    assert [stage["name"] for stage in tree["stages"]][:2] == ["PyTorch fp32", "OpenVINO fp32, folded"]
    assert tree["n_images"] == 90
    assert tree["stages"][0]["top1"] == 1.0
    export, int8 = tree["drops"]
    assert export["drop_points"] == 0
    assert export["max_abs_error"] < 1e-5
    # The bias of 0.04 is 10 gray levels of red: the images lifted by less are taken for red.
    assert int8["lost"] > 3
    assert int8["gained"] == 0
    assert tree["total"]["lost"] == int8["lost"]
    assert tree["assumed"][0]["part"] == "preprocessing"
    assert "same by construction" in tree["assumed"][0]["reason"]


def test_auto_never_runs_a_python_file_that_a_bundle_names(make_bundle, data, tmp_path):
    result = run(make_bundle(), "--data", data, "--json")
    tree = json.loads(result.stdout)
    assert [stage["part"] for stage in tree["stages"]] == ["reference", "INT8"]
    assert not (tmp_path / "ran").exists()
    reasons = {part["part"]: part["reason"] for part in tree["assumed"]}
    assert "--against torch" in reasons["preprocessing"]
    assert "largest error 2e-06 (limit 0.0001), SQNR 120 dB" in reasons["export"]


def test_the_terminal_says_it_in_words(make_bundle, data):
    result = run(make_bundle(), "--data", data, "--max-drop", 90)
    assert result.stdout == ""
    assert "Accuracy of each stage" in result.stderr
    assert "Classes that lost most" in result.stderr
    assert "Within the budget of 90 points" in result.stderr
    assert "With 95% confidence the true drop lies between" in result.stderr


def test_past_the_budget_is_exit_3_after_everything_was_written(make_bundle, data, tmp_path):
    report = tmp_path / "report.html"
    with pytest.raises(
        AccuracyGateError, match=r"past the budget of 0\.5\. Most of it comes from INT8"
    ) as caught:
        run(make_bundle(), "--data", data, "--max-drop", 0.5, "--report", report)
    assert caught.value.exit_code == 3
    assert "Past the budget" in report.read_text()


def test_an_edited_bundle_is_refused_before_it_is_parsed(make_bundle, data):
    bundle = make_bundle()
    (bundle / "model.int8.onnx").write_bytes(b"not a model")
    with pytest.raises(IntegrityError, match=r"model\.int8\.onnx"):
        run(bundle, "--data", data)


def test_both_engines_agree(make_bundle, data):
    bundle = make_bundle()
    trees = [
        json.loads(run(bundle, "--data", data, "--json", "--engine", e).stdout)
        for e in ("openvino", "onnxruntime")
    ]
    assert trees[0]["stages"][1]["name"] == "OpenVINO int8"
    assert trees[1]["stages"][1]["name"] == "ONNX Runtime int8"
    assert trees[0]["total"]["lost"] == trees[1]["total"]["lost"]


def test_limit_takes_all_classes_alike(make_bundle, data):
    tree = json.loads(run(make_bundle(), "--data", data, "--json", "--limit", 30).stdout)
    assert [row["n_images"] for row in tree["classes"]] == [10, 10, 10]


def test_folders_match_by_name_and_not_by_their_order(make_bundle, tmp_path):
    folder = write_folders(tmp_path / "named", LABELS)  # sorted: blue, green, red
    tree = json.loads(run(make_bundle(), "--data", folder, "--json").stdout)
    assert tree["stages"][0]["top1"] == 1.0
    assert tree["notes"] == []


def test_folders_of_other_names_match_by_index_and_say_so(make_bundle, tmp_path):
    folder = write_folders(tmp_path / "coded", ("n01", "n02", "n03"))
    tree = json.loads(run(make_bundle(), "--data", folder, "--json").stdout)
    assert tree["stages"][0]["top1"] == 1.0
    assert "matched by index ('n01' is 'red')" in tree["notes"][0]


def test_labels_file_replaces_the_names_of_the_bundle(make_bundle, tmp_path):
    folder = write_folders(tmp_path / "coded", ("rot", "gruen", "blau"))
    names = tmp_path / "labels.txt"
    names.write_text("rot\ngruen\nblau\n")
    tree = json.loads(run(make_bundle(), "--data", folder, "--labels", names, "--json").stdout)
    assert tree["stages"][0]["top1"] == 1.0
    assert {row["label"] for row in tree["classes"]} == {"rot", "gruen", "blau"}


def test_classes_that_the_model_lacks_are_listed(make_bundle, tmp_path):
    folder = write_folders(tmp_path / "other", ("red", "green", "mauve"))
    with pytest.raises(DataError, match=r"1 of the 3 classes of other are not among .* 'mauve'"):
        run(make_bundle(), "--data", folder)


def test_labels_of_another_count_are_refused(make_bundle, data, tmp_path):
    names = tmp_path / "labels.txt"
    names.write_text("a\nb\nc\nd\n")
    with pytest.raises(DataError, match="4 class names for a model of 3 outputs"):
        run(make_bundle(), "--data", data, "--labels", names)


def test_images_without_labels_are_refused(make_bundle, tmp_path):
    pixels, _ = images(3)
    (tmp_path / "flat").mkdir()
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "flat" / f"{i}.png")
    with pytest.raises(DataError, match="has no labels, and accuracy needs them"):
        run(make_bundle(), "--data", tmp_path / "flat")


class TestModelWithoutNames:
    def test_indices_need_no_names_and_may_leave_classes_out(self, tmp_path):
        pixels, labels = images(4)
        np.savez(tmp_path / "some.npz", images=pixels, labels=labels)  # classes 0 to 2 of 7
        dataset = open_labelled(str(tmp_path / "some.npz"), (), 7, None)
        assert dataset.class_names == tuple("0123456")

    def test_folders_give_the_names_where_the_count_is_the_same(self, tmp_path):
        folder = write_folders(tmp_path / "named", LABELS)
        assert open_labelled(str(folder), (), 3, None).class_names == ("blue", "green", "red")

    def test_folders_of_another_count_are_refused_and_not_counted_off(self, make_bundle, tmp_path):
        folder = write_folders(tmp_path / "named", LABELS)
        bundle = make_bundle(labels=(), model=ModelSource("a.onnx", "in the ONNX file", None, 7))
        with pytest.raises(DataError, match="3 of the 3 classes of named are not among"):
            run(bundle, "--data", folder)


def test_data_that_is_not_there_is_named(make_bundle):
    with pytest.raises(DataError, match="no data at 'nowhere'"):
        run(make_bundle(), "--data", "nowhere")


def test_an_fp32_bundle_needs_pytorch_to_compare_with(make_bundle, data):
    bundle = make_bundle(ships="model.onnx")
    with pytest.raises(UsageError, match=r"nothing to compare.*--against onnx"):
        run(bundle, "--data", data, "--against", "onnx")
    pytest.importorskip("torch")
    tree = json.loads(run(bundle, "--data", data, "--against", "torch", "--json").stdout)
    assert [stage["part"] for stage in tree["stages"]] == ["reference", "export"]


def test_a_model_of_fixed_batch_gets_its_own(make_bundle, data, tmp_path, factory):
    with BundleWriter(tmp_path / "one") as writer:
        graph(writer.path / "model.onnx", batch="1")
        graph(writer.path / "model.int8.onnx", batch="1")
        fixed = (TensorSpec("input", "uint8", (1, 8, 8, 3)),)
        bundle = writer.commit(manifest(factory, inputs=fixed)).path
    tree = json.loads(run(bundle, "--data", data, "--json", "--limit", 9).stdout)
    assert tree["total"]["drop_points"] == 0
    assert tree["n_images"] == 9


class TestReference:
    def test_without_pytorch_the_chain_starts_at_the_folded_graph(self, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        recorded = manifest(
            "inception_v3", model=ModelSource("inception_v3", "random:0", None, 3, weights_option="random:0")
        )
        assert "PyTorch is not installed" in find_reference(recorded, "auto").why_not
        with pytest.raises(UnsupportedError, match=r"edgefold\[build\]"):
            find_reference(recorded, "torch")

    def test_weights_that_moved_or_changed_are_no_reference(self, tmp_path):
        pytest.importorskip("torch")
        weights = tmp_path / "weights.safetensors"
        source = ModelSource("inception_v3", str(weights), "0" * 64, 3, weights_option=str(weights))
        assert "are not there" in find_reference(manifest("", model=source), "auto").why_not
        weights.write_bytes(b"other")
        reason = find_reference(manifest("", model=source), "auto").why_not
        assert "have changed since the build" in reason
        assert hashlib.sha256(b"other").hexdigest() in reason
        with pytest.raises(WeightsError, match="have changed"):
            find_reference(manifest("", model=source), "torch")

    def test_an_onnx_model_has_no_pytorch(self):
        assert "ONNX file" in find_reference(manifest("colour.onnx"), "auto").why_not

    def test_a_library_transform_of_the_same_spec_is_judged_first(self, make_bundle, data):
        torch = pytest.importorskip("torch")
        from pipeline.preprocess import normalize

        backend = get_backend("openvino")
        subject = subject_of_bundle(open_bundle(make_bundle()), backend)

        class Mean(torch.nn.Module):
            def forward(self, x):
                return x.mean(dim=(2, 3)) * torch.tensor(SPEC.std) + torch.tensor(SPEC.mean)

        @dataclasses.dataclass
        class Resolved:
            module: object
            reference_transform: object
            preprocess: PreprocessSpec = SPEC

        def darker(image):
            return normalize((np.asarray(image) // 2)[None], SPEC, "RGB")[0]

        def judged(resolved):
            dataset = open_labelled(data, LABELS, 3, None)
            return validate_subject(subject, dataset, backend, Reference(resolved))

        result = judged(Resolved(Mean(), darker))
        assert [stage.part for stage in result.stages] == ["reference", "preprocessing", "export", "INT8"]
        assert result.drops[0].max_abs_error > 0.1  # the transform halves every value
        assert result.drops[1].max_abs_error < 1e-5
        assert result.assumed == ()

        resizing = dataclasses.replace(subject, preprocess=dataclasses.replace(SPEC, resize="shorter"))
        result = validate_subject(
            resizing,
            open_labelled(data, LABELS, 3, 9),
            backend,
            Reference(Resolved(Mean(), darker, resizing.preprocess)),
            crops=12,
        )
        assert [stage.part for stage in result.stages] == ["reference", "export", "INT8"]
        assert "12 crops are cut by the same preprocessing" in result.assumed[0].reason

        other = dataclasses.replace(SPEC, crop_fraction=0.9)
        result = judged(Resolved(Mean(), darker, other))
        assert [stage.part for stage in result.stages] == ["reference", "export", "INT8"]
        assert "other preprocessing" in result.assumed[0].reason


def test_a_build_under_way_is_judged_by_its_models(tmp_path, data):
    def model(name, bias):
        path = graph(tmp_path / name, bias)
        return ModelArtifact(
            path=path,
            sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
            inputs=(TensorSpec("input", "uint8", ("N", 8, 8, 3)),),
            outputs=(TensorSpec("logits", "float32", ("N", 3)),),
            opset=18,
            preprocess=SPEC,
            input_color="BGR",
        )

    backend = get_backend("openvino")
    folded, final = model("a.onnx", (0, 0, 0)), model("b.onnx", (0.04, 0, 0))
    subject = subject_of_models(folded, final, backend, precision="int8", num_classes=3)
    result = validate_subject(
        subject, open_labelled(data, (), 3, None), backend, Reference(None, "no module")
    )
    assert result.total.lost > 3
    assert [row.label for row in result.classes] == ["0", "1", "2"]
    same = subject_of_models(folded, folded, backend, precision="fp32", num_classes=3)
    with ExitStack() as stack, pytest.raises(UsageError, match="nothing to compare"):
        build_judges(stack, same, backend, Reference(None, "no module"), 4)


def test_validation_imports_no_torch():
    import subprocess

    code = "import sys, apps.validate, apps.validating, apps.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
