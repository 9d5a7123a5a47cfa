"""Layers beside changed copies of themselves, in one graph: what each copy's output is off by.

A correction of one layer by itself needs no walk from layer to layer. Every layer gets copies that read the same
fp32 input, through a grid and with other weights; the difference of their outputs is averaged in the graph,
over the positions of an image. Nothing but three numbers a channel, image and copy leaves it. Everything is
compiled and run once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import ShapeInferencePass

from pipeline.artifacts import QuantParams
from pipeline.contracts import RunnerFactory
from pipeline.metrics import sqnr_db_from_energies
from pipeline.onnx_files import save_model

__all__ = ["LayerProbe", "ProbeResult"]

_POSITIONS = 256
"""Of an output's channel in one image, about; all where there are no more."""


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


class LayerProbe:
    """A copy of an fp32 graph that compares; the original stays as it is."""

    def __init__(self, model: ir.Model) -> None:
        """Start without copies.

        Args:
            model: fp32, the shapes of its tensors known.
        """
        self._model = model.clone()
        self._graph = self._model.graph
        self._values = {value.name: value for node in self._graph for value in node.outputs}
        self._columns: list[tuple[str, int]] = []
        self._parts: list[list[ir.Value]] = [[], [], []]
        self._restored: dict[tuple[ir.Value, float, int], ir.Value] = {}
        self._strides: dict[tuple[int, ...], list[ir.Value]] = {}

    def add(
        self,
        layer: str,
        weight: NDArray[np.float32],
        grid: QuantParams | None,
        input_scale: NDArray[np.float64] | None = None,
    ) -> None:
        """Compare a layer with a copy of it.

        Args:
            layer: the name of its output tensor.
            weight: the copy's, of the shape of the layer's own.
            grid: what the copy's input is quantized on; ``None``: it is exact.
            input_scale: what every channel of the copy's input is multiplied with beforehand.
        """
        output = self._values[layer]
        node = output.producer()
        assert node is not None
        data = node.inputs[0]
        assert data is not None
        rank = 0 if data.shape is None else len(data.shape)
        if input_scale is not None:
            along = input_scale.astype(np.float32).reshape(1, -1, *[1] * (rank - 2))
            data = self._append("Mul", [data, self._constant(along)])
        if grid is not None:
            data = self._quantized(data, grid)
        copy = ir.node(
            node.op_type,
            [data, self._constant(weight), *node.inputs[2:]],
            attributes=dict(node.attributes),
        )
        self._graph.append(copy)
        sizes = [size if isinstance(size, int) else 0 for size in output.shape or ()]
        seen = self._selected(output, sizes)
        error = self._append("Sub", [seen, self._selected(copy.outputs[0], sizes)])
        for part, value in zip(
            self._parts,
            (error, self._append("Mul", [error, error]), self._append("Mul", [seen, seen])),
            strict=True,
        ):
            part.append(self._mean(value, len(sizes)))
        self._columns.append((layer, sizes[1]))

    def run(
        self, images: NDArray[np.uint8], runner_factory: RunnerFactory, folder: Path
    ) -> list[tuple[str, ProbeResult]]:
        """Run the images through; a result for each copy, in the order in which they were added.

        Args:
            images: uint8 NHWC, a multiple of the model's batch size where that is fixed.
            runner_factory: makes the fp32 runner.
            folder: for the graph's file.
        """
        if not self._columns:
            return []
        self._graph.outputs.clear()
        for index, part in enumerate(self._parts):
            joined = self._append("Concat", part, axis=1)
            joined.name, joined.dtype = f"edgefold_probe_{index}", ir.DataType.FLOAT
            self._graph.outputs.append(joined)
        ShapeInferencePass(data_prop=True)(self._model)
        path = folder / "probe.onnx"
        save_model(self._model, path)
        image = self._graph.inputs[0]
        batch = image.shape[0] if image.shape is not None and isinstance(image.shape[0], int) else 1
        seen: list[list[NDArray[Any]]] = [[], [], []]
        with runner_factory(path, ()) as runner:
            for start in range(0, len(images), batch):
                outputs = runner.infer({image.name or "": images[start : start + batch]})
                for index, rows in enumerate(seen):
                    rows.append(np.array(outputs[f"edgefold_probe_{index}"], np.float64))
        whole = [np.concatenate(rows) for rows in seen]
        results, first = [], 0
        for layer, n_channels in self._columns:
            columns = slice(first, first + n_channels)
            first += n_channels
            results.append((layer, ProbeResult(*(means[:, columns] for means in whole))))
        return results

    def _quantized(self, value: ir.Value, grid: QuantParams) -> ir.Value:
        """`value` through the grid; once for all layers that read it so."""
        key = (value, float(grid.scale), int(grid.zero_point))
        if key not in self._restored:
            ends = [self._constant(grid.scale), self._constant(grid.zero_point)]
            stored = self._append("QuantizeLinear", [value, *ends])
            self._restored[key] = self._append("DequantizeLinear", [stored, *ends])
        return self._restored[key]

    def _selected(self, value: ir.Value, sizes: list[int]) -> ir.Value:
        """An even selection of the positions of `value`: neighbours are alike, and comparing takes time."""
        spatial = sizes[2:]
        step = max(1, math.ceil((math.prod(spatial) / _POSITIONS) ** (1 / len(spatial)))) if spatial else 1
        steps = [min(step, size) for size in spatial]
        if all(step == 1 for step in steps):
            return value
        key = tuple(steps)
        if key not in self._strides:
            self._strides[key] = [
                self._constant(np.array(numbers, np.int64))
                for numbers in (
                    [(step - 1) // 2 for step in steps],
                    [2**31 - 1] * len(steps),
                    list(range(2, len(sizes))),
                    steps,
                )
            ]
        return self._append("Slice", [value, *self._strides[key]])

    def _mean(self, value: ir.Value, rank: int) -> ir.Value:
        if rank == 2:
            return value
        return self._append(
            "ReduceMean", [value, self._constant(np.arange(2, rank, dtype=np.int64))], keepdims=0
        )

    def _append(self, op_type: str, inputs: list[ir.Value], **attributes: int) -> ir.Value:
        node = ir.node(op_type, inputs, attributes)
        self._graph.append(node)
        return node.outputs[0]

    def _constant(self, array: NDArray[Any]) -> ir.Value:
        name = f"edgefold_probe_constant_{len(self._graph.initializers)}"
        tensor = ir.tensor(np.asarray(array), name=name)
        value = ir.Value(
            name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor
        )
        self._graph.initializers[name] = value
        return value
