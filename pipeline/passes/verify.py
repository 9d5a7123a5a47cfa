"""Whether a pass kept what the model computes: structure, interface, and the numbers themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from pipeline.artifacts import TensorSpec
from pipeline.errors import PassError
from pipeline.metrics import max_abs_error, sqnr_db
from pipeline.onnx_files import interface
from pipeline.passes.graph_pass import Feeds, GraphPass, Tolerance

__all__ = [
    "Execute",
    "check_interface",
    "check_numerics",
    "check_structure",
    "execute",
    "nudged",
    "seeded_feeds",
]

Execute = Callable[[ir.Model, Feeds], Feeds]
"""Runs a model in float32 on one set of inputs: feeds by input name to outputs by output name."""

_FREE_BATCH = 2
"""What a free batch dimension is run with: a rewrite that mixes up the batch shows at two."""


_PATCH = 16


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
    """Reproducible inputs: standard normal for float tensors, patches with noise for uint8 images.

    Plain noise averages out in the first layers, and what is left of it in the logits is mostly rounding.
    """
    rng = np.random.default_rng(seed)
    feeds: Feeds = {}
    for spec in interface(model)[0]:
        shape = [size if isinstance(size, int) else _FREE_BATCH for size in spec.shape]
        if spec.dtype == "uint8":
            patches = rng.integers(
                0, 256, [shape[0], *(-(-size // _PATCH) for size in shape[1:3]), *shape[3:]]
            )
            image = patches.repeat(_PATCH, axis=1).repeat(_PATCH, axis=2)[:, : shape[1], : shape[2]]
            feeds[spec.name] = (image + rng.integers(-32, 33, shape)).clip(0, 255).astype(np.uint8)
        else:
            feeds[spec.name] = rng.standard_normal(shape).astype(spec.dtype)
    return feeds


def nudged(model: ir.Model, seed: int, nudge: float) -> ir.Model:
    """A copy of `model` with every float weight moved up or down by `nudge` of itself."""
    rng = np.random.default_rng(seed)
    copy = model.clone()
    for value in copy.graph.initializers.values():
        if value.const_value is not None and value.dtype == ir.DataType.FLOAT:
            weights = value.const_value.numpy()
            signs = rng.integers(0, 2, weights.shape, dtype=np.int8) * np.float32(2) - np.float32(1)
            value.const_value = ir.tensor(weights * (1 + np.float32(nudge) * signs), name=value.name)
    return copy


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


def check_numerics(
    graph_pass: GraphPass, before: Feeds, after: Feeds, rounding: Callable[[], Feeds] | None = None
) -> tuple[float, float]:
    """Compare outputs, by name.

    Where the pass's limits are exceeded, the model itself may be at fault: some cancel so much that the
    rounding of their weights alone moves their output as far. `rounding` then gives the outputs of the
    `nudged` original, and twice that error is allowed, up to the pass's ``worst``.

    Returns:
        The largest absolute error and the lowest SQNR in dB (``inf`` if all are equal) over the outputs.

    Raises:
        PassError: step ``numerics``.
    """
    worst_error, worst_sqnr = 0.0, np.inf
    for name, reference in before.items():
        result = after[name]
        if reference.shape != result.shape:
            message = f"output {name!r} has shape {result.shape}, it had {reference.shape}"
            raise PassError(graph_pass.name, "numerics", message)
        if not (np.isfinite(reference).all() and np.isfinite(result).all()):
            message = f"output {name!r} holds NaN or Inf; look for such values in the weights"
            raise PassError(graph_pass.name, "numerics", message)
        limits, change = graph_pass.tolerance, _change(reference, result)
        if not _within(change, limits) and rounding is not None:
            own = _change(reference, rounding()[name])
            worst = graph_pass.worst
            limits = Tolerance(
                relative=max(limits.relative, min(2 * own.relative, worst.relative)),
                sqnr_db=min(limits.sqnr_db, max(own.sqnr_db - 6.0, worst.sqnr_db)),
            )
        error = max_abs_error(reference, result)
        if not _within(change, limits):
            raise PassError(
                graph_pass.name,
                "numerics",
                f"output {name!r} moved by {error:.3g} ({change.relative:.1e} of its largest value, limit "
                f"{limits.relative:.1e}) at an SQNR of {change.sqnr_db:.1f} dB (limit {limits.sqnr_db:.0f} "
                "dB); this is a defect of the pass: report it with the model",
            )
        worst_error, worst_sqnr = max(worst_error, error), min(worst_sqnr, change.sqnr_db)
    return worst_error, float(worst_sqnr)


def _change(reference: NDArray[Any], result: NDArray[Any]) -> Tolerance:
    """How far `result` is from `reference`, in the terms of a tolerance."""
    peak = max(float(np.abs(reference).max(initial=0.0)), float(np.finfo(np.float32).tiny))
    return Tolerance(max_abs_error(reference, result) / peak, sqnr_db(reference, result))


def _within(change: Tolerance, limits: Tolerance) -> bool:
    return change.relative <= limits.relative and change.sqnr_db >= limits.sqnr_db


def _same(name: str, what: str, before: tuple[TensorSpec, ...], after: tuple[TensorSpec, ...]) -> None:
    if before != after:
        raise PassError(name, "interface", f"the {what}s were {before} and are {after}")
