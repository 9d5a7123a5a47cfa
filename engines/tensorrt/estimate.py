"""How long a network will take on a device that is not here: a roofline range, layer by layer.

Each fused layer takes as long as the slower of its arithmetic and its memory traffic, and a kernel's own overhead::

    arithmetic = 2 · MACs · padding / (peak · waves filled · efficiency)
    memory     = (weights + activations that do not fit the L2 cache) / (bandwidth · efficiency)
    layer      = max(arithmetic, memory) + overhead

* *padding*: int8 tensor cores take input channels by 32, fp16 by 8 (TensorRT's ``kCHW32`` and ``kHWC8`` formats); a
  first layer of up to four channels is packed by 4.
* *waves filled*: a layer is cut into output tiles that the multiprocessors work off in waves. At batch 1 a late layer
  has fewer tiles than a large GPU has multiprocessors, and most of it idles ("Tile and wave quantization", NVIDIA
  Deep Learning Performance guide). Tiles are 64×64, on Turing 128×64.
* Grouped convolutions of few channels run outside the tensor cores.

The three pairs of constants are one band for every GPU and for the DLA: the low end of the estimate takes the better
of each, the high end the worse. No pair is further apart than `MAX_RATIO`, and so neither is any estimate. They were
chosen so that the published figures of ``docs/estimate.md`` lie inside, all with the same band; the page shows where
each lies. They are not measured on a device here.

Left out: transfers to and from the device, preprocessing outside the graph, waiting for the host, other work on the
memory bus, and clocks below those of the peak figures (power modes, heat).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import onnx_ir as ir

from engines.tensorrt.fusion import predict_layers
from engines.tensorrt.layers import FusedLayer, Precision
from engines.tensorrt.quantized_graph import PRECISION_BYTES, node_name
from pipeline.errors import UnsupportedError
from pipeline.inspection import at_batch_one
from pipeline.targets import Peaks, Target

__all__ = [
    "MAX_RATIO",
    "Estimate",
    "Gemm",
    "LayerEstimate",
    "assume_precision",
    "estimate",
    "estimate_layers",
]

MAX_RATIO = 2.5
"""No estimate's high end is more than this times its low end."""

COMPUTE_EFFICIENCY = (0.75, 0.32)
"""Share of the dense peak that a convolution kernel sustains in the waves it fills, at best and at worst. Whole
networks at large batches reach 0.37 to 0.52 of it (ResNet-50, MLPerf Offline: H100 SXM 0.37, T4 0.38, L4 0.43, A10
0.45, A100 0.52)."""
MEMORY_EFFICIENCY = (1.0, 0.42)
"""Share of the bandwidth that a kernel reaches. All of it stands for what TensorRT saves beyond the kernels predicted
here, by keeping tensors in the cache from one kernel to the next."""
OVERHEAD_US = (2.0, 5.0)
"""Start and drain of one kernel in a CUDA graph, in microseconds."""
CUDA_CORE_SHARE = 1 / 16
"""Rate of layers that tensor cores cannot take, as a share of the tensor cores' peak."""
MIN_GROUP_CHANNELS = 16
"""A grouped convolution with fewer channels a group than this runs outside the tensor cores."""
TURING_SM = 75

_CHANNEL_ATOM: Mapping[Precision, int] = {"int8": 32, "fp16": 8, "bf16": 8, "fp32": 4}
_PACKED_CHANNELS = 4

Bound = Literal["compute", "memory", "overhead"]
Engine = Literal["gpu", "dla"]


@dataclass(frozen=True, slots=True)
class Gemm:
    """A convolution or matrix product of one image as the kernel sees it: ``groups`` products M×K by K×N."""

    m: int
    """Output positions."""
    n: int
    """Output channels, of all groups."""
    channels: int
    """Input channels of one group; K is these times the kernel's area."""
    groups: int = 1


@dataclass(frozen=True, slots=True)
class LayerEstimate:
    """One kernel, in microseconds for the whole batch."""

    name: str
    kind: str
    precision: Precision
    low_us: float
    high_us: float
    bound: Bound
    """The largest part of its time, in the middle of the band."""
    tensor_utilization: float
    """Share of the peak that padding and half-filled waves leave, before any efficiency; 0 without MACs."""
    macs: int
    """Of the batch."""
    memory_bytes: int
    """Moved to or from the device's memory, of the batch."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A latency range, and what it rests on."""

    target: str
    engine: Engine
    batch: int
    layers: tuple[LayerEstimate, ...]
    assumptions: tuple[str, ...]

    @property
    def low_ms(self) -> float:
        """Latency of one batch at best."""
        return sum(layer.low_us for layer in self.layers) / 1e3

    @property
    def high_ms(self) -> float:
        """Latency of one batch at worst."""
        return sum(layer.high_us for layer in self.layers) / 1e3

    @property
    def images_per_s(self) -> tuple[float, float]:
        """At worst and at best, one batch after the other."""
        return self.batch / self.high_ms * 1e3, self.batch / self.low_ms * 1e3


def estimate(
    model: ir.Model,
    target: Target,
    *,
    precision: Precision | None = None,
    batch: int = 1,
    engine: Engine = "gpu",
    super_mode: bool = False,
) -> Estimate:
    """The latency range of `model` on `target`.

    Args:
        model: as it would be given to TensorRT; it is not changed.
        target: from `pipeline.targets`.
        precision: take every layer for one of this precision, whatever the graph says; by default each layer's own.
        batch: images a request.
        engine: ``dla`` for one DLA core, every layer on it.
        super_mode: the clocks of JetPack 6.2's Super mode.

    Raises:
        UnsupportedError: the table has no figure to estimate with, the target has no such engine or mode, or the
            graph cannot be predicted.
    """
    layers = predict_layers(model)
    if precision is not None:
        layers = assume_precision(layers, precision)
    shapes = _gemms(model)
    return estimate_layers(layers, shapes, target, batch=batch, engine=engine, super_mode=super_mode)


def assume_precision(layers: tuple[FusedLayer, ...], precision: Precision) -> tuple[FusedLayer, ...]:
    """`layers` as if each computed and stored in `precision`."""
    return tuple(
        replace(
            layer,
            precision=precision,
            **{
                part: getattr(layer, part) * PRECISION_BYTES[precision] // PRECISION_BYTES[layer.precision]
                for part in ("input_bytes", "weight_bytes", "output_bytes")
            },
        )
        for layer in layers
    )


def estimate_layers(
    layers: tuple[FusedLayer, ...],
    gemms: Mapping[str, Gemm],
    target: Target,
    *,
    batch: int = 1,
    engine: Engine = "gpu",
    super_mode: bool = False,
) -> Estimate:
    """As `estimate`, of layers already predicted.

    Args:
        layers: one image's; a ``noop`` costs nothing.
        gemms: shapes by node name; a layer with MACs but no shape is taken to fill its waves.
        target: see `estimate`.
        batch: see `estimate`.
        engine: see `estimate`.
        super_mode: see `estimate`.

    Raises:
        UnsupportedError: see `estimate`.
    """
    device = _Device(target, engine, super_mode)
    estimates = tuple(_layer(layer, gemms, device, batch) for layer in layers if layer.kind != "noop")
    return Estimate(target.name, engine, batch, estimates, _assumptions(device, batch))


class _Device:
    """The figures of one engine of a target."""

    def __init__(self, target: Target, engine: Engine, super_mode: bool) -> None:
        if target.family != "tensorrt":
            raise UnsupportedError(
                f"{target.name!r} is no GPU to estimate for; edgefold bench measures it on the CPU at hand"
            )
        if super_mode and target.super_peaks is None:
            raise UnsupportedError(f"{target.name} has no Super mode; leave --super out")
        if engine == "dla" and target.dla_cores == 0:
            raise UnsupportedError(f"{target.name} has no DLA; leave --dla out")
        self.target = target
        self.engine = engine
        self.super_mode = super_mode
        self.peaks: Peaks = target.super_peaks if super_mode and target.super_peaks else target.peaks
        self.sm_count = target.sm_count if engine == "gpu" else None
        self.l2_bytes = int((target.l2_mib or 0) * 2**20) if engine == "gpu" else 0
        self.tile = (128, 64) if target.sm == TURING_SM else (64, 64)

    @property
    def bandwidth(self) -> float:
        """Bytes a second."""
        if self.peaks.bandwidth_gb_s is None:
            raise self._no_figure("memory bandwidth")
        return self.peaks.bandwidth_gb_s * 1e9

    def peak(self, precision: Precision) -> float:
        """Operations a second.

        float32 is TF32, at half the rate of fp16, from Ampere on; before it the CUDA cores' (an eighth of the tensor
        cores' fp16 on Volta and Turing, half of fp16 without tensor cores).
        """
        if self.engine == "dla":
            if precision != "int8":
                raise UnsupportedError(
                    f"the table has no {precision} rate of {self.target.name}'s DLA; estimate --dla in int8"
                )
            return self._known(self.peaks.dla_int8_tops, "int8 rate of the DLA") / self.target.dla_cores
        if precision == "int8":
            return self._known(self.peaks.int8_tops, "int8 peak")
        fp16 = self._known(self.peaks.fp16_tflops, "fp16 peak")
        if precision in ("fp16", "bf16"):
            return fp16
        sm = self.target.sm or 0
        return fp16 / (2 if sm >= 80 or sm < 70 else 8)

    def _known(self, tera: float | None, what: str) -> float:
        if tera is None:
            raise self._no_figure(what)
        return tera * 1e12

    def _no_figure(self, what: str) -> UnsupportedError:
        return UnsupportedError(
            f"no source gives the {what} of {self.target.name}, so nothing can be estimated from it; see edgefold "
            f"targets {self.target.name}"
        )


def _layer(layer: FusedLayer, gemms: Mapping[str, Gemm], device: _Device, batch: int) -> LayerEstimate:
    gemm = next((gemms[node] for node in layer.nodes if node in gemms), None)
    macs = layer.macs * batch
    utilization = _utilization(gemm, layer.precision, device, batch) if macs else 0.0
    compute_s = 2 * macs / (device.peak(layer.precision) * utilization) if macs else 0.0
    activations = (layer.input_bytes + layer.output_bytes) * batch
    moved = layer.weight_bytes + (activations if activations > device.l2_bytes else 0)
    memory_s = moved / device.bandwidth
    low, high = (
        max(compute_s / compute, memory_s / memory) * 1e6 + overhead
        for compute, memory, overhead in zip(COMPUTE_EFFICIENCY, MEMORY_EFFICIENCY, OVERHEAD_US, strict=True)
    )
    middle: dict[Bound, float] = {
        "compute": compute_s * 1e6 / _middle(COMPUTE_EFFICIENCY),
        "memory": memory_s * 1e6 / _middle(MEMORY_EFFICIENCY),
        "overhead": _middle(OVERHEAD_US),
    }
    bound = max(middle, key=middle.__getitem__)
    return LayerEstimate(
        layer.name, layer.kind, layer.precision, low, high, bound, utilization, macs, moved
    )  # fmt: skip


def _utilization(gemm: Gemm | None, precision: Precision, device: _Device, batch: int) -> float:
    """Share of the peak left by channel padding and by waves that are not full."""
    if gemm is None:
        return 1.0
    if gemm.groups > 1 and gemm.channels < MIN_GROUP_CHANNELS:
        return CUDA_CORE_SHARE
    atom = _PACKED_CHANNELS if gemm.channels <= _PACKED_CHANNELS else _CHANNEL_ATOM[precision]
    padding = gemm.channels / (math.ceil(gemm.channels / atom) * atom)
    if device.sm_count is None:
        return padding
    tile_m, tile_n = device.tile
    m, n = gemm.m * batch, gemm.n // gemm.groups
    tiles = math.ceil(m / tile_m) * math.ceil(n / tile_n) * gemm.groups
    waves = math.ceil(tiles / device.sm_count)
    return padding * (m * gemm.n) / (waves * device.sm_count * tile_m * tile_n)


def _gemms(model: ir.Model) -> dict[str, Gemm]:
    """Shapes of the convolutions and matrix products whose sizes are known, by node name, of one image."""
    shapes: dict[str, Gemm] = {}
    for node in at_batch_one(model).graph:
        if node.op_type not in ("Conv", "Gemm", "MatMul") or len(node.inputs) < 2:
            continue
        weight, output = node.inputs[1], node.outputs[0]
        if weight is None or weight.shape is None or output.shape is None:
            continue
        if not (weight.shape.is_static() and output.shape.is_static()):
            continue
        sizes, out = weight.shape.numpy(), output.shape.numpy()
        if node.op_type == "Conv":
            groups = node.attributes.get_int("group", 1)
            shapes[node_name(node)] = Gemm(math.prod(out[2:]), sizes[0], sizes[1], groups)
        else:
            shapes[node_name(node)] = Gemm(math.prod(out[1:-1]), out[-1], math.prod(sizes) // out[-1])
    return shapes


def _assumptions(device: _Device, batch: int) -> tuple[str, ...]:
    """What the range rests on, for a person to read."""
    target, peaks = device.target, device.peaks
    best, worst = COMPUTE_EFFICIENCY
    if device.engine == "dla":
        where = "one DLA core runs every layer; layers that it cannot run are not looked for"
    else:
        tile_m, tile_n = device.tile
        where = (
            f"one stream on the GPU, in a CUDA graph; tiles of {tile_m}×{tile_n} over {target.sm_count} SMs"
        )
    clocks = "in Super mode" if device.super_mode else "at the clocks of the maker's peak figures"
    return (
        where,
        f"kernels reach {worst:g} to {best:g} of the dense peak in the waves they fill",
        f"memory reaches {MEMORY_EFFICIENCY[1]:g} to {MEMORY_EFFICIENCY[0]:g} of {peaks.bandwidth_gb_s:g} GB/s; "
        + (
            f"activations that fit the {target.l2_mib:g} MiB L2 stay there"
            if device.l2_bytes
            else "every tensor passes through it"
        ),
        f"{OVERHEAD_US[0]:g} to {OVERHEAD_US[1]:g} µs a kernel; input channels padded to the tensor cores' width",
        f"{target.title} {clocks}, not throttled and with the memory to itself; batch {batch}",
        "transfers, preprocessing outside the graph and the host's own time are left out",
        "kernels are predicted from the graph (edgefold has not built it); the band is one for all devices",
    )


def _middle(band: tuple[float, float]) -> float:
    return math.sqrt(band[0] * band[1])
