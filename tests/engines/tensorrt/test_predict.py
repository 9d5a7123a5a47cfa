"""The static audit: what is proved of a graph, and that nothing of it goes unlisted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnx_text import onnx_model, weight
from qdq_nets import QdqNet
from tensorrt_rtx_logs import build_log

from calibration.placement import cpu
from calibration.placement.tensorrt import place
from calibration.qdq import insert_qdq
from engines.tensorrt.audit import AuditReport, Edit, Tally, check_int8
from engines.tensorrt.inspected import audit_build_log
from engines.tensorrt.predict import predict_audit
from pipeline.artifacts import TensorRange
from pipeline.compile import export_resolved
from pipeline.models.resolve import resolve_model
from pipeline.onnx_files import load_model
from pipeline.passes import DEFAULT_PASSES
from pipeline.passes.center_pixels import CENTER_PIXELS
from pipeline.passes.half_precision import half_precision
from pipeline.passes.preprocess import fold_preprocess


def _assert_complete(report: AuditReport) -> None:
    """Every sum and every concatenation is clean or listed, once."""
    adds, concats = (
        report.of("unfused_add", "float_add"),
        report.of("concat_requantized", "concat_float", "concat_copied"),
    )
    assert len(adds) == report.adds.total - report.adds.clean
    assert len(concats) == report.concats.total - report.concats.clean
    layers = {layer.name for layer in report.layers}
    assert {finding.layer for finding in report.findings} <= layers


def _ranges(observed: tuple[str, ...]) -> dict[str, TensorRange]:
    """Every tensor its own range, so that equal scales come from the placement alone."""
    peaks = np.linspace(1, 8, len(observed))
    return {name: TensorRange(-float(peak), float(peak)) for name, peak in zip(observed, peaks, strict=True)}


def _folded(name: str, input_size: int, folder: Path) -> ir.Model:
    resolved = resolve_model(
        name, weights="random:0", num_classes=10, input_size=input_size, preprocess_file=None
    )
    exported = export_resolved(resolved, folder / "model.onnx")
    model = load_model(exported.path)
    for graph_pass in (*DEFAULT_PASSES, fold_preprocess(exported.preprocess, "BGR"), *DEFAULT_PASSES):
        graph_pass.rewrite(model)
    return model


def _tensorrt_form(folded: ir.Model, **options: frozenset[str]) -> ir.Model:
    model = folded.clone()
    CENTER_PIXELS.rewrite(model)
    placement = place(model, **options)
    insert_qdq(model, placement, _ranges(placement.observed))
    half_precision("float16").rewrite(model)
    return model


@pytest.fixture(scope="module")
def lite(tmp_path_factory: pytest.TempPathFactory) -> ir.Model:
    return _folded("inception_resnet_lite", 96, tmp_path_factory.mktemp("lite"))


def test_every_sum_and_concatenation_of_the_lite_network_is_free(lite: ir.Model) -> None:
    report = predict_audit(_tensorrt_form(lite))
    _assert_complete(report)
    assert (report.adds, report.concats) == (Tally(7, 7), Tally(9, 9))
    assert not report.of("requantization", "half_quantized", "fp32_island", "asymmetric")
    assert {layer.precision for layer in report.layers if layer.kind == "conv"} == {"int8"}
    # The classifier, and what brings pixels in and logits out.
    assert [finding.kind for finding in report.findings if finding.kind != "reformat"] == ["float_layer"]
    assert all(finding.remedy.startswith("none: it brings") for finding in report.of("reformat"))


def test_an_untied_concatenation_requantizes_what_others_read_too() -> None:
    model = onnx_model(
        """agraph (float[N,16,8,8] x) => (float[N,16,8,8] z) {
            a = Conv (x, w) r = Relu (a) b = Conv (r, w) s = Relu (b)
            j = Concat <axis = 1> (r, s) z = Conv (j, v) }""",
        w=weight(16, 16, 1, 1),
        v=weight(16, 32, 1, 1),
    )
    assert predict_audit(_tensorrt_form(model)).concats == Tally(1, 1)
    report = predict_audit(_tensorrt_form(model, untied_concats=frozenset({"j"})))
    _assert_complete(report)
    assert report.concats == Tally(1, 0)
    (finding,) = report.of("concat_requantized")
    # `s` is read by the concatenation alone: its convolution writes the scale that is wanted there.
    assert "'r' has scale" in finding.detail
    assert "'s' has scale" not in finding.detail
    assert finding.edit == Edit("share_scale", ("r", "s", "j"))


def test_the_placement_for_cpus_is_shown_to_be_wrong_for_tensorrt(lite: ir.Model) -> None:
    """Both inputs of an Add quantized, uint8 activations with a zero point: each is found."""
    model = lite.clone()
    placement = cpu.place(model)
    insert_qdq(model, placement, _ranges(placement.observed))
    report = predict_audit(model)
    _assert_complete(report)
    assert report.adds.clean == 0
    edits = {finding.edit.action for finding in report.of("unfused_add") if finding.edit is not None}
    assert edits == {"remove_qdq"}
    assert report.of("asymmetric")


def _kernels(report: AuditReport, model: ir.Model) -> set[frozenset[str]]:
    """Which sums and activations run in which convolution."""
    ops = {node.name: node.op_type for node in model.graph}
    return {
        frozenset(name for name in layer.nodes if ops.get(name) in ("Conv", "Add", "Relu"))
        for layer in report.layers
        if layer.kind == "conv"
    }


def test_a_whole_half_precision_network_is_compiled_as_predicted(lite: ir.Model) -> None:
    model = lite.clone()
    CENTER_PIXELS.rewrite(model)
    half_precision("float16").rewrite(model)
    predicted, built = predict_audit(model), audit_build_log(build_log(model), model)
    # This compiler puts the last Relu into the average behind it, not into the convolution before it.
    last = {frozenset({"node_conv2d_46", "node_relu_46"})}
    assert _kernels(predicted, model) - _kernels(built, model) == last
    assert _kernels(built, model) - _kernels(predicted, model) == {frozenset({"node_conv2d_46"})}
    assert built.adds == predicted.adds == Tally(7, 7)
    assert {layer.precision for layer in built.layers if layer.kind == "conv"} == {"fp16"}


def test_a_whole_int8_network_is_compiled_in_int8(lite: ir.Model) -> None:
    model = _tensorrt_form(lite)
    predicted, built = predict_audit(model), audit_build_log(build_log(model), model)
    assert check_int8(built) == ()
    int8 = {
        report.source: {
            name
            for layer in report.layers
            if layer.kind == "conv" and layer.precision == "int8"
            for name in layer.nodes
            if name.startswith("node_conv")
        }
        for report in (predicted, built)
    }
    assert int8["inspector"] == int8["predicted"]
    assert len(int8["predicted"]) == 47


@pytest.mark.slow
@pytest.mark.parametrize(("name", "adds"), [("inception_resnet_v2", 40), ("inception_v3", 0)])
def test_full_networks(name: str, adds: int, tmp_path: Path) -> None:
    report = predict_audit(_tensorrt_form(_folded(name, 96, tmp_path)))
    _assert_complete(report)
    assert (report.adds.total, report.adds.clean) == (adds, adds)
    assert report.concats.clean == report.concats.total > 0


def _edit(report: AuditReport, kind: str) -> Edit | None:
    (finding,) = [finding for finding in report.findings if finding.kind == kind]
    return finding.edit


def test_why_a_sum_stays_alone() -> None:
    net = QdqNet()
    x = net.qdq("x", 0.1)
    scaled = net.op("Mul", net.conv(x, 16), net.constant(0.2), name="Mul_s")
    report = predict_audit(net.model(net.conv(net.qdq(net.op("Add", x, scaled), 0.2), 16)))
    assert _edit(report, "unfused_add") == Edit("fold", (), ("Mul_s",))
    _assert_complete(report)

    net = QdqNet()
    x = net.qdq("x", 0.1)
    branch = net.qdq(net.conv(x, 16, name="Conv_b"), 0.2)
    report = predict_audit(net.model(net.conv(net.qdq(net.op("Add", x, branch, name="Add_r"), 0.2), 16)))
    assert _edit(report, "unfused_add") == Edit("remove_qdq", ("Conv_b_out",), ("Add_r",))

    net = QdqNet()
    x = net.qdq("x", 0.1)
    shared = net.conv(x, 16, name="Conv_b")
    report = predict_audit(net.model(net.op("Add", x, shared), net.op("Relu", shared)))
    (finding,) = report.of("unfused_add")
    assert "'Conv_b_out' is read by others than the sum" in finding.detail
    assert finding.edit is None


def test_layers_that_stay_in_float_are_listed_with_what_they_miss() -> None:
    net = QdqNet()
    x = net.qdq("x", 0.1)
    half = net.conv(x, 16, int8=False, name="Conv_h")
    report = predict_audit(
        net.model(net.conv(net.qdq(half, 0.2), 16), net.conv("x", 16, int8=False, name="Conv_f"))
    )
    assert _edit(report, "half_quantized") == Edit("insert_qdq", ("constant_4",), ("Conv_h",))
    edit = _edit(report, "float_layer")
    assert edit is not None
    assert (edit.nodes, edit.tensors[0]) == (("Conv_f",), "x")


def test_fp32_among_int8_is_an_island_but_an_fp32_network_is_none() -> None:
    net = QdqNet(float_type=np.float32)
    y = net.op("Softmax", net.conv(net.qdq("x", 0.1), 16), name="Softmax_s")
    report = predict_audit(net.model(y))
    assert _edit(report, "fp32_island") == Edit("lower", (), ("Softmax_s",))

    plain = QdqNet(float_type=np.float32)
    assert predict_audit(plain.model(plain.op("Softmax", plain.conv("x", 16, int8=False)))).findings == ()


def test_a_mixed_reader_is_asked_to_take_the_quantized_tensor() -> None:
    net = QdqNet()
    y = net.conv(net.qdq("x", 0.1), 16, name="Conv_a")
    report = predict_audit(net.model(net.conv(net.qdq(y, 0.2), 16), net.op("Softmax", y, name="Softmax_s")))
    edits = [finding.edit for finding in report.of("reformat") if finding.edit is not None]
    assert edits == [Edit("insert_qdq", ("Conv_a_out",), ("Softmax_s",))]
