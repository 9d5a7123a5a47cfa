"""The roofline against arithmetic done by hand, its bounds on any network, and ResNet-50 as others measured it."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx_text import onnx_model, weight
from qdq_nets import QdqNet

from benchmarks.published import PUBLISHED
from engines.tensorrt import estimate as estimating
from engines.tensorrt.estimate import (
    COMPUTE_EFFICIENCY,
    MAX_RATIO,
    MEMORY_EFFICIENCY,
    OVERHEAD_US,
    Gemm,
    assume_precision,
    estimate,
    estimate_layers,
)
from engines.tensorrt.layers import FusedLayer
from pipeline.errors import UnsupportedError
from pipeline.targets import Peaks, Target, find_target

DEVICE = dataclasses.replace(
    find_target("jetson-agx-orin"), peaks=Peaks(100, 50, 200, dla_int8_tops=40), sm_count=10, l2_mib=1
)
"""Round figures: 10 TOPS a multiprocessor."""


def _conv(name: str, gemm: Gemm, area: int = 1, precision: str = "int8", identity: int = 0) -> FusedLayer:
    """A convolution of int8 tensors."""
    k = gemm.channels * area
    return FusedLayer(
        name, "conv", (name,), precision, gemm.m * gemm.n * k, gemm.m * gemm.channels * gemm.groups + identity,
        gemm.n * k, gemm.m * gemm.n, "",
    )  # fmt: skip


def _one(gemm: Gemm, target: Target = DEVICE, **options):
    layer = _conv("c", gemm)
    (done,) = estimate_layers((layer,), {"c": gemm}, target, **options).layers
    return layer, done


def test_a_compute_bound_layer_by_hand() -> None:
    # 640 tiles of 64×64 fill 64 waves of ten; 4096 products an output outweigh its memory
    gemm = Gemm(m=64 * 64, n=64 * 10, channels=4096)
    layer, done = _one(gemm)
    assert done.bound == "compute"
    assert done.tensor_utilization == 1.0
    seconds = 2 * layer.macs / 100e12
    for got, efficiency, overhead in zip(
        (done.low_us, done.high_us), COMPUTE_EFFICIENCY, OVERHEAD_US, strict=True
    ):
        assert got == pytest.approx(seconds / efficiency * 1e6 + overhead)


def test_a_memory_bound_layer_by_hand() -> None:
    pool = FusedLayer("p", "pool", ("p",), "int8", 0, 30_000_000, 0, 10_000_000, "")
    (done,) = estimate_layers((pool,), {}, DEVICE).layers
    assert done.bound == "memory"
    assert done.memory_bytes == 40_000_000
    seconds = 40e6 / 200e9
    for got, efficiency, overhead in zip(
        (done.low_us, done.high_us), MEMORY_EFFICIENCY, OVERHEAD_US, strict=True
    ):
        assert got == pytest.approx(seconds / efficiency * 1e6 + overhead)


def test_activations_that_fit_the_cache_do_not_count_until_the_batch_outgrows_it() -> None:
    gemm = Gemm(m=512, n=64, channels=64)  # 64 KiB of activations
    layer, alone = _one(gemm)
    assert alone.memory_bytes == layer.weight_bytes
    _, many = _one(gemm, batch=17)
    assert many.memory_bytes == layer.weight_bytes + 17 * (layer.input_bytes + layer.output_bytes)
    no_cache = dataclasses.replace(DEVICE, l2_mib=None)
    assert _one(gemm, no_cache)[1].memory_bytes == layer.weight_bytes + layer.input_bytes + layer.output_bytes


@pytest.mark.parametrize(
    ("gemm", "expected"),
    [
        (Gemm(640, 64, 64), 1.0),  # ten tiles, ten multiprocessors
        (Gemm(64, 64, 64), 0.1),  # one of ten
        (Gemm(704, 64, 64), 0.55),  # eleven: a second wave for one
        (Gemm(49, 640, 64), 49 / 64),  # half-filled tiles
        (Gemm(640, 64, 48), 0.75),  # 48 channels take the room of 64
        (Gemm(640, 64, 3), 0.75),  # packed by four
        (Gemm(320, 128, 32, groups=2), 1.0),
        (Gemm(320, 128, 1, groups=128), 1 / 16),  # depthwise
    ],
)
def test_what_padding_and_waves_leave_of_the_peak(gemm, expected) -> None:
    assert _one(gemm)[1].tensor_utilization == pytest.approx(expected)


def test_a_batch_fills_the_waves() -> None:
    gemm = Gemm(64, 64, 64)
    assert _one(gemm, batch=10)[1].tensor_utilization == pytest.approx(1.0)
    assert _one(gemm, batch=10)[1].high_us < 10 * _one(gemm)[1].high_us


def test_turing_has_larger_tiles() -> None:
    turing = dataclasses.replace(DEVICE, sm=75)
    assert _one(Gemm(640, 64, 64), turing)[1].tensor_utilization == pytest.approx(0.5)


def test_fp16_channels_are_padded_by_eight() -> None:
    gemm = Gemm(640, 64, 24)
    layer = _conv("c", gemm, precision="fp16")
    (done,) = estimate_layers((layer,), {"c": gemm}, DEVICE).layers
    assert done.tensor_utilization == 1.0
    assert _one(gemm)[1].tensor_utilization == pytest.approx(0.75)


def test_dla_is_one_core_without_tiles() -> None:
    gemm = Gemm(64, 64, 4096)
    layer, done = _one(gemm, engine="dla")
    assert done.tensor_utilization == 1.0
    assert done.low_us == pytest.approx(
        max(2 * layer.macs / 20e12 / COMPUTE_EFFICIENCY[0], (layer.weight_bytes + layer.input_bytes + layer.output_bytes) / 200e9)
        * 1e6
        + OVERHEAD_US[0]
    )  # fmt: skip


def test_a_noop_costs_nothing() -> None:
    noop = FusedLayer("r", "noop", ("r",), "int8", 0, 0, 0, 0, "")
    assert estimate_layers((noop,), {}, DEVICE).layers == ()


def test_assuming_a_precision_scales_the_bytes() -> None:
    layer = FusedLayer("c", "conv", ("c",), "fp32", 100, 400, 800, 40, "")
    (int8,) = assume_precision((layer,), "int8")
    assert (int8.precision, int8.input_bytes, int8.weight_bytes, int8.output_bytes) == ("int8", 100, 200, 10)
    assert assume_precision((int8,), "fp32") == (layer,)


def test_what_no_source_gives_is_not_made_up() -> None:
    layers, gemms = (_conv("c", Gemm(64, 64, 64)),), {"c": Gemm(64, 64, 64)}
    with pytest.raises(UnsupportedError, match="no source gives the int8 peak of dgx-spark"):
        estimate_layers(layers, gemms, find_target("dgx-spark"))
    with pytest.raises(UnsupportedError, match="no source gives the int8 peak of jetson-thor-t5000"):
        estimate_layers(layers, gemms, find_target("jetson-thor"))
    assert estimate_layers(assume_precision(layers, "fp16"), gemms, find_target("jetson-thor")).low_ms > 0
    with pytest.raises(UnsupportedError, match="no fp16 rate of jetson-agx-orin-64gb's DLA"):
        estimate_layers(assume_precision(layers, "fp16"), gemms, find_target("jetson-agx-orin"), engine="dla")


def test_what_the_device_lacks() -> None:
    with pytest.raises(UnsupportedError, match="edgefold bench"):
        estimate_layers((), {}, find_target("cpu"))
    with pytest.raises(UnsupportedError, match="l4 has no DLA"):
        estimate_layers((), {}, find_target("l4"), engine="dla")
    with pytest.raises(UnsupportedError, match="l4 has no Super mode"):
        estimate_layers((), {}, find_target("l4"), super_mode=True)


def test_super_mode_is_faster() -> None:
    layers, gemms = (_conv("c", Gemm(6400, 640, 640)),), {"c": Gemm(6400, 640, 640)}
    orin = find_target("jetson-orin-nx")
    assert (
        estimate_layers(layers, gemms, orin, super_mode=True).high_ms
        < estimate_layers(layers, gemms, orin).high_ms
    )


_GEMMS = st.builds(
    Gemm, m=st.integers(1, 5000), n=st.integers(1, 600), channels=st.integers(1, 600), groups=st.just(1)
)


@given(
    gemms=st.lists(_GEMMS, min_size=1, max_size=6),
    batch=st.integers(1, 64),
    name=st.sampled_from(["l4", "t4", "jetson-orin-nx", "h100"]),
)
def test_no_range_is_wider_than_promised_and_more_work_takes_longer(gemms, batch, name) -> None:
    shapes = {f"c{i}": gemm for i, gemm in enumerate(gemms)}
    layers = tuple(_conv(node, gemm) for node, gemm in shapes.items())
    done = estimate_layers(layers, shapes, find_target(name), batch=batch)
    assert 0 < done.low_ms <= done.high_ms <= MAX_RATIO * done.low_ms * (1 + 1e-9)
    assert done.images_per_s[0] <= done.images_per_s[1]
    assert all(0 < layer.tensor_utilization <= 1 for layer in done.layers)
    twice = estimate_layers(layers, shapes, find_target(name), batch=2 * batch)
    assert twice.high_ms >= done.high_ms


def test_the_constants_keep_the_promise() -> None:
    for better, worse in (COMPUTE_EFFICIENCY, MEMORY_EFFICIENCY, OVERHEAD_US):
        assert max(better, worse) / min(better, worse) <= MAX_RATIO


def test_shapes_come_from_the_graph() -> None:
    model = onnx_model(
        """agraph (float[N,8,14,14] x) => (float[N,5] z) {
            c = Conv <kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1], group=2> (x, w)
            p = GlobalAveragePool (c) f = Flatten (p) z = Gemm <transB=1> (f, h) }""",
        w=weight(12, 4, 3, 3),
        h=weight(5, 12),
    )
    shapes = estimating._gemms(model)
    assert list(shapes.values()) == [Gemm(49, 12, 4, 2), Gemm(1, 5, 12)]


def test_a_quantized_graph_is_estimated_in_its_own_precisions() -> None:
    net = QdqNet(channels=64, size=16)
    hidden = net.op("Relu", net.conv(net.qdq("x", 0.1), 64, 3, name="Conv_a"))
    model = net.model(net.conv(net.qdq(hidden, 0.1), 64, 3, name="Conv_b"))
    done = estimate(model, find_target("jetson-agx-orin"))
    convs = [layer for layer in done.layers if layer.kind == "conv"]
    assert [layer.precision for layer in convs] == ["int8", "int8"]
    assert all(layer.tensor_utilization < 1 for layer in convs), "their shapes were found in the graph"
    half = estimate(model, find_target("jetson-agx-orin"), precision="fp16")
    assert {layer.precision for layer in half.layers} == {"fp16"}
    assert any("0.32 to 0.75" in words for words in done.assumptions)


def _resnet50() -> tuple[tuple[FusedLayer, ...], dict[str, Gemm]]:
    """ResNet-50 v1.5 at 224×224, fused and in int8, from the table of its paper."""
    layers: list[FusedLayer] = []
    shapes: dict[str, Gemm] = {}

    def conv(
        side: int, channels: int, out: int, area: int = 1, stride: int = 1, identity: bool = False
    ) -> None:
        name = f"conv{len(layers)}"
        gemm = Gemm((side // stride) ** 2, out, channels)
        shapes[name] = gemm
        layer = _conv(name, gemm, area, identity=gemm.m * out if identity else 0)
        layers.append(
            dataclasses.replace(layer, input_bytes=layer.input_bytes + (side**2 - gemm.m) * channels)
        )

    conv(224, 3, 64, 49, 2)
    layers.append(FusedLayer("pool", "pool", ("pool",), "int8", 0, 64 * 112**2, 0, 64 * 56**2, ""))
    side, channels = 56, 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            stride = 2 if block == 0 and width > 64 else 1
            conv(side, channels, width)
            conv(side, width, width, 9, stride)
            if block == 0:
                conv(side, channels, 4 * width, 1, stride)
            side //= stride
            conv(side, width, 4 * width, identity=True)
            channels = 4 * width
    layers.append(FusedLayer("mean", "reduce", ("mean",), "int8", 0, 2048 * 49, 0, 2048, ""))
    conv(1, 2048, 1000)
    return tuple(layers), shapes


def test_the_table_is_resnet50() -> None:
    layers, _ = _resnet50()
    assert sum(layer.macs for layer in layers) == 4_089_184_256
    assert sum(layer.weight_bytes for layer in layers) == 25_502_912


_RESNET_FIGURES = [figure for figure in PUBLISHED if figure.network == "resnet50"]


@pytest.mark.parametrize("figure", _RESNET_FIGURES, ids=lambda f: f"{f.target} {f.what} {f.gpu_batch}")
def test_published_figures_of_resnet50_lie_inside(figure) -> None:
    layers, shapes = _resnet50()
    target = find_target(figure.target)
    if figure.latency_ms is not None:
        done = estimate_layers(layers, shapes, target, batch=figure.gpu_batch)
        low, high, published = done.low_ms, done.high_ms, figure.latency_ms
    else:
        low = high = 0.0
        published = figure.images_per_s
        if figure.gpu_batch:
            low, high = estimate_layers(layers, shapes, target, batch=figure.gpu_batch).images_per_s
        if figure.dla_batch:
            dla = estimate_layers(layers, shapes, target, batch=figure.dla_batch, engine="dla").images_per_s
            low, high = low + target.dla_cores * dla[0], high + target.dla_cores * dla[1]
    assert low <= published <= high
    assert high <= MAX_RATIO * low


def test_a_wrong_device_would_not_contain_the_figure() -> None:
    """The ranges tell devices apart: the figure of one GPU is outside the range of one twice as fast or slow."""
    layers, shapes = _resnet50()
    orin_ms = 0.640258
    for name in ("jetson-orin-nano-8gb", "h100-sxm", "rtx-5090", "jetson-xavier-nx"):
        done = estimate_layers(layers, shapes, find_target(name))
        assert not done.low_ms <= orin_ms <= done.high_ms, name
    assert math.isclose(
        orin_ms,
        next(f.latency_ms for f in _RESNET_FIGURES if f.latency_ms and f.target == "jetson-agx-orin-64gb"),
    )
