"""What runs a model: one backend an engine family, imported only when it is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import cast

from pipeline.contracts import EngineBackend
from pipeline.errors import UnsupportedError

__all__ = ["BACKENDS", "CPU_BACKENDS", "BackendEntry", "get_backend"]


@dataclass(frozen=True, slots=True)
class BackendEntry:
    """Where a backend is implemented and what it needs to be importable."""

    module: str
    """Our module; it defines `attribute`, an `EngineBackend`."""
    requires: str
    """The import name of the engine itself."""
    remedy: str
    """How to install the engine."""
    attribute: str = "BACKEND"


BACKENDS: Mapping[str, BackendEntry] = MappingProxyType(
    {
        "openvino": BackendEntry("engines.openvino", "openvino", "pip install openvino"),
        "onnxruntime": BackendEntry(
            "engines.onnxruntime", "onnxruntime", "pip install 'edgefold[onnxruntime]'"
        ),
        "tensorrt": BackendEntry(
            "engines.tensorrt.backend", "tensorrt", "pip install 'edgefold[tensorrt]'; JetPack has its own"
        ),
        "tensorrt_rtx": BackendEntry(
            "engines.tensorrt.backend", "tensorrt_rtx", "pip install 'edgefold[tensorrt-rtx]'", "RTX_BACKEND"
        ),
    }
)
"""Every engine family there is, by the name the command line and the manifest use."""

CPU_BACKENDS = ("openvino", "onnxruntime")
"""Those whose engine is the ONNX file itself, run on a CPU: any of them can run any CPU bundle."""


def get_backend(name: str) -> EngineBackend:
    """The backend called `name`, imported now.

    Raises:
        UnsupportedError: no backend has that name, or its engine cannot be imported here.
    """
    entry = BACKENDS.get(name)
    if entry is None:
        raise UnsupportedError(f"no engine is called {name!r}; there are: {', '.join(BACKENDS)}")
    try:
        importlib.import_module(entry.requires)
    except ImportError as error:  # also a shared library of the engine that is missing
        raise UnsupportedError(
            f"engine {name!r} cannot be used here: importing {entry.requires!r} failed ({error}); "
            f"install it with: {entry.remedy}"
        ) from error
    return cast(EngineBackend, getattr(importlib.import_module(entry.module), entry.attribute))
