"""Pixels centred on zero, so that symmetric int8 holds each of them exactly."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from pipeline.passes.graph_pass import GraphPass, LeaveAlone, RewriteReport
from pipeline.passes.linear import (
    STANDARD_DOMAINS,
    Affine,
    LinearLayer,
    add_initializer,
    describe,
    sole_consumer,
    unused_name,
)

__all__ = ["CENTER_PIXELS", "PIXEL_CENTER", "center_pixels"]

PIXEL_CENTER = 128
"""The middle of uint8: ``pixel - 128`` is in [-128, 127], which is int8."""


def center_pixels(model: ir.Model) -> RewriteReport:
    """Subtract 128 from the pixels, and give the first convolution the bias that makes up for it.

    Given::

        x = Cast(Transpose(image))            # image: uint8 NHWC
        y = Conv(x, W, b)

    Result::

        x = Sub(Transpose(Cast(image)), 128)
        y = Conv(x, W, b')                    # b'[o] = b[o] + 128 sum W[o]

    since ``W * p + b = W * (p - 128) + (b + 128 sum W)``, which holds at the borders too where the
    convolution does not pad with zeros. It is worth doing for three reasons. TensorRT's int8 is
    symmetric: at zero point 0 the pixel fits without loss only after the shift. With normalization
    folded, ``b`` cancels most of ``W * p``, and float16 would round two large numbers to get a small one.
    And what quantization does to ``W`` is multiplied by ``p - 128``, which is around zero, not by ``p``:
    the sum is that of the weights before they are quantized (``benchmarks/centered_pixels.py``).

    The Cast moves before the Transpose in any case: TensorRT takes uint8 at an input, and can only
    cast it.

    Left alone: a convolution that pads, pixels that go elsewhere than to one convolution.
    """
    n_rewrites = 0
    skipped: list[tuple[str, str]] = []
    for image in list(model.graph.inputs):
        if image.dtype != ir.DataType.UINT8:
            continue
        try:
            pixels, n_swapped = _cast_first(image)
            n_rewrites += n_swapped
            _subtract(model.graph, pixels)
            n_rewrites += 1
        except LeaveAlone as reason:
            skipped.append((f"input {image.name!r}", str(reason)))
    return RewriteReport(n_rewrites, tuple(skipped))


def _cast_first(image: ir.Value) -> tuple[ir.Value, int]:
    """The float tensor of the pixels, NCHW or as the graph has it, and whether the Cast was moved."""
    first = sole_consumer(image)
    if first.domain in STANDARD_DOMAINS and first.op_type == "Transpose":
        cast = sole_consumer(first.outputs[0])
        if cast.op_type != "Cast":
            raise LeaveAlone(f"{describe(first)} of the pixels goes to {describe(cast)}, not to a Cast")
        floats, moved = cast.outputs[0], first.outputs[0]
        cast.replace_input_with(0, image)
        floats.replace_all_uses_with(moved, replace_graph_outputs=True)
        first.replace_input_with(0, floats)
        moved.type, floats.shape = floats.type, image.shape
        graph = first.graph
        assert graph is not None
        graph.remove(cast)
        graph.insert_before(first, cast)
        return moved, 1
    if first.op_type != "Cast":
        raise LeaveAlone(f"the pixels go to {describe(first)}, not to a Cast")
    floats = first.outputs[0]
    after = sole_consumer(floats)
    return (after.outputs[0] if after.op_type == "Transpose" else floats), 0


def _subtract(graph: ir.Graph, pixels: ir.Value) -> None:
    convolution = sole_consumer(pixels)
    if convolution.op_type != "Conv" or convolution.inputs[0] is not pixels:
        raise LeaveAlone(f"the pixels go to {describe(convolution)}, not to a convolution")
    LinearLayer.of(convolution).put_before(Affine(np.ones(1), np.full(1, float(PIXEL_CENTER))))
    center = add_initializer(graph, f"{pixels.name}_center", np.asarray(PIXEL_CENTER, np.float32))
    node = ir.node("Sub", [pixels, center])
    node.outputs[0].name = unused_name(graph, f"{pixels.name}_centered")
    node.outputs[0].type, node.outputs[0].shape = pixels.type, pixels.shape
    convolution.replace_input_with(0, node.outputs[0])
    graph.insert_before(convolution, node)


CENTER_PIXELS = GraphPass("center_pixels", center_pixels)
