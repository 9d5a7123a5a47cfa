"""What the target table says of a device, and of a JetPack release.

Values only: the entries stand in `pipeline.target_table`, and what is asked of them in `pipeline.targets`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = [
    "Family",
    "JetPack",
    "Kind",
    "Peaks",
    "Precision",
    "Source",
    "Target",
    "TensorRtWindow",
    "version_key",
]

Family = Literal["cpu", "tensorrt"]
Kind = Literal["cpu", "jetson", "datacenter", "workstation", "geforce"]
Precision = Literal["int8", "fp16", "bf16", "fp32"]

TENSORRT_RTX_SMS = frozenset({75, 80, 86, 89, 120, 121})
"""The members of ``ComputeCapability`` in TensorRT-RTX 1.7.1: 87, 90, 100 and 110 are not among them."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where figures come from.

    ``read`` says whether the figures were read in that document, or in a stored copy of it, when the table was
    made. Where it is ``False`` the document is the one to look into, and the figure is to be checked there.
    """

    figures: str
    title: str
    url: str
    read: bool


@dataclass(frozen=True, slots=True)
class Peaks:
    """Dense peak rates (never the doubled figures for 2:4 sparsity); ``None`` where no source gives one."""

    int8_tops: float | None
    """Of the GPU alone, in 10¹² operations a second; a multiply-accumulate is two."""
    fp16_tflops: float | None
    """Of the GPU's tensor cores; with float32 accumulation where the two differ (GeForce)."""
    bandwidth_gb_s: float | None
    """Of the device's memory, in 10⁹ bytes a second."""
    dla_int8_tops: float | None = None
    """Of all DLA cores together."""


@dataclass(frozen=True, slots=True)
class TensorRtWindow:
    """The TensorRT versions that hold kernels for a compute capability, first and last included.

    ``None`` leaves an end open; ``first`` is ``None`` too where the first version is not known.
    """

    first: str | None
    last: str | None = None

    def holds(self, version: str) -> bool:
        """Whether `version` lies inside; a last of ``10.7`` holds 10.7.1."""
        key = version_key(version)
        if self.first is not None and key < version_key(self.first):
            return False
        last = version_key(self.last) if self.last is not None else None
        return last is None or key[: len(last)] <= last


@dataclass(frozen=True, slots=True)
class JetPack:
    """A JetPack release: what it brings, and for which GPUs."""

    version: str
    tensorrt: str
    python: str
    sms: tuple[int, ...]
    """Compute capabilities that its TensorRT has kernels for."""
    note: str | None = None


@dataclass(frozen=True, slots=True)
class Target:
    """A device that an engine can be built for, or estimated on.

    Figures are the maker's for the module or board as delivered, at its highest regular power mode.
    ``super_peaks`` are those of JetPack 6.2's Super mode where the module has one.
    """

    name: str
    title: str
    family: Family
    kind: Kind
    sm: int | None
    """CUDA compute capability times ten; ``None`` without a GPU."""
    precisions: tuple[Precision, ...]
    memory_gib: float | None
    """Memory the GPU can use, in GiB as the makers count them (16 for a 16 GB board)."""
    peaks: Peaks
    sources: tuple[Source, ...]
    sm_count: int | None = None
    """Streaming multiprocessors."""
    l2_mib: float | None = None
    """Second-level cache of the GPU; ``None`` where no source gives it."""
    dla_cores: int = 0
    super_peaks: Peaks | None = None
    tensorrt: TensorRtWindow | None = None
    """Of a board that takes any TensorRT; a Jetson takes its JetPack's."""
    refusal: str | None = None
    """Why no engine can be built for it."""
    aliases: tuple[str, ...] = ()
    note: str | None = None

    @property
    def buildable(self) -> bool:
        """Whether an engine can be built for it at all."""
        return self.refusal is None

    @property
    def tensorrt_rtx(self) -> bool:
        """Whether TensorRT-RTX compiles for its GPU, and so a machine without one can build a plan."""
        return self.buildable and self.sm in TENSORRT_RTX_SMS


def version_key(version: str) -> tuple[int, ...]:
    """``"10.16.2"`` as numbers that compare.

    Raises:
        ValueError: a part is no number.
    """
    return tuple(int(part) for part in version.split("."))
