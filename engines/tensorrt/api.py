"""Which TensorRT there is, and what it can do.

Two libraries have the same Python API: ``tensorrt`` and ``tensorrt_rtx``. Between versions and
flavours it gains and loses names; a feature is therefore looked up by its name in the module that was
imported, never concluded from the version. The one thing no name tells is that TensorRT-RTX
has the calls of the timing cache and does nothing with it (release notes of TensorRT-RTX 1.1), so that
is asked of the flavour.

The names were read out of the bindings that are published for Python 3.11: 10.3.0, 10.13.2 and 11.4.0 of
``tensorrt``, and 1.7.1 of ``tensorrt_rtx`` (table in ``docs/tensorrt.md``).
"""

from __future__ import annotations

import importlib
import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from pipeline.errors import UnsupportedError

__all__ = ["FEATURES", "MINIMUM_VERSIONS", "Feature", "Flavour", "TensorRtApi", "load_api"]

Flavour = Literal["tensorrt", "tensorrt_rtx"]
Feature = Literal[
    "strong_typing",
    "weak_typing",
    "same_compute_capability",
    "tiling",
    "compute_capabilities",
    "runtime_config",
    "runtime_cache",
    "engine_stat",
    "engine_validity",
]

FEATURES: Mapping[Feature, str] = MappingProxyType(
    {
        "strong_typing": "NetworkDefinitionCreationFlag.STRONGLY_TYPED",
        "weak_typing": "BuilderFlag.INT8",
        "same_compute_capability": "HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY",
        "tiling": "IBuilderConfig.tiling_optimization_level",
        "compute_capabilities": "IBuilderConfig.set_compute_capability",
        "runtime_config": "ICudaEngine.create_runtime_config",
        "runtime_cache": "IRuntimeConfig.create_runtime_cache",
        "engine_stat": "ICudaEngine.get_engine_stat",
        "engine_validity": "Runtime.get_engine_validity",
    }
)
"""A feature is there where this name is."""

MINIMUM_VERSIONS: Mapping[Flavour, tuple[int, ...]] = MappingProxyType(
    {"tensorrt": (10, 3), "tensorrt_rtx": (1, 7)}
)
"""The oldest that is supported: JetPack 6's TensorRT, and the TensorRT-RTX this was run on."""

_TITLES: Mapping[Flavour, str] = MappingProxyType({"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"})
_REMEDIES: Mapping[Flavour, str] = MappingProxyType(
    {
        "tensorrt": "pip install 'edgefold[tensorrt]'; on a Jetson it is JetPack's own, seen from a "
        "--system-site-packages environment",
        "tensorrt_rtx": "pip install 'edgefold[tensorrt-rtx]'",
    }
)


@dataclass(frozen=True, slots=True)
class TensorRtApi:
    """An imported TensorRT."""

    flavour: Flavour
    module: Any
    """``tensorrt`` or ``tensorrt_rtx``."""
    version: tuple[int, ...]
    """As numbers, to compare: ``(10, 3, 0)``."""
    version_text: str
    """As the library writes it: ``10.3.0``, ``1.7.1.116``."""

    @property
    def title(self) -> str:
        """Name and version for people: ``TensorRT-RTX 1.7.1.116``."""
        return f"{_TITLES[self.flavour]} {self.version_text}"

    def has(self, feature: Feature) -> bool:
        """Whether this library has `feature`."""
        try:
            operator.attrgetter(FEATURES[feature])(self.module)
        except AttributeError:
            return False
        return True

    @property
    def uses_timing_cache(self) -> bool:
        """Whether a timing cache changes anything. TensorRT-RTX chooses kernels without timing them."""
        return self.flavour == "tensorrt"

    @property
    def compute_capabilities(self) -> tuple[int, ...]:
        """The SMs this library compiles for without having such a device, sorted: ``(75, 80, …)``.

        Empty where it only compiles for the GPU it finds (every ``tensorrt``).
        """
        if not self.has("compute_capabilities"):
            return ()
        names = (re.fullmatch(r"SM(\d+)", name) for name in dir(self.module.ComputeCapability))
        return tuple(sorted(int(match[1]) for match in names if match))


def load_api(flavour: Flavour) -> TensorRtApi:
    """Import a flavour of TensorRT.

    Raises:
        UnsupportedError: it is not installed, a library it needs is missing, or it is older than
            `MINIMUM_VERSIONS`; with the remedy.
    """
    title = _TITLES[flavour]
    try:
        module = importlib.import_module(flavour)
    except (ImportError, OSError) as error:  # OSError: a shared library that ctypes cannot open
        raise UnsupportedError(
            f"{title} cannot be used here: importing {flavour!r} failed ({error}); "
            f"install it with: {_REMEDIES[flavour]}"
        ) from error
    text = str(getattr(module, "__version__", "unknown"))
    match = re.match(r"\d+(?:\.\d+)*", text)
    version = tuple(map(int, match[0].split("."))) if match else ()
    minimum = MINIMUM_VERSIONS[flavour]
    if version < minimum:
        raise UnsupportedError(
            f"{title} {text} is installed, {'.'.join(map(str, minimum))} is the oldest supported; "
            f"get a newer one: {_REMEDIES[flavour]}"
        )
    return TensorRtApi(flavour, module, version, text)
