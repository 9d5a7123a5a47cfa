"""Which kernels are predicted, rule by rule, with bytes and MACs worked out by hand."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_text import onnx_model, weight
from qdq_nets import QdqNet

from engines.tensorrt.fusion import FusedLayer, predict_layers
from engines.tensorrt.predict import predict_audit
from pipeline.errors import UnsupportedError


def _layer(layers: tuple[FusedLayer, ...], node: str) -> FusedLayer:
    """The one layer that computes `node`."""
    (found,) = [layer for layer in layers if node in layer.nodes]
    return found


def _computed(layers: tuple[FusedLayer, ...], *op_types: str) -> list[tuple[str, ...]]:
    """The nodes of these operators, kernel by kernel."""
    kernels = [tuple(n for n in layer.nodes if n.split("_")[0] in op_types) for layer in layers]
    return [kernel for kernel in kernels if kernel]


def _residual(net: QdqNet, identity: str, branch: str) -> str:
    return net.op("Relu", net.op("Add", identity, branch, name="Add_r"), name="Relu_r")


def test_sum_and_activation_run_in_the_convolution() -> None:
    net = QdqNet(channels=16, size=8)
    x = net.qdq("x", 0.1)
    hidden = net.qdq(net.op("Relu", net.conv(x, 32, 3, name="Conv_a"), name="Relu_a"), 0.2)
    out = net.qdq(_residual(net, x, net.conv(hidden, 16, name="Conv_b")), 0.3)
    layers = predict_layers(net.model(net.conv(out, 8, name="Conv_c")))
    assert [layer.kind for layer in layers] == ["quantize", "conv", "conv", "conv"]
    assert _computed(layers, "Conv", "Add", "Relu") == [
        ("Conv_a", "Relu_a"),
        ("Conv_b", "Add_r", "Relu_r"),
        ("Conv_c",),
    ]
    a, b, c = layers[1:]
    assert {layer.precision for layer in layers} == {"int8"}
    assert (a.macs, b.macs) == (32 * 16 * 9 * 64, 16 * 32 * 64)
    # int8 weights, a float32 bias
    assert (a.weight_bytes, b.weight_bytes) == (32 * 16 * 9 + 4 * 32, 16 * 32 + 4 * 16)
    assert (a.input_bytes, a.output_bytes) == (16 * 64, 32 * 64)
    assert (b.input_bytes, b.output_bytes) == ((32 + 16) * 64, 16 * 64)
    assert c.output_bytes == 2 * 8 * 64, "the graph's output is fp16"
    assert (layers[0].input_bytes, layers[0].output_bytes) == (2 * 16 * 64, 16 * 64)


def test_a_float_operand_makes_the_sum_float_and_leaves_the_quantizer_behind() -> None:
    net = QdqNet()
    hidden = net.qdq(net.op("Relu", net.conv(net.qdq("x", 0.1), 16, name="Conv_a")), 0.2)
    out = net.quantize(_residual(net, "x", net.conv(hidden, 16, name="Conv_b")), 0.3, name="Q_out")
    layers = predict_layers(net.model(net.conv(net.dequantize(out, 0.3), 16)))
    fused = _layer(layers, "Conv_b")
    assert fused.nodes[-2:] == ("Add_r", "Relu_r")
    assert (fused.precision, fused.output_bytes) == ("int8", 2 * 16 * 64)
    assert "adds 'x', which is float" in fused.reason
    assert _layer(layers, "Q_out").kind == "quantize"


@pytest.mark.parametrize("swapped", [False, True])
def test_of_two_bare_convolutions_the_later_takes_the_sum(swapped: bool) -> None:
    net = QdqNet()
    x = net.qdq("x", 0.1)
    first, second = net.conv(x, 16, name="Conv_first"), net.conv(x, 16, name="Conv_second")
    out = _residual(net, second, first) if swapped else _residual(net, first, second)
    layers = predict_layers(net.model(out))
    assert _computed(layers, "Conv", "Add", "Relu") == [("Conv_first",), ("Conv_second", "Add_r", "Relu_r")]


def test_a_branch_with_qdq_leaves_the_sum_to_the_bare_one() -> None:
    net = QdqNet()
    x = net.qdq("x", 0.1)
    bare = net.conv(x, 16, name="Conv_bare")
    quantized = net.qdq(net.conv(x, 16, name="Conv_quantized"), 0.2)
    layers = predict_layers(net.model(_residual(net, bare, quantized)))
    assert _computed(layers, "Conv", "Add", "Relu") == [("Conv_quantized",), ("Conv_bare", "Add_r", "Relu_r")]


def test_a_sum_that_broadcasts_is_a_kernel_of_its_own() -> None:
    net = QdqNet()
    x = net.qdq("x", 0.1)
    pooled = net.op("GlobalAveragePool", "x")
    layers = predict_layers(net.model(_residual(net, pooled, net.conv(x, 16))))
    assert _layer(layers, "Add_r").kind == "elementwise"


def test_a_scale_folds_into_a_float_weight_but_not_into_an_int8_one() -> None:
    for int8 in (False, True):
        net = QdqNet()
        x = net.qdq("x", 0.1) if int8 else "x"
        scaled = net.op("Mul", net.conv(x, 16, int8=int8, name="Conv_b"), net.constant(0.2), name="Mul_s")
        layers = predict_layers(net.model(_residual(net, x, scaled)))
        expected = (
            [("Conv_b",), ("Mul_s", "Add_r", "Relu_r")] if int8 else [("Conv_b", "Mul_s", "Add_r", "Relu_r")]
        )
        assert _computed(layers, "Conv", "Mul", "Add", "Relu") == expected


@pytest.mark.parametrize(("scale", "n_requantized"), [(0.4, 0), (0.2, 1)])
def test_equal_scales_make_a_concatenation_free(scale: float, n_requantized: int) -> None:
    net = QdqNet()
    x = net.qdq("x", 0.1)
    parts = [net.qdq(net.conv(x, 16), 0.4), net.qdq(net.conv(x, 16), scale)]
    joined = net.qdq(net.op("Concat", *parts, axis=1, name="Concat_c"), 0.4)
    layers = predict_layers(net.model(net.conv(joined, 16)))
    kinds = Counter(layer.kind for layer in layers)
    assert kinds["requantize"] == n_requantized
    concat = _layer(layers, "Concat_c")
    assert (concat.kind, concat.precision, concat.input_bytes, concat.output_bytes) == ("noop", "int8", 0, 0)


def test_the_quantizer_behind_a_concatenation_moves_onto_its_inputs() -> None:
    net = QdqNet()
    x = net.qdq("x", 0.1)
    joined = net.op("Concat", net.conv(x, 16, name="Conv_a"), net.conv(x, 8, name="Conv_b"), axis=1)
    layers = predict_layers(net.model(net.conv(net.qdq(joined, 0.4), 16)))
    assert _layer(layers, "Conv_a").output_bytes == 16 * 64
    assert not [
        layer for layer in layers if layer.kind in ("quantize", "requantize") and "x" not in layer.name
    ]


def test_a_tensor_can_be_written_into_one_concatenation_only() -> None:
    net = QdqNet()
    shared = net.conv("x", 16, int8=False)
    first = net.op("Concat", shared, net.conv("x", 16, int8=False), axis=1, name="Concat_1")
    second = net.op("Concat", shared, net.conv("x", 8, int8=False), axis=1, name="Concat_2")
    layers = predict_layers(net.model(first, second))
    assert _layer(layers, "Concat_2").kind == "noop"
    copied = _layer(layers, "Concat_1")
    assert (copied.kind, copied.input_bytes, copied.output_bytes) == ("concat", 2 * 16 * 64, 2 * 16 * 64)


def test_max_pool_passes_int8_on() -> None:
    net = QdqNet()
    pooled = net.op("MaxPool", net.op("Relu", net.conv(net.qdq("x", 0.1), 16, name="Conv_a")), kernel_shape=[2, 2], strides=[2, 2], name="MaxPool_p")  # fmt: skip
    layers = predict_layers(net.model(net.conv(net.qdq(pooled, 0.2), 16)))
    assert _layer(layers, "Conv_a").output_bytes == 16 * 64
    pool = _layer(layers, "MaxPool_p")
    assert (pool.kind, pool.precision, pool.input_bytes, pool.output_bytes) == (
        "pool",
        "int8",
        16 * 64,
        16 * 16,
    )


def test_average_pool_is_int8_only_between_dq_and_q() -> None:
    for op, attributes in (("GlobalAveragePool", {}), ("AveragePool", {"kernel_shape": [2, 2]})):
        net = QdqNet()
        x = net.qdq("x", 0.1)
        inside = net.qdq(net.op(op, x, name="Pool_q", **attributes), 0.2)
        outside = net.op(op, x, name="Pool_f", **attributes)
        layers = predict_layers(net.model(net.conv(inside, 16), outside))
        assert _layer(layers, "Pool_q").precision == "int8"
        assert _layer(layers, "Pool_f").precision == "fp16"
        assert [layer.kind for layer in layers].count("dequantize") == 1


def test_the_mean_over_pixels_is_a_pool() -> None:
    net = QdqNet()
    axes = net.constant([2, 3], np.int64)
    layers = predict_layers(net.model(net.op("ReduceMean", "x", axes, name="Mean_p", keepdims=1), net.op("ReduceMean", "x", axes, name="Mean_r", keepdims=0)))  # fmt: skip
    assert (_layer(layers, "Mean_p").kind, _layer(layers, "Mean_r").kind) == ("pool", "reduce")


def test_one_requantization_for_all_who_want_it() -> None:
    net = QdqNet()
    x = net.qdq("x", 0.1)
    again = [net.conv(net.qdq(x, 0.3), 16), net.conv(net.qdq(x, 0.3), 16)]
    layers = predict_layers(net.model(*again))
    assert [layer.kind for layer in layers].count("requantize") == 1


def test_half_quantized_layers_run_in_float_and_say_why() -> None:
    net = QdqNet()
    x = net.qdq("x", 0.1)
    layers = predict_layers(
        net.model(net.conv(x, 16, int8=False, name="Conv_input"), net.conv("x", 16, name="Conv_weight"))
    )
    only_input, only_weight = _layer(layers, "Conv_input"), _layer(layers, "Conv_weight")
    assert (only_input.precision, only_weight.precision) == ("fp16", "fp16")
    assert "its weight 'constant_4' is float" in only_input.reason
    assert "its input 'x' is float" in only_weight.reason
    assert only_weight.weight_bytes == 2 * (16 * 16 + 16), (
        "an int8 weight in a float layer is stored as float"
    )


def test_casts_and_arithmetic_are_one_kernel() -> None:
    net = QdqNet(float_type=np.float32)
    shifted = net.op(
        "Sub", net.op("Cast", "x", to=10, name="Cast_c"), net.constant(3, np.float16), name="Sub_s"
    )
    layers = predict_layers(net.model(net.op("Cast", net.op("MaxPool", shifted, kernel_shape=[2, 2]), to=1, name="Cast_out")))  # fmt: skip
    assert _computed(layers, "Cast", "Sub") == [("Cast_c", "Sub_s"), ("Cast_out",)]
    assert (layers[0].kind, layers[0].precision, layers[-1].kind) == ("elementwise", "fp16", "reformat")


def test_silu_runs_in_the_convolution() -> None:
    net = QdqNet()
    y = net.conv("x", 16, int8=False, name="Conv_a")
    layers = predict_layers(net.model(net.op("Mul", y, net.op("Sigmoid", y, name="Sigmoid_s"), name="Mul_m")))
    assert _computed(layers, "Conv", "Sigmoid", "Mul") == [("Conv_a", "Sigmoid_s", "Mul_m")]


@pytest.mark.parametrize("batch", ["N", 4])
def test_costs_are_those_of_one_image(batch: str | int) -> None:
    net = QdqNet(batch=batch)
    (layer,) = predict_layers(net.model(net.conv("x", 8, int8=False)))
    assert (layer.macs, layer.input_bytes, layer.weight_bytes) == (8 * 16 * 64, 2 * 16 * 64, 2 * (8 * 16 + 8))


def _random_net(draw: st.DrawFn) -> ir.Model:
    """Layers, sums, concatenations, pools and Q/DQ of two scales, on tensors of one size."""
    net = QdqNet(size=4)
    values = ["x"]
    for _ in range(draw(st.integers(1, 14))):
        value = draw(st.sampled_from(values))
        choice = draw(
            st.sampled_from(["qdq", "conv", "float", "relu", "add", "concat", "max", "average", "mul"])
        )
        if choice == "qdq":
            value = net.qdq(value, draw(st.sampled_from([0.1, 0.2])))
        elif choice in ("conv", "float"):
            value = net.conv(value, 16, draw(st.sampled_from([1, 3])), int8=choice == "conv")
        elif choice == "relu":
            value = net.op("Relu", value)
        elif choice == "add":
            same = [other for other in values if net.channels[other] == net.channels[value]]
            value = net.op("Add", value, draw(st.sampled_from(same)))
        elif choice == "concat":
            value = net.op("Concat", value, draw(st.sampled_from(values)), axis=1)
        elif choice == "mul":
            value = net.op("Mul", value, net.constant(0.5))
        else:
            op = "MaxPool" if choice == "max" else "AveragePool"
            value = net.op(op, value, kernel_shape=[3, 3], pads=[1, 1, 1, 1])
        values.append(value)
    outputs = {*net.unread(), *draw(st.lists(st.sampled_from(values[1:]), max_size=2))}
    return net.model(*sorted(outputs))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_graph_is_covered_once_and_in_an_order_that_runs(data: st.DataObject) -> None:
    model = _random_net(data.draw)
    layers = predict_layers(model)
    names = Counter(name for layer in layers for name in layer.nodes)
    assert names == Counter(node.name for node in model.graph)
    place = {name: index for index, layer in enumerate(layers) for name in layer.nodes}
    computing = [node for node in model.graph if node.op_type not in ("QuantizeLinear", "DequantizeLinear")]
    for node in computing:
        for value in node.inputs:
            producer = None if value is None else value.producer()
            if producer in computing:
                assert place[producer.name] <= place[node.name]
    for layer in layers:
        assert min(layer.macs, layer.input_bytes, layer.weight_bytes, layer.output_bytes) >= 0
        assert layer.kind == "noop" or layer.output_bytes > 0
    report = predict_audit(model)
    assert len(report.of("unfused_add", "float_add")) == report.adds.total - report.adds.clean
    concats = report.of("concat_requantized", "concat_float", "concat_copied")
    assert len(concats) == report.concats.total - report.concats.clean
    assert {finding.layer for finding in report.findings} <= {layer.name for layer in layers}


def test_scales_must_be_one_constant_a_tensor() -> None:
    net = QdqNet()
    per_channel = net.op("QuantizeLinear", "x", net.constant(np.full(16, 0.1)), net.constant(np.zeros(16), np.int8), axis=1, name="Q_each")  # fmt: skip
    model = net.model(net.op("DequantizeLinear", per_channel, net.constant(0.1), net.constant(0, np.int8)))
    with pytest.raises(UnsupportedError, match="'Q_each' has no single constant scale"):
        predict_layers(model)


def test_a_shape_that_depends_on_the_data_is_refused() -> None:
    model = onnx_model(
        "agraph (float[N,4] x) => (float[A,B] z) { i = NonZero (x) f = Cast <to = 1> (i) z = MatMul (f, w) }",
        w=weight(8, 3),
    )
    with pytest.raises(UnsupportedError, match="is not known before the graph runs"):
        predict_layers(model)
