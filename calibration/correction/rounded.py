"""Weights as they lie on their int8 grids: rounded once, and shared by every graph that reads them."""

from __future__ import annotations

from functools import cached_property, partial
from pathlib import Path

import onnx_ir as ir

from calibration.placement import Placement, WeightPoint
from calibration.qdq import weight_params
from calibration.qparams import dequantize, quantize
from pipeline.onnx_files import unload_tensors

__all__ = ["RoundedWeights"]


class RoundedWeights:
    """The weights of a model rounded to nearest, float32, in a file from which they are mapped.

    Judging a correction, and finding biases, takes several graphs with the same rounded weights.
    """

    def __init__(self, model: ir.Model, placement: Placement, folder: Path) -> None:
        """Nothing is rounded before it is asked for.

        Args:
            model: fp32.
            placement: where Q/DQ will stand.
            folder: for the file; graphs that read it are written there by `pipeline.onnx_files.save_for_runner`.
        """
        self._placement = placement
        self._folder = folder
        self._original = {
            point.weight: _constant(model.graph.initializers[point.weight]) for point in placement.weights
        }

    def of(self, model: ir.Model, point: WeightPoint) -> ir.TensorProtocol:
        """The rounded weight of a layer of `model`, a copy of the original; one that was changed is rounded now."""
        constant = _constant(model.graph.initializers[point.weight])
        if constant is self._original[point.weight]:
            return self._of_original[point.weight]
        return _rounded(constant, point, self._placement)

    def put_into(self, model: ir.Model) -> None:
        """Round the weights of `model`, a copy of the original, in place."""
        found = {point.weight: self.of(model, point) for point in self._placement.weights}
        for name, tensor in found.items():
            model.graph.initializers[name].const_value = tensor

    @cached_property
    def _of_original(self) -> dict[str, ir.TensorProtocol]:
        points = {point.weight: point for point in self._placement.weights}
        lazy = [
            ir.LazyTensor(
                partial(_rounded, original, points[name], self._placement),
                ir.DataType.FLOAT,
                ir.Shape(original.shape.numpy()),
                name=name,
            )
            for name, original in self._original.items()
        ]
        return dict(zip(points, unload_tensors(lazy, self._folder / "rounded.weights"), strict=True))


def _rounded(constant: ir.TensorProtocol, point: WeightPoint, placement: Placement) -> ir.TensorProtocol:
    array = constant.numpy()
    params = weight_params(array, point, placement)
    return ir.tensor(dequantize(quantize(array, params), params), name=point.weight)


def _constant(value: ir.Value) -> ir.TensorProtocol:
    assert value.const_value is not None, "a weight point names a constant"
    return value.const_value
