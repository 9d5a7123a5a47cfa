"""What a corrected model's layer computes where it is not quantized after all: what it did before.

A correction makes up for the rounding of its layer. Of a layer that stays in float, nothing is rounded, and what
the correction did to it would be all that is lost.
"""

from __future__ import annotations

import onnx_ir as ir

from calibration.placement.points import Placement

__all__ = ["restore_float_layers"]


def restore_float_layers(corrected: ir.Model, original: ir.Model, placement: Placement) -> None:
    """Give every layer that `placement` leaves in float its own constants back, in place.

    Args:
        corrected: fp32, the weights of its layers corrected.
        original: the same graph before the corrections.
        placement: made for either.
    """
    quantized = {point.consumer.node for point in placement.weights}
    kept = {
        value.name
        for node in corrected.graph
        if node.outputs[0].name in quantized
        for value in node.inputs
        if value is not None
    }
    for name, value in corrected.graph.initializers.items():
        if name not in kept:
            value.const_value = original.graph.initializers[name].const_value
