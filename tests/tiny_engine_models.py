"""Tiny models for tests of whatever runs an engine: an fp32 one, and an int8 one with uint8 pixels in."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from tolerances import ENGINE_FP32_ATOL, ENGINE_INT8_ATOL

from pipeline.artifacts import ModelArtifact, PreprocessSpec, TensorSpec

HW = 12
N_CLASSES = 5
_FLOAT = onnx.TensorProto.FLOAT
_UINT8 = onnx.TensorProto.UINT8


@dataclass(frozen=True)
class TinyModel:
    """A model on disk, a sample of its input and what it computes, worked out with NumPy alone."""

    artifact: ModelArtifact
    sample: Callable[[int, int], dict[str, NDArray]]
    """``sample(batch, seed)``"""
    expected: Callable[[NDArray], NDArray]
    atol: float


def _weights() -> tuple[NDArray, NDArray]:
    rng = np.random.default_rng(7)
    conv = rng.standard_normal((8, 3, 1, 1)).astype(np.float32)
    head = rng.standard_normal((8, N_CLASSES)).astype(np.float32)
    return conv, head


def _save(graph: onnx.GraphProto, path: Path, dtype: str, shape: tuple[int | str, ...]) -> ModelArtifact:
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    data = model.SerializeToString()
    path.write_bytes(data)
    return ModelArtifact(
        path=path,
        sha256=hashlib.sha256(data).hexdigest(),
        inputs=(TensorSpec(graph.input[0].name, dtype, shape),),
        outputs=(TensorSpec("logits", "float32", (shape[0], N_CLASSES)),),
        opset=18,
        preprocess=PreprocessSpec(input_hw=(HW, HW)),
    )


def make_fp32(path: Path, batch: int | str = "batch") -> TinyModel:
    """1x1 conv, ReLU, global average pool, linear head; float32 NCHW in."""
    conv, head = _weights()
    shape = (batch, 3, HW, HW)
    nodes = [
        helper.make_node("Conv", ["input", "w"], ["conv"]),
        helper.make_node("Relu", ["conv"], ["relu"]),
        helper.make_node("ReduceMean", ["relu", "hw"], ["pooled"], keepdims=0),
        helper.make_node("MatMul", ["pooled", "v"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("input", _FLOAT, shape)],
        [helper.make_tensor_value_info("logits", _FLOAT, (batch, N_CLASSES))],
        [
            numpy_helper.from_array(conv, "w"),
            numpy_helper.from_array(np.array([2, 3], np.int64), "hw"),
            numpy_helper.from_array(head, "v"),
        ],
    )

    def sample(n: int, seed: int) -> dict[str, NDArray]:
        rng = np.random.default_rng(seed)  # a tint each, or averaging makes all images alike
        return {
            "input": (rng.standard_normal((n, 3, HW, HW)) + 2 * rng.random((n, 3, 1, 1))).astype(np.float32)
        }

    def expected(x: NDArray) -> NDArray:
        relu = np.maximum(np.einsum("oc,nchw->nohw", conv[:, :, 0, 0], x), 0)
        return relu.mean(axis=(2, 3)) @ head

    return TinyModel(_save(graph, path, "float32", shape), sample, expected, ENGINE_FP32_ATOL)


def make_int8(path: Path, batch: int | str = "batch") -> TinyModel:
    """The same layers with Q/DQ as a CPU engine wants it, uint8 NHWC pixels in, scale 1 at the first conv."""
    conv, head = _weights()
    conv = conv / 255.0
    shape = (batch, HW, HW, 3)
    w_scale = (np.abs(conv).max(axis=(1, 2, 3)) / 127).astype(np.float32)
    w_q = np.clip(np.round(conv / w_scale[:, None, None, None]), -127, 127).astype(np.int8)
    relu_scale = np.float32(4.0 / 255)
    constants = {
        "one": np.float32(1.0),
        "zero": np.uint8(0),
        "w_q": w_q,
        "w_scale": w_scale,
        "w_zero": np.zeros(8, np.int8),
        "relu_scale": relu_scale,
        "hw": np.array([2, 3], np.int64),
        "v": head,
    }
    nodes = [
        helper.make_node("Transpose", ["input"], ["nchw"], perm=[0, 3, 1, 2]),
        helper.make_node("DequantizeLinear", ["nchw", "one", "zero"], ["pixels"]),
        helper.make_node("DequantizeLinear", ["w_q", "w_scale", "w_zero"], ["w"], axis=0),
        helper.make_node("Conv", ["pixels", "w"], ["conv"]),
        helper.make_node("Relu", ["conv"], ["relu"]),
        helper.make_node("QuantizeLinear", ["relu", "relu_scale", "zero"], ["relu_q"]),
        helper.make_node("DequantizeLinear", ["relu_q", "relu_scale", "zero"], ["relu_dq"]),
        helper.make_node("ReduceMean", ["relu_dq", "hw"], ["pooled"], keepdims=0),
        helper.make_node("MatMul", ["pooled", "v"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny_int8",
        [helper.make_tensor_value_info("input", _UINT8, shape)],
        [helper.make_tensor_value_info("logits", _FLOAT, (batch, N_CLASSES))],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )

    def sample(n: int, seed: int) -> dict[str, NDArray]:
        rng = np.random.default_rng(seed)
        return {"input": (rng.integers(0, 256, (n, HW, HW, 3)) * rng.random((n, 1, 1, 3))).astype(np.uint8)}

    def expected(x: NDArray) -> NDArray:
        real = w_q[:, :, 0, 0] * w_scale[:, None]
        relu = np.maximum(np.einsum("oc,nhwc->nohw", real, x.astype(np.float32)), 0)
        quantized = np.clip(np.round(relu / relu_scale), 0, 255) * relu_scale
        return quantized.mean(axis=(2, 3)) @ head

    return TinyModel(_save(graph, path, "uint8", shape), sample, expected, ENGINE_INT8_ATOL)


MAKERS = {"fp32": make_fp32, "int8": make_int8}
