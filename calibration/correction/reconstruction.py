"""Corrects a model layer by layer: ranges, bias and rounding, each kept only where it helps.

The fp32 model and its quantized form run side by side, from layer to layer (`LayerwiseRun`). At each layer
there are the output ``y`` it should have and the input ``x`` that the corrected layers before it leave,
quantized. Three corrections are solved on samples of most images and judged on the others:

* **ranges**: the width of the input's grid, and of each output channel's weight grid, that make the squared
  error at the layer's output least. (A range that is best for the tensor need not be best for the layer:
  what matters of an input is what the weights make of it.)
* **bias**: ``b = E[y] - W E[x]``, for the weights that adaptive rounding chooses. By itself this form does harm, and
  `calibration.correction.bias` takes its place.
* **adaround**: `calibration.correction.rounding`.

What comes out is an fp32 model again, whose weights lie on their int8 grids. Quantizing it gives exactly the
integers chosen here, whatever writes the Q/DQ: the largest magnitude of a channel still is 127 steps.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import ShapeInferencePass

from calibration.correction.layerwise import LayerwiseRun
from calibration.correction.linear import LinearLayer, Samples, linear_layer
from calibration.correction.ranges import search_activation_range, search_weight_scale
from calibration.correction.records import CorrectionRecord, judging
from calibration.correction.rounding import (
    Moments,
    at_the_ends,
    best_bias,
    best_weights,
    moments,
    round_adaptively,
)
from calibration.placement import ActivationPoint, Placement, WeightPoint
from calibration.qdq import activation_params, insert_qdq, weight_params
from calibration.qparams import dequantize, min_weight_scale, quantize
from pipeline.artifacts import QuantParams, TensorRange
from pipeline.contracts import Progress, RunnerFactory
from pipeline.metrics import sqnr_db

__all__ = ["MAX_SUMS", "Reconstruction", "carry_over", "n_sampled", "reconstruct"]

RIDGES = (3.0, 0.3, 0.03)
"""Tried for every layer: how far a layer may go in making up for the noise of those before it depends on how
many samples there are for how many weights. Not going at all is tried as well."""
MAX_SUMS = 4608
"""Rounding solves a dense system of this size at most: 512 channels of a 3×3 kernel, 170 MB."""
_MIN_POSITIONS = 20_000
_POSITIONS_A_SUM = 16
_MAX_SAMPLES = 2**25
"""Values drawn of one layer's input: 134 MB."""
_HELD_POSITIONS = 4096
_RANGE_SAMPLES = 2**22
"""For the search of one number, in eleven trials."""


@dataclass(frozen=True, slots=True)
class Reconstruction:
    """What was found besides the weights and biases, which are in the model."""

    ranges: dict[str, TensorRange]
    records: tuple[CorrectionRecord, ...]
    skipped: tuple[tuple[str, str], ...]
    """Layers that were left as they are, and why."""
    is_whole: bool
    """Otherwise it was given up on the way."""


@dataclass(slots=True)
class _Layer:
    """A layer's quantized weight and bias while they are being corrected; matrices as `LinearLayer`'s."""

    weights: NDArray[np.float64]
    scale: NDArray[np.float64]
    steps: NDArray[np.float64]
    bias: NDArray[np.float64]
    fit: Samples
    held: Samples

    def held_sqnr_db(
        self, scale: NDArray[np.float64], steps: NDArray[np.float64], bias: NDArray[np.float64]
    ) -> float:
        """SQNR of the layer's output with these, on the images nothing was made from."""
        rounded = (steps * scale[:, :, None]).astype(np.float32).transpose(0, 2, 1)
        output = self.held.inputs @ rounded + bias[:, None].astype(np.float32)
        return sqnr_db(self.held.outputs, output)


def reconstruct(
    model: ir.Model,
    placement: Placement,
    ranges: Mapping[str, TensorRange],
    images: NDArray[np.uint8],
    corrections: Collection[str],
    runner_factory: RunnerFactory,
    folder: Path,
    progress: Progress,
    goes_on: Callable[[int], bool] = lambda _: True,
) -> Reconstruction:
    """Correct the weights and biases of `model` in place.

    Args:
        model: the fp32 model that `placement` was made for, the shapes of its tensors known.
        placement: where Q/DQ will stand.
        ranges: of every tensor in ``placement.observed``.
        images: uint8 ``[N, H, W, 3]``, N at least 3; one in five is kept for judging.
        corrections: some of ``ranges``, ``bias`` and ``adaround``; ``bias`` with ``adaround`` only.
        runner_factory: makes the runners of the pieces.
        folder: for temporary files.
        progress: told of every layer.
        goes_on: asked after every layer, with the number of layers that `model` now has corrected.

    Raises:
        CalibrationError: as `calibration.qdq.insert_qdq`.
        EngineError: a piece of the graph cannot be run.
    """
    run = _Run(model, placement, dict(ranges), images, frozenset(corrections), runner_factory, folder)
    is_whole = True
    for done, point in enumerate(placement.weights, start=1):
        run.correct(point)
        progress("correct", done, len(placement.weights))
        if not goes_on(done):
            is_whole = False
            break
    return Reconstruction(run.ranges, tuple(run.records), tuple(run.skipped), is_whole)


def carry_over(source: ir.Model, target: ir.Model, points: Sequence[WeightPoint]) -> None:
    """Give layers of `target` the weights and biases they have in `source`, a model of the same graph."""
    nodes = {value.name: node for node in source.graph for value in node.outputs}
    for point in points:
        for name in (point.weight, _bias_name(nodes[point.consumer.node])):
            if name is not None:
                _write(target, name, _array(source.graph.initializers[name]))


class _Run:
    def __init__(
        self,
        model: ir.Model,
        placement: Placement,
        ranges: dict[str, TensorRange],
        images: NDArray[np.uint8],
        corrections: frozenset[str],
        runner_factory: RunnerFactory,
        folder: Path,
    ) -> None:
        self._corrections = corrections
        self._placement = placement
        self._model = model
        self.ranges = ranges
        self.records: list[CorrectionRecord] = []
        self.skipped: list[tuple[str, str]] = []
        self._reference = LayerwiseRun(model.clone(), images, runner_factory, folder)
        # Weights stay float here: those of layers behind are replaced by rounded ones as they are found.
        self._graph = model.clone()
        insert_qdq(self._graph, dataclasses.replace(placement, weights=()), ranges)
        ShapeInferencePass(data_prop=True)(self._graph)
        self._quantized = LayerwiseRun(self._graph, images, runner_factory, folder)
        self._values = {value.name: value for node in self._graph.graph for value in node.outputs}
        judges = judging(len(images))
        self._fit, self._held = np.flatnonzero(~judges), np.flatnonzero(judges)
        self._rng = np.random.default_rng(0)
        self._own_grid = _grids_of_one_tensor(placement)

    def correct(self, point: WeightPoint) -> None:
        node = self._node(point.consumer.node)
        original = self._constant(point.weight)
        bias_name = _bias_name(node)
        bias = None if bias_name is None else self._constant(bias_name)
        linear = self._linear(node, point)
        if isinstance(linear, str):
            self.skipped.append((point.consumer.node, linear))
            params = weight_params(original, point, self._placement)
            _write(self._graph, point.weight, dequantize(quantize(original, params), params))
            return
        outputs = self._reference.advance(point.consumer.node)
        weights = linear.matrix(original).astype(np.float64)
        channels = weights.shape[:2]
        zeros = np.zeros(channels)
        offset = zeros if bias is None else bias.astype(np.float64).reshape(channels)
        if "ranges" in self._corrections:
            self._search_input_range(node, linear, weights, offset, outputs)
        inputs, grid = self._input(node)
        # Below this a channel's bias would not fit in int32, where the placement stores it so.
        smallest = min_weight_scale(bias, grid.scale) if bias is not None and point.bias and grid else 0.0
        params = weight_params(original, point, self._placement, smallest)
        layer = _Layer(
            weights,
            params.scale.astype(np.float64).reshape(channels),
            linear.matrix(quantize(original, params)).astype(np.float64),
            offset,
            self._samples(linear, inputs, grid, outputs, self._fit),
            self._samples(linear, inputs, grid, outputs, self._held),
        )
        self._solve(point.consumer.node, layer, has_bias=bias is not None)
        weight = linear.weight(layer.steps * layer.scale[:, :, None], original.shape).astype(np.float32)
        for model in (self._model, self._graph):
            _write(model, point.weight, weight)
            if bias_name is not None and bias is not None:
                _write(model, bias_name, layer.bias.reshape(bias.shape).astype(np.float32))

    def _solve(self, name: str, layer: _Layer, has_bias: bool) -> None:
        frees_bias = has_bias and "bias" in self._corrections
        seen = moments(layer.fit, None if frees_bias else layer.bias, "adaround" in self._corrections)
        if "ranges" in self._corrections:
            scale = search_weight_scale(layer.weights, layer.scale, layer.fit.inputs)
            nearest = np.clip(np.rint(layer.weights / scale[:, :, None]), -127, 127)
            self._keep_if_better(name, "ranges", layer, scale, nearest, layer.bias)
        if frees_bias:
            self._keep_if_better(
                name,
                "bias",
                layer,
                layer.scale,
                layer.steps,
                best_bias(layer.steps * layer.scale[:, :, None], seen),
            )
        if "adaround" not in self._corrections:
            return
        if layer.weights.shape[2] > MAX_SUMS:
            reason = (
                f"an output sums {layer.weights.shape[2]} products; rounding solves for {MAX_SUMS} at most"
            )
            self.skipped.append((name, reason))
            return
        weights = self._best_weights(layer, seen, frees_bias)
        ends = at_the_ends(layer.weights, layer.scale)
        steps = round_adaptively(weights, layer.scale, seen, ends)
        bias = best_bias(steps * layer.scale[:, :, None], seen) if frees_bias else layer.bias
        self._keep_if_better(name, "adaround", layer, layer.scale, steps, bias)

    def _best_weights(self, layer: _Layer, seen: Moments, frees_bias: bool) -> NDArray[np.float64]:
        """Real-valued weights to round, with the ridge that serves the images apart best."""
        candidates = [layer.weights, *(best_weights(layer.weights, seen, ridge) for ridge in RIDGES)]
        whole = np.ones(layer.scale.shape)

        def judged(weights: NDArray[np.float64]) -> float:
            bias = best_bias(weights, seen) if frees_bias else layer.bias
            return layer.held_sqnr_db(whole, weights, bias)

        return max(candidates, key=judged)

    def _keep_if_better(
        self,
        name: str,
        correction: str,
        layer: _Layer,
        scale: NDArray[np.float64],
        steps: NDArray[np.float64],
        bias: NDArray[np.float64],
    ) -> None:
        before = layer.held_sqnr_db(layer.scale, layer.steps, layer.bias)
        after = layer.held_sqnr_db(scale, steps, bias)
        if after >= before:
            layer.scale, layer.steps, layer.bias = scale, steps, bias
        self.records.append(CorrectionRecord(name, correction, before, after, after >= before))

    def _search_input_range(
        self,
        node: ir.Node,
        linear: LinearLayer,
        weights: NDArray[np.float64],
        bias: NDArray[np.float64],
        outputs: NDArray[np.float32],
    ) -> None:
        """Choose the grid of the layer's input before anything is quantized with it."""
        restore = None if node.inputs[0] is None else node.inputs[0].producer()
        quantizer = None if restore is None or restore.inputs[0] is None else restore.inputs[0].producer()
        if restore is None or quantizer is None or quantizer.inputs[0] is None:
            return
        point = self._own_grid.get(quantizer.inputs[0].name or "")
        if point is None or self._quantized.is_done(restore.inputs[0]):  # another reader has chosen
            return
        inputs = self._quantized.advance(point.tensor)
        fit, held = (
            self._samples(linear, inputs, None, outputs, images, _RANGE_SAMPLES)
            for images in (self._fit, self._held)
        )
        name = point.sources[0]
        before = self.ranges[name]
        form = self._placement.activation_form
        found, judged = search_activation_range(before, form, weights, bias, fit, held)
        kept = judged[1] >= judged[0]
        self.records.append(CorrectionRecord(node.outputs[0].name or "", "ranges", *judged, kept))
        if kept and found != before:
            self.ranges[name] = found
            params = activation_params(point, self._placement, self.ranges)
            for value, array in zip(restore.inputs[1:], (params.scale, params.zero_point), strict=True):
                assert value is not None
                _write(self._graph, value.name or "", array)

    def _input(self, node: ir.Node) -> tuple[NDArray[Any], QuantParams | None]:
        """What the layer reads: integers and their grid, or real values."""
        value = node.inputs[0]
        assert value is not None
        restore = value.producer()
        if restore is None or restore.op_type != "DequantizeLinear":
            return self._quantized.advance(value.name or ""), None
        stored = restore.inputs[0]
        assert stored is not None
        scale, zero_point = (_array(value) for value in restore.inputs[1:] if value is not None)
        grid = QuantParams(scale, zero_point, "uint8" if zero_point.dtype == np.uint8 else "int8")
        return self._quantized.advance(stored.name or ""), grid

    def _samples(
        self,
        linear: LinearLayer,
        inputs: NDArray[Any],
        grid: QuantParams | None,
        outputs: NDArray[np.float32],
        images: NDArray[np.intp],
        at_most: int = _MAX_SAMPLES,
    ) -> Samples:
        wanted = _HELD_POSITIONS if images is self._held else n_sampled(linear)
        wanted = min(wanted, max(1, at_most // (linear.n_sums * linear.n_groups)))
        return linear.samples(inputs, grid, outputs, images, wanted, self._rng)

    def _linear(self, node: ir.Node, point: WeightPoint) -> LinearLayer | str:
        for value in node.inputs[1:]:
            if value is not None and len(value.uses()) > 1:
                return f"its constant {value.name!r} is shared with another layer"
        return linear_layer(node, point)

    def _node(self, name: str) -> ir.Node:
        node = self._values[name].producer()
        assert node is not None
        return node

    def _constant(self, name: str) -> NDArray[np.float32]:
        return _array(self._model.graph.initializers[name])


def n_sampled(layer: LinearLayer) -> int:
    """Positions that a layer is solved on, about."""
    wanted = max(_MIN_POSITIONS, _POSITIONS_A_SUM * layer.n_sums)
    return min(wanted, max(1, _MAX_SAMPLES // (layer.n_sums * layer.n_groups)))


def _grids_of_one_tensor(placement: Placement) -> dict[str, ActivationPoint]:
    """Points whose grid no other tensor shares, by the name of what they restore."""
    n_points = Counter(point.sources for point in placement.activations)
    return {
        point.tensor: point
        for point in placement.activations
        if len(point.sources) == 1 and n_points[point.sources] == 1
    }


def _bias_name(node: ir.Node) -> str | None:
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    return None if bias is None else bias.name


def _array(value: ir.Value) -> NDArray[Any]:
    assert value.const_value is not None, f"{value.name!r} is no constant"
    array: NDArray[Any] = value.const_value.numpy()
    return array


def _write(model: ir.Model, name: str, array: NDArray[Any]) -> None:
    model.graph.initializers[name].const_value = ir.tensor(np.asarray(array), name=name)
