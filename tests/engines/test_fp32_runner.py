"""The runner factory of calibration: intermediate tensors by their ONNX names, in true fp32."""

from __future__ import annotations

import importlib

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from engines import BACKENDS, CPU_BACKENDS
from pipeline.errors import EngineError
from pipeline.onnx_files import save_for_runner, unload_tensors

GRAPH = """<ir_version: 9, opset_import: ["" : 18]>
g (float[batch,3,8,8] x) => (float[batch,3,8,8] logits, float[batch,3,8,8] second)
<float[3,3,1,1] w = {1,0,0,0,-2,0,0,0,3}>
{ conv = Conv(x, w)
  relu = Relu(conv)
  same = Identity(relu)
  second = Identity(same)
  sum = Add(conv, relu)
  logits = Identity(sum) }"""


@pytest.fixture(params=CPU_BACKENDS)
def fp32_runner(request):
    entry = BACKENDS[request.param]
    pytest.importorskip(entry.requires)
    return importlib.import_module(entry.module).fp32_runner


@pytest.fixture
def path(tmp_path):
    target = tmp_path / "graph.onnx"
    target.write_bytes(onnx.parser.parse_model(GRAPH).SerializeToString())
    return target


def _expected(x):
    conv = x * np.array([1, -2, 3], np.float32)[:, None, None]
    relu = np.maximum(conv, 0)
    return {
        "conv": conv,
        "relu": relu,
        "same": relu,
        "second": relu,
        "sum": conv + relu,
        "logits": conv + relu,
    }


@pytest.mark.parametrize(
    "extra", [(), ("conv",), ("relu", "conv"), ("relu", "same", "conv"), ("sum", "conv", "sum", "logits")]
)
def test_tensors_come_under_their_names(fp32_runner, path, extra):
    with fp32_runner(path, extra) as runner:
        declared = [spec.name for spec in runner.outputs]
        assert declared == ["logits", "second", *[name for name in dict.fromkeys(extra) if name != "logits"]]
        for batch in (2, 1):  # the last batch of a data set may be short
            x = np.random.default_rng(batch).standard_normal((batch, 3, 8, 8)).astype(np.float32)
            outputs = runner.infer({"x": x})
            assert list(outputs) == declared
            for name, array in outputs.items():
                np.testing.assert_allclose(array, _expected(x)[name], atol=1e-6, err_msg=name)


def test_an_unknown_tensor_is_named(fp32_runner, path):
    with pytest.raises(EngineError, match="'nowhere'"):
        fp32_runner(path, ["conv", "nowhere"])


def test_exposed_tensors_may_hold_nan_the_models_own_may_not(fp32_runner, tmp_path):
    """Calibration judges what it exposes; `infer` judges the logits."""
    text = GRAPH.replace("Add(conv, relu)", "Min(over, conv)").replace(
        "relu =", "over = Mul(conv, conv)\n relu ="
    )
    path = tmp_path / "overflow.onnx"
    path.write_bytes(onnx.parser.parse_model(text).SerializeToString())
    x = np.full((1, 3, 8, 8), 1e30, np.float32)
    with fp32_runner(path, ["over"]) as runner:
        assert np.isinf(runner.infer({"x": x})["over"]).all()
        with pytest.raises(EngineError, match="'logits'"):
            runner.infer({"x": np.full((1, 3, 8, 8), 3e38, np.float32)})


def test_weights_may_lie_in_a_file_beside_the_graph(fp32_runner, tmp_path):
    model = ir.serde.deserialize_model(onnx.parser.parse_model(GRAPH))
    constant = model.graph.initializers["w"]
    (constant.const_value,) = unload_tensors([constant.const_value], tmp_path / "graph.weights")
    save_for_runner(model, tmp_path / "graph.onnx")
    x = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)
    for extra in ((), ("conv",)):
        with fp32_runner(tmp_path / "graph.onnx", extra) as runner:
            for name, array in runner.infer({"x": x}).items():
                np.testing.assert_allclose(array, _expected(x)[name], atol=1e-6, err_msg=name)


def test_products_keep_float32_precision(fp32_runner, tmp_path):
    """Fails where the engine silently multiplies in bf16 (8 bits), as OpenVINO does by default on AMX CPUs."""
    rng = np.random.default_rng(3)
    w = rng.standard_normal((64, 64, 3, 3)).astype(np.float32)
    x = rng.standard_normal((1, 64, 16, 16)).astype(np.float32)
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Conv", ["x", "w"], ["logits"])],
        "conv",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, x.shape)],
        [onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, (1, 64, 14, 14))],
        [onnx.numpy_helper.from_array(w, "w")],
    )
    path = tmp_path / "conv.onnx"
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9), path
    )
    windows = np.lib.stride_tricks.sliding_window_view(x[0].astype(np.float64), (3, 3), axis=(1, 2))
    expected = np.einsum("cyxij,ocij->oyx", windows, w.astype(np.float64))
    with fp32_runner(path, []) as runner:
        error = np.abs(runner.infer({"x": x})["logits"][0] - expected).max() / expected.std()
    assert error < 1e-5  # bf16: about 1e-2


@pytest.mark.parametrize(("weights", "expected"), [("int8", True), ("float32", False)])
def test_integer_kernels_are_looked_for_where_weights_are_integers(tmp_path, weights, expected):
    """Else OpenVINO compiles a judged graph twice as long for nothing; with them it would run a third as fast."""
    openvino = pytest.importorskip("engines.openvino")
    constant = "w = DequantizeLinear(i, scale, none)" if weights == "int8" else "w = Mul(h, scale)"
    text = f"""<ir_version: 9, opset_import: ["" : 18]>
    g (float[batch,1,8,8] x) => (float[batch,1,8,8] logits)
    <int8[1,1,1,1] i = {{3}}, float[1,1,1,1] h = {{3}}, float scale = {{0.5}}, int8 none = {{0}}, uint8 zero = {{7}}>
    {{ q = QuantizeLinear(x, scale, zero) d = DequantizeLinear(q, scale, zero) {constant} logits = Conv(d, w) }}"""
    path = tmp_path / "graph.onnx"
    path.write_bytes(onnx.parser.parse_model(text).SerializeToString())
    assert openvino._has_integer_weights(openvino._read(path, path)) == expected
