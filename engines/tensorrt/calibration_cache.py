"""TensorRT's calibration cache: int8 scales in a text file, for networks without Q/DQ.

A DLA takes no explicit quantization; its int8 engines are built from the folded ONNX and this file, which
`IInt8EntropyCalibrator2.read_calibration_cache` hands to the builder (``trtexec --calib=FILE``). The format is
TensorRT's own::

    TRT-100300-EntropyCalibration2
    image: 40008102
    relu_1: 3d6eb5ae

The first line names the version of TensorRT, another one ignores the file. Then each tensor with its scale:
the bits of a float32 in hexadecimal, ``real = scale * q``. A scale of 0 means: none.

Every tensor inside the network needs a scale, or its layers fall back to fp16. The calibration table has
those that Q/DQ would stand on; the others follow from them:

* **Max and average pools, concatenations, reshapes** have one scale on both sides, the union: the DLA
  requires it of pools and of everything that meets in a concatenation;
* **what an activation function takes** has the scale of what it gives: both are one kernel;
* **pixels** cast from uint8 reach 255; centred ones (`pipeline.passes.center_pixels`) have scale 1.

The network's outputs need none: nothing is computed from them.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from engines.tensorrt.quantized_graph import QuantizedGraph, is_move
from pipeline.artifacts import CalibrationTable, TensorRange
from pipeline.errors import CalibrationError, IntegrityError

__all__ = ["CalibrationCache", "cache_from_text", "cache_to_text", "make_cache"]

_QMAX = 127
_PIXEL_MAX = 255.0
_HEADER = re.compile(r"TRT-(\d{4,6})-EntropyCalibration2")
_LINE = re.compile(r"(?P<tensor>.+): (?P<bits>[0-9a-f]{1,8})")
_FROM_BEHIND = frozenset({"Relu", "Clip", "LeakyRelu", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish"})
_TIES = frozenset({"AveragePool", "GlobalAveragePool", "GlobalMaxPool", "ReduceMean"})


@dataclass(frozen=True, slots=True)
class CalibrationCache:
    """Scales by tensor, for one version of TensorRT."""

    tensorrt: tuple[int, int, int]
    scales: Mapping[str, np.float32]
    """``real = scale * q``, q from -127 to 127; 0 where a tensor has none."""


def make_cache(
    model: ir.Model, table: CalibrationTable, tensorrt: tuple[int, int, int] = (10, 3, 0)
) -> CalibrationCache:
    """The scales of every tensor of `model` that int8 layers read or write.

    Args:
        model: the folded fp32 model the table was made of, without Q/DQ.
        table: its ranges. That it belongs to the model is the caller's to check
            (`calibration.table.check_table`).
        tensorrt: the version that will read the cache; JetPack 6.1 and 6.2 have 10.3.0.

    Raises:
        CalibrationError: a tensor has no range and none can be derived, or its range is not finite.
    """
    graph = QuantizedGraph(model)
    ranges = _Ranges(graph, table.ranges)
    missing = [name for name in ranges.needed if ranges.of(name) is None]
    if missing:
        raise CalibrationError(
            f"no range for tensor {missing[0]!r} ({len(missing)} of {len(ranges.needed)} missing), and none follows "
            "from its neighbours: a DLA would run its layers in fp16; calibrate this model again"
        )
    scales = {}
    for name in ranges.known:
        peak = ranges.of(name)
        if peak is not None:
            if not np.isfinite(peak):
                raise CalibrationError(f"tensor {name!r} has the range {peak}; check the calibration images")
            scales[name] = np.float32(peak / _QMAX)
    return CalibrationCache(tensorrt, scales)


def cache_to_text(cache: CalibrationCache) -> str:
    """The file, byte for byte the same for the same cache.

    Raises:
        CalibrationError: a tensor's name holds a line break.
    """
    broken = [name for name in cache.scales if "\n" in name or "\r" in name or not name]
    if broken:
        raise CalibrationError(
            f"tensor name {broken[0]!r} cannot stand in a calibration cache; rename the tensor"
        )
    lines = [f"TRT-{_version_number(cache.tensorrt)}-EntropyCalibration2"]
    lines += [f"{name}: {_bits(scale):x}" for name, scale in cache.scales.items()]
    return "\n".join(lines) + "\n"


def cache_from_text(text: str) -> CalibrationCache:
    """Read a cache, of this program or of TensorRT's own calibration.

    Raises:
        IntegrityError: it is none; names the line.
    """
    lines = text.split("\n")
    header = _HEADER.fullmatch(lines[0])
    if header is None:
        raise IntegrityError(
            f"not a calibration cache: the first line is {lines[0][:60]!r}, it should be TRT-<version>-EntropyCalibration2"
        )
    if lines[-1]:
        raise IntegrityError(f"the calibration cache breaks off in line {len(lines)}: {lines[-1][:60]!r}")
    scales: dict[str, np.float32] = {}
    for number, line in enumerate(lines[1:-1], start=2):
        match = _LINE.fullmatch(line)
        if match is None:
            raise IntegrityError(
                f"line {number} of the calibration cache is {line[:60]!r}, not 'tensor: hexadecimal scale'"
            )
        name, bits = match["tensor"], int(match["bits"], 16)
        scale = np.float32(struct.unpack(">f", struct.pack(">I", bits))[0])
        if not np.isfinite(scale) or scale < 0:
            raise IntegrityError(f"line {number} of the calibration cache gives {name!r} the scale {scale}")
        if name in scales:
            raise IntegrityError(
                f"line {number} of the calibration cache names tensor {name!r} a second time"
            )
        scales[name] = scale
    return CalibrationCache(_version_of(int(header[1])), scales)


class _Ranges:
    """The largest magnitude of every tensor, found in the table or derived from its neighbours."""

    def __init__(self, graph: QuantizedGraph, ranges: Mapping[str, TensorRange]) -> None:
        self._parent: dict[str, str] = {}
        self._peaks: dict[str, float] = {}
        outputs = {value.name for value in graph.graph.outputs}
        values = [*graph.graph.inputs, *(value for node in graph.nodes for value in node.outputs[:1])]
        activations = [value for value in values if graph.precision(value) is not None and value.name]
        self.known = [value.name or "" for value in activations]
        for node in graph.nodes:
            ties = [*graph.activations(node), node.outputs[0]]
            tied = is_move(node) or node.op_type in _TIES
            # Before an activation function only what the table does not know.
            derived = node.op_type in _FROM_BEHIND and ties[0].name not in ranges
            if (tied or derived or node.op_type == "Cast") and all(
                graph.precision(v) is not None for v in ties
            ):
                self._tie(value.name or "" for value in ties)
        for value in activations:
            name = value.name or ""
            if name in ranges:
                self._raise(name, max(-ranges[name].low, ranges[name].high))
            if value.dtype == ir.DataType.UINT8:
                self._raise(name, _PIXEL_MAX)
        pixels = {self._root(value.name or "") for value in activations if value.dtype == ir.DataType.UINT8}
        for node in graph.nodes:
            source = node.inputs[0] if node.op_type == "Sub" else None
            if source is not None and self._root(source.name or "") in pixels:
                self._raise(node.outputs[0].name or "", _centered_peak(node))
        ends = {self._root(name) for name in outputs if name}
        self.needed = [name for name in self.known if name not in outputs and self._root(name) not in ends]

    def of(self, name: str) -> float | None:
        return self._peaks.get(self._root(name))

    def _root(self, name: str) -> str:
        while self._parent.setdefault(name, name) != name:
            name = self._parent[name]
        return name

    def _tie(self, names: Iterable[str]) -> None:
        first, *others = names
        for other in others:
            self._parent[self._root(other)] = self._root(first)

    def _raise(self, name: str, peak: float) -> None:
        root = self._root(name)
        self._peaks[root] = max(peak, self._peaks.get(root, 0.0))


def _centered_peak(node: ir.Node) -> float:
    """The magnitude that ``pixel - constant`` is given.

    Of ``pixel - 128`` it is 127, although it goes to -128: int8 holds that too, and at scale 1 nothing is rounded.
    """
    center = node.inputs[1]
    assert center is not None
    if center.const_value is None:
        return _PIXEL_MAX
    shift = float(np.max(center.const_value.numpy()))
    return float(_QMAX) if shift == _QMAX + 1 else max(abs(shift), abs(_PIXEL_MAX - shift))


def _bits(scale: np.float32) -> int:
    return int(struct.unpack(">I", struct.pack(">f", scale))[0])


def _version_number(version: tuple[int, int, int]) -> int:
    """``NV_TENSORRT_VERSION``: 8.5.2 is 8502, 10.3.0 is 100300."""
    major, minor, patch = version
    return (major * 10000 if major >= 10 else major * 1000) + minor * 100 + patch


def _version_of(number: int) -> tuple[int, int, int]:
    major_unit = 10000 if number >= 100000 else 1000
    return number // major_unit, number % major_unit // 100, number % 100
