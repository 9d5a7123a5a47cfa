"""What a plan says of itself, read before any TensorRT sees it.

A plan is native code that a library maps and trusts, and `deserialize_cuda_engine` is no
parser made for hostile or foreign bytes. What can be told without it is told first: whose plan it is,
whether it is whole, and, where the flavour writes them there, its version and the SMs it holds.

The first 64 bytes of a TensorRT-RTX plan, as read out of plans built by 1.7.1 for every SM it has and
confirmed by its own complaints (``header.magicTag``, ``plan.header.size == blobSize``)::

    0   4  "vtrt"                    28  4  "vtrt"
    8   8  2 (layout)                32  8  SMs, a bit each: 75, 80, 86, 89, 120, 121
    16  8  size of the plan, bytes   56  8  not interpreted here
    24  4  version: 1, 7, 1, 116

A plan of TensorRT starts with "ftrt" (Torch-TensorRT tells plans by it); the rest of its header is not
documented and not relied on here: its size and digest are the manifest's.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from engines.tensorrt.api import Flavour
from engines.tensorrt.options import BatchProfile
from pipeline.errors import IntegrityError

__all__ = ["BuiltPlan", "PlanHeader", "identify_plan"]

_MAGIC: dict[bytes, Flavour] = {b"ftrt": "tensorrt", b"vtrt": "tensorrt_rtx"}
_RTX_HEADER = struct.Struct("<4s4xQQ4B4sQ16x8x")
_RTX_LAYOUT = 2
_RTX_SM_BITS = (75, 80, 86, 89, 120, 121)
_SMALLEST_PLAN_BYTES = _RTX_HEADER.size


@dataclass(frozen=True, slots=True)
class PlanHeader:
    """What the first bytes of a plan say."""

    flavour: Flavour
    version: tuple[int, ...] | None
    """Of the library that built it; ``None`` where the header does not say."""
    sms: tuple[int, ...] | None
    """The compute capabilities it holds code for; ``None`` where the header does not say."""


@dataclass(frozen=True, slots=True)
class BuiltPlan:
    """A plan on disk and how it came to be."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    path: Path
    sha256: str
    size_bytes: int
    """Of the file; a plan of TensorRT-RTX is packed in it."""
    model_sha256: str
    flavour: Flavour
    version: str
    compute_capabilities: tuple[int, ...]
    """What it runs on; empty where TensorRT built for a GPU that could not be identified."""
    device: str | None
    """The GPU it was built on; ``None``: ahead of time, on a machine without one."""
    strongly_typed: bool
    """False: TensorRT refused the graph as strongly typed and chose precisions under FP16 and INT8 flags."""
    profiles: tuple[BatchProfile, ...]
    """Empty for a graph with a fixed batch."""
    workspace_bytes: int | None
    """The limit it was built under; ``None``: TensorRT's default."""
    seconds: float
    timing_cache: Path | None
    """The timing cache read and written; ``None`` where none was used."""
    warnings: tuple[str, ...]
    """What TensorRT warned of, and what was tried before it succeeded."""
    inspector: str | None
    """The engine inspector's JSON; ``None`` without a GPU to load the plan on."""
    kernel_log: str | None
    """The kernels as the build log describes them; ``None`` where it does not. TensorRT-RTX's does."""


def identify_plan(plan: bytes) -> PlanHeader:
    """Tell whose plan `plan` is, without any library.

    Args:
        plan: all of it, not packed.

    Raises:
        IntegrityError: it is no plan, is truncated, or has a header this version cannot read.
    """
    flavour = _MAGIC.get(plan[:4])
    if flavour is None:
        raise IntegrityError(
            f"this is no TensorRT plan: {len(plan)} bytes that start with {plan[:4]!r} instead of 'ftrt' "
            "(TensorRT) or 'vtrt' (TensorRT-RTX); build it again"
        )
    if len(plan) < _SMALLEST_PLAN_BYTES:
        raise IntegrityError(
            f"the plan is truncated: {len(plan)} bytes, its header alone has {_SMALLEST_PLAN_BYTES}; "
            "build it again, or copy it again from where it was built"
        )
    if flavour == "tensorrt":
        return PlanHeader(flavour, None, None)
    _, layout, size, *version, magic, bits = _RTX_HEADER.unpack_from(plan)
    if layout != _RTX_LAYOUT or magic != plan[:4]:
        raise IntegrityError(
            f"the TensorRT-RTX plan has header layout {layout}, this version of edgefold reads "
            f"{_RTX_LAYOUT}; build it again with a TensorRT-RTX that edgefold supports"
        )
    if size != len(plan):
        raise IntegrityError(
            f"the plan is {'truncated' if len(plan) < size else 'followed by other bytes'}: its header says "
            f"{size} bytes, {len(plan)} are there; build it again, or copy it again from where it was built"
        )
    sms = tuple(sm for bit, sm in enumerate(_RTX_SM_BITS) if bits >> bit & 1)
    return PlanHeader(flavour, tuple(version), sms)
