"""A kernel of a TensorRT engine, as far as a prediction describes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["FusedLayer", "Kind", "Precision", "rewritten_tensor"]

Precision = Literal["int8", "fp16", "bf16", "fp32"]
Kind = Literal[
    "conv",
    "fc",
    "pool",
    "reduce",
    "elementwise",
    "softmax",
    "concat",
    "quantize",
    "requantize",
    "dequantize",
    "reformat",
    "noop",
    "other",
]
"""``quantize``, ``requantize``, ``dequantize`` and ``reformat`` only rewrite memory. A ``noop`` is no kernel
at all: a reshape, or a concatenation into whose output the producers write."""


@dataclass(frozen=True, slots=True)
class FusedLayer:
    """One kernel, as predicted, or a ``noop``. MACs and activation bytes are those of one image.

    ``nodes`` are the ONNX nodes it computes, in graph order; every node of a graph is in exactly one
    layer. ``weight_bytes`` is the whole weight and bias as the engine stores them.
    """

    name: str
    kind: Kind
    nodes: tuple[str, ...]
    precision: Precision
    macs: int
    input_bytes: int
    weight_bytes: int
    output_bytes: int
    reason: str


def rewritten_tensor(layer: FusedLayer) -> str:
    """The tensor that a ``quantize``, ``requantize`` or ``dequantize`` rewrites."""
    return layer.name.removeprefix(f"{layer.kind} ")
