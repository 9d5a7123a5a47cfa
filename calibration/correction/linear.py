"""A layer as a linear map: which of its inputs meet which weights.

Conv, Gemm and MatMul all compute ``y = W x + b`` for every position of the output, in ``G`` groups:

    W: [G, O, K]     x: [G, positions, K]     y: [G, positions, O]

``K`` is what one output sums over: input channels of the group times kernel taps. A depthwise convolution
has as many groups as channels and ``O = 1``. Positions are drawn, not all taken: neighbours hardly differ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from calibration.placement import WeightPoint
from pipeline.artifacts import QuantParams

__all__ = ["LinearLayer", "Samples", "linear_layer"]


@dataclass(frozen=True, slots=True)
class Samples:
    """Rows of a layer's input and output at the same positions, float32."""

    inputs: NDArray[np.float32]
    """``[G, positions, K]``"""
    outputs: NDArray[np.float32]
    """``[G, positions, O]``"""


@dataclass(frozen=True, slots=True)
class LinearLayer:
    """What is needed to draw samples of a layer and to bring its weight into the form of a matrix.

    ``kernel`` is empty for Gemm and MatMul.
    """

    n_groups: int
    n_sums: int
    """``K``"""
    transposed: bool
    kernel: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    """At the start of every spatial axis."""

    def matrix(self, weight: NDArray[Any]) -> NDArray[Any]:
        """The weight as ``[G, O, K]``."""
        rows = weight.T if self.transposed else weight
        return rows.reshape(self.n_groups, -1, self.n_sums)

    def weight(self, matrix: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
        """What `matrix` was made of."""
        rows = matrix.reshape(shape[::-1] if self.transposed else shape)
        return np.ascontiguousarray(rows.T if self.transposed else rows)

    def samples(
        self,
        inputs: NDArray[Any],
        params: QuantParams | None,
        outputs: NDArray[np.float32],
        images: NDArray[np.intp],
        n_positions: int,
        rng: np.random.Generator,
    ) -> Samples:
        """Draw positions of the output, as many in every image, and what the layer reads there.

        Args:
            inputs: ``[N, C, ...]``, integers on the grid of `params`, or real where that is ``None``.
            params: the per-tensor grid of `inputs`.
            outputs: ``[N, O, ...]`` of the same images.
            images: which of them to draw from.
            n_positions: about how many in all.
            rng: chooses.
        """
        if not self.kernel:
            x = _real(inputs[images], params).reshape(1, -1, self.n_sums)
            return Samples(x, outputs[images].reshape(1, x.shape[1], -1))
        spatial = outputs.shape[2:]
        size = math.prod(spatial)
        per_image = max(1, min(size, math.ceil(n_positions / len(images))))
        flat = np.concatenate([rng.choice(size, per_image, replace=False) for _ in images])
        image = np.repeat(images, per_image)
        at = np.unravel_index(flat, spatial)
        where: tuple[Any, ...] = (image, slice(None), *at)
        y = outputs[where]
        return Samples(self._patches(inputs, params, image, at), _grouped(y, self.n_groups))

    def _patches(
        self,
        inputs: NDArray[Any],
        params: QuantParams | None,
        image: NDArray[np.intp],
        at: Sequence[NDArray[np.intp]],
    ) -> NDArray[np.float32]:
        sizes = inputs.shape[2:]
        patches = np.empty((len(image), inputs.shape[1], math.prod(self.kernel)), np.float32)
        for tap, offsets in enumerate(np.ndindex(self.kernel)):
            index = [
                position * stride + offset * dilation - pad
                for position, stride, offset, dilation, pad in zip(
                    at, self.strides, offsets, self.dilations, self.pads, strict=True
                )
            ]
            inside = np.ones(len(image), bool)
            for i, size in zip(index, sizes, strict=True):
                inside &= (i >= 0) & (i < size)
            kept = [i.clip(0, size - 1) for i, size in zip(index, sizes, strict=True)]
            where: tuple[Any, ...] = (image, slice(None), *kept)
            values = _real(inputs[where], params)
            values[~inside] = 0.0
            patches[:, :, tap] = values
        return _grouped(patches.reshape(len(image), -1), self.n_groups)


def linear_layer(node: ir.Node, point: WeightPoint) -> LinearLayer | str:
    """The layer that `point` is the weight of, or why it cannot be seen as one."""
    weight = node.inputs[1]
    assert weight is not None, "a weight point names a constant"
    assert weight.shape is not None
    shape = tuple(int(size) for size in weight.shape if isinstance(size, int))
    if node.op_type in ("Gemm", "MatMul"):
        return LinearLayer(1, shape[1 - point.axis], transposed=point.axis == 1)
    if node.op_type != "Conv":
        return f"{node.op_type} is not solved for"
    if node.attributes.get_string("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return "its padding is chosen at run time"
    kernel = shape[2:]
    ones = [1] * len(kernel)
    return LinearLayer(
        n_groups=node.attributes.get_int("group", 1),
        n_sums=math.prod(shape[1:]),
        transposed=False,
        kernel=kernel,
        strides=tuple(node.attributes.get_ints("strides", ones)),
        dilations=tuple(node.attributes.get_ints("dilations", ones)),
        pads=tuple(node.attributes.get_ints("pads", [0] * len(kernel))[: len(kernel)]),
    )


def _real(values: NDArray[Any], params: QuantParams | None) -> NDArray[np.float32]:
    real = values.astype(np.float32)
    if params is not None:
        real -= np.float32(params.zero_point)
        real *= np.float32(params.scale)
    return real


def _grouped(rows: NDArray[np.float32], n_groups: int) -> NDArray[np.float32]:
    """``[positions, G * n]`` to ``[G, positions, n]``."""
    return np.ascontiguousarray(rows.reshape(len(rows), n_groups, -1).transpose(1, 0, 2))
