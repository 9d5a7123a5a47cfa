"""Weights that somebody published: a hub's, and those that come with the package."""

import json
import urllib.error

import numpy as np
import pytest
import torch
from lite_weights import lite_state
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from pipeline.artifacts import PreprocessSpec
from pipeline.errors import ModelSpecError, UnsupportedError, WeightsError
from pipeline.models import weights as weights_module
from pipeline.models.inception import inception_v3
from pipeline.models.lite import inception_resnet_lite
from pipeline.models.resolve import resolve_model

LITE = "inception_resnet_lite"


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


def photograph():
    """An odd-sized picture with detail at every scale."""
    rng = np.random.default_rng(4)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 13, 3), dtype=np.uint8)).resize((341, 227))
    grain = rng.integers(-40, 41, (227, 341, 3))
    return Image.fromarray(np.clip(np.asarray(coarse) + grain, 0, 255).astype(np.uint8))


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
