"""A small network from pixels to logits as the quantizer takes it, and images for it."""

from __future__ import annotations

import hashlib

import numpy as np
import onnx_ir as ir
from onnx_text import onnx_model, weight

from pipeline.artifacts import ModelArtifact, PreprocessSpec, TensorSpec

HW = 16
DATASET = "d" * 64
GRAPH = f"""g (uint8[{{batch}},{HW},{HW},3] image) => (float[{{batch}},5] logits)
    {{{{ f = Cast<to=1>(image)
      x = Transpose<perm=[0,3,1,2]>(f)
      c = Conv<pads=[1,1,1,1]>(x, w, b)
      r = Relu(c)
      m = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r)
      d = Conv<pads=[1,1,1,1]>(m, v)
      s = Relu(d)
      p = GlobalAveragePool(s)
      q = Flatten(p)
      logits = Gemm(q, h, k) }}}}"""


def make_model(path, batch="N", graph=GRAPH, **changed):
    weights = {
        "w": weight(8, 3, 3, 3) / 64.0,  # pixels reach 255
        "b": weight(8),
        "v": weight(12, 8, 3, 3),
        "h": weight(12, 5),
        "k": weight(5),
    }
    model = onnx_model(graph.format(batch=batch), **{**weights, **changed})
    data = ir.serde.serialize_model(model).SerializeToString()
    path.write_bytes(data)
    return ModelArtifact(
        path=path,
        sha256=hashlib.sha256(data).hexdigest(),
        inputs=(TensorSpec("image", "uint8", (batch, HW, HW, 3)),),
        outputs=(TensorSpec("logits", "float32", (batch, 5)),),
        opset=18,
        preprocess=PreprocessSpec(input_hw=(HW, HW)),
    )


def images(n, seed):
    """A tint each, or averaging makes all images alike."""
    rng = np.random.default_rng(seed)
    return (rng.integers(0, 256, (n, HW, HW, 3)) * rng.random((n, 1, 1, 3))).astype(np.uint8)


def batches():
    yield from np.array_split(images(20, seed=1), [8, 16])  # 8, 8, 4


def logits(path, pixels):
    from engines.openvino import fp32_runner

    with fp32_runner(path, ()) as runner:
        return np.array(runner.infer({"image": pixels})["logits"])
