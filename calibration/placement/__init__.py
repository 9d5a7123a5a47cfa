"""Which tensors get Q/DQ: one file an engine family, each a plain function ``place(model, float_layers=...) -> Placement``."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol

import onnx_ir as ir

from calibration.placement import cpu, tensorrt
from calibration.placement.points import ActivationPoint, Edge, FloatType, Placement, WeightPoint

__all__ = [
    "PLACEMENTS",
    "ActivationPoint",
    "Edge",
    "FloatType",
    "Place",
    "Placement",
    "WeightPoint",
    "observed_by_all",
]


class Place(Protocol):
    """What the placements have in common; each may know more options."""

    def __call__(self, model: ir.Model, *, float_layers: frozenset[str] = ...) -> Placement:
        """Choose what is quantized; `float_layers`, named by their output tensor, are not."""
        ...


PLACEMENTS: Mapping[str, Place] = MappingProxyType({"cpu": cpu.place, "tensorrt": tensorrt.place})
"""By engine family."""


def observed_by_all(model: ir.Model) -> tuple[str, ...]:
    """The tensors whose ranges any of the placements needs: one calibration then emits every form."""
    return tuple(dict.fromkeys(name for place in PLACEMENTS.values() for name in place(model).observed))
