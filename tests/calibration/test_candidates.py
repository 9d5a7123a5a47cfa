"""The graphs that a device is given to choose from."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir
import pytest
from onnx_text import onnx_model, weight

from calibration.candidates import tensorrt_candidates
from calibration.quantizer import StaticQuantizer
from calibration.table import derive_table
from pipeline.artifacts import ModelArtifact, PreprocessSpec, TensorRange
from pipeline.errors import IntegrityError
from pipeline.onnx_files import interface, load_model, save_model

pytest.importorskip("openvino")
from engines.openvino import fp32_runner

HW = 17
GRAPH = f"""g (uint8[batch,{HW},{HW},3] image) => (float[batch,5] logits)
    {{ i = Transpose<perm=[0,3,1,2]>(image) x = Cast<to=1>(i)
      a = Conv<strides=[2,2]>(x, w) ra = Relu(a)
      z = Conv<strides=[2,2]>(ra, o) rz = Relu(z)
      m = MaxPool<kernel_shape=[2,2], strides=[2,2]>(ra)
      b = Conv<strides=[2,2]>(ra, v) rb = Relu(b)
      t = Concat<axis=1>(m, rb, rz)
      y = Conv(t, u) ry = Relu(y)
      p = GlobalAveragePool(ry) q = Flatten(p) logits = Gemm(q, h) }}"""


def make_model(path, **changed):
    weights = {
        "w": weight(16, 3, 3, 3) / 64.0,
        "o": weight(16, 16, 1, 1),
        "v": weight(16, 16, 1, 1, seed=1),
        "u": weight(16, 48, 1, 1),
        "h": weight(16, 5),
    }
    graph = onnx_model(GRAPH, **{**weights, **changed})
    digest = save_model(graph, path)
    inputs, outputs = interface(graph)
    return ModelArtifact(path, digest, inputs, outputs, 18, PreprocessSpec(input_hw=(HW, HW)))


def batches():
    yield np.random.default_rng(0).integers(0, 256, (8, HW, HW, 3), np.uint8)


def calibrated(model):
    quantizer = StaticQuantizer(runner_factory=fp32_runner)
    statistics, _ = quantizer.statistics(model, batches, "d" * 64, lambda *_: None)
    return statistics, derive_table(statistics, "minmax")


def int8_layers(candidate):
    graph = load_model(candidate.model.path).graph
    return {
        node.outputs[0].name
        for node in graph
        if node.op_type == "Conv" and node.inputs[1].producer() is not None
    }


def test_a_network_of_equal_layers_has_two(tmp_path):
    model = make_model(tmp_path / "model.onnx")
    _, table = calibrated(model)
    # Ranges all alike: nothing to untie. Without statistics nobody knows what to take out.
    table = dataclasses.replace(table, ranges={name: TensorRange(-1.0, 4.0) for name in table.ranges})
    candidates = tensorrt_candidates(model, table, tmp_path)
    assert [(c.name, c.precision) for c in candidates] == [("int8", "int8"), ("fp16", "fp16")]
    int8, fp16 = candidates
    assert int8_layers(int8) == {"a", "z", "b", "y"}
    assert int8_layers(fp16) == set()
    assert int8.float_layers == int8.untied_concats == frozenset()
    assert "4 layers" in int8.reason
    assert {path.name for path in tmp_path.iterdir()} == {"model.onnx", "model.int8.onnx", "model.fp16.onnx"}
    assert [load_model(c.model.path).graph.outputs[0].dtype for c in candidates] == [ir.DataType.FLOAT] * 2


def test_a_concat_that_costs_a_bit_is_untied(tmp_path):
    model = make_model(tmp_path / "model.onnx")
    _, table = calibrated(model)
    ranges = {
        **table.ranges,
        "ra": TensorRange(0.0, 1.0),
        "rb": TensorRange(0.0, 8.0),
        "rz": TensorRange(0.0, 1.0),
    }
    candidates = tensorrt_candidates(model, dataclasses.replace(table, ranges=ranges), tmp_path)
    assert [c.name for c in candidates] == ["int8", "int8-untied", "fp16"]
    untied = candidates[1]
    assert untied.untied_concats == {"t"}
    assert "'ra' 8.0 times coarser" in untied.reason
    assert untied.model.sha256 != candidates[0].model.sha256


def test_a_noisy_layer_is_kept_in_half_precision(tmp_path):
    # One weight a channel so large that the others lie right between two steps; few of them, so it is cheap.
    spiky = np.full((8, 48, 1, 1), 0.49 / 127)
    spiky[:, 0] = 1.0
    model = make_model(tmp_path / "model.onnx", u=spiky, h=weight(8, 5))
    statistics, table = calibrated(model)
    candidates = {c.name: c for c in tensorrt_candidates(model, table, tmp_path, statistics=statistics)}
    mixed = candidates["int8-mixed"]
    assert mixed.float_layers == {"y"}
    assert int8_layers(mixed) == {"a", "b", "z"}
    assert "1 of 4 layers in fp16" in mixed.reason
    assert "% of the multiplications" in mixed.reason


def test_bfloat16_names_itself_and_its_reason(tmp_path):
    model = make_model(tmp_path / "model.onnx")
    _, table = calibrated(model)
    high = {**table.ranges, "ry": TensorRange(0.0, 5e4)}
    candidates = tensorrt_candidates(model, dataclasses.replace(table, ranges=high), tmp_path)
    assert candidates[-1].name == candidates[-1].precision == "bf16"
    assert "'ry' reaches 50000" in candidates[-1].reason


def test_statistics_of_another_calibration_are_refused(tmp_path):
    model = make_model(tmp_path / "model.onnx")
    statistics, table = calibrated(model)
    other = dataclasses.replace(statistics, n_samples=9)
    with pytest.raises(IntegrityError, match=table.statistics_sha256):
        tensorrt_candidates(model, table, tmp_path, statistics=other)
