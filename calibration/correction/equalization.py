"""Cross-layer equalization: narrow channels of an activation get more of the grid that the widest one needs.

An activation has one grid for all its channels; a channel a tenth as wide as the widest is left with a tenth of
the levels. Scaling it up where it is made and down where it is read costs nothing, and the fp32 model computes
the same (Nagel et al., arXiv 1906.04721, section 4.1; `calibration.correction.channels` finds which channels
belong together).

There, scales are chosen for per-tensor *weight* grids, ``s = sqrt(r1 r2) / r2``. Weights here have a grid for
each output channel, which takes any scale of the output in by itself; what is left to equalize are the
activations:

    s_c = largest range of any channel / (MARGIN * range of channel c), at least 1

over all tensors that the channel passes through the smallest such ``s``, so that no grid becomes wider.

**Relu6.** ``clip(s x, 0, 6) = s clip(x, 0, 6)`` holds while ``s x <= 6``. The paper gives each channel a clip of
its own, which no integer engine fuses, or drops the clip. Neither is done here: a channel is scaled up only as
far as `CLIP_MARGIN` times the largest value seen stays below the clip. A channel that was never active has
shown no largest value, and is left alone.

**High biases** (section 4.1.3 there) come from scaling channels down in front of a Relu. Here they are only
scaled up, to no more than the widest channel, so there is nothing to absorb.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from calibration.collect import fix_batch, fixed_batch, is_non_negative
from calibration.correction.channels import ChannelAtoms, Layer, trace_channels
from pipeline.contracts import RunnerFactory
from pipeline.errors import CalibrationError
from pipeline.onnx_files import save_for_runner

__all__ = [
    "ChannelRanges",
    "channel_ranges",
    "channel_scales",
    "equalize",
    "read_scales",
    "scaled_weight",
    "tensors_to_equalize",
]

MARGIN = 2.0
"""How far a channel may go beyond what was seen of it before its grid clips it. The largest value of a tensor is much
the same on all images, that of one channel is not: without a margin, 28 of 29 layers of `inception_resnet_lite`
lost, up to 50 dB, on images not seen."""
CLIP_MARGIN = 4.0
"""Measured on EfficientNet-Lite1: with 2, images not seen in calibration reach the clip in so many channels
that the fp32 model itself is changed to 20 dB."""
MAX_SCALE = 16.0
"""A channel 4 bits below the widest gains 4 bits; what is still smaller hardly matters to anything."""

ChannelRanges = Mapping[str, tuple[NDArray[np.float32], NDArray[np.float32]]]
"""Smallest and largest value of every channel, by tensor."""


def tensors_to_equalize(graph: ir.Graph, quantized: Sequence[str]) -> tuple[str, ...]:
    """The tensors whose channel ranges `channel_scales` must know.

    Args:
        graph: the fp32 model's, the shapes of its tensors known.
        quantized: the tensors that get a grid.
    """
    atoms = trace_channels(graph)
    names = [*quantized, *(name for name, _ in atoms.clips)]
    return tuple(dict.fromkeys(name for name in names if name in atoms.of))


def channel_ranges(
    model: ir.Model,
    tensors: Sequence[str],
    images: NDArray[np.uint8],
    runner_factory: RunnerFactory,
    folder: Path,
) -> ChannelRanges:
    """One pass over the images for the extrema of every channel; the reduction is part of the graph.

    Where no value can be below 0, neither extremum is: the smallest is not looked for.

    Raises:
        CalibrationError: an extremum is NaN or Inf; names the tensor.
    """
    batch = fixed_batch(model)
    probe = model.clone()
    fix_batch(probe, batch)
    values = {value.name: value for node in probe.graph for value in node.outputs}
    outputs: list[ir.Value] = []
    for index, name in enumerate(tensors):
        value = values[name]
        rank = 0 if value.shape is None else len(value.shape)
        for op_type in ("ReduceMax",) if is_non_negative(value) else ("ReduceMin", "ReduceMax"):
            inputs = [value]
            if rank > 2:
                axes = ir.tensor(np.arange(2, rank, dtype=np.int64), name=f"edgefold_axes_{index}_{op_type}")
                initializer = ir.Value(
                    name=axes.name,
                    type=ir.TensorType(axes.dtype),
                    shape=ir.Shape([rank - 2]),
                    const_value=axes,
                )
                probe.graph.initializers[axes.name or ""] = initializer
                inputs.append(initializer)
            node = ir.node(op_type if rank > 2 else "Identity", inputs, {"keepdims": 0} if rank > 2 else {})
            node.outputs[0].name = f"edgefold_{op_type}_{index}"
            node.outputs[0].dtype = ir.DataType.FLOAT
            probe.graph.append(node)
            outputs.append(node.outputs[0])
    probe.graph.outputs.clear()
    probe.graph.outputs.extend(outputs)
    path = folder / "channels.onnx"
    save_for_runner(probe, path)
    low = [np.float32(np.inf)] * len(tensors)
    high = [np.float32(-np.inf)] * len(tensors)
    with runner_factory(path, ()) as runner:
        for start in range(0, len(images), batch):
            seen = runner.infer({probe.graph.inputs[0].name or "": images[start : start + batch]})
            for index in range(len(tensors)):
                largest = seen[f"edgefold_ReduceMax_{index}"]
                smallest = seen.get(f"edgefold_ReduceMin_{index}", np.zeros_like(largest))
                low[index] = np.minimum(low[index], smallest.min(axis=0))
                high[index] = np.maximum(high[index], largest.max(axis=0))
    ranges = {name: (np.asarray(low[i]), np.asarray(high[i])) for i, name in enumerate(tensors)}
    for name, ends in ranges.items():
        if not all(np.isfinite(end).all() for end in ends):
            raise CalibrationError(
                f"tensor {name!r} holds NaN or Inf; check the model's weights and its preprocessing"
            )
    return ranges


def channel_scales(
    atoms: ChannelAtoms, ranges: ChannelRanges, quantized: Sequence[str]
) -> NDArray[np.float64]:
    """The scale of every atom, at least 1.

    Args:
        atoms: of the graph.
        ranges: of the tensors `tensors_to_equalize` names.
        quantized: the tensors that get a grid.
    """
    scales = np.full(atoms.n_atoms, MAX_SCALE)
    reached = np.zeros(atoms.n_atoms, bool)
    for name in quantized:
        if name not in atoms.of:
            continue
        low, high = ranges[name]
        roots = atoms.roots(atoms.of[name])
        room = np.full(len(low), np.inf)
        for end, widest in ((high, high.max()), (-low, (-low).max())):
            np.minimum(room, widest / (MARGIN * np.maximum(end, 1e-12)), out=room, where=end > 0.0)
        np.minimum.at(scales, roots, np.where(np.isfinite(room), np.maximum(room, 1.0), 1.0))
        reached[roots] = True
    for name, limit in atoms.clips:
        high = ranges[name][1]
        room = np.where(high > 0.0, limit / (CLIP_MARGIN * np.maximum(high, 1e-12)), 1.0)
        np.minimum.at(scales, atoms.roots(atoms.of[name]), np.maximum(room, 1.0))
    scales[~reached] = 1.0
    scales[sorted(atoms.fixed)] = 1.0
    return scales[atoms.roots(np.arange(atoms.n_atoms))]


def equalize(atoms: ChannelAtoms, scales: NDArray[np.float64]) -> None:
    """Scale weights and biases in place, in the graph that `atoms` was traced on; it computes the same.

    Args:
        atoms: the graph's channels.
        scales: of every atom; tied atoms have equal ones.
    """
    for layer in atoms.layers:
        made = scales[atoms.of[layer.node.outputs[0].name or ""]]
        weight = layer.node.inputs[1]
        assert weight is not None
        assert weight.const_value is not None
        scaled = scaled_weight(layer, weight.const_value.numpy(), made, read_scales(layer, atoms, scales))
        weight.const_value = ir.tensor(scaled, name=weight.name)
        bias = layer.node.inputs[2] if len(layer.node.inputs) > 2 else None
        if bias is not None and bias.const_value is not None:
            values = bias.const_value.numpy().astype(np.float64) * made
            bias.const_value = ir.tensor(values.astype(np.float32), name=bias.name)


def read_scales(layer: Layer, atoms: ChannelAtoms, scales: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """The scales of the channels that `layer` reads, ``None`` where these have no atoms."""
    source = layer.node.inputs[0]
    read = None if source is None else atoms.of.get(source.name or "")
    return None if read is None else scales[read]


def scaled_weight(
    layer: Layer,
    weight: NDArray[np.float32],
    made: NDArray[np.float64] | float,
    read: NDArray[np.float64] | None,
) -> NDArray[np.float32]:
    """`weight` times the scales of the channels it makes, over those of the channels it reads."""
    rows = weight.T if layer.point.axis == 1 else weight
    n_sums = rows.shape[1]
    factors = np.broadcast_to(np.reshape(made, (-1, 1)), (len(rows), n_sums))
    if read is not None:
        grouped = factors.reshape(layer.n_groups, -1, n_sums)
        factors = (grouped / read.reshape(layer.n_groups, 1, -1)).reshape(factors.shape)
    # A factor for each kernel, not for each weight, is computed in float64.
    rows = rows * factors.astype(np.float32).reshape(*factors.shape, *[1] * (rows.ndim - 2))
    return np.ascontiguousarray(rows.T if layer.point.axis == 1 else rows)
