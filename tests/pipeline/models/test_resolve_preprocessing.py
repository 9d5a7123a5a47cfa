"""The preprocessing that comes with a model, against the libraries' own transforms."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tolerances import REFERENCE_TRANSFORM_ATOL
from torch import nn

from pipeline.artifacts import PreprocessSpec
from pipeline.errors import ModelSpecError
from pipeline.models.library_preprocess import timm_preprocessing, torchvision_preprocessing
from pipeline.models.resolve import resolve_model
from pipeline.preprocess import normalize, to_network_pixels

LITE = "inception_resnet_lite"


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
