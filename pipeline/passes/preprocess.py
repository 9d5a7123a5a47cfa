"""Normalization, colour order and the uint8 NHWC input into the first convolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from pipeline.artifacts import PreprocessSpec
from pipeline.passes.graph_pass import Feeds, GraphPass, LeaveAlone, RewriteReport
from pipeline.passes.linear import (
    STANDARD_DOMAINS,
    Affine,
    LinearLayer,
    Vector,
    add_initializer,
    describe,
    sole_consumer,
    unused_name,
)
from pipeline.preprocess import affine, normalize

__all__ = ["IMAGE_INPUT", "fold_preprocess"]

IMAGE_INPUT = "image"
"""Name of the input after folding: uint8, NHWC."""

_TO_NCHW = (0, 3, 1, 2)


def fold_preprocess(spec: PreprocessSpec, input_color: Literal["RGB", "BGR"]) -> GraphPass:
    """The pass that makes a graph take raw pixels.

    Given::

        x: float32 [N, 3, H, W], normalized, channels in spec.color order
        y = Conv(x, W, b)

    Result::

        image: uint8 [N, H, W, 3], channels in `input_color` order
        y = Conv(Cast(Transpose(image)), W', b')

    Normalization is affine, ``x[c] = s[c] p[c] + t[c]`` for a pixel ``p``
    (`pipeline.preprocess.affine`), so this is `pipeline.passes.affine_before` for the first convolution:
    ``W'[o, c] = s[c] W[o, c]`` and ``b'[o] = b[o] + sum W[o, c] t[c]``. Where the channel orders differ,
    the channels of ``W'`` are reversed.

    If the convolution pads with zeros and ``t`` is not zero, the shift is no bias: a padded ``x = 0``
    means the pixel ``m = -t / s``, not 0. The scale and the colour order are folded all the same, and a
    prologue keeps the rest::

        y = Conv(Sub(Cast(Transpose(image)), m), W', b)

    since ``s p + t = s (p - m)``, whose zero is ``x``'s zero. Where the input does not go to just one
    convolution of a single group, the whole normalization is the prologue: colours by Gather, Mul, Add.

    A network that takes NHWC (Keras) starts with a Transpose, which then takes the place of the new one.

    The rewrite is the model's only one whose input changes; ``n_rewrites`` is 1, and what stays in the
    graph is reported as skipped.
    """

    def rewrite(model: ir.Model) -> RewriteReport:
        source = _float_image_input(model)
        if source is None:
            return RewriteReport(0)
        scale, shift = affine(spec)
        return _rewrite(
            model.graph, source, Affine(scale, shift), spec.layout, flip=input_color != spec.color
        )

    def original_feeds(original: ir.Model, feeds: Feeds) -> Feeds:
        name = original.graph.inputs[0].name
        assert name is not None
        return {name: normalize(feeds[IMAGE_INPUT], spec, input_color)}

    return GraphPass("preprocess_into_first_conv", rewrite, original_feeds=original_feeds)


def _float_image_input(model: ir.Model) -> ir.Value | None:
    """The model's one normalized input, or ``None`` where it takes pixels already."""
    if len(model.graph.inputs) != 1:
        raise ValueError(f"the model has {len(model.graph.inputs)} inputs; an image classifier has one")
    source = model.graph.inputs[0]
    return None if source.dtype == ir.DataType.UINT8 else source


def _rewrite(
    graph: ir.Graph, source: ir.Value, normalization: Affine, layout: Literal["NCHW", "NHWC"], *, flip: bool
) -> RewriteReport:
    shape = source.shape
    channel_axis = 1 if layout == "NCHW" else 3
    if shape is None or len(shape) != 4 or shape[channel_axis] != 3:
        raise ValueError(
            f"the input has shape {shape}; expected rank 4 with 3 channels on axis {channel_axis}"
        )
    height, width = (shape[2], shape[3]) if layout == "NCHW" else (shape[1], shape[2])
    image = ir.Value(
        name=IMAGE_INPUT,
        type=ir.TensorType(ir.DataType.UINT8),
        shape=ir.Shape([shape[0], height, width, 3]),
    )
    head, own_transpose = source, None
    if layout == "NHWC" and (own_transpose := _sole_transpose(source)) is not None:
        head, channel_axis = own_transpose.outputs[0], 1
    prologue = _Prologue(graph, image)
    if channel_axis == 1:
        prologue.append("Transpose", perm=_TO_NCHW)
    prologue.append("Cast", to=int(source.dtype or ir.DataType.FLOAT))
    skipped: tuple[tuple[str, str], ...] = ()
    try:
        consumer = sole_consumer(head)
        layer = _first_convolution(consumer, head)
        kept = _fold_into(layer, normalization, flip=flip)
        if kept is not None:
            prologue.append("Sub", _along_channels(kept, channel_axis))
            pixel = ", ".join(f"{value:.2f}" for value in kept)
            reason = f"it pads with zeros, and zero is the pixel ({pixel}): subtracting that stays before it"
            skipped = ((describe(consumer), reason),)
    except LeaveAlone as reason:
        if flip:
            prologue.append("Gather", np.array([2, 1, 0], np.int64), axis=channel_axis)
        prologue.append("Mul", _along_channels(normalization.scale, channel_axis))
        prologue.append("Add", _along_channels(normalization.shift, channel_axis))
        skipped = ((f"input {source.name!r}", f"{reason}: the whole normalization stays in the graph"),)
    head.replace_all_uses_with(prologue.result)
    if own_transpose is not None:
        graph.remove(own_transpose, safe=True)
    graph.inputs[0] = image
    return RewriteReport(1, skipped)


def _sole_transpose(source: ir.Value) -> ir.Node | None:
    uses = source.uses()
    node = next(iter(uses)).node if len(uses) == 1 else None
    if node is None or node.op_type != "Transpose" or tuple(node.attributes.get_ints("perm", ())) != _TO_NCHW:
        return None
    return node


def _first_convolution(node: ir.Node, head: ir.Value) -> LinearLayer:
    if node.op_type != "Conv" or node.domain not in STANDARD_DOMAINS or node.inputs[0] is not head:
        raise LeaveAlone(f"the input goes to {describe(node)}, not to a convolution")
    layer = LinearLayer.of(node)
    if layer.groups != 1:
        raise LeaveAlone(f"{describe(node)} has {layer.groups} groups")
    return layer


def _fold_into(layer: LinearLayer, normalization: Affine, *, flip: bool) -> Vector | None:
    """Fold what is exact; returns the pixel that must still be subtracted, in the graph's channel order."""
    exact = not layer.pads or not np.any(normalization.shift)
    layer.put_before(normalization if exact else Affine(normalization.scale, np.zeros(3)))
    order = slice(None, None, -1) if flip else slice(None)
    if flip:
        layer.store(layer.weight_array()[:, order], layer.bias_array())
    return None if exact else (-normalization.shift / normalization.scale)[order]


def _along_channels(values: Vector, channel_axis: int) -> NDArray[np.float32]:
    shape = [1, 1, 1, 1]
    shape[channel_axis] = 3
    return values.astype(np.float32).reshape(shape)


class _Prologue:
    """Nodes put one after another in front of everything else."""

    def __init__(self, graph: ir.Graph, image: ir.Value) -> None:
        self.result = image
        self._graph = graph
        self._before = graph[0]

    def append(
        self, op_type: str, constant: NDArray[Any] | None = None, **attributes: int | Sequence[int]
    ) -> None:
        inputs = [self.result]
        if constant is not None:
            inputs.append(add_initializer(self._graph, f"{IMAGE_INPUT}_{op_type.lower()}_by", constant))
        node = ir.node(op_type, inputs, attributes=attributes)
        node.outputs[0].name = unused_name(self._graph, f"{IMAGE_INPUT}_{op_type.lower()}")
        self._graph.insert_before(self._before, node)
        self.result = node.outputs[0]
