"""Whether equalization helps: every layer that reads scaled channels, before and after, on images apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from calibration.correction.channels import ChannelAtoms, Layer
from calibration.correction.equalization import ChannelRanges, read_scales, scaled_weight
from calibration.correction.probe import LayerProbe
from calibration.correction.records import CorrectionRecord
from calibration.placement import Placement
from calibration.qparams import ACTIVATION_FORMS, dequantize, per_channel_int8, quantize
from pipeline.artifacts import QuantParams, TensorRange
from pipeline.contracts import RunnerFactory

__all__ = ["judge_scales"]

_JUDGED_CHANNELS = 64
"""Of a convolution's output, about, from all over: both copies of a layer are judged by the same ones."""


def judge_scales(
    model: ir.Model,
    atoms: ChannelAtoms,
    scales: NDArray[np.float64],
    ranges: ChannelRanges,
    placement: Placement,
    images: NDArray[np.uint8],
    float_weights: bool,
    runner_factory: RunnerFactory,
    folder: Path,
) -> tuple[NDArray[np.float64], tuple[CorrectionRecord, ...], NDArray[np.float32]]:
    """Take back the scales of channels whose readers lose by them.

    Channels that stand in one tensor are judged together, by the noise-to-signal ratios of all layers that
    read them, each layer by itself: its input exact but for its own grid.

    Args:
        model: the fp32 model that `atoms` was traced on, not yet scaled.
        atoms: its channels.
        scales: of every atom.
        ranges: of the channels.
        placement: where Q/DQ will stand.
        images: uint8 NHWC, none that `ranges` is from.
        float_weights: judge what the input's grid costs alone.
        runner_factory: makes the fp32 runner.
        folder: for its file.

    Returns:
        The scales that are kept, 1 for others; a record of every layer; the outputs of `model`.
    """
    probe = LayerProbe(model)
    unit_of = _units(atoms, [point.tensor for point in placement.activations])
    quantized = {weight.consumer.node for weight in placement.weights}
    units: list[int] = []
    for layer in atoms.layers:
        read = read_scales(layer, atoms, scales)
        name = layer.node.outputs[0].name or ""
        if read is None or (read == 1.0).all() or layer.point.input not in ranges or name not in quantized:
            continue
        grid = ACTIVATION_FORMS[placement.activation_form](_hull(ranges[layer.point.input]))
        step = _channel_step(layer)
        probe.add(name, _rounded(layer, None, float_weights, step), grid, step)
        probe.add(name, _rounded(layer, read, float_weights, step), _scaled(grid, read), step)
        units.append(int(unit_of[atoms.of[layer.point.input][0]]))
    if not units:
        return np.ones_like(scales), (), np.empty((0, 0), np.float32)
    probed = probe.run(images, runner_factory, folder)
    seen = [(name, result.sqnr_db()) for name, result in probed.layers]
    judged = [
        (unit, CorrectionRecord(name, "equalize", before_db, after_db, True))
        for unit, (name, before_db), (_, after_db) in zip(units, seen[::2], seen[1::2], strict=True)
    ]
    worse = {unit for unit, _ in judged if not _gains([r for u, r in judged if u == unit])}
    kept = scales.copy()
    kept[np.isin(unit_of, sorted(worse))] = 1.0
    # Scales that no judged layer reads were never shown to help.
    kept[~np.isin(unit_of, [unit for unit, _ in judged])] = 1.0
    records = tuple(
        CorrectionRecord(r.layer, r.correction, r.before_db, r.after_db, unit not in worse)
        for unit, r in judged
    )
    return kept, records, probed.outputs


def _units(atoms: ChannelAtoms, tensors: list[str]) -> NDArray[np.intp]:
    """A number for every atom, the same for all that stand in one tensor, or are tied to such."""
    unit = atoms.roots(np.arange(atoms.n_atoms))
    for name in tensors:
        if name in atoms.of and len(atoms.of[name]):
            together = np.unique(unit[atoms.of[name]])
            unit[np.isin(unit, together)] = together[0]
    return unit


def _gains(records: list[CorrectionRecord]) -> bool:
    noise = np.power(10.0, [[-record.before_db / 10, -record.after_db / 10] for record in records])
    before, after = noise.sum(axis=0)
    return bool(after < before)


def _channel_step(layer: Layer) -> int:
    if layer.node.op_type != "Conv" or layer.n_groups > 1:
        return 1
    constant = layer.node.inputs[1]
    assert constant is not None
    assert constant.shape is not None
    return max(1, constant.shape.numpy()[0] // _JUDGED_CHANNELS)


def _rounded(
    layer: Layer, read: NDArray[np.float64] | None, float_weights: bool, step: int
) -> ir.TensorProtocol:
    """Every `step`-th channel of a weight as it is rounded, of the channels it reads scaled or not."""
    constant = layer.node.inputs[1]
    assert constant is not None
    assert constant.const_value is not None
    weight = constant.const_value.numpy()[::step]
    if not float_weights:
        weight = weight if read is None else scaled_weight(layer, weight, 1.0, read)
        params: QuantParams = per_channel_int8(weight, layer.point.axis)
        weight = dequantize(quantize(weight, params), params)
        weight = weight if read is None else scaled_weight(layer, weight, 1.0, 1.0 / read)
    return ir.tensor(np.ascontiguousarray(weight))


def _scaled(grid: QuantParams, read: NDArray[np.float64]) -> QuantParams:
    """On which a channel comes out as on `grid` if multiplied with its scale beforehand, and divided by it behind."""
    scale = (grid.scale / read).astype(np.float32)
    return QuantParams(scale, np.full(scale.shape, grid.zero_point), grid.dtype, 1)


def _hull(ranges: tuple[NDArray[Any], NDArray[Any]]) -> TensorRange:
    return TensorRange(float(ranges[0].min()), float(ranges[1].max()))
