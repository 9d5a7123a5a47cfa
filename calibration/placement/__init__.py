"""Which tensors get Q/DQ: one file an engine family, each a plain function ``place(model) -> Placement``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import onnx_ir as ir

from calibration.placement import cpu, tensorrt
from calibration.placement.points import ActivationPoint, Edge, FloatType, Placement, WeightPoint

__all__ = [
    "PLACEMENTS",
    "ActivationPoint",
    "Edge",
    "FloatType",
    "Placement",
    "WeightPoint",
    "observed_by_all",
]

PLACEMENTS: Mapping[str, Callable[[ir.Model], Placement]] = MappingProxyType(
    {"cpu": cpu.place, "tensorrt": tensorrt.place}
)
"""By engine family."""


def observed_by_all(model: ir.Model) -> tuple[str, ...]:
    """The tensors whose ranges any of the placements needs: one calibration then emits every form."""
    return tuple(dict.fromkeys(name for place in PLACEMENTS.values() for name in place(model).observed))
