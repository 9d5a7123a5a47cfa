"""What a placement is: which tensors are quantized, in which form, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["ActivationPoint", "Edge", "FloatType", "Placement", "WeightPoint"]

FloatType = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True, slots=True, order=True)
class Edge:
    """One use of a tensor: input number `index` of the node whose first output is `node`."""

    node: str
    index: int


@dataclass(frozen=True, slots=True)
class ActivationPoint:
    """A tensor that gets QuantizeLinear and DequantizeLinear.

    ``consumers`` read the dequantized tensor, every other use the float one. The grid covers the
    ranges of all ``sources``; points with the same sources therefore have the same scale. Where the
    values are integers beforehand (pixels), ``scale`` is their step and there are no sources.
    """

    tensor: str
    consumers: tuple[Edge, ...]
    sources: tuple[str, ...]
    reason: str
    scale: float | None = None


@dataclass(frozen=True, slots=True)
class WeightPoint:
    """A constant that is stored as int8, one scale for each slice along ``axis``.

    ``bias`` names the layer's bias where the placement wants it quantized as well; ``input`` is the
    activation the weight is multiplied with, whose scale the bias needs.
    """

    weight: str
    consumer: Edge
    axis: int
    input: str
    bias: str | None
    reason: str


@dataclass(frozen=True, slots=True)
class Placement:
    """Everything `calibration.qdq.insert_qdq` needs to know about one engine family.

    ``pixels`` are uint8 graph inputs that are only moved and cast to float: a DequantizeLinear with
    scale 1 and zero point 0 takes the place of the Cast, and nothing is rounded.
    ``skipped`` says which layers stay in float, and why. ``remainder`` is the type that everything not
    quantized will have: every scale is a value of it.
    """

    family: str
    activation_form: Literal["asymmetric_uint8", "symmetric_int8"]
    pixels: tuple[str, ...]
    activations: tuple[ActivationPoint, ...]
    weights: tuple[WeightPoint, ...]
    skipped: tuple[tuple[str, str], ...]
    remainder: FloatType = "float32"

    @property
    def observed(self) -> tuple[str, ...]:
        """The tensors whose range must be known, each once, in graph order."""
        return tuple(dict.fromkeys(source for point in self.activations for source in point.sources))
