"""Which layers lose most in int8, from what calibration has seen already: no further pass.

A layer multiplies its input ``x`` by its weight ``W``. Quantization adds ``n`` to the one and ``d`` to the
other, so the output gets ``W n + d x`` (the product of both errors is of second order). With elements that
are not correlated, the ratio of that noise to the signal ``W x`` is

    NSR = E[n^2] / E[x^2]  +  sum d^2 / sum W^2

``E[n^2]`` and ``E[x^2]`` are integrals over the input's histogram, ``d`` is known. Correlated inputs make
both noise and signal larger than that; as a ranking within a network it holds, as a prediction of the
logits it is not meant.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

import numpy as np
import onnx_ir as ir

from calibration.observers import Distribution, distribution
from calibration.placement import Placement
from calibration.placement.layers import moved_from, name_of
from calibration.qdq import activation_params, weight_params
from calibration.qparams import dequantize, quantize
from calibration.ranges import error_on_grid
from pipeline.artifacts import TensorRange, TensorStatistics

__all__ = ["MAX_MAC_SHARE", "STANDS_OUT", "LayerNoise", "layer_noise", "stragglers"]

STANDS_OUT = 2.0
"""A straggler's noise is at least this many times the median layer's: 3 dB worse."""
MAX_MAC_SHARE = 0.2
"""Of the multiplications may leave int8: tensor cores take twice the time for them in half precision."""
_NOISE_LEFT = 0.5


@dataclass(frozen=True, slots=True)
class LayerNoise:
    """What int8 does to one layer by itself."""

    layer: str
    """The name of its output tensor."""
    nsr: float
    """Noise-to-signal power ratio at its output."""
    macs: int
    """Multiplications for one image."""

    @property
    def sqnr_db(self) -> float:
        """The same in decibels; ``inf`` where nothing is lost."""
        return -10.0 * math.log10(self.nsr) if self.nsr > 0.0 else math.inf


def layer_noise(
    graph: ir.Graph,
    placement: Placement,
    ranges: Mapping[str, TensorRange],
    statistics: TensorStatistics,
) -> tuple[LayerNoise, ...]:
    """The noise of every layer that `placement` quantizes, in graph order.

    Args:
        graph: the fp32 graph that `placement` was made for, its shapes known.
        placement: where Q/DQ stand.
        ranges: what the grids are made of.
        statistics: the histograms of the same calibration.
    """
    values = {name_of(v): v for v in (*graph.inputs, *(v for node in graph for v in node.outputs))}
    grids = {point.tensor: activation_params(point, placement, ranges) for point in placement.activations}
    rounded = {point.tensor for point in placement.activations if point.scale is None}  # pixels are not
    found = []
    for point in placement.weights:
        weight = graph.initializers[point.weight].const_value
        assert weight is not None, "a weight point names a constant"
        array = weight.numpy()
        params = weight_params(array, point, placement)
        noise = array - dequantize(quantize(array, params), params)
        nsr = _energy(noise) / max(_energy(array), np.finfo(np.float64).tiny)
        if point.input in rounded:
            parts = [
                (share, distribution(statistics.histogram[name], statistics.min[name], statistics.max[name]))
                for name, share in _origins(values[point.input], statistics)
            ]
            signal = sum(share * _mean_square(seen) for share, seen in parts)
            lost = sum(share * error_on_grid(seen, grids[point.input]) for share, seen in parts)
            nsr += lost / signal if signal > 0.0 else 0.0
        output = values[point.consumer.node].shape
        spatial = [size for size in (output or ())[2:] if isinstance(size, int)]
        found.append(LayerNoise(point.consumer.node, nsr, array.size * math.prod(spatial)))
    return tuple(found)


def stragglers(noise: tuple[LayerNoise, ...]) -> tuple[LayerNoise, ...]:
    """The layers worth half precision: few, much noisier than the others, and cheap enough.

    Those that are `STANDS_OUT` times as noisy as the median layer, worst first, until half of the noise of
    all layers is taken away; one whose multiplications no longer fit into `MAX_MAC_SHARE` is passed over.
    Networks whose layers are all alike have none: there, every layer in half precision costs time and
    hardly changes anything.
    """
    if not noise:
        return ()
    total, budget = sum(entry.nsr for entry in noise), MAX_MAC_SHARE * sum(entry.macs for entry in noise)
    threshold = STANDS_OUT * median(entry.nsr for entry in noise)
    left, chosen = total, []
    for entry in sorted(noise, key=lambda entry: -entry.nsr):
        if entry.nsr < threshold or left <= _NOISE_LEFT * total:
            break
        if entry.macs <= budget:
            budget -= entry.macs
            left -= entry.nsr
            chosen.append(entry)
    return tuple(chosen)


def _origins(value: ir.Value, statistics: TensorStatistics) -> list[tuple[str, float]]:
    """The observed tensors that `value` consists of, and the share of its channels each of them has.

    What a MaxPool leaves is not distributed as what it read, but of the same order.
    """
    if name_of(value) in statistics.histogram:
        return [(name_of(value), 1.0)]
    sources = moved_from(value, set())
    channels = [source.shape[1] if source.shape is not None else 1 for source in sources]
    sizes = [size if isinstance(size, int) else 1 for size in channels]
    return [
        (name, share * size / sum(sizes))
        for source, size in zip(sources, sizes, strict=True)
        for name, share in _origins(source, statistics)
    ]


def _mean_square(seen: Distribution) -> float:
    """``E[x^2]``; within a bin from ``a`` to ``b`` it is ``(a^2 + a b + b^2) / 3``."""
    a, b = seen.edges[:-1], seen.edges[1:]
    return float(np.average((a * a + a * b + b * b) / 3.0, weights=seen.mass))


def _energy(array: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> float:
    flat = array.reshape(-1).astype(np.float64)
    return float(flat @ flat)
