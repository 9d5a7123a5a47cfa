"""Whether a pass kept what the model computes: structure, interface, and the numbers themselves."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from pipeline.artifacts import TensorSpec
from pipeline.errors import PassError
from pipeline.metrics import max_abs_error, sqnr_db
from pipeline.onnx_files import interface
from pipeline.passes.graph_pass import Feeds, GraphPass

__all__ = ["Execute", "check_interface", "check_numerics", "check_structure", "execute", "seeded_feeds"]

Execute = Callable[[ir.Model, Feeds], Feeds]
"""Runs a model in float32 on one set of inputs: feeds by input name to outputs by output name."""

_FREE_BATCH = 2
"""What a free batch dimension is run with: a rewrite that mixes up the batch shows at two."""


def execute(model: ir.Model, feeds: Feeds) -> Feeds:
    """Run `model` once with OpenVINO in float32.

    OpenVINO, because the run-time install has it, and because it loads and runs Inception-ResNet-v2 in
    two seconds where ONNX's reference evaluator takes minutes. It is called as a library here, as a
    calculator: `engines` is not involved. Whatever it fuses by itself it fuses on both sides of a
    comparison.
    """
    import openvino

    core = openvino.Core()
    content = ir.serde.serialize_model(model).SerializeToString()
    network = core.read_model(content)
    del content
    # Fixed shapes compile faster and take every kernel the fixed-batch engine will take.
    network.reshape({name: list(array.shape) for name, array in feeds.items()})
    # On CPUs with bfloat16 units the default precision is not float32.
    compiled = core.compile_model(network, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    outputs = compiled(feeds)
    return {output.name or "": outputs[index] for index, output in enumerate(model.graph.outputs)}


def seeded_feeds(model: ir.Model, seed: int) -> Feeds:
    """Reproducible inputs: standard normal for float tensors, every value alike for uint8 pixels."""
    rng = np.random.default_rng(seed)
    feeds: Feeds = {}
    for spec in interface(model)[0]:
        shape = [size if isinstance(size, int) else _FREE_BATCH for size in spec.shape]
        if spec.dtype == "uint8":
            feeds[spec.name] = rng.integers(0, 256, shape, dtype=np.uint8)
        else:
            feeds[spec.name] = rng.standard_normal(shape).astype(spec.dtype)
    return feeds


def check_structure(name: str, model: ir.Model) -> None:
    """The ONNX checker with strict shape inference; fills in the shapes of `model`.

    Raises:
        PassError: step ``check`` or ``shapes``.
    """
    try:
        common.CheckerPass()(model)
    except Exception as error:
        raise PassError(name, "check", f"the rewritten graph is not valid ONNX: {error}") from error
    try:
        common.CheckerPass(full_check=True)(model)
    except Exception as error:
        raise PassError(
            name, "shapes", f"shapes of the rewritten graph contradict each other: {error}"
        ) from error
    common.ShapeInferencePass(data_prop=True)(model)


def check_interface(graph_pass: GraphPass, before: ir.Model, after: ir.Model) -> None:
    """Inputs and outputs are the same; a pass that declares `original_feeds` may change the input.

    Raises:
        PassError: step ``interface``.
    """
    inputs_before, outputs_before = interface(before)
    inputs_after, outputs_after = interface(after)
    if graph_pass.original_feeds is None:
        _same(graph_pass.name, "input", inputs_before, inputs_after)
    elif [spec.shape[0] for spec in inputs_before] != [spec.shape[0] for spec in inputs_after]:
        raise PassError(
            graph_pass.name, "interface", f"the batch changed: {inputs_before} became {inputs_after}"
        )
    _same(graph_pass.name, "output", outputs_before, outputs_after)


def check_numerics(graph_pass: GraphPass, before: Feeds, after: Feeds) -> tuple[float, float]:
    """Compare outputs, by name.

    Returns:
        The largest absolute error and the lowest SQNR in dB (``inf`` if all are equal) over the outputs.

    Raises:
        PassError: step ``numerics``.
    """
    limits = graph_pass.tolerance
    worst_error, worst_sqnr = 0.0, np.inf
    for name, reference in before.items():
        result = after[name]
        if reference.shape != result.shape:
            raise PassError(
                graph_pass.name,
                "numerics",
                f"output {name!r} has shape {result.shape}, it had {reference.shape}",
            )
        if not (np.isfinite(reference).all() and np.isfinite(result).all()):
            raise PassError(
                graph_pass.name,
                "numerics",
                f"output {name!r} holds NaN or Inf; look for such values in the weights",
            )
        error, sqnr = max_abs_error(reference, result), sqnr_db(reference, result)
        relative = error / max(max_abs_error(reference, np.zeros_like(reference)), np.finfo(np.float32).tiny)
        if relative > limits.relative or sqnr < limits.sqnr_db:
            raise PassError(
                graph_pass.name,
                "numerics",
                f"output {name!r} moved by {error:.3g} ({relative:.1e} of its largest value, limit "
                f"{limits.relative:.1e}) at an SQNR of {sqnr:.1f} dB (limit {limits.sqnr_db:.0f} dB); "
                "this is a defect of the pass: report it with the model",
            )
        worst_error, worst_sqnr = max(worst_error, error), min(worst_sqnr, sqnr)
    return worst_error, float(worst_sqnr)


def _same(name: str, what: str, before: tuple[TensorSpec, ...], after: tuple[TensorSpec, ...]) -> None:
    if before != after:
        raise PassError(name, "interface", f"the {what}s were {before} and are {after}")
