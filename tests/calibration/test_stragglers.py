"""The noise of each layer from histograms and weights, against the noise that is really there."""

from __future__ import annotations

import numpy as np
import pytest
from onnx_text import onnx_model, weight
from tolerances import LAYER_NOISE_DB

from calibration.observers import TensorObserver
from calibration.placement.tensorrt import place
from calibration.qdq import activation_params
from calibration.qparams import dequantize, per_channel_int8, quantize
from calibration.stragglers import MAX_MAC_SHARE, LayerNoise, layer_noise, stragglers
from pipeline.artifacts import TensorRange, TensorStatistics
from pipeline.metrics import sqnr_db
from pipeline.passes.center_pixels import center_pixels

RNG = np.random.default_rng(0)


def statistics(**tensors):
    observers = {}
    for name, values in tensors.items():
        observers[name] = TensorObserver(name)
        values = values.astype(np.float32)
        observers[name].update(values.min(keepdims=True), values.max(keepdims=True), values)
    return TensorStatistics(
        {name: seen.low for name, seen in observers.items()},
        {name: seen.high for name, seen in observers.items()},
        {name: seen.histogram for name, seen in observers.items()},
        1, "d", "m", "p",
    )  # fmt: skip


@pytest.mark.parametrize("high", [3.0, 8.0, 40.0], ids=["clipped", "fitting", "coarse"])
def test_the_estimate_is_the_noise_of_the_layer_itself(high):
    """A 1×1 convolution of independent inputs, quantized for real."""
    w = weight(32, 64, 1, 1)
    model = onnx_model("g (float[N,64,4,4] x) => (float[N,32,4,4] y) { y = Conv(x, w) }", w=w)
    x = RNG.standard_normal((2000, 64)).astype(np.float32)
    placement = place(model, remainder="float32")
    ranges = {"x": TensorRange(-high, high)}
    (entry,) = layer_noise(model.graph, placement, ranges, statistics(x=x))
    grid = activation_params(placement.activations[0], placement, ranges)
    params = per_channel_int8(w.astype(np.float32), 0)
    w_int8 = dequantize(quantize(w.astype(np.float32), params), params)
    real = x @ w[:, :, 0, 0].T
    int8 = dequantize(quantize(x, grid), grid) @ w_int8[:, :, 0, 0].T
    assert entry.sqnr_db == pytest.approx(sqnr_db(real, int8), abs=LAYER_NOISE_DB)
    assert (entry.layer, entry.macs) == ("y", 32 * 64 * 16)


def test_a_concat_mixes_what_it_is_made_of():
    graph_text = """g (float[N,16,4,4] x) => (float[N,16,4,4] y)
        { a = Conv(x, u) b = Conv(x, v) t = Concat<axis=1>(a, b) y = Conv(t, w) }"""
    weights = {"u": weight(48, 16, 1, 1), "v": weight(16, 16, 1, 1), "w": weight(16, 64, 1, 1)}
    model = onnx_model(graph_text, **weights)
    placement = place(model, remainder="float32")
    small, large = RNG.standard_normal(4096) / 8, RNG.standard_normal(4096)
    seen = statistics(x=large, a=small, b=large)
    ranges = {name: TensorRange(-4.0, 4.0) for name in ("x", "a", "b")}
    noise = {entry.layer: entry for entry in layer_noise(model.graph, placement, ranges, seen)}
    step = 4.0 / 127
    signal = 0.75 * np.mean(small**2) + 0.25 * np.mean(large**2)
    assert noise["y"].nsr == pytest.approx(step**2 / 12 / signal, rel=0.2)  # the weight adds some 5%


def test_exact_pixels_leave_the_noise_of_the_weight_alone():
    weights = RNG.integers(-127, 128, (16, 3, 3, 3))
    weights[:, 0, 0, 0] = 127  # on the int8 grid of scale 1
    model = onnx_model(
        """g (uint8[N,8,8,3] image) => (float[N,16,6,6] y)
        { i = Transpose<perm=[0,3,1,2]>(image) x = Cast<to=1>(i) y = Conv(x, w) }""",
        w=weights / 1.0,
    )
    center_pixels(model)
    (entry,) = layer_noise(model.graph, place(model), {}, statistics())
    assert entry.nsr == 0.0
    assert entry.sqnr_db == np.inf


def made(*nsr_and_macs):
    return tuple(LayerNoise(f"layer{i}", nsr, macs) for i, (nsr, macs) in enumerate(nsr_and_macs))


def test_the_worst_are_taken_until_half_the_noise_is_gone():
    noise = made((1.0, 10), (20.0, 10), (1.0, 970), (9.0, 10), (8.0, 10))
    # 39 in all: layer1 alone takes 20, more than half; layer3 would be next.
    assert [entry.layer for entry in stragglers(noise)] == ["layer1"]
    noise = made((1.0, 10), (10.0, 10), (1.0, 970), (9.0, 10), (1.0, 10), (8.0, 10))
    assert [entry.layer for entry in stragglers(noise)] == ["layer1", "layer3"]


def test_a_layer_too_expensive_is_passed_over():
    share = int(100 * MAX_MAC_SHARE)
    noise = made((50.0, share + 1), (40.0, share), (1.0, 99 - 2 * share), (1.0, 0), (1.0, 0))
    assert [entry.layer for entry in stragglers(noise)] == ["layer1"]


def test_layers_all_alike_have_no_stragglers():
    assert stragglers(made(*[(1.0 + i / 10, 10) for i in range(10)])) == ()
    assert stragglers(()) == ()
