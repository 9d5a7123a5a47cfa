"""Specs and the weights they ask for: never guessed, checked, and named."""

import re

import pytest
import torch
from lite_weights import lite_state
from safetensors.torch import save_file

from pipeline.errors import ModelSpecError, WeightsError
from pipeline.models.inception import inception_v3
from pipeline.models.resolve import resolve_model

LITE = "inception_resnet_lite"


# --- names ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "offered"),
    [
        ("inception_v33", "inception_v3"),
        ("inception_resnet_lit", LITE),
        ("resnet50", "timm:resnet50"),
        ("resnet50", "torchvision:resnet50"),
        ("timm:resnet5O", "timm:resnet50"),
        ("timm:resnet18.nobody", "timm:resnet18.a1_in1k"),
        ("torchvision:resnet1", "torchvision:resnet18"),
        ("torchvision:fasterrcnn_resnet50_fpn", "torchvision:resnet50"),
    ],
)
def test_near_names_are_offered(spec, offered):
    with pytest.raises(ModelSpecError, match=rf"near: .*\b{offered}\b"):
        resolve_model(spec, weights="random:0")


def test_nothing_near_lists_what_a_spec_can_be():
    with pytest.raises(ModelSpecError, match=r"inception_v2.*timm:NAME.*file\.py:factory.*\.onnx") as caught:
        resolve_model("qqqqqq", weights=None)
    assert "near:" not in str(caught.value)


def test_a_weights_file_is_no_model(lite_file):
    with pytest.raises(ModelSpecError, match=f"not a model.*--weights {lite_file}"):
        resolve_model(lite_file, weights=None)


# --- weights ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [LITE, "inception_v3", "timm:resnet18", "torchvision:resnet18"])
def test_weights_are_never_guessed(spec):
    with pytest.raises(WeightsError, match=r"none are guessed.*--weights FILE.*random:SEED"):
        resolve_model(spec, weights=None)


def test_class_count_is_read_from_the_head(lite_file):
    model = resolve_model(LITE, weights=lite_file, input_size=32)
    assert model.num_classes == 5
    assert any("5 classes, read from the head" in note for note in model.notes)
    assert any("assumed, not known (default of inception_resnet_lite)" in note for note in model.notes)
    assert model.weights == lite_file
    assert len(model.weights_sha256) == 64
    assert not model.module.training
    assert torch.equal(model.module.head.weight, lite_state()["head.weight"])


def test_a_wrong_head_is_refused(lite_file):
    with pytest.raises(WeightsError, match=r"head .* has 5 classes and --num-classes says 12"):
        resolve_model(LITE, weights=lite_file, input_size=32, num_classes=12)


def test_weights_of_another_architecture_are_listed(lite_file):
    with pytest.raises(WeightsError) as caught:
        resolve_model("torchvision:resnet18", weights=lite_file)
    message = str(caught.value)
    assert "0 of its 122 tensors fit" in message
    assert "102 missing: conv1.weight, bn1.weight" in message
    assert re.search(r"\d+ extra: \S+, \S+.* and \d+ more", message)


def test_weights_of_the_other_stem_do_not_fit(lite_file):
    with pytest.raises(WeightsError, match=r"missing: stem\."):
        resolve_model(LITE, weights=lite_file, input_size=96)


def test_nan_weights_are_refused(tmp_path):
    state = lite_state()
    state["stage_b.0.up.weight"][3, 2] = float("nan")
    save_file(state, tmp_path / "nan.safetensors")
    with pytest.raises(WeightsError, match=r"stage_b\.0\.up\.weight \(1 of \d+\)"):
        resolve_model(LITE, weights=str(tmp_path / "nan.safetensors"), input_size=32)


def test_weights_that_overflow_are_refused(tmp_path):
    state = lite_state()
    for key in state:
        if key.endswith("up.weight"):
            state[key] = state[key] * 1e30
    save_file(state, tmp_path / "huge.safetensors")
    with pytest.raises(WeightsError, match="NaN or infinite logits"):
        resolve_model(LITE, weights=str(tmp_path / "huge.safetensors"), input_size=32)


def test_a_fine_tuned_torchvision_checkpoint_loads_into_inception_v3(tmp_path):
    """As people save them: data parallel, seven classes, the auxiliary head still there."""
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in inception_v3(7).state_dict().items()}
    state = {
        f"module.{key}": torch.full(shape, 0.01, dtype=torch.float16 if shape else torch.int64)
        for key, shape in shapes.items()
    }
    state["module.AuxLogits.fc.weight"] = torch.zeros(7, 768)
    torch.save({"model": state, "epoch": 90}, tmp_path / "best.pth")
    model = resolve_model("inception_v3", weights=str(tmp_path / "best.pth"), input_size=79)
    assert model.num_classes == 7
    notes = "\n".join(model.notes)
    for said in ("'model'", "'module.'", "7 classes", "dropped AuxLogits (1 tensors)", "low-resolution stem"):
        assert said in notes


def test_a_face_checkpoint_serves_as_embedding_and_as_classifier(tmp_path):
    path = str(tmp_path / "face.safetensors")
    classifier = resolve_model("inception_resnet_v1", weights="random:0", num_classes=6, input_size=96)
    save_file(classifier.module.state_dict(), path)
    assert resolve_model("inception_resnet_v1", weights=path, input_size=96).num_classes == 6
    embedding = resolve_model("inception_resnet_v1_embedding", weights=path, input_size=96)
    assert embedding.num_classes == 512
    assert any("dropped logits (2 tensors)" in note for note in embedding.notes)
    save_file(embedding.module.state_dict(), path)
    with pytest.raises(WeightsError, match=r"2 missing: logits\.weight, logits\.bias"):
        resolve_model("inception_resnet_v1", weights=path, input_size=96)


def test_random_weights_say_what_they_are():
    model = resolve_model(LITE, weights="random:3", input_size=32, num_classes=4)
    assert (model.weights, model.weights_sha256, model.num_classes) == ("random:3", None, 4)
    assert any("predictions mean nothing" in note for note in model.notes)


# --- sizes ------------------------------------------------------------------------------------------


def test_a_size_the_network_cannot_take_is_refused(lite_file):
    with pytest.raises(
        ModelSpecError, match=r"torchvision:squeezenet1_1 does not take .* 8×8 .*--input-size"
    ):
        resolve_model("torchvision:squeezenet1_1", weights="random:0", input_size=8)


@pytest.mark.parametrize("arguments", [{"num_classes": 1}, {"input_size": 0}])
def test_impossible_numbers(arguments, lite_file):
    with pytest.raises(ModelSpecError, match=r"--num-classes 1|--input-size 0"):
        resolve_model(LITE, weights=lite_file, **arguments)
