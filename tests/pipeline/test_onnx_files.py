"""Writing ONNX files: the same model as the library's serializer makes, and weights shared between files."""

from __future__ import annotations

import hashlib

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx_text import onnx_model, weight

from pipeline import onnx_files
from pipeline.errors import ExportError
from pipeline.onnx_files import (
    load_model,
    save_for_runner,
    save_model,
    unload_tensors,
    unload_weights,
)

GRAPH = """g (float[N,16,4,4] x) => (float[N,40,4,4] y)
    { a = Conv<pads=[1,1,1,1]>(x, w, b) r = Relu(a) d = Conv(r, v) y = Mul(d, s) }"""


def make():
    model = onnx_model(GRAPH, w=weight(64, 16, 3, 3), b=weight(64), v=weight(40, 64, 1, 1), s=np.array(2.0))
    others = {
        "packed": ir.tensor((np.arange(20000) % 16 - 8).astype(np.int8), dtype=ir.DataType.INT4),
        "halves": ir.tensor(weight(3000).astype(np.float16)),
        "words": ir.StringTensor([b"word"] * 4000, shape=ir.Shape([4000]), name="words"),
        "nothing": ir.tensor(np.zeros((0, 3), np.float32)),
        "doubles": ir.tensor(weight(900)),
    }
    for name, tensor in others.items():
        tensor.name = name
        model.graph.initializers[name] = ir.Value(
            name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape), const_value=tensor
        )
    model.metadata_props["origin"] = "a test"
    return model


def test_a_file_holds_what_the_library_would_write(tmp_path):
    model = make()
    model.graph.initializers["doubles"].const_value.doc_string = "kept"
    path = tmp_path / "model.onnx"
    expected = ir.serde.serialize_model(model)
    digest = save_model(model, path)
    assert len(expected.graph.initializer) == 9
    assert onnx.load_model(path) == expected
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.onnx"]
    assert ir.serde.serialize_model(model) == expected, "the model itself stays as it was"
    assert save_model(load_model(path), tmp_path / "again.onnx") == digest


@pytest.mark.parametrize("n", [0, 1, 127, 128, 16383, 16384, 2**31 - 1])
def test_lengths_are_varints(n):
    """Against what protobuf itself writes for a field of that number."""
    proto = onnx.TensorProto(data_type=n) if n else None
    expected = b"\x10\x00" if proto is None else proto.SerializeToString()
    assert onnx_files._key(0x10, n) == expected


def test_unloaded_weights_lie_beside_the_graphs_and_are_put_back_by_saving(tmp_path):
    model, original = make(), make()
    digest = save_model(model, tmp_path / "whole.onnx")
    unload_weights(model, tmp_path / "shared.weights")
    large = [name for name, value in model.graph.initializers.items() if is_unloaded(value)]
    assert large == ["w", "v", "packed", "halves", "doubles"]
    for name in large:
        np.testing.assert_array_equal(
            *(m.graph.initializers[name].const_value.numpy() for m in (model, original))
        )
    save_for_runner(model, tmp_path / "graph.onnx")
    inside = 4000 * len("word")
    assert inside < (tmp_path / "graph.onnx").stat().st_size < inside + 20000
    assert (
        onnx.load_model(tmp_path / "graph.onnx").graph.node
        == onnx.load_model(tmp_path / "whole.onnx").graph.node
    )
    assert save_model(model, tmp_path / "again.onnx") == digest
    clone = model.clone()
    unload_weights(clone, tmp_path / "other.weights")
    assert clone.graph.initializers["w"].const_value is model.graph.initializers["w"].const_value, "as it was"


def test_what_is_mapped_outlives_the_file_that_takes_its_place(tmp_path):
    path = tmp_path / "shared.weights"
    (first,) = unload_tensors([ir.tensor(weight(5000), name="first")], path)
    seen = first.numpy()
    (second,) = unload_tensors([ir.tensor(np.zeros(10), name="second")], path)
    np.testing.assert_array_equal(seen, weight(5000))
    np.testing.assert_array_equal(second.numpy(), np.zeros(10))


def test_more_than_protobuf_takes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_files, "_PROTOBUF_LIMIT_BYTES", 50_000)
    model = make()
    for write in (save_model, save_for_runner):
        with pytest.raises(ExportError, match=r"holds at most 50000"):
            write(model, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())
    unload_weights(model, tmp_path / "shared.weights")
    save_for_runner(model, tmp_path / "model.onnx")


def test_a_folder_that_is_not_there_is_named(tmp_path):
    for write in (save_model, save_for_runner):
        with pytest.raises(ExportError, match=r"cannot write .*gone"):
            write(make(), tmp_path / "gone" / "model.onnx")


def is_unloaded(value):
    return isinstance(value.const_value, ir.ExternalTensor)
