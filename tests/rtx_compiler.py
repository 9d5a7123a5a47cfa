"""TensorRT-RTX's own parser and ahead-of-time compiler, which need no GPU: the judge of TensorRT-bound graphs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Compiled:
    plan_bytes: int
    float32_layers: tuple[str, ...]
    """Layers of the parsed network, constants aside, that compute a float32 tensor."""


def compile_plan(path: Path, sm: str = "SM89") -> Compiled:
    """Parse and build, strongly typed; a refusal fails the test with the parser's own words."""
    trt = pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx, which compiles without a GPU")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse(path.read_bytes())
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    assert parsed, [f"{error.node_operator()} {error.node_name()}: {error.desc()}" for error in errors]
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    assert config.set_compute_capability(getattr(trt.ComputeCapability, sm), 0)
    image = network.get_input(0)
    profile = builder.create_optimization_profile()
    smallest, largest = ((batch, *tuple(image.shape)[1:]) for batch in (1, 4))
    profile.set_shape(image.name, smallest, smallest, largest)
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    assert plan is not None, "TensorRT-RTX parsed the graph and could not build it"
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    wide = [
        layer.name
        for layer in layers
        if layer.type != trt.LayerType.CONSTANT and layer.get_output(0).dtype == trt.float32
    ]
    return Compiled(plan.nbytes, tuple(wide))
