"""Which corrections a build makes unasked: those that paid on every network measured, while they are cheap.

`bias` costs less than one fp32 run of the calibration images and is always tried. `adaround` solves a dense system for
every layer: seconds for a network of a few million weights, minutes for Inception-ResNet-v2. It is made where its
estimated cost stays below `LIMIT_SECONDS`. The estimate counts operations at fixed rates, and does not time this
machine: the same network and images get the same corrections everywhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import onnx_ir as ir

from calibration.correction.linear import linear_layer
from calibration.correction.reconstruction import MAX_SUMS, n_sampled
from calibration.placement import Placement

__all__ = ["LIMIT_SECONDS", "Choice", "choose_corrections", "estimate_rounding_seconds"]

LIMIT_SECONDS = 60.0
"""Of estimated time for adaptive rounding. A build of Inception-ResNet-v2 takes a minute without it."""
_FLOAT32_PER_SECOND = 100e9
_FLOAT64_PER_SECOND = 20e9
_INFERENCE_PER_SECOND = 50e9
"""Multiplications on two cores with 512-bit vectors, in matrix products and in running the network's pieces."""
_PIECE_SECONDS = 0.05
"""To write and compile the piece of the graph up to a layer; there are two, fp32 and quantized."""
_RIDGES_SOLVED = 3
_DESCENT = 6
"""Sweeps of the descent, about, with the sequential rounding before it."""
_NOT_PAYING = "does not pay on every network measured (docs/accuracy.md); name it to have it made"


@dataclass(frozen=True, slots=True)
class Choice:
    """The corrections to be made, and why the others are not: ``(name, reason)``."""

    corrections: frozenset[str]
    left_out: tuple[tuple[str, str], ...]


def choose_corrections(model: ir.Model, placement: Placement, n_images: int) -> Choice:
    """What pays on this network.

    Args:
        model: the fp32 model that `placement` was made for, the shapes of its tensors known.
        placement: where Q/DQ will stand.
        n_images: those the corrections are made from.
    """
    left_out = [("equalize", _NOT_PAYING), ("ranges", _NOT_PAYING)]
    seconds = estimate_rounding_seconds(model, placement, n_images)
    if seconds <= LIMIT_SECONDS:
        return Choice(frozenset({"bias", "adaround"}), tuple(left_out))
    reason = (
        f"estimated at {seconds:.0f} s on two cores, above the {LIMIT_SECONDS:.0f} s spent unasked; "
        "--corrections bias,adaround makes it"
    )
    return Choice(frozenset({"bias"}), (*left_out, ("adaround", reason)))


def estimate_rounding_seconds(model: ir.Model, placement: Placement, n_images: int) -> float:
    """About what adaptive rounding takes on two cores.

    For a layer of ``G`` groups with ``O`` outputs of ``K`` products each, on ``P`` samples: the moments take
    ``2 P K (K + O)`` multiplications; each ridge ``K^3 / 3 + 2 K^2 O``; inverting and factoring ``H`` ``4/3 K^3``;
    each sweep ``K^2 O`` (`calibration.correction.rounding`). The network itself runs twice.
    """
    values = {value.name: value for node in model.graph for value in node.outputs}
    sums = solving = network = 0.0
    for point in placement.weights:
        output = values[point.consumer.node]
        node, weight = output.producer(), model.graph.initializers[point.weight].const_value
        assert node is not None, "a weight point names a layer"
        assert weight is not None, "a weight point names a constant"
        positions = math.prod(size for size in (output.shape or ())[2:] if isinstance(size, int))
        network += weight.size * positions
        layer = linear_layer(node, point)
        if isinstance(layer, str) or layer.n_sums > MAX_SUMS:
            continue
        g, k = layer.n_groups, layer.n_sums
        o = weight.size // (g * k)
        sums += g * 2.0 * n_sampled(layer) * k * (k + o)
        solving += g * (_RIDGES_SOLVED * (k**3 / 3 + 2 * k * k * o) + 4 / 3 * k**3 + _DESCENT * k * k * o)
    return (
        sums / _FLOAT32_PER_SECOND
        + solving / _FLOAT64_PER_SECOND
        + 2.0 * n_images * network / _INFERENCE_PER_SECOND
        + 2.0 * _PIECE_SECONDS * len(placement.weights)
    )
