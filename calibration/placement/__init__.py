"""Which tensors get Q/DQ: one file an engine family, each a plain function ``place(model) -> Placement``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import onnx_ir as ir

from calibration.placement import cpu
from calibration.placement.points import ActivationPoint, Edge, Placement, WeightPoint

__all__ = ["PLACEMENTS", "ActivationPoint", "Edge", "Placement", "WeightPoint"]

PLACEMENTS: Mapping[str, Callable[[ir.Model], Placement]] = MappingProxyType({"cpu": cpu.place})
"""By engine family."""
