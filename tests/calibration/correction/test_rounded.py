"""Rounded weights that several graphs share."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
from onnx_text import onnx_model, weight

from calibration.correction.rounded import RoundedWeights
from calibration.placement import PLACEMENTS
from calibration.qdq import weight_params
from calibration.qparams import dequantize, quantize
from pipeline.onnx_files import save_for_runner

GRAPH = """g (float[N,32,4,4] x) => (float[N,40,4,4] y) { a = Conv<pads=[1,1,1,1]>(x, w, b) r = Relu(a) y = Conv(r, v) }"""


def test_each_is_rounded_once_and_one_that_changed_by_itself(tmp_path):
    model = onnx_model(GRAPH, w=weight(64, 32, 3, 3), b=weight(64), v=weight(40, 64, 1, 1))
    placement = PLACEMENTS["cpu"](model)
    points = {point.weight: point for point in placement.weights}
    assert set(points) == {"w", "v"}
    rounded = RoundedWeights(model, placement, tmp_path)
    assert not list(tmp_path.iterdir()), "nothing is rounded before it is asked for"
    plain, changed = model.clone(), model.clone()
    changed.graph.initializers["v"].const_value = ir.tensor(
        weight(40, 64, 1, 1, seed=9).astype(np.float32), name="v"
    )
    sources = {
        (id(graph), name): graph.graph.initializers[name].const_value.numpy()
        for graph in (plain, changed)
        for name in points
    }
    for graph in (plain, changed):
        rounded.put_into(graph)
        for name, point in points.items():
            source = sources[id(graph), name]
            params = weight_params(source, point, placement)
            got = graph.graph.initializers[name].const_value.numpy()
            np.testing.assert_array_equal(got, dequantize(quantize(source, params), params))
            assert np.abs(got - source).max() > 0
    shared = plain.graph.initializers["w"].const_value
    assert shared is changed.graph.initializers["w"].const_value is rounded.of(model, points["w"])
    original = model.graph.initializers["w"].const_value.numpy()
    np.testing.assert_array_equal(original, weight(64, 32, 3, 3).astype(np.float32))
    save_for_runner(plain, tmp_path / "plain.onnx")
    (stored,) = (t for t in onnx.load_model(tmp_path / "plain.onnx").graph.initializer if t.name == "w")
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(stored), shared.numpy())
