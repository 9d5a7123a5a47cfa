from __future__ import annotations

import hashlib
import os

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from engines.model_file import read_model_bytes
from pipeline.errors import EngineError, IntegrityError


def _model(*, attribute: bool = False, doc: str = "") -> onnx.ModelProto:
    weights = numpy_helper.from_array(np.eye(3, dtype=np.float32), "w")
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    if attribute:
        nodes.insert(0, helper.make_node("Constant", [], ["w"], value=weights))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, (1, 3))],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, (1, 3))],
        [] if attribute else [weights],
        doc_string=doc,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def _external(tensor: onnx.TensorProto, location: str) -> None:
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)


def test_reads_what_the_digest_says(tmp_path):
    data = _model().SerializeToString()
    path = tmp_path / "m.onnx"
    path.write_bytes(data)
    assert read_model_bytes(path, hashlib.sha256(data).hexdigest()) == data
    assert read_model_bytes(path, None) == data
    with pytest.raises(IntegrityError, match=r"m\.onnx.*not parsed"):
        read_model_bytes(path, "0" * 64)


@pytest.mark.parametrize("location", ["w.bin", "../w.bin", os.devnull])
@pytest.mark.parametrize("attribute", [False, True])
def test_external_tensors_are_refused(tmp_path, location, attribute):
    model = _model(attribute=attribute)
    _external(model.graph.node[0].attribute[0].t if attribute else model.graph.initializer[0], location)
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(EngineError, match="'w' in another file"):
        read_model_bytes(path, None)


def test_external_tensor_in_a_subgraph_is_refused(tmp_path):
    inner = _model()
    _external(inner.graph.initializer[0], "w.bin")
    outer = _model()
    branch = helper.make_node("If", ["c"], ["z"], then_branch=inner.graph, else_branch=_model().graph)
    outer.graph.node.append(branch)
    path = tmp_path / "m.onnx"
    path.write_bytes(outer.SerializeToString())
    with pytest.raises(EngineError, match="another file"):
        read_model_bytes(path, None)


def test_the_mere_word_location_is_allowed(tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(_model(doc="location of the camera").SerializeToString())
    assert read_model_bytes(path, None)
