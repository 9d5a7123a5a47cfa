"""From what a user writes to a module ready to export."""

import json
import re
import sys
import urllib.error

import numpy as np
import onnx.parser
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tolerances import REFERENCE_TRANSFORM_ATOL
from torch import nn

from pipeline.artifacts import PreprocessSpec
from pipeline.errors import ModelSpecError, UnsupportedError, WeightsError
from pipeline.models import weights as weights_module
from pipeline.models.inception import inception_v3
from pipeline.models.library_preprocess import timm_preprocessing, torchvision_preprocessing
from pipeline.models.lite import inception_resnet_lite
from pipeline.models.resolve import resolve_model
from pipeline.preprocess import normalize, to_network_pixels

LITE = "inception_resnet_lite"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def lite_state(num_classes=5, small_input=True):
    torch.manual_seed(1)
    return inception_resnet_lite(num_classes, small_input=small_input).state_dict()


@pytest.fixture
def lite_file(tmp_path):
    path = tmp_path / "lite.safetensors"
    save_file(lite_state(), path)
    return str(path)


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
    state["stage_b.1.up.weight"][3, 2] = float("nan")
    save_file(state, tmp_path / "nan.safetensors")
    with pytest.raises(WeightsError, match=r"stage_b\.1\.up\.weight \(1 of \d+\)"):
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


@pytest.fixture
def no_hub(tmp_path, monkeypatch):
    """The hub's own offline switch, an empty cache, and no other way out."""
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def unreachable(*_, **__):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)


@pytest.mark.parametrize("spec", ["inception_v4", "timm:resnet18", "torchvision:resnet18"])
def test_pretrained_without_a_network(no_hub, spec):
    with pytest.raises(UnsupportedError, match=r"cannot be fetched.*--weights FILE"):
        resolve_model(spec, weights="pretrained")


def test_pretrained_where_nothing_is_published():
    with pytest.raises(WeightsError, match="no public weights of inception_v2"):
        resolve_model("inception_v2", weights="pretrained")


def test_pretrained_features_are_no_classifier():
    with pytest.raises(WeightsError, match="without a classifier"):
        resolve_model("timm:vit_small_patch14_dinov2", weights="pretrained")


class Donor(nn.Module):
    """What timm would have fetched: our keys, and the auxiliary head that its checkpoint carries."""

    def __init__(self):
        super().__init__()
        self.network = inception_v3(1000)
        self.num_classes = 1000
        self.pretrained_cfg = {
            "architecture": "inception_v3",
            "tag": "gluon_in1k",
            "input_size": (3, 299, 299),
            "num_classes": 1000,
            "mean": (0.485, 0.456, 0.406),
        }

    def state_dict(self):
        return {**self.network.state_dict(), "AuxLogits.fc.weight": torch.zeros(1000, 768)}


def test_pretrained_weights_bring_the_preprocessing_of_their_tag(monkeypatch):
    """Inception-v3's tags differ in their normalization; the network's default would be wrong for this one."""
    timm = pytest.importorskip("timm")
    donor = Donor()
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: donor)
    model = resolve_model("inception_v3", weights="pretrained", input_size=107)
    assert model.preprocess.mean == (0.485, 0.456, 0.406)
    assert model.weights == "pretrained (inception_v3.gluon_in1k of timm)"
    assert len(model.labels) == 1000
    assert torch.equal(model.module.fc.weight, donor.network.fc.weight)
    assert model.reference_transform(photograph()).shape == (3, 107, 107)
    assert any("dropped AuxLogits" in note for note in model.notes)
    assert not any("assumed" in note for note in model.notes)


def test_pretrained_through_timm_s_client(monkeypatch):
    """The hub's part is played here: timm's module, its configuration and its labels go through."""
    timm = pytest.importorskip("timm")
    created = timm.create_model

    def from_cache(name, pretrained=False, **arguments):
        return created(name, **arguments)

    monkeypatch.setattr(timm, "create_model", from_cache)
    model = resolve_model("timm:resnet18", weights="pretrained", input_size=64)
    assert model.num_classes == len(model.labels) == 1000
    assert "goldfish" in model.labels[1]
    assert model.weights == "pretrained (timm resnet18, tag a1_in1k)"
    with pytest.raises(WeightsError, match="have 1000 classes and --num-classes says 10"):
        resolve_model("timm:resnet18", weights="pretrained", num_classes=10)


# --- bundled ----------------------------------------------------------------------------------------


@pytest.fixture
def bundled(tmp_path, monkeypatch):
    monkeypatch.setattr(weights_module, "BUNDLED_DIR", tmp_path)
    half = {k: v.half() if v.is_floating_point() else v for k, v in lite_state(3).items()}
    save_file(half, tmp_path / f"{LITE}.toy.safetensors")
    card = {
        "model": LITE,
        "input_size": 32,
        "num_classes": 3,
        "labels": ["a", "b", "c"],
        "preprocess": {"input_hw": [32, 32], "resize": "squash", "std": [0.2, 0.2, 0.2]},
        "recipe": "modern",
    }
    (tmp_path / f"{LITE}.toy.json").write_text(json.dumps(card))


def test_a_bundled_network_brings_everything(bundled):
    model = resolve_model(f"{LITE}.toy", weights=None)
    assert model.labels == ("a", "b", "c")
    assert model.num_classes == 3
    assert model.preprocess == PreprocessSpec((32, 32), resize="squash", std=(0.2, 0.2, 0.2))
    assert model.weights == f"bundled {LITE}.toy"
    assert model.module.head.weight.dtype == torch.float32


def test_a_bundled_network_keeps_its_stem_at_another_size(bundled):
    model = resolve_model(f"{LITE}.toy", weights=None, input_size=128)
    assert model.preprocess.input_hw == (128, 128)


def test_an_unknown_tag_names_the_known(bundled):
    with pytest.raises(ModelSpecError, match=rf"{LITE}\.toy"):
        resolve_model(f"{LITE}.tox", weights=None)


def test_no_tag_offers_the_tags(bundled):
    with pytest.raises(WeightsError, match=rf"bundled network {LITE}\.toy"):
        resolve_model(LITE, weights=None)


def test_a_tag_and_weights_contradict(bundled):
    with pytest.raises(WeightsError, match="drop one of the two"):
        resolve_model(f"{LITE}.toy", weights="random:0")


def test_trained_weights_are_read_by_the_card_beside_them(tmp_path):
    """Another width, another size, another normalization: none of it is in the weights' names."""
    path = tmp_path / "weights.safetensors"
    torch.manual_seed(1)
    save_file(inception_resnet_lite(3, width=0.5, small_input=True).state_dict(), path)
    card = {
        "model": LITE,
        "width": 0.5,
        "input_size": 40,
        "num_classes": 3,
        "labels": ["a", "b", "c"],
        "preprocess": {"input_hw": [40, 40], "std": [0.2, 0.2, 0.2]},
    }
    (tmp_path / "card.json").write_text(json.dumps(card))
    model = resolve_model(LITE, weights=str(path))
    assert model.labels == ("a", "b", "c")
    assert model.preprocess == PreprocessSpec((40, 40), std=(0.2, 0.2, 0.2))
    assert any("model card beside the weights" in note for note in model.notes)
    with pytest.raises(WeightsError, match="has 3 classes and --num-classes says 4"):
        resolve_model(LITE, weights=str(path), num_classes=4)
    (tmp_path / "card.json").write_text(json.dumps({**card, "num_classes": 2, "labels": ["a", "b"]}))
    with pytest.raises(WeightsError, match="has 3 classes and the model card says 2"):
        resolve_model(LITE, weights=str(path))


# --- factories --------------------------------------------------------------------------------------

FACTORY = """
from torch import nn
import {helper}

def build(num_classes=6):
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(4, num_classes))

def fixed():
    return build()

def required(num_classes):
    return build(num_classes)

def greedy(width, depth):
    return build()

def broken():
    return 1 / 0

def number():
    return 3

def pair():
    class Pair(nn.Module):
        def forward(self, x):
            return x, x
    return Pair()

def binary():
    return build(1)

def segmenter():
    return nn.Conv2d(3, 2, 1)

def declared():
    module = build()
    module.edgefold_preprocess = {preprocess}
    return module

net = build()
"""


@pytest.fixture
def factory_file(tmp_path):
    helper = f"helper_{tmp_path.name}"
    (tmp_path / f"{helper}.py").write_text("")
    path = tmp_path / "my model.py"
    path.write_text(FACTORY.format(helper=helper, preprocess={"input_hw": [40, 40], "color": "BGR"}))
    return path


def test_a_factory_s_own_weights_are_accepted_with_a_note(factory_file):
    path_before = list(sys.path)
    model = resolve_model(f"{factory_file}:build", weights=None, input_size=48)
    assert model.num_classes == 6
    assert model.weights == "as built by the factory"
    assert model.name == "my model:build"
    notes = "\n".join(model.notes)
    assert "those the factory gave" in notes
    assert (
        "assumed, not known (ImageNet defaults): shorter resize, bilinear, crop fraction 0.875 to 48×48"
        in notes
    )
    assert sys.path == path_before


def test_a_factory_takes_the_class_count(factory_file):
    assert resolve_model(f"{factory_file}:build", weights=None, num_classes=9).num_classes == 9
    assert resolve_model(f"{factory_file}:required", weights="random:1", num_classes=9).num_classes == 9
    with pytest.raises(ModelSpecError, match="fixed has 6 outputs and --num-classes says 9"):
        resolve_model(f"{factory_file}:fixed", weights=None, num_classes=9)
    with pytest.raises(ModelSpecError, match="requires num_classes: give --num-classes"):
        resolve_model(f"{factory_file}:required", weights=None)


def test_a_factory_with_a_weights_file(factory_file, tmp_path):
    trained = resolve_model(f"{factory_file}:build", weights="random:1", num_classes=11).module
    torch.save({"state_dict": trained.state_dict()}, tmp_path / "trained.pth")
    model = resolve_model(f"{factory_file}:build", weights=str(tmp_path / "trained.pth"))
    assert model.num_classes == 11
    assert torch.equal(model.module[4].weight, trained[4].weight)
    with pytest.raises(WeightsError, match=r"2 misshapen: 4\.weight \(file 11×4, model 6×4\)"):
        resolve_model(f"{factory_file}:fixed", weights=str(tmp_path / "trained.pth"))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("biuld", r"'biuld' is not in the file.*build, fixed"),
        ("net", "is a Sequential, not a function"),
        ("greedy", "requires width, depth"),
        ("broken", r"broken raised ZeroDivisionError: division by zero \(my model\.py, line 19\)"),
        ("number", "returned int; it must return an nn.Module"),
        ("pair", "returns tuple; wrap it"),
        ("binary", r"returns shape \(1, 1\).*at least 2 classes"),
        ("segmenter", r"returns shape \(1, 2, 224, 224\)"),
    ],
)
def test_a_factory_that_is_none(factory_file, name, said):
    with pytest.raises(ModelSpecError, match=said):
        resolve_model(f"{factory_file}:{name}", weights=None)


def test_a_factory_declares_its_preprocessing(factory_file):
    model = resolve_model(f"{factory_file}:declared", weights=None)
    assert model.preprocess == PreprocessSpec((40, 40), color="BGR")
    assert model.preprocess_source == "edgefold_preprocess of my model.py"
    assert not any("assumed" in note for note in model.notes)


def test_a_factory_s_declaration_is_checked(factory_file):
    factory_file.write_text(factory_file.read_text() + "edgefold_preprocess = {'inptu_hw': [1, 1]}\n")
    with pytest.raises(ModelSpecError, match=r"(?s)edgefold_preprocess of .*inptu_hw"):
        resolve_model(f"{factory_file}:build", weights=None)


def test_a_file_that_raises(tmp_path):
    path = tmp_path / "model.py"
    path.write_text("import not_there_at_all\n")
    with pytest.raises(ModelSpecError, match=r"ModuleNotFoundError.*not_there_at_all.*model\.py, line 1"):
        resolve_model(f"{path}:build", weights=None)
    with pytest.raises(ModelSpecError, match="no such file"):
        resolve_model(f"{tmp_path}/other.py:build", weights=None)
    with pytest.raises(ModelSpecError, match=r"write .*model\.py:FACTORY"):
        resolve_model(str(path), weights=None)


def test_two_files_of_one_name_are_two_modules(tmp_path):
    for folder, classes in (("one", 2), ("two", 3)):
        (tmp_path / folder).mkdir()
        source = f"from torch import nn\ndef build():\n    return nn.Sequential(nn.Flatten(), nn.Linear(12, {classes}))\n"
        (tmp_path / folder / "model.py").write_text(source)
    counts = [
        resolve_model(f"{tmp_path}/{folder}/model.py:build", weights=None, input_size=2).num_classes
        for folder in ("one", "two", "one")
    ]
    assert counts == [2, 3, 2]


# --- preprocessing ----------------------------------------------------------------------------------


def test_a_preprocess_file_overrides_the_model(tmp_path, lite_file):
    file = tmp_path / "preprocess.json"
    file.write_text(json.dumps({"input_hw": [48, 48], "mean": [0.1, 0.2, 0.3], "color": "BGR"}))
    model = resolve_model(LITE, weights=lite_file, preprocess_file=file)
    assert model.preprocess == PreprocessSpec((48, 48), mean=(0.1, 0.2, 0.3), color="BGR")
    assert model.preprocess_source == str(file)
    with pytest.raises(ModelSpecError, match=r"--input-size 32 and input_hw 48×48 .* disagree"):
        resolve_model(LITE, weights=lite_file, input_size=32, preprocess_file=file)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "not a JSON object"),
        ('{"mean": [0, 0, 0]}', "input_hw"),
        ('{"input_hw": [32, 32], "sdt": [1, 1, 1]}', "sdt"),
        ('{"input_hw": [32, 32], "std": [1, 0, 1]}', "no std 0"),
        ('{"input_hw": [0, 32]}', "sizes must be positive"),
        ('{"input_hw": [32, 32], "crop_fraction": 1.5}', "at most 1"),
        ('{"input_hw": [32, 32], "interpolation": "cubic"}', "interpolation"),
    ],
)
def test_a_preprocess_file_is_strict(tmp_path, lite_file, content, said):
    file = tmp_path / "preprocess.json"
    file.write_text(content)
    with pytest.raises(ModelSpecError, match=said):
        resolve_model(LITE, weights=lite_file, preprocess_file=file)


def photograph():
    """An odd-sized picture with detail at every scale."""
    rng = np.random.default_rng(4)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 13, 3), dtype=np.uint8)).resize((341, 227))
    grain = rng.integers(-40, 41, (227, 341, 3))
    return Image.fromarray(np.clip(np.asarray(coarse) + grain, 0, 255).astype(np.uint8))


def ours(spec, image):
    pixels = to_network_pixels(np.asarray(image), "RGB", spec, "RGB")
    return normalize(pixels[None], spec, "RGB")[0]


def with_config(**config):
    """What `timm_preprocessing` reads of a timm module, without building one."""
    module = nn.Identity()
    module.pretrained_cfg = {"architecture": "toy", "input_size": (3, 160, 160), **config}
    return module


@pytest.mark.parametrize(
    "config",
    [
        {"crop_pct": 0.875, "interpolation": "bicubic"},
        {"crop_pct": 0.95, "interpolation": "bilinear", "mean": (0.5, 0.5, 0.5)},
        {"crop_pct": 1.0, "interpolation": "bicubic", "crop_mode": "squash"},
        {"crop_pct": 0.9, "interpolation": "bilinear", "crop_mode": "squash"},
        {"crop_pct": 0.9, "interpolation": "bicubic", "input_size": (3, 160, 96)},
    ],
)
@pytest.mark.parametrize("input_size", [None, 99])
def test_timm_s_own_transform_gives_the_same_input(config, input_size):
    preprocessing = timm_preprocessing(with_config(**config), input_size)
    if input_size is not None:
        assert preprocessing.spec.input_hw == (99, 99)
    expected = preprocessing.reference(photograph())
    assert expected.dtype == np.float32
    np.testing.assert_allclose(
        ours(preprocessing.spec, photograph()), expected, rtol=0, atol=REFERENCE_TRANSFORM_ATOL
    )


@pytest.mark.parametrize("config", [{"crop_mode": "border"}, {"interpolation": "hamming"}])
def test_timm_preprocessing_that_cannot_be_expressed_is_refused(config):
    with pytest.raises(ModelSpecError, match=r"not supported.*--preprocess FILE"):
        timm_preprocessing(with_config(**config), None)


@pytest.mark.parametrize(
    ("name", "transform_input"), [("resnet50", False), ("inception_v3", True), ("efficientnet_b0", False)]
)
@pytest.mark.parametrize("input_size", [None, 99])
def test_torchvision_s_own_transform_gives_the_same_input(name, transform_input, input_size):
    models = pytest.importorskip("torchvision").models
    weights = models.get_model_weights(name).DEFAULT
    preprocessing = torchvision_preprocessing(name, weights, input_size, transform_input)
    np.testing.assert_allclose(
        ours(preprocessing.spec, photograph()),
        preprocessing.reference(photograph()),
        rtol=0,
        atol=REFERENCE_TRANSFORM_ATOL,
    )


def test_torchvision_s_inner_normalization_is_moved_to_the_pixels():
    """Loaded naively, torchvision's Inception-v3 would be fed another normalization than it was trained on."""
    models = pytest.importorskip("torchvision").models
    weights = models.get_model_weights("inception_v3").DEFAULT
    with torch.device("meta"):
        theirs = models.Inception3(transform_input=True, init_weights=False, aux_logits=False)
    image = photograph()
    by_them = theirs._transform_input(weights.transforms()(image)[None])[0].numpy()
    spec = torchvision_preprocessing("inception_v3", weights, None, transform_input=True).spec
    np.testing.assert_allclose(ours(spec, image), by_them, rtol=0, atol=REFERENCE_TRANSFORM_ATOL)
    naive = torchvision_preprocessing("inception_v3", weights, None, transform_input=False).spec
    assert np.abs(ours(naive, image) - by_them).max() > 0.5


def test_a_library_model_brings_its_preprocessing_and_transform():
    model = resolve_model("torchvision:squeezenet1_1", weights="random:0", input_size=64)
    assert model.preprocess.input_hw == (64, 64)
    assert "SqueezeNet1_1_Weights.IMAGENET1K_V1" in model.preprocess_source
    assert model.reference_transform(photograph()).shape == (3, 64, 64)


def test_a_vision_transformer_is_built_for_another_size():
    model = resolve_model("timm:test_vit", weights="random:0", input_size=96)
    assert model.preprocess.input_hw == (96, 96)


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


# --- ONNX -------------------------------------------------------------------------------------------


@pytest.fixture
def onnx_file(tmp_path):
    def write(shape="N, 3, 32, 32", classes="4", dtype="float", perm="0, 1, 2, 3"):
        text = f"""
            <ir_version: 10, opset_import: ["" : 18]>
            toy ({dtype}[{shape}] image) => ({dtype}[N, {classes}] logits)
            <int64[2] axes = {{2, 3}}>
            {{
                t = Transpose <perm = [{perm}]> (image)
                pooled = ReduceMean <keepdims = 0> (t, axes)
                logits = Concat <axis = 1> (pooled, pooled)
            }}"""
        path = tmp_path / "toy.onnx"
        path.write_bytes(onnx.parser.parse_model(text).SerializeToString())
        return str(path)

    return write


def test_an_onnx_file_says_its_size_and_classes(onnx_file):
    path = onnx_file(classes="6")
    model = resolve_model(path, weights=None)
    assert (model.module, str(model.onnx_path), model.name) == (None, path, "toy")
    assert (model.num_classes, model.preprocess.input_hw) == (6, (32, 32))
    assert model.preprocess.layout == "NCHW"
    assert len(model.weights_sha256) == 64
    assert any("preprocessing is assumed" in note for note in model.notes)


def test_an_onnx_file_in_nhwc(onnx_file, tmp_path):
    path = onnx_file(shape="1, 32, 48, 3", perm="0, 3, 1, 2")
    assert resolve_model(path, weights=None).preprocess.input_hw == (32, 48)
    file = tmp_path / "preprocess.json"
    file.write_text('{"input_hw": [32, 48]}')
    assert resolve_model(path, weights=None, preprocess_file=file).preprocess.layout == "NHWC"


def test_an_onnx_file_of_any_size_needs_one(onnx_file):
    path = onnx_file(shape="N, 3, H, W", classes="C")
    with pytest.raises(ModelSpecError, match=r"any size .*--input-size N"):
        resolve_model(path, weights=None)
    with pytest.raises(ModelSpecError, match=r"class count .*--num-classes N"):
        resolve_model(path, weights=None, input_size=64)
    assert resolve_model(path, weights=None, input_size=64, num_classes=4).preprocess.input_hw == (64, 64)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"input_size": 64}, "takes 32×32 pixels, and 64×64"),
        ({"num_classes": 5}, "has 4 outputs and --num-classes says 5"),
        ({"weights": "random:0"}, "holds its own weights"),
    ],
)
def test_what_contradicts_an_onnx_file(onnx_file, arguments, said):
    with pytest.raises((ModelSpecError, WeightsError), match=said):
        resolve_model(onnx_file(), **{"weights": None, **arguments})


@pytest.mark.parametrize(
    ("fields", "said"),
    [({"dtype": "float16"}, "float16"), ({"shape": "N, 1, 32, 32"}, r"\(N, 3, H, W\)")],
)
def test_an_onnx_input_that_is_no_float_image(onnx_file, fields, said):
    with pytest.raises(ModelSpecError, match=said):
        resolve_model(onnx_file(**fields), weights=None)


def test_a_file_that_is_no_onnx(tmp_path):
    path = tmp_path / "x.onnx"
    with pytest.raises(ModelSpecError, match="no such file"):
        resolve_model(str(path), weights=None)
    path.write_bytes(b"not a model")
    with pytest.raises(ModelSpecError, match="not an ONNX model"):
        resolve_model(str(path), weights=None)
