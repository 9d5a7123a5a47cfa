"""The edge network and the weights bundled with it."""

from __future__ import annotations

import json

import pytest
import torch

from pipeline.models.lite import inception_resnet_lite
from pipeline.models.resolve import resolve_model
from pipeline.models.weights import BUNDLED_DIR
from pipeline.synthetic import CLASS_NAMES


def parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("num_classes", [10, 1000])
def test_at_most_two_and_a_half_million_parameters(num_classes: int) -> None:
    assert parameters(inception_resnet_lite(num_classes)) <= 2_500_000


def test_the_width_multiplier_scales_it() -> None:
    sizes = [parameters(inception_resnet_lite(10, width=w)) for w in (0.5, 1.0, 1.5)]
    assert sizes[0] < sizes[1] / 2
    assert sizes[2] > 1.8 * sizes[1]


@pytest.mark.parametrize(
    ("side", "small"), [(32, True), (79, False), (96, False), (151, False), (299, False)]
)
def test_input_sizes(side: int, small: bool) -> None:
    model = inception_resnet_lite(7, small_input=small).eval()
    with torch.inference_mode():
        assert model(torch.zeros(1, 3, side, side)).shape == (1, 7)


def test_the_first_convolution_has_no_padding() -> None:
    # So that mean, std and channel order fold into it exactly.
    for small in (False, True):
        assert inception_resnet_lite(7, small_input=small).stem[0].conv.padding == (0, 0)


@pytest.mark.parametrize(("tag", "n_classes", "side"), [("signs", 12, 96), ("cifar10", 10, 32)])
def test_bundled_weights_are_small_and_have_a_card(tag: str, n_classes: int, side: int) -> None:
    model = resolve_model(f"inception_resnet_lite.{tag}", weights=None)
    assert model.num_classes == len(model.labels) == n_classes
    assert model.preprocess.input_hw == (side, side)
    card = json.loads((BUNDLED_DIR / f"inception_resnet_lite.{tag}.json").read_text())
    assert {"data", "recipe", "command", "accuracy"} <= set(card)
    assert (BUNDLED_DIR / f"inception_resnet_lite.{tag}.safetensors").stat().st_size < 5_000_000


def test_the_signs_network_knows_the_cameras_classes() -> None:
    assert resolve_model("inception_resnet_lite.signs", weights=None).labels == CLASS_NAMES
