"""Audits of engines that were really built: NVIDIA's recordings, and what TensorRT-RTX compiles here.

The graphs of the recordings are written down again from the node names in them. On each, the prediction is
compared with what TensorRT made.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from qdq_nets import QdqNet
from tensorrt_rtx_logs import build_log

from engines.tensorrt.audit import AuditReport, check_int8, report_from_json, report_to_json, require_int8
from engines.tensorrt.fusion import predict_layers
from engines.tensorrt.inspected import audit_build_log, audit_engine
from engines.tensorrt.inspector import kernels_of_inspector
from pipeline.errors import EngineError, IntegrityError

_RECORDED = Path(__file__).parent / "recorded"
_COMPUTED = ("Conv", "Add", "MaxPool", "GlobalAveragePool", "Gemm")


def _recording(name: str) -> str:
    return (_RECORDED / f"{name}.json").read_text()


def _resnet(block_names: list[dict[str, str]], *, quantized_identity: bool, tail: bool) -> ir.Model:
    """ResNet-18's beginning: pytorch-quantization's Q/DQ on every input and weight."""
    net = QdqNet(channels=3, size=224, float_type=np.float32, batch=32)
    stem = net.conv(net.qdq("x", 0.02, "QuantizeLinear_2"), 64, 7, strides=[2, 2], name="Conv_9", weight_quantizer="QuantizeLinear_7")  # fmt: skip
    y = net.op("MaxPool", net.op("Relu", stem), kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1], name="MaxPool_12")  # fmt: skip
    for n, names in enumerate(block_names):
        scale = 0.1 * (n + 1)
        x = net.qdq(y, scale, names["input"])
        down = "down" in names
        channels, strides = (128, [2, 2]) if down else (64, [1, 1])
        hidden = net.op("Relu", net.conv(x, channels, 3, strides=strides, name=names["conv1"], weight_quantizer=names["w1"]))  # fmt: skip
        branch = net.conv(net.qdq(hidden, scale / 2), channels, 3, name=names["conv2"], weight_quantizer=names["w2"])  # fmt: skip
        identity = (
            net.conv(x, 128, strides=strides, name=names["down"], weight_quantizer=names["wd"]) if down else y
        )
        if quantized_identity:
            identity = net.qdq(identity, scale * (0.7 if down else 1.0))
        y = net.op("Relu", net.op("Add", branch, identity, name=names["add"]), name=names["relu"])
    if not tail:
        # What follows reads int8 and float, as every block's output here.
        return net.model(net.conv(net.qdq(y, 0.4, "QuantizeLinear_101"), 128), y)
    pooled = net.op("GlobalAveragePool", net.qdq(y, 0.4), name="GlobalAveragePool_300")
    flat = net.op("Flatten", net.qdq(pooled, 0.3))
    scales, zeros = net.constant(np.full(1000, 0.01)), net.constant(np.zeros(1000), np.int8)
    stored = net.op("QuantizeLinear", net.constant(np.ones((1000, 128))), scales, zeros, axis=0, name="QuantizeLinear_309")  # fmt: skip
    weight = net.op("DequantizeLinear", stored, scales, zeros, axis=0)
    return net.model(net.op("Gemm", flat, weight, net.constant(np.zeros(1000)), transB=1, name="Gemm_311"))


def _numbered(**numbers: int) -> dict[str, str]:
    ops = {"conv1": "Conv", "conv2": "Conv", "down": "Conv", "add": "Add", "relu": "Relu"}
    return {key: f"{ops.get(key, 'QuantizeLinear')}_{number}" for key, number in numbers.items()}


def _quantized_identity() -> ir.Model:
    return _resnet(
        [
            _numbered(input=15, conv1=22, w1=20, conv2=34, w2=32, add=42, relu=43),
            _numbered(input=46, conv1=53, w1=51, conv2=65, w2=63, add=73, relu=74),
            _numbered(input=77, conv1=84, w1=82, conv2=96, w2=94, down=107, wd=105, add=115, relu=116),
        ],
        quantized_identity=True,
        tail=True,
    )


def _float_identity() -> ir.Model:
    return _resnet(
        [
            _numbered(input=15, conv1=22, w1=20, conv2=34, w2=32, add=36, relu=37),
            _numbered(input=40, conv1=47, w1=45, conv2=59, w2=57, add=61, relu=62),
            _numbered(input=65, conv1=72, w1=70, conv2=84, w2=82, down=95, wd=93, add=97, relu=98),
        ],
        quantized_identity=False,
        tail=False,
    )


def _mobilenet() -> ir.Model:
    net = QdqNet(channels=3, size=224, float_type=np.float32, batch=1)

    def layer(value: str, out: int, conv: int, w: int, clip: int = 0, **attributes: Any) -> str:
        y = net.conv(value, out, name=f"Conv_{conv}", weight_quantizer=f"QuantizeLinear_{w}", **attributes)
        return net.op("Clip", y, net.constant(0), net.constant(6), name=f"Clip_{clip}") if clip else y

    x = layer(net.qdq("x", 0.02, "QuantizeLinear_2"), 32, 9, 7, 13, kernel=3, strides=[2, 2])
    x = layer(net.qdq(x, 0.1), 32, 23, 21, 27, kernel=3, group=32)
    x = layer(net.qdq(x, 0.2), 16, 37, 35)
    x = layer(net.qdq(x, 0.3), 96, 48, 46, 52)
    x = layer(net.qdq(x, 0.4), 96, 62, 60, 66, kernel=3, group=96, strides=[2, 2])
    identity = net.qdq(layer(net.qdq(x, 0.5), 24, 76, 74), 0.6)
    x = layer(identity, 144, 93, 91, 97)
    x = layer(net.qdq(x, 0.7), 144, 107, 105, 111, kernel=3, group=144)
    x = net.op("Add", layer(net.qdq(x, 0.8), 24, 121, 119), identity, name="Add_123")
    # What follows takes int8.
    return net.model(net.conv(net.qdq(layer(net.qdq(x, 0.9), 144, 133, 131, 137), 1.0), 8))


def _kernels(layers: Any) -> set[tuple[str, ...]]:
    """What is computed together, in order of the graph; only operators a kernel's name always tells."""
    kernels = {tuple(sorted(n for n in layer.nodes if n.split("_")[0] in _COMPUTED)) for layer in layers}
    return kernels - {()}


def _precisions(layers: Any) -> dict[str, str]:
    return {name: layer.precision for layer in layers for name in layer.nodes if name.split("_")[0] in ("Conv", "Gemm", "GlobalAveragePool")}  # fmt: skip


@pytest.mark.parametrize(
    ("recording", "model", "split"),
    [
        # The one fusion that was not predicted: this builder put the max pool into the first convolution.
        ("resnet18_quantized_identity", _quantized_identity, ("Conv_9", "MaxPool_12")),
        ("resnet18_float_identity", _float_identity, None),
        ("mobilenet_v2_residuals", _mobilenet, None),
    ],
)
def test_prediction_against_what_was_built(recording: str, model: Any, split: tuple[str, ...] | None) -> None:
    graph = model()
    predicted = predict_layers(graph)
    built = [layer for layer in audit_engine(_recording(recording), graph).layers if layer.nodes]
    expected = _kernels(built)
    if split is not None:
        assert split in expected
        expected = expected - {split} | {(name,) for name in split}
    named = {name for kernel in expected for name in kernel}
    got = {tuple(n for n in kernel if n in named) for kernel in _kernels(predicted)} - {()}
    assert got == expected
    ours, theirs = _precisions(predicted), _precisions(built)
    assert {name: ours[name] for name in theirs} == theirs
    # Q that the engine kept as a kernel of its own, and no other.
    activation_q = {node.name for node in graph.graph if node.op_type == "QuantizeLinear" and node.inputs[0].const_value is None}  # fmt: skip
    kept = {n for layer in built if layer.kind == "quantize" for n in layer.nodes}
    ours_kept = {n for layer in predicted if layer.kind == "quantize" for n in layer.nodes} & activation_q
    assert {n for n in ours_kept if n in named | kept} == kept


def test_a_quantized_identity_is_clean() -> None:
    report = audit_engine(_recording("resnet18_quantized_identity"), _quantized_identity())
    assert (report.adds.total, report.adds.clean) == (3, 3)
    assert report.precisions == {"int8": 10}
    assert {(finding.kind, finding.layer) for finding in report.findings} == {
        ("reformat", "QuantizeLinear_2")
    }
    assert check_int8(report) == ()
    assert report_from_json(report_to_json(report)) == report


def test_a_float_identity_is_named_with_the_edit_that_mends_it() -> None:
    report = audit_engine(_recording("resnet18_float_identity"), _float_identity())
    assert (report.adds.total, report.adds.clean) == (3, 0)
    edits = {f.edit.nodes: f.edit.tensors for f in report.of("float_add") if f.edit is not None}
    assert edits == {
        ("Add_36",): ("MaxPool_12_out",),
        ("Add_61",): ("Relu_37_out",),
        # Both branches are bare: the earlier convolution's output is what the later one adds.
        ("Add_97",): ("Conv_84_out",),
    }
    assert report.kinds["quantize"] == 5
    by_layer = {finding.layer: finding for finding in report.of("reformat")}
    copy = by_layer["Reformatting CopyNode for Output Tensor 0 to MaxPool_12"]
    assert copy.edit is None
    assert "different layouts" in copy.remedy
    mended = by_layer["QuantizeLinear_40"].edit
    assert mended is not None
    assert (mended.action, mended.tensors, mended.nodes) == ("insert_qdq", ("Relu_37_out",), ("Add_61",))


def test_a_layer_that_fell_back_fails_the_policy() -> None:
    information = json.loads(_recording("resnet18_quantized_identity"))
    fallen = information["Layers"][2]
    fallen["Weights"]["Type"] = "Half"
    for tensor in (*fallen["Inputs"], *fallen["Outputs"]):
        tensor["Format/Datatype"] = "Half(64,1:8,...)"
    report = audit_engine(json.dumps(information), _quantized_identity())
    assert [finding.layer for finding in report.of("not_int8")] == [fallen["Name"]]
    (problem,) = check_int8(report)
    assert "Conv 'Conv_22_out' is quantized in the graph but runs in fp16" in problem
    with pytest.raises(EngineError, match="not the int8 engine that was asked for"):
        require_int8([problem])


@pytest.mark.parametrize(("int8_ms", "fails"), [(1.0, False), (2.0, True), (2.5, True)])
def test_int8_must_beat_fp16(int8_ms: float, fails: bool) -> None:
    report = audit_engine(_recording("resnet18_quantized_identity"), _quantized_identity())
    problems = check_int8(report, int8_ms=int8_ms, fp16_ms=2.0)
    assert bool(problems) == fails
    require_int8(()) if not fails else None
    if fails:
        assert f"int8 takes {int8_ms:.3f} ms and fp16 2.000 ms" in problems[0]


def rtx_net() -> ir.Model:
    """The network of ``recorded/tensorrt_rtx_1_7.log``: a residual sum, a concatenation of equal scales."""
    net = QdqNet(channels=32, size=28, batch=1)
    x = net.qdq("x", 0.1)
    hidden = net.qdq(net.op("Relu", net.conv(x, 32, 3, name="Conv_a")), 0.2)
    out = net.op("Relu", net.op("Add", net.conv(hidden, 32, 3, name="Conv_b"), x, name="Add_r"))
    y = net.qdq(out, 0.3)
    parts = [net.qdq(net.op("Relu", net.conv(y, 32, kernel)), 0.4) for kernel in (1, 3)]
    return net.model(net.conv(net.qdq(net.op("Concat", *parts, axis=1, name="Concat_c"), 0.4), 32))


def _check_rtx(report: AuditReport) -> None:
    """TensorRT-RTX runs the convolutions in int8, and what follows them in kernels of their own."""
    convolutions = [layer for layer in report.layers if layer.kind == "conv"]
    assert len(convolutions) == 5
    assert {layer.precision for layer in convolutions} == {"int8"}
    assert check_int8(report) == ()
    assert (report.adds.total, report.concats.total, report.concats.clean) == (1, 1, 1)


def test_tensorrt_rtx_build_log_as_recorded() -> None:
    report = audit_build_log((_RECORDED / "tensorrt_rtx_1_7.log").read_text(), rtx_net())
    _check_rtx(report)
    assert report.adds.clean == 0
    (finding,) = report.of("unfused_add")
    assert "the builder chose other kernels" in finding.remedy
    assert len(report.of("split_layer")) == 5
    assert [layer.kind for layer in report.layers][:3] == ["quantize", "conv", "elementwise"]


def test_tensorrt_rtx_as_it_compiles_here() -> None:
    model = rtx_net()
    _check_rtx(audit_build_log(build_log(model), model))


@pytest.mark.parametrize(
    ("information", "message"),
    [
        ("", "no output of TensorRT's engine inspector"),
        ("[1, 2]", "no output of TensorRT's engine inspector"),
        ('{"Layers": {}}', "no output of TensorRT's engine inspector"),
        ('{"Layers": ["Conv_9", "Conv_22"]}', "LAYER_NAMES_ONLY; build it with DETAILED"),
        ('{"Layers": [{"LayerType": "Reformat"}]}', "cannot be read: KeyError"),
        ('{"Layers": [{"Name": "a", "Inputs": [3]}]}', "cannot be read: AttributeError"),
    ],
)
def test_inspector_output_that_cannot_be_read(information: str, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        kernels_of_inspector(information)


def test_a_log_without_layers_and_types_left_open() -> None:
    with pytest.raises(EngineError, match="lists no layers"):
        audit_build_log("Engine generation completed in 0.1 seconds.", rtx_net())
    unknown = {"Name": "MaxPool_12", "LayerType": "TiledPooling", "Outputs": [{"Name": "y", "Format/Datatype": "N/A due to dynamic shapes"}]}  # fmt: skip
    with pytest.raises(EngineError, match="give it an execution context"):
        audit_engine(json.dumps({"Layers": [unknown]}), _float_identity())


def test_metadata_is_read_with_and_without_separators() -> None:
    forms = ["[ONNX Layer: a/Conv][ONNX Layer: b [1]]", "[ONNX Layer: a/Conv]\x1f[ONNX Layer: b [1]]", "[ONNX Layer: a/Conv]\x1e[ONNX Layer: b [1]]"]  # fmt: skip
    for metadata in forms:
        (kernel,) = kernels_of_inspector(json.dumps({"Layers": [{"Name": "k", "LayerType": "kgen", "Metadata": metadata}]}))  # fmt: skip
        assert kernel.metadata == ("a/Conv", "b [1]")


@pytest.mark.parametrize("data", [b"", b"{}", b'{"source": "guessed"}'])
def test_what_is_no_report_is_refused(data: bytes) -> None:
    with pytest.raises(IntegrityError, match="not an audit report"):
        report_from_json(data)
