"""Layers beside changed copies of themselves, in one graph: what each copy's output is off by.

A correction of one layer by itself needs no walk from layer to layer. Every layer gets copies that read the same
fp32 input, through a grid and with other weights; at some positions of an image, the outputs of both leave the
graph. Everything is compiled and run once.

A copy of a convolution computes no more than what is looked at: of the layer's positions every n-th, by a stride n times
as long. With ``S`` the layer's stride and ``p`` its padding at the start, the first of them is position ``a``, and

    copy(i) = layer(a + n i) = sum_k W_k x(n S i + a S - p + k)

a convolution of stride ``n S`` and padding ``p - a S``; `_Positions` keeps that from being negative. Where the kernel is
a point, what it does not read is not quantized either.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from calibration.collect import fix_batch, fixed_batch
from pipeline.artifacts import QuantParams
from pipeline.contracts import RunnerFactory
from pipeline.metrics import sqnr_db_from_energies
from pipeline.onnx_files import save_for_runner, unload_weights

__all__ = ["LayerProbe", "ProbeResult", "Probed"]

_POSITIONS = 256
"""Of an output's channel in one image, about; all where there are no more."""
_OUTPUT = "edgefold_probe"


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """Means over the positions of an image that are looked at, each ``[images, channels]``."""

    error: NDArray[np.float64]
    """Of the layer's output minus the copy's."""
    square_error: NDArray[np.float64]
    square_output: NDArray[np.float64]
    """Of the layer's own output."""

    def sqnr_db(self) -> float:
        """Of the copy's output, over all images and channels."""
        return sqnr_db_from_energies(float(self.square_output.sum()), float(self.square_error.sum()))


@dataclass(frozen=True, slots=True)
class Probed:
    """What a probe saw."""

    layers: list[tuple[str, ProbeResult]]
    """Of each copy, in the order in which they were added."""
    outputs: NDArray[np.float32]
    """The model's first."""


@dataclass(frozen=True, slots=True)
class _Positions:
    """What is looked at of a tensor: of axis 1 and every spatial axis each n-th from a first one on.

    Positions are sampled because neighbours are alike and comparing takes time.
    """

    firsts: tuple[int, ...]
    steps: tuple[int, ...]

    @classmethod
    def of_output(cls, node: ir.Node, sizes: list[int], channel_step: int) -> _Positions:
        """Of a convolution the first is where the padding ends, at most half an interval from the border."""
        spatial = sizes[2:]
        step = max(1, math.ceil((math.prod(spatial) / _POSITIONS) ** (1 / len(spatial)))) if spatial else 1
        steps = [min(step, size) for size in spatial]
        firsts = [(step - 1) // 2 for step in steps]
        if _can_stride(node):
            firsts = [
                min(first, pad // stride)
                for first, pad, stride in zip(firsts, *_pads_and_strides(node, len(spatial)), strict=True)
            ]
        return cls((0, *firsts), (channel_step, *steps))

    def read_by(self, node: ir.Node) -> _Positions:
        """What a convolution whose kernel is a point, without padding, reads for these."""
        _, strides = _pads_and_strides(node, len(self.steps) - 1)
        firsts, steps = (
            [position * stride for position, stride in zip(positions[1:], strides, strict=True)]
            for positions in (self.firsts, self.steps)
        )
        return _Positions((0, *firsts), (1, *steps))

    def sizes(self, sizes: list[int]) -> list[int]:
        """How many of them there are along every axis from 1 on."""
        return [
            len(range(first, size, step))
            for first, size, step in zip(self.firsts, sizes[1:], self.steps, strict=True)
        ]


@dataclass(frozen=True, slots=True)
class _Comparison:
    layer: str
    sizes: tuple[int, int]
    """Channels and positions."""
    own: int
    """Where the layer's own values begin among all that leave the graph, and where the copy's do."""
    copied: int

    def result(self, seen: NDArray[np.float32]) -> ProbeResult:
        own, copied = (
            seen[:, first : first + math.prod(self.sizes)].reshape(len(seen), *self.sizes)
            for first in (self.own, self.copied)
        )
        error = own - copied
        n = self.sizes[1]
        return ProbeResult(
            error.mean(axis=2, dtype=np.float64),
            np.einsum("ncp,ncp->nc", error, error).astype(np.float64) / n,
            np.einsum("ncp,ncp->nc", own, own).astype(np.float64) / n,
        )


class LayerProbe:
    """A copy of an fp32 graph that compares; the original stays as it is."""

    def __init__(self, model: ir.Model) -> None:
        """Start without copies.

        Args:
            model: fp32, the shapes of its tensors known.
        """
        self._model = model.clone()
        self._graph = self._model.graph
        self._batch = fixed_batch(self._model)
        fix_batch(self._model, self._batch)
        self._values = {value.name: value for node in self._graph for value in node.outputs}
        self._comparisons: list[_Comparison] = []
        self._parts: list[ir.Value] = []
        self._n_columns = 0
        self._rows = self._constant(ir.Tensor(np.array([self._batch, -1])))
        self._restored: dict[tuple[ir.Value, bytes, bytes], ir.Value] = {}
        self._selections: dict[tuple[ir.Value, _Positions], ir.Value] = {}
        self._own: dict[tuple[str, _Positions], int] = {}

    def add(
        self,
        layer: str,
        weight: ir.TensorProtocol,
        grid: QuantParams | None,
        channel_step: int = 1,
    ) -> None:
        """Compare a layer with a copy of it.

        Args:
            layer: the name of its output tensor.
            weight: the copy's, float32, of the shape of the layer's own but for `channel_step`.
            grid: what the copy's input is quantized on, all of it or each channel; ``None``: it is exact.
            channel_step: the copy has every n-th output channel only; of a convolution in one group.
        """
        output = self._values[layer]
        node = output.producer()
        assert node is not None
        data = node.inputs[0]
        assert data is not None
        sizes = [size if isinstance(size, int) else 0 for size in output.shape or ()]
        positions = _Positions.of_output(node, sizes, channel_step)
        attributes = dict(node.attributes)
        if _can_stride(node):
            pads, strides = _pads_and_strides(node, len(sizes) - 2)
            if set(weight.shape[2:]) <= {1} and not any(node.attributes.get_ints("pads", [])):
                data = self._selected(data, positions.read_by(node))
                strides = [1] * len(strides)
            else:
                pads = [
                    pad - first * s for pad, first, s in zip(pads, positions.firsts[1:], strides, strict=True)
                ]
                strides = [step * s for step, s in zip(positions.steps[1:], strides, strict=True)]
            ends = node.attributes.get_ints("pads", [0] * 2 * len(pads))[len(pads) :]
            attributes.pop("auto_pad", None)
            attributes["pads"] = ir.AttrInt64s("pads", [*pads, *ends])
            attributes["strides"] = ir.AttrInt64s("strides", strides)
        if grid is not None:
            data = self._quantized(data, grid)
        bias = node.inputs[2:]
        if channel_step > 1 and bias and bias[0] is not None and bias[0].const_value is not None:
            bias = (self._constant(ir.Tensor(bias[0].const_value.numpy()[::channel_step].copy())),)
        copy = ir.node(node.op_type, [data, self._constant(weight), *bias], attributes=attributes)
        self._graph.append(copy)
        computed = copy.outputs[0]
        if not _can_stride(node):  # all positions were computed, of no other channels
            computed = self._selected(
                computed, dataclasses.replace(positions, steps=(1, *positions.steps[1:]))
            )
        n_channels, *spatial = positions.sizes(sizes)
        n_seen = (n_channels, math.prod(spatial))
        key = (layer, positions)
        if key not in self._own:
            self._own[key] = self._take(self._selected(output, positions), n_seen)
        self._comparisons.append(_Comparison(layer, n_seen, self._own[key], self._take(computed, n_seen)))

    def run(self, images: NDArray[np.uint8], runner_factory: RunnerFactory, folder: Path) -> Probed:
        """Run the images through; at least one copy has been added.

        Args:
            images: uint8 NHWC, a multiple of the model's batch size where that is fixed.
            runner_factory: makes the fp32 runner.
            folder: for the graph's file.
        """
        joined = self._append("Concat", self._parts, axis=1)
        joined.name, joined.dtype = _OUTPUT, ir.DataType.FLOAT
        self._graph.outputs.append(joined)
        unload_weights(self._model, folder / "probe.weights")
        path = folder / "probe.onnx"
        save_for_runner(self._model, path)
        image, output = self._graph.inputs[0].name or "", self._graph.outputs[0].name or ""
        outputs: list[NDArray[np.float32]] = []
        results: list[list[ProbeResult]] = [[] for _ in self._comparisons]
        with runner_factory(path, ()) as runner:
            for start in range(0, len(images), self._batch):
                made = runner.infer({image: images[start : start + self._batch]})
                outputs.append(np.array(made[output]))
                for comparison, parts in zip(self._comparisons, results, strict=True):
                    parts.append(comparison.result(made[_OUTPUT]))
        layers = [
            (
                comparison.layer,
                ProbeResult(
                    *(
                        np.concatenate([getattr(part, field) for part in parts])
                        for field in ProbeResult.__slots__
                    )
                ),
            )
            for comparison, parts in zip(self._comparisons, results, strict=True)
        ]
        return Probed(layers, np.concatenate(outputs))

    def _quantized(self, value: ir.Value, grid: QuantParams) -> ir.Value:
        """`value` through the grid; once for all layers that read it so."""
        key = (value, grid.scale.tobytes(), grid.zero_point.tobytes())
        if key not in self._restored:
            ends = [self._constant(ir.Tensor(np.asarray(end))) for end in (grid.scale, grid.zero_point)]
            stored = self._append("QuantizeLinear", [value, *ends])
            self._restored[key] = self._append("DequantizeLinear", [stored, *ends])
        return self._restored[key]

    def _selected(self, value: ir.Value, positions: _Positions) -> ir.Value:
        if all(step == 1 for step in positions.steps):
            return value
        key = (value, positions)
        if key not in self._selections:
            n = len(positions.steps)
            ends = [
                self._constant(ir.Tensor(np.array(numbers, np.int64)))
                for numbers in (positions.firsts, [2**31 - 1] * n, range(1, n + 1), positions.steps)
            ]
            self._selections[key] = self._append("Slice", [value, *ends])
        return self._selections[key]

    def _take(self, value: ir.Value, sizes: tuple[int, int]) -> int:
        """Let the values leave the graph; where they begin."""
        self._parts.append(self._append("Reshape", [value, self._rows]))
        first = self._n_columns
        self._n_columns += math.prod(sizes)
        return first

    def _append(self, op_type: str, inputs: list[ir.Value], **attributes: int) -> ir.Value:
        node = ir.node(op_type, inputs, attributes)
        self._graph.append(node)
        return node.outputs[0]

    def _constant(self, tensor: ir.TensorProtocol) -> ir.Value:
        name = f"edgefold_probe_constant_{len(self._graph.initializers)}"
        value = ir.Value(
            name=name,
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(tensor.shape.numpy()),
            const_value=tensor,
        )
        self._graph.initializers[name] = value
        return value


def _can_stride(node: ir.Node) -> bool:
    """Whether some positions can be computed without the others; not where padding is chosen at run time."""
    return node.op_type == "Conv" and node.attributes.get_string("auto_pad", "NOTSET") in ("NOTSET", "VALID")


def _pads_and_strides(node: ir.Node, n: int) -> tuple[list[int], list[int]]:
    """A convolution's, the paddings at the start."""
    pads = node.attributes.get_ints("pads", [0] * 2 * n)
    return list(pads[:n]), list(node.attributes.get_ints("strides", [1] * n))
