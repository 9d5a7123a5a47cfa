"""The complaints of TensorRT-RTX's real ONNX parser, which is TensorRT's, put in words."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from engines.tensorrt.builder import build_plan
from engines.tensorrt.options import TensorRtOptions
from engines.tensorrt.parser_errors import (
    ParserFailure,
    explain_parser_failures,
    explain_uint8_quantization,
)
from pipeline.errors import EngineError

SCALE = {"s": np.float32(0.1)}
INT8 = {**SCALE, "z": np.int8(0)}
UINT8 = {**SCALE, "z": np.uint8(0)}
W8 = np.ones((4, 3, 1, 1), np.int8)


@pytest.fixture
def complaint(rtx, make_model, tmp_path):
    """The message about a graph, which leaves no plan behind."""

    def complain(graph: str, opset: int = 18, **initializers) -> str:
        model = make_model(graph, opset, **initializers)
        with pytest.raises(EngineError) as caught:
            build_plan(rtx, model, tmp_path / "p.plan", TensorRtOptions(sms=(89,)), lambda *told: None)
        assert {path.name for path in tmp_path.iterdir()} == {"graph.onnx"}
        assert str(caught.value).startswith(f"model {model.path}: ")
        return str(caught.value)

    return complain


def test_int32_bias_behind_dequantize(complaint):
    graph = """g (float[1,3,8,8] x) => (float[1,4,8,8] y) {
        xq = QuantizeLinear(x, s, z)
        xd = DequantizeLinear(xq, s, z)
        "stem.0.conv.weight_dequantized" = DequantizeLinear("stem.0.conv.weight_int8", s, z)
        b_dequantized = DequantizeLinear("val_6_int32", s)
        y = Conv(xd, "stem.0.conv.weight_dequantized", b_dequantized) }"""
    weights = {"stem.0.conv.weight_int8": W8, "val_6_int32": np.zeros(4, np.int32)}
    message = complaint(graph, **INT8, **weights)
    assert "DequantizeLinear 'b_dequantized'" in message
    assert "of layer 'stem.0.conv'" in message
    assert "calibration.placement.cpu" in message
    assert "input has type Int32" in message
    assert "keep the bias in floating point" in message
    assert "CUDA driver" not in message  # the parser's log says so of every error on a machine without GPU


@pytest.mark.parametrize("zero", [np.uint8(3), np.int8(-3)])
def test_asymmetric_zero_point(complaint, zero):
    graph = """g (float[1,3,8,8] x) => (float[1,3,8,8] y) {
        x_quantized = QuantizeLinear(x, s, z)
        y = DequantizeLinear(x_quantized, s, z) }"""
    message = complaint(graph, **SCALE, z=zero)
    assert "QuantizeLinear 'x_quantized'" in message
    assert "placed on tensor 'x' by calibration.qdq" in message
    assert "quantize symmetrically (int8, zero point 0)" in message


def test_uint8_grids_are_refused_although_the_parser_only_warns(complaint):
    graph = """g (float[1,3,8,8] x) => (float[1,3,8,8] y) {
        xq = QuantizeLinear(x, s, z)
        y = DequantizeLinear(xq, s, z) }"""
    message = complaint(graph, **UINT8)
    assert "quantizes to uint8 (QuantizeLinear 'xq'" in message
    assert "2 nodes in all" in message
    assert "TensorRT placement" in message


def test_pixels_transposed_before_the_cast(complaint):
    graph = """g (uint8[1,8,8,3] image) => (float[1,3,8,8] y) {
        image_transpose = Transpose <perm = [0, 3, 1, 2]> (image)
        y = Cast <to = 1> (image_transpose) }"""
    message = complaint(graph)
    assert "Transpose 'image_transpose'" in message
    assert "pipeline.passes.preprocess" in message
    assert "put the Cast to float right behind the input" in message


def test_pixels_dequantized(complaint):
    graph = "g (uint8[1,3,8,8] image) => (float[1,3,8,8] y) { y = DequantizeLinear(image, s, z) }"
    message = complaint(graph, **UINT8)
    assert "unsupported input type of UINT8" in message
    assert "pixels go through a Cast to float" in message


@pytest.mark.parametrize("graph", ["y = Add(x, w)", "y = Conv(x, w)"])
def test_two_types_meet(complaint, graph):
    weight = np.ones((3, 3, 1, 1), np.float32)
    message = complaint(f"g (float16[3,3,8,8] x) => (float16[3,3,8,8] y) {{ {graph} }}", w=weight)
    assert "are of types Half and Float" in message or "`kernel` is of type Float" in message
    assert "a strongly typed graph casts explicitly" in message


@pytest.mark.parametrize(
    ("graph", "nearest"),
    [
        ("y = ConvInteger(x, w)", "Conv between DequantizeLinear and QuantizeLinear"),
        ("a = Cast <to = 1> (x) y = Det(a)", "the arithmetic of the determinant"),
        ("y = Foo(x)", "write it with operators it has"),
    ],
)
def test_operator_without_importer(complaint, graph, nearest):
    message = complaint(
        f"g (uint8[1,3,8,8] x) => (int32[n] y) {{ {graph} }}", w=np.ones((4, 3, 1, 1), np.uint8)
    )
    assert f"TensorRT refuses {graph.split(' = ')[-1].split('(')[0]} 'y'" in message
    assert nearest in message
    assert "--target cpu" in message


def test_operator_of_another_runtime(complaint):
    graph = "g (float[1,3] x) => (float[1,3] y) { y = com.microsoft.FusedConv(x) }"
    message = complaint(graph)
    assert "domain 'com.microsoft'" in message
    assert "without another runtime's optimizations" in message


def test_a_file_that_is_no_onnx(rtx, make_model, tmp_path):
    model = make_model()
    model.path.write_bytes(b"\xff\xfe not a model")
    import hashlib

    model = dataclasses.replace(model, sha256=hashlib.sha256(model.path.read_bytes()).hexdigest())
    with pytest.raises(EngineError, match="cannot read the model as ONNX"):
        build_plan(rtx, model, tmp_path / "p", TensorRtOptions(sms=(89,)), lambda *told: None)


def test_free_image_size(complaint):
    graph = "g (float[batch,3,h,8] x) => (float[batch,3,h,8] y) { y = Relu(x) }"
    assert "input 'x' has shape [-1, 3, -1, 8]: only the batch" in complaint(graph)


def test_the_layer_comes_from_the_exporters_record(make_model):
    model = make_model()
    import onnx

    proto = onnx.load(model.path)
    proto.graph.node[0].metadata_props.add(key="namespace", value="net/stem/conv")
    failure = ParserFailure("INVALID_NODE", "odd words", 0, "node_0", "Conv", in_function=False)
    message = explain_parser_failures([failure] * 5, proto.SerializeToString())
    assert (
        "Conv 'c' (node 'node_0') of layer 'net/stem/conv', as exported: odd words (INVALID_NODE)" in message
    )
    assert "… and 2 more" in message


def test_an_index_that_is_not_the_graphs_is_not_trusted(make_model):
    data = make_model().path.read_bytes()
    inside = ParserFailure("INVALID_NODE", "odd", 0, "node_1", "Relu", in_function=True)
    assert "Relu 'y'" in explain_parser_failures([inside], data)
    nowhere = ParserFailure("INVALID_NODE", "odd", 7, "lost", "Tan", in_function=False)
    assert "node 'lost' (Tan)" in explain_parser_failures([nowhere], data)


def test_other_warnings_are_no_refusal(make_model):
    assert explain_uint8_quantization(["something else"], make_model().path.read_bytes()) is None
