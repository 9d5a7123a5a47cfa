"""Batch norm and arithmetic with constants into the linear layer after them, where that is exact."""

from __future__ import annotations

import onnx_ir as ir

from pipeline.passes.batch_norm import is_batch_norm
from pipeline.passes.graph_pass import GraphPass, LeaveAlone, RewriteReport
from pipeline.passes.linear import (
    LinearLayer,
    affine_of,
    bypass,
    constant_operand,
    describe,
    is_linear,
    sole_consumer,
    sweep,
)

__all__ = ["AFFINE_BEFORE", "fold_affine_before"]


def fold_affine_before(model: ir.Model) -> RewriteReport:
    """Fold affine nodes into the linear layer that they feed.

    Given::

        y = BatchNormalization(x, …)     # or Mul, Add, Sub, Div with a constant
        z = Conv(y, W, b)

    Result::

        z = Conv(x, W', b')

    With ``y = a x + t`` per input channel ``i``, and output channel ``o`` of the same group::

        z[o] = sum W[o, i] * (a[i] x[i] + t[i]) + b[o]
             = sum (a[i] W[o, i]) * x[i]  +  b[o] + sum over i and kernel of W[o, i] t[i]

    The second sum is a constant only where every output position sees the whole kernel. Zero padding
    breaks that at the borders, where ``y`` continues as 0 and not as ``t``: a shift before a padded
    convolution is left alone, a pure scale (``t = 0``) is folded, since ``a 0 = 0``. ConvTranspose sees a
    part of its kernel everywhere, so it takes scales only.

    Also left alone: a second consumer of ``y``, a shared weight, a consumer that is not linear.
    """
    return sweep(model, _is_candidate, _fold, backwards=True)


def _is_candidate(node: ir.Node) -> bool:
    return is_batch_norm(node) or constant_operand(node) is not None


def _fold(node: ir.Node) -> int:
    consumer = sole_consumer(node.outputs[0])
    feeds_data = consumer.inputs[0] is node.outputs[0] and consumer.graph is node.graph
    if not is_linear(consumer) or not feeds_data:
        raise LeaveAlone(f"its output goes to {describe(consumer)}, which is not a linear layer")
    layer = LinearLayer.of(consumer)
    # Of the layer's input: of the same rank as its output, channels on the same axis.
    affine = affine_of(node, layer.rank, layer.channel_axis)
    if max(affine.scale.size, affine.shift.size) not in (1, layer.in_channels):
        raise LeaveAlone(f"{describe(node)} broadcasts over more channels than its input has")
    index = constant_operand(node)
    source = node.inputs[0 if index is None else 1 - index]
    assert source is not None
    if index is not None and not _has_channels(source, layer):
        raise LeaveAlone(f"{describe(node)} may widen its input, whose shape is {source.shape}")
    layer.put_before(affine)
    bypass(node, source)
    return 1


def _has_channels(value: ir.Value, layer: LinearLayer) -> bool:
    shape = value.shape
    return shape is not None and len(shape) == layer.rank and shape[layer.channel_axis] == layer.in_channels


AFFINE_BEFORE = GraphPass("affine_before_linear", fold_affine_before)
