"""Reads what TensorRT tells about an engine's kernels: the engine inspector's JSON, or a build log.

The JSON (``LayerInformationFormat.JSON``, of an engine built with ``ProfilingVerbosity.DETAILED``) has one
entry a kernel. Its fields changed over the versions, and every form below has been met in recordings or in
output made here:

* the type of a tensor stands in words (``"Thirty-two wide channel vectorized row major Int8 format"``), as a
  bare name (``"Half"``), with strides (``"Half(64,1:8,...)"``), or in a field ``Datatype`` of its own;
  ``"N/A due to dynamic shapes"`` where the inspector was given no execution context;
* the ONNX nodes stand in ``Metadata`` as ``[ONNX Layer: name]``, with or without a separator between; before
  TensorRT 8.6 only in the kernel's name, joined by ``+``;
* what computes is a ``Cask…`` or ``…Conv…`` kernel, or, compiled, a ``correlation`` or ``gemm``; compiled
  elementwise work is a ``kgen``.

A build log of verbosity VERBOSE ends with the same entries, one a line. TensorRT-RTX writes them when it
compiles ahead of time, so its kernels can be audited where no engine can be loaded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engines.tensorrt.layers import Precision
from pipeline.errors import EngineError

__all__ = ["Kernel", "kernels_of_build_log", "kernels_of_inspector"]

_TYPES: Mapping[str, Precision] = {
    "int8": "int8",
    "uint8": "int8",
    "half": "fp16",
    "fp16": "fp16",
    "bfloat16": "bf16",
    "bf16": "bf16",
    "float": "fp32",
    "fp32": "fp32",
    "tf32": "fp32",
}
_TYPE = re.compile(r"\b(u?int8|bfloat16|bf16|half|fp16|float|fp32|tf32)\b", re.IGNORECASE)
_ONNX_LAYER = re.compile(r"\[ONNX Layer: (.*?)\](?=[\s\x1e\x1f\[]|$)")
_LINE = re.compile(r"^(?:\S+ )?Name: (?P<name>.*?), LayerType: (?P<type>[^,]*), Inputs: \[(?P<rest>.*)$")
_TENSOR = re.compile(r"\{ Name: (?P<name>.*?), .*?Datatype: (?P<type>\w+)")


@dataclass(frozen=True, slots=True)
class Kernel:
    """One entry of the inspector. Precisions are ``None`` where the entry does not tell them."""

    name: str
    layer_type: str
    inputs: tuple[tuple[str, Precision | None], ...]
    outputs: tuple[tuple[str, Precision | None], ...]
    weights: Precision | None
    tactic: str
    metadata: tuple[str, ...]
    """ONNX nodes, where the entry names them."""
    origin: str = ""
    """Why a reformat is there: ``QDQ`` or ``REFORMAT``."""


def kernels_of_inspector(information: str) -> tuple[Kernel, ...]:
    """The kernels in ``IEngineInspector.get_engine_information(LayerInformationFormat.JSON)``.

    Raises:
        EngineError: it is no such JSON, or the engine was built without detailed verbosity.
    """
    try:
        layers = json.loads(information)["Layers"]
        if not isinstance(layers, list):
            raise TypeError(f"Layers is a {type(layers).__name__}")
    except (ValueError, KeyError, TypeError) as error:
        raise EngineError(
            f"this is no output of TensorRT's engine inspector ({error!r}); ask it for LayerInformationFormat.JSON"
        ) from error
    if layers and all(isinstance(layer, str) for layer in layers):
        raise EngineError(
            f"the inspector names the engine's {len(layers)} layers but not their types: the engine was built with "
            "ProfilingVerbosity.LAYER_NAMES_ONLY; build it with DETAILED"
        )
    try:
        return tuple(_kernel(layer) for layer in layers)
    except (AttributeError, KeyError, TypeError) as error:
        raise EngineError(f"a layer of the inspector's output cannot be read: {error!r}") from error


def kernels_of_build_log(log: str) -> tuple[Kernel, ...]:
    """The kernels that a build log of verbosity VERBOSE ends with.

    Raises:
        EngineError: it lists none.
    """
    kernels = tuple(
        kernel for line in log.splitlines() if (kernel := _kernel_of_line(line.strip())) is not None
    )
    if not kernels:
        raise EngineError(
            "the build log lists no layers; build with ProfilingVerbosity.DETAILED and log at VERBOSE"
        )
    return kernels


def _kernel(layer: Mapping[str, Any]) -> Kernel:
    weights = layer.get("Weights") or layer.get("ConvWeights") or {}
    constants = [_tensor(tensor)[1] for tensor in layer.get("Constants", ())]
    return Kernel(
        name=str(layer["Name"]),
        layer_type=str(layer.get("LayerType", "")),
        inputs=tuple(_tensor(tensor) for tensor in layer.get("Inputs", ())),
        outputs=tuple(_tensor(tensor) for tensor in layer.get("Outputs", ())),
        weights=_precision(str(weights.get("Type", ""))) if weights.get("Count", 1) else _first(constants),
        tactic=str(layer.get("TacticName", layer.get("TacticValue", ""))),
        metadata=tuple(_ONNX_LAYER.findall(str(layer.get("Metadata", "")))),
        origin=str(layer.get("Origin", "")),
    )


def _tensor(tensor: Mapping[str, Any]) -> tuple[str, Precision | None]:
    kind = tensor.get("Datatype") or tensor.get("Format/Datatype") or ""
    return str(tensor.get("Name", "")), _precision(str(kind))


def _precision(text: str) -> Precision | None:
    found = _TYPE.search(text)
    return None if found is None else _TYPES[found.group(1).lower()]


def _first(precisions: Sequence[Precision | None]) -> Precision | None:
    return next((precision for precision in precisions if precision is not None), None)


def _kernel_of_line(line: str) -> Kernel | None:
    match = _LINE.match(line)
    if match is None:
        return None
    rest, _, tail = match["rest"].partition("TacticName: ")
    inputs, _, outputs = rest.rpartition("Outputs: [")
    inputs, _, constants = inputs.partition("Constants: [")
    tactic, _, metadata = tail.partition(", StreamId: ")
    return Kernel(
        name=match["name"],
        layer_type=match["type"],
        inputs=_tensors(inputs),
        outputs=_tensors(outputs),
        weights=_first([precision for _, precision in _tensors(constants)]),
        tactic=tactic,
        metadata=tuple(_ONNX_LAYER.findall(metadata)),
    )


def _tensors(text: str) -> tuple[tuple[str, Precision | None], ...]:
    return tuple((match["name"], _precision(match["type"])) for match in _TENSOR.finditer(text))
