"""What each layer's quantization costs at the logits, from one pass over a few images.

Quantizing layer ``l`` adds a noise ``d_l`` to its output, which arrives at the logits as ``J_l d_l``. To first
order the noises of all layers add up there; so they can be injected all at once and told apart afterwards,
if each is switched by a pattern of its own. Each image is run in `N_PATTERNS` versions beside itself. In
version ``k`` every layer computes, in float32 ::

    y + s_kl d_l        y = W x + b,  d_l = W_int8 x_int8 - W x of the image itself,  s_kl = +1 or -1

and the patterns ``s`` are columns of a Hadamard matrix, of which any two are orthogonal. With ``z_k`` the
logits of version ``k``, the mean ``1/K sum_k s_kl z_k`` holds layer ``l``'s noise and, of the layers with
other patterns, nothing. The constant column is used by nobody: the mean of all versions is the fp32 logits, and
whatever does not change its sign with the noise (a Relu's rectification, say) falls out with it. Switching
one layer at a time would take as many runs as there are layers, and see their even-order terms as well.

Networks with more layers than patterns share them: a pattern then holds the energy of all its layers
(crossing terms have random signs, since every layer's pattern also gets one). The layers are dealt anew for
every image, and the energies of the layers are the least-squares solution of all these sums. Up to
``N_PATTERNS - 1`` layers nothing is shared. This is a supersaturated design with orthogonal columns (Lin,
Technometrics 35 (1993) 28-31); random signs with the same purpose make Hutchinson's estimate of a trace
(Communications in Statistics 18 (1989) 1059-1076).

The whole costs some 40 fp32 runs of each image, whatever the number of layers. What is left out: terms of
second order in the noises, which are as large as the noise of layers far better than the worst one (40 dB better
than one at 10 dB came out 3 dB off); the rounding of a residual's or a pool's input, which
belongs to no layer, and that of the bias to 32 bits. A layer's own noise, at its own output, needs no
pass: it is `calibration.stragglers`'s.
"""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from calibration.collect import fix_batch
from calibration.placement import PLACEMENTS, Placement, WeightPoint
from calibration.placement.layers import name_of
from calibration.qdq import activation_params, weight_params
from calibration.qparams import dequantize, quantize
from calibration.stragglers import layer_noise
from calibration.table import check_table
from pipeline.artifacts import CalibrationTable, ModelArtifact, TensorRange, TensorStatistics
from pipeline.contracts import Batches, Progress, Runner, RunnerFactory
from pipeline.errors import CalibrationError
from pipeline.onnx_files import load_model, save_model

__all__ = ["N_IMAGES", "N_PATTERNS", "LayerSensitivity", "measure_sensitivity", "switched_graph"]

N_IMAGES = 16
"""Images of a pass: 16 x 31 sums for the energies of a few hundred layers."""
N_PATTERNS = 32
"""Versions of each image. A power of two."""
_ROWS_A_RUN = 9
"""The image itself and eight versions go through the engine together: more gain little and take memory."""
_SWITCHES = "edgefold_switches"


@dataclass(frozen=True, slots=True)
class LayerSensitivity:
    """What int8 does to one layer, and through it to the logits."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "allow_inf_nan": False}

    layer: str
    """The name of its output tensor."""
    op_type: str
    nsr: float
    """Noise-to-signal power ratio at its own output: `calibration.stragglers.LayerNoise`."""
    logits_nsr: float
    """The same at the logits, where the signal is theirs. 0 where the noise is below what the pass resolves."""
    macs: int
    """Multiplications for one image."""

    @property
    def sqnr_db(self) -> float | None:
        """Of its own output, in decibels; ``None`` where nothing is lost."""
        return -10.0 * math.log10(self.nsr) if self.nsr > 0.0 else None

    @property
    def logits_sqnr_db(self) -> float | None:
        """Of the logits with this layer alone in int8; ``None`` where nothing is lost, or too little to be seen."""
        return -10.0 * math.log10(self.logits_nsr) if self.logits_nsr > 0.0 else None

    def to_json(self) -> dict[str, Any]:
        """JSON-compatible values; ``null`` for an infinite ratio."""
        return {
            "layer": self.layer,
            "op_type": self.op_type,
            "sqnr_db": self.sqnr_db,
            "logits_sqnr_db": self.logits_sqnr_db,
            "macs": self.macs,
        }


def measure_sensitivity(
    model: ModelArtifact,
    table: CalibrationTable,
    statistics: TensorStatistics,
    batches: Batches,
    runner_factory: RunnerFactory,
    progress: Progress,
    *,
    placement: str = "cpu",
    n_images: int = N_IMAGES,
    corrected: ModelArtifact | None = None,
) -> tuple[LayerSensitivity, ...]:
    """One pass over some of the calibration images.

    Args:
        model: the folded fp32 model.
        table: what its grids are made of.
        statistics: what `table` was derived from.
        batches: uint8 NHWC batches; the first `n_images` images are used.
        runner_factory: makes the fp32 runner.
        progress: told of every image.
        placement: the engine family, a key of `calibration.placement.PLACEMENTS`.
        n_images: images to look at.
        corrected: `model` with the weights and biases that its layers have in int8
            (`calibration.quantizer.Corrected.model`); ``None``: they have its own.

    Returns:
        Every quantized layer, the most harmful to the logits first; equals by their own noise.

    Raises:
        IntegrityError: the table is another model's.
        CalibrationError: there is no image, nothing is quantized, or the logits are all zero.
    """
    check_table(table, model)
    graph = load_model(model.path)
    placed = PLACEMENTS[placement](graph)
    noise = layer_noise(graph.graph, placed, table.ranges, statistics)
    if not noise:
        raise CalibrationError(f"{model.path} has no quantized layer whose sensitivity could be measured")
    op_types = {name_of(node.outputs[0]): node.op_type for node in graph.graph}
    fixed = model.inputs[0].shape[0]
    rows = fixed if isinstance(fixed, int) else _ROWS_A_RUN
    source = None if corrected is None or corrected.sha256 == model.sha256 else load_model(corrected.path)
    switched_graph(graph, placed, table.ranges, rows, source)
    del source
    with tempfile.TemporaryDirectory(prefix="edgefold-sensitivity-") as folder:
        path = Path(folder) / "switched.onnx"
        save_model(graph, path)
        del graph
        fit = _Fit(len(noise))
        images = itertools.islice((image for batch in batches() for image in batch), n_images)
        with runner_factory(path, ()) as runner:
            for index, image in enumerate(images):
                patterns = _Patterns(len(noise), seed=index)
                fit.add(patterns, _versions(runner, model, image, rows, patterns.switches))
                progress("sensitivity", index + 1, n_images)
    energies = fit.energies()
    found = [
        LayerSensitivity(entry.layer, op_types[entry.layer], entry.nsr, float(energy), entry.macs)
        for entry, energy in zip(noise, energies, strict=True)
    ]
    return tuple(sorted(found, key=lambda entry: (-entry.logits_nsr, -entry.nsr)))


def _versions(
    runner: Runner,
    model: ModelArtifact,
    image: NDArray[np.uint8],
    rows: int,
    switches: NDArray[np.float32],
) -> NDArray[np.float64]:
    """The logits of every version of an image: ``[N_PATTERNS, C]``."""
    pixels = np.ascontiguousarray(np.broadcast_to(image, (rows, *image.shape)))
    n_clean = 1 if rows > 1 else 0
    step = rows - n_clean
    found = []
    for start in range(0, len(switches), step):
        some = switches[start : start + step]
        table = np.zeros((rows, switches.shape[1]), np.float32)
        table[n_clean : n_clean + len(some)] = some
        outputs = runner.infer({model.inputs[0].name: pixels, _SWITCHES: table})
        logits = np.array(outputs[model.outputs[0].name], np.float64).reshape(rows, -1)
        found.append(logits[n_clean : n_clean + len(some)])
    return np.concatenate(found)


def switched_graph(
    model: ir.Model,
    placement: Placement,
    ranges: Mapping[str, TensorRange],
    rows: int,
    corrected: ir.Model | None = None,
) -> None:
    """Give every layer of `placement` a switch for its noise, in place.

    Given::

        y = Conv(x, W, b)

    Result, with ``s`` a column of the new input, float32 ``[rows, layers]``::

        d = Conv(DQ(Q(x[0:1])), W_int8 as float, b_int8) - y[0:1]
        y = Conv(x, W, b) + s d

    The noise is that of the first row, so that it is the same in every version: give that row no
    noise. A graph for one row only has no other; there each version has the noise of its own input.

    Args:
        model: the fp32 model that `placement` was made for.
        placement: whose grids are used.
        ranges: of every tensor in ``placement.observed``.
        rows: the batch size the graph is made for.
        corrected: the same graph with the constants that quantized layers have; ``None``: they have `model`'s.
    """
    fix_batch(model, rows)
    constants = (corrected or model).graph.initializers
    _Switches(model.graph, placement, ranges, rows, constants).run()


class _Switches:
    def __init__(
        self,
        graph: ir.Graph,
        placement: Placement,
        ranges: Mapping[str, TensorRange],
        rows: int,
        constants: Mapping[str, ir.Value],
    ) -> None:
        self._graph, self._placement, self._rows, self._constants = graph, placement, rows, constants
        self._values = {name_of(v): v for v in (*graph.inputs, *(v for node in graph for v in node.outputs))}
        self._grids = {
            point.tensor: activation_params(point, placement, ranges)
            for point in placement.activations
            if point.scale is None
        }
        self._rounded: dict[str, ir.Value] = {}
        self._input = ir.Value(
            name=_SWITCHES,
            type=ir.TensorType(ir.DataType.FLOAT),
            shape=ir.Shape([rows, len(placement.weights)]),
        )
        graph.inputs.append(self._input)

    def run(self) -> None:
        for column, point in enumerate(self._placement.weights):
            self._switch(point, column)

    def _switch(self, point: WeightPoint, column: int) -> None:
        exact = self._values[point.consumer.node]
        node = exact.producer()
        assert node is not None, "a weight point's consumer is a node"
        array = self._stored(point.weight)
        params = weight_params(array, point, self._placement)
        in_int8 = self._constant(
            f"edgefold_weight_{column}", dequantize(quantize(array, params), params).astype(np.float32)
        )
        data = self._rounded_input(point.input)
        readers, is_output = list(exact.uses()), exact.is_graph_output()
        clean = self._first_row(exact)
        biases = [
            bias
            if bias is None or bias.const_value is None
            else self._constant(f"edgefold_bias_{column}", self._stored(bias.name or ""))
            for bias in node.inputs[2:]
        ]
        quantized = ir.Node("", node.op_type, [data, in_int8, *biases], node.attributes.values())
        rank = len(exact.shape or ())
        index = self._constant(f"edgefold_column_{column}", np.array([column], np.int64))
        shape = self._constant(f"edgefold_switch_shape_{rank}", np.array([-1] + [1] * (rank - 1), np.int64))
        gathered = ir.node("Gather", [self._input, index], {"axis": 1})
        switch = ir.node("Reshape", [gathered.outputs[0], shape])
        noise = ir.node("Sub", [quantized.outputs[0], clean])
        switched = ir.node("Mul", [noise.outputs[0], switch.outputs[0]])
        total = ir.node("Add", [exact, switched.outputs[0]])
        self._insert_behind(clean, [quantized, gathered, switch, noise, switched, total])
        for reader, position in readers:
            reader.replace_input_with(position, total.outputs[0])
        self._values[point.consumer.node] = total.outputs[0]
        if is_output:
            self._take_over_output(exact, total.outputs[0])

    def _stored(self, name: str) -> NDArray[np.float32]:
        """A constant as the layer in int8 has it."""
        constant = self._constants[name].const_value
        assert constant is not None, "the weight and bias of a quantized layer are constants"
        array: NDArray[np.float32] = constant.numpy()
        return array

    def _take_over_output(self, exact: ir.Value, total: ir.Value) -> None:
        name = exact.name
        exact.name = f"{name}_exact"
        total.name, total.type, total.shape = name, exact.type, exact.shape
        outputs = [total if value is exact else value for value in self._graph.outputs]
        self._graph.outputs.clear()
        self._graph.outputs.extend(outputs)

    def _rounded_input(self, name: str) -> ir.Value:
        """The first row of a layer's input on its grid; pixels as they are."""
        if name not in self._rounded:
            value = self._first_row(self._values[name])
            if name in self._grids:
                grid, stem = self._grids[name], f"edgefold_grid_{len(self._rounded)}"
                scale = self._constant(f"{stem}_scale", grid.scale)
                zero_point = self._constant(f"{stem}_zero_point", grid.zero_point)
                steps = ir.node("QuantizeLinear", [value, scale, zero_point])
                restored = ir.node("DequantizeLinear", [steps.outputs[0], scale, zero_point])
                self._insert_behind(value, [steps, restored])
                value = restored.outputs[0]
            self._rounded[name] = value
        return self._rounded[name]

    def _first_row(self, value: ir.Value) -> ir.Value:
        if self._rows == 1:
            return value
        bounds = [self._constant(f"edgefold_{i}", np.array([i], np.int64)) for i in (0, 1)]
        sliced = ir.node("Slice", [value, bounds[0], bounds[1], bounds[0]])
        self._insert_behind(value, [sliced])
        return sliced.outputs[0]

    def _insert_behind(self, value: ir.Value, nodes: list[ir.Node]) -> None:
        producer = value.producer()
        if producer is None:
            self._graph.insert_before(self._graph[0], nodes)
        else:
            self._graph.insert_after(producer, nodes)

    def _constant(self, name: str, array: NDArray[Any]) -> ir.Value:
        if name not in self._graph.initializers:
            tensor = ir.tensor(array, name=name)
            self._graph.initializers[name] = ir.Value(
                name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor
            )
        return self._graph.initializers[name]


class _Patterns:
    """Which layer is switched by which pattern in the versions of one image."""

    def __init__(self, n_layers: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        columns = _hadamard(N_PATTERNS)[:, 1:]
        self.columns = columns
        self.of_layer = rng.permutation(np.arange(n_layers) % columns.shape[1])
        signs = rng.choice(np.array([-1.0, 1.0]), n_layers)
        self.switches = (columns[:, self.of_layer] * signs).astype(np.float32)


class _Fit:
    """Sums over the images: the normal equations of the layers' energies, and the energy of the logits."""

    def __init__(self, n_layers: int) -> None:
        self._gram = np.zeros((n_layers, n_layers))
        self._moments = np.zeros(n_layers)
        self._signal = 0.0
        self._n_images = 0

    def add(self, patterns: _Patterns, logits: NDArray[np.float64]) -> None:
        """Take in one image: float64 ``[N_PATTERNS, C]``."""
        parts = patterns.columns.T @ logits / N_PATTERNS
        energies = np.einsum("pc,pc->p", parts, parts)
        self._gram += patterns.of_layer[:, None] == patterns.of_layer[None, :]
        self._moments += energies[patterns.of_layer]
        mean = logits.mean(axis=0)
        self._signal += float(mean @ mean)
        self._n_images += 1

    def energies(self) -> NDArray[np.float64]:
        """The noise-to-signal ratio of each layer at the logits; what comes out negative is 0."""
        if self._n_images == 0:
            raise CalibrationError("no image was given to measure sensitivity on: pass real images")
        if not self._signal > 0.0 or not np.isfinite(self._moments).all():
            raise CalibrationError(
                f"the logits of {self._n_images} images have energy {self._signal}, and noise is measured against "
                "it; check the model's weights and its preprocessing"
            )
        solution, *_ = np.linalg.lstsq(self._gram, self._moments, rcond=None)
        # Both sums run over the same images: their quotient is a ratio of energies.
        ratio: NDArray[np.float64] = np.maximum(solution * self._n_images / self._signal, 0.0)
        return ratio


def _hadamard(order: int) -> NDArray[np.float64]:
    """Sylvester's: rows and columns of +1 and -1, orthogonal; the first column is constant."""
    matrix = np.ones((1, 1))
    while len(matrix) < order:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix
