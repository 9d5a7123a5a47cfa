"""OpenVINO computing Q/DQ as it is written: what a graph made for another engine is judged by."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import onnx.parser
import pytest

from engines.openvino import BACKEND, EMULATOR
from pipeline.artifacts import EngineArtifact, EngineOptions

# TensorRT's form: the identity of the sum is quantized, the convolution's branch is bare; fp16 between.
GRAPH = """<ir_version: 9, opset_import: ["" : 19]>
g (float[batch,1,1,256] x) => (float[batch,1,1,256] y)
<float[1,1,1,1] w32 = {0.37}, float s32 = {0.125}, int8 z = {0}, float t32 = {0.0625}>
{ w = Cast<to = 10>(w32)
  s = Cast<to = 10>(s32)
  t = Cast<to = 10>(t32)
  xh = Cast<to = 10>(x)
  xq = QuantizeLinear(xh, s, z)
  xd = DequantizeLinear(xq, s, z)
  conv = Conv(xd, w)
  sum = Add(conv, xd)
  q = QuantizeLinear(sum, t, z)
  d = DequantizeLinear(q, t, z)
  y = Cast<to = 1>(d) }"""


def as_written(x: np.ndarray) -> np.ndarray:
    """The graph in float64, rounding half to even as ONNX does."""
    steps = np.clip(np.rint(x.astype(np.float64) / 0.125), -128, 127) * 0.125
    total = steps * float(np.float16(0.37)) + steps
    return np.clip(np.rint(total / 0.0625), -128, 127) * 0.0625


@pytest.fixture
def artifact(tmp_path: Path) -> EngineArtifact:
    data = onnx.parser.parse_model(GRAPH).SerializeToString()
    path = tmp_path / "graph.onnx"
    path.write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    return EngineArtifact(path, digest, digest, EMULATOR.name, EMULATOR.fingerprint())


def test_q_dq_is_computed_as_it_is_written(artifact: EngineArtifact) -> None:
    x = np.random.default_rng(0).normal(0, 4, (3, 1, 1, 256)).astype(np.float16).astype(np.float32)
    with EMULATOR.load(artifact, EngineOptions()) as runner:
        y = runner.infer({"x": x})["y"]
    # Sums that lie within fp16's rounding of the middle between two steps may fall either way.
    assert np.mean(y != as_written(x)) < 0.02
    assert np.abs(y - as_written(x)).max() <= 0.0625


def test_its_blobs_are_not_those_of_the_integer_kernels(artifact: EngineArtifact, tmp_path: Path) -> None:
    options = EngineOptions(cache_dir=tmp_path / "cache")
    BACKEND.load(artifact, options).close()
    EMULATOR.load(artifact, options).close()
    assert len(list((tmp_path / "cache").glob("*.blob"))) == 2
