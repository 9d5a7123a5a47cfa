"""What is corrected unasked: decided by the sizes of the layers and the number of images."""

from __future__ import annotations

import pytest
from onnx_text import onnx_model, weight

from calibration.correction import choice as choice_module
from calibration.correction.choice import choose_corrections, estimate_rounding_seconds
from calibration.placement import PLACEMENTS


def convolution(n_in=16, n_out=32, kernel=3, groups=1):
    size = 8 + kernel - 1
    model = onnx_model(
        f"""g (float[N,{n_in},{size},{size}] x) => (float[N,{n_out},8,8] y)
            {{ r = Relu(x) y = Conv<group={groups}>(r, w) }}""",
        w=weight(n_out, n_in // groups, kernel, kernel),
    )
    return model, PLACEMENTS["cpu"](model)


def estimate(n_images=100, **sizes):
    return estimate_rounding_seconds(*convolution(**sizes), n_images)


def test_the_estimate_is_the_arithmetic_of_one_layer():
    k, o, positions = 16 * 9, 32, 20_000
    sums = 2 * positions * k * (k + o)
    solving = 3 * (k**3 / 3 + 2 * k * k * o) + 4 / 3 * k**3 + 6 * k * k * o
    network = o * k * 8 * 8
    expected = sums / 100e9 + solving / 20e9 + 2 * 100 * network / 50e9 + 2 * 0.05
    assert estimate() == pytest.approx(expected)


def test_it_grows_with_images_and_layers_and_less_with_groups():
    assert estimate(n_images=200) > estimate(n_images=100)
    assert estimate(n_in=256) > estimate(n_in=128)
    assert estimate(n_in=32, groups=32) < estimate(n_in=32)


def test_a_layer_too_wide_to_be_solved_for_costs_no_solving():
    wide = estimate(n_in=600)  # sums 5,400 products, above 4,608
    assert wide < estimate(n_in=512)
    assert wide > 0.1


def test_bias_always_and_rounding_below_the_limit(monkeypatch):
    model, placement = convolution()
    chosen = choose_corrections(model, placement, 100)
    assert chosen.corrections == {"bias", "adaround"}
    assert [name for name, _ in chosen.left_out] == ["equalize", "ranges"]
    monkeypatch.setattr(choice_module, "LIMIT_SECONDS", 0.1)
    cheap = choose_corrections(model, placement, 100)
    assert cheap.corrections == {"bias"}
    reasons = dict(cheap.left_out)
    assert reasons.keys() == {"equalize", "ranges", "adaround"}
    assert "estimated at 0 s on two cores" in reasons["adaround"]
    assert "--corrections bias,adaround" in reasons["adaround"]
