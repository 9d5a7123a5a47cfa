"""Models on disk, the real TensorRT-RTX, and a stand-in for TensorRT that worker processes find, too."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx.parser
import pytest
from numpy.typing import NDArray

from engines.tensorrt.api import TensorRtApi, load_api
from engines.tensorrt.device import DeviceIdentity
from pipeline.artifacts import ModelArtifact, PreprocessSpec, TensorSpec

FAKE_SITE = Path(__file__).parent / "fake_site"
CONV = "g (float[batch,3,8,8] x) => (float[batch,4,8,8] y) { c = Conv(x, w) y = Relu(c) }"
WEIGHT = {"w": np.ones((4, 3, 1, 1), np.float32)}


@pytest.fixture
def rtx() -> TensorRtApi:
    """The real TensorRT-RTX, which parses and builds without a GPU."""
    pytest.importorskip("tensorrt_rtx")
    return load_api("tensorrt_rtx")


@pytest.fixture
def make_model(tmp_path: Path) -> Callable[..., ModelArtifact]:
    """``make_model(graph_text, opset=18, **initializers)``: an ONNX file that need not be valid."""

    def make(graph: str = CONV, opset: int = 18, **initializers: NDArray) -> ModelArtifact:
        proto = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : {opset}]> {graph}')
        for name, values in (initializers or (WEIGHT if graph == CONV else {})).items():
            proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(values), name))
        for index, node in enumerate(proto.graph.node):
            node.name = node.name or f"node_{index}"
        data = proto.SerializeToString()
        path = tmp_path / "graph.onnx"
        path.write_bytes(data)
        (image,) = proto.graph.input
        shape = tuple(d.dim_param or d.dim_value for d in image.type.tensor_type.shape.dim)
        return ModelArtifact(
            path=path,
            sha256=hashlib.sha256(data).hexdigest(),
            inputs=(TensorSpec(image.name, "float32", shape),),
            outputs=(),
            opset=opset,
            preprocess=PreprocessSpec((8, 8)),
        )

    return make


@pytest.fixture
def fake_tensorrt(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., TensorRtApi]]:
    """``fake_tensorrt(version="10.3.0", **misbehaviour)``: the stand-in, here and in worker processes."""
    monkeypatch.syspath_prepend(FAKE_SITE)
    sys.modules.pop("tensorrt", None)

    def make(version: str = "10.3.0", **wanted: object) -> TensorRtApi:
        monkeypatch.setenv("EDGEFOLD_FAKE_TENSORRT", json.dumps({"version": version, **wanted}))
        sys.modules.pop("tensorrt", None)
        return load_api("tensorrt")

    yield make
    sys.modules.pop("tensorrt", None)


@pytest.fixture
def orin(monkeypatch: pytest.MonkeyPatch) -> DeviceIdentity:
    """As if this machine had one."""
    identity = DeviceIdentity("Orin (nvgpu)", 87, "540.4.0", "12.6")
    monkeypatch.setattr("engines.tensorrt.builder.device_identity", lambda: identity)
    return identity
