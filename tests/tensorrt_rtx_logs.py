"""What TensorRT-RTX says while it compiles ahead of time, which needs no GPU."""

from __future__ import annotations

import onnx_ir as ir
import pytest


def build_log(model: ir.Model) -> str:
    """The verbose log of compiling `model` for SM89; skips where TensorRT-RTX is not installed."""
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    lines: list[str] = []

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: object, message: str) -> None:
            lines.append(message)

    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    assert parser.parse(ir.serde.serialize_model(model).SerializeToString()), parser.get_error(0).desc()
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.num_compute_capabilities = 1
    assert config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    image = network.get_input(0)
    if image.shape[0] == -1:
        shape = (1, *tuple(image.shape)[1:])
        profile = builder.create_optimization_profile()
        profile.set_shape(image.name, shape, shape, shape)
        config.add_optimization_profile(profile)
    assert builder.build_serialized_network(network, config) is not None
    return "\n".join(lines)
