"""Bias correction of every layer by itself, in one run.

Rounded weights and a clipped input shift the mean of a layer's output, and a shift does not average out over the
positions of an image: ``b' = b + E[y - y^]`` takes it away, channel by channel (Nagel et al., arXiv 1906.04721,
section 4.2: the expectation of the layer's own quantization error, taken from images). With ``e = y - y^`` known
in its mean and mean square, what the corrected bias leaves is known without another run:

    E[(e - d)^2] = E[e^2] - 2 d E[e] + d^2

Each layer's input is the fp32 one, but for its own grid. A bias that also makes up for the layers before is what
`calibration.correction.reconstruction` finds, together with the rounding; without that it does harm: layer after
layer then shifts what the next has learned to expect, and EfficientNet-Lite1 loses 1 to 2 dB.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from calibration.correction.probe import LayerProbe, ProbeResult
from calibration.correction.records import CorrectionRecord
from calibration.correction.rounded import RoundedWeights
from calibration.placement import Placement
from calibration.qdq import activation_params
from pipeline.artifacts import TensorRange
from pipeline.contracts import RunnerFactory
from pipeline.metrics import sqnr_db_from_energies

__all__ = ["correct_biases"]


def correct_biases(
    model: ir.Model,
    placement: Placement,
    ranges: Mapping[str, TensorRange],
    rounded: RoundedWeights,
    images: NDArray[np.uint8],
    n_judging: int,
    runner_factory: RunnerFactory,
    folder: Path,
) -> tuple[tuple[CorrectionRecord, ...], NDArray[np.float32]]:
    """Correct the biases of `model` in place, for weights rounded to nearest.

    Args:
        model: the fp32 model that `placement` was made for, the shapes of its tensors known.
        placement: where Q/DQ will stand.
        ranges: of every tensor in ``placement.observed``.
        rounded: the weights of `model`, or of what it is a copy of.
        images: uint8 NHWC, a multiple of the model's batch size where that is fixed.
        n_judging: how many of the last of them judge; the others give the means.
        runner_factory: makes the fp32 runner.
        folder: for temporary files.

    Returns:
        A record of every layer, and what `model` made of the images before.
    """
    grids = {point.tensor: activation_params(point, placement, ranges) for point in placement.activations}
    probe = LayerProbe(model)
    biases: list[ir.Value] = []
    values = {value.name: value for node in model.graph for value in node.outputs}
    for point in placement.weights:
        node = values[point.consumer.node].producer()
        bias = None if node is None or len(node.inputs) < 3 else node.inputs[2]
        if bias is None or len(bias.uses()) > 1:
            continue
        probe.add(point.consumer.node, rounded.of(model, point), grids.get(point.input))
        biases.append(bias)
    judges = np.arange(len(images)) >= len(images) - n_judging
    records = []
    if not biases:
        return (), np.empty((0, 0), np.float32)
    found = probe.run(images, runner_factory, folder)
    for bias, (layer, seen) in zip(biases, found.layers, strict=True):
        shift = seen.error[~judges].mean(axis=0)
        before_db, after_db = _judged(seen, judges, shift)
        kept = after_db >= before_db
        records.append(CorrectionRecord(layer, "bias", before_db, after_db, kept))
        if kept and bias.const_value is not None:
            corrected = bias.const_value.numpy() + shift.astype(np.float32)
            bias.const_value = ir.tensor(corrected, name=bias.name)
    return tuple(records), found.outputs


def _judged(seen: ProbeResult, judges: NDArray[np.bool_], shift: NDArray[np.float64]) -> tuple[float, float]:
    """SQNR without the shift, and with it."""
    signal = float(seen.square_output[judges].sum())
    before = float(seen.square_error[judges].sum())
    gained = float((2.0 * shift * seen.error[judges] - shift**2).sum())
    return sqnr_db_from_energies(signal, before), sqnr_db_from_energies(signal, max(before - gained, 0.0))
