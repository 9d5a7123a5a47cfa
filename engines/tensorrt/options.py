"""How a TensorRT plan is to be built."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from engines.tensorrt.api import TensorRtApi
from pipeline.errors import UnsupportedError, UsageError

__all__ = ["BatchProfile", "HardwareCompatibility", "TensorRtOptions", "check_build_options"]

HardwareCompatibility = Literal["none", "same_compute_capability", "ampere_plus"]
Tiling = Literal["none", "fast", "moderate", "full"]

MIN_WORKSPACE_BYTES = 1 << 20
"""Less than this is a mistake of units: a workspace is a matter of megabytes."""


@dataclass(frozen=True, slots=True)
class BatchProfile:
    """An optimization profile of a graph with a free batch: kernels are chosen for ``optimum``."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    minimum: int = 1
    optimum: int = 1
    maximum: int = 1


@dataclass(frozen=True, slots=True)
class TensorRtOptions:
    """What a plan is built for. ``None`` leaves a choice to TensorRT."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    sms: tuple[int, ...] = ()
    """Compute capabilities, ``(80, 89)``; empty: that of the GPU found here. TensorRT only builds for
    the GPU it finds, so there it is a check; TensorRT-RTX builds for others, several in one plan."""
    profiles: tuple[BatchProfile, ...] = (BatchProfile(),)
    """For a graph with a free batch; one with a fixed batch has none."""
    workspace_bytes: int | None = None
    """Scratch memory a layer may use; halved and tried again where memory runs out."""
    optimization_level: int | None = None
    """0 (quick build) to 5 (slow build, fastest plan); TensorRT's own default is 3."""
    version_compatible: bool = False
    """A plan that later versions of TensorRT load, too."""
    hardware_compatibility: HardwareCompatibility = "none"
    """A plan for more GPUs than the one it is built on, at some cost in speed."""
    tiling: Tiling = "none"
    """How long to look for tilings that keep activations in L2."""
    timing_cache_dir: Path | None = None
    """Where kernel timings are kept between builds; ``None``: nowhere."""


def check_build_options(options: TensorRtOptions, api: TensorRtApi) -> None:
    """Refuse what cannot be built before anything is started.

    Raises:
        UsageError: a number out of its range.
        UnsupportedError: an SM, or an option, that this library does not have; names both.
    """
    if not options.profiles:
        raise UsageError("no batch profile is given; give at least one (minimum, optimum, maximum)")
    for profile in options.profiles:
        if not 1 <= profile.minimum <= profile.optimum <= profile.maximum:
            raise UsageError(
                f"batch profile {profile.minimum}, {profile.optimum}, {profile.maximum} is out of order; "
                "it must be 1 ≤ minimum ≤ optimum ≤ maximum"
            )
    if options.workspace_bytes is not None and options.workspace_bytes < MIN_WORKSPACE_BYTES:
        raise UsageError(
            f"a workspace of {options.workspace_bytes} bytes is asked for; give at least "
            f"{MIN_WORKSPACE_BYTES} (1 MiB)"
        )
    if options.optimization_level is not None and not 0 <= options.optimization_level <= 5:
        raise UsageError(f"builder optimization level {options.optimization_level} is not in 0 … 5")
    if len(set(options.sms)) < len(options.sms):
        raise UsageError(f"compute capabilities {list(options.sms)} name one twice")
    _check_features(options, api)


def _check_features(options: TensorRtOptions, api: TensorRtApi) -> None:
    if api.has("compute_capabilities"):
        known = api.compute_capabilities
        unknown = [sm for sm in options.sms if sm not in known]
        if unknown:
            raise UnsupportedError(
                f"{api.title} does not compile for SM {', '.join(map(str, unknown))}; it knows "
                f"{', '.join(map(str, known))}. Build on the device itself, with its TensorRT"
            )
    elif len(options.sms) > 1:
        raise UnsupportedError(
            f"{api.title} builds for the one GPU it finds, {len(options.sms)} compute capabilities were "
            f"asked for ({', '.join(map(str, options.sms))}); build once on each device"
        )
    if options.tiling != "none" and not api.has("tiling"):
        raise UnsupportedError(f"{api.title} has no tiling optimization; leave it at 'none'")
    if options.hardware_compatibility == "same_compute_capability" and not api.has("same_compute_capability"):
        raise UnsupportedError(
            f"{api.title} has no hardware compatibility 'same_compute_capability'; use 'ampere_plus' or "
            "'none', or a later TensorRT"
        )
    if api.flavour == "tensorrt_rtx" and (
        options.version_compatible or options.hardware_compatibility != "none"
    ):
        # The names exist: it warns about one and looks for a lean library it does not ship for the other.
        raise UnsupportedError(
            f"{api.title} has no version-compatible and no hardware-compatible plans; name every compute "
            "capability in one plan instead, and rebuild for another version"
        )
