"""The scale of a residual branch into the convolution that ends the branch."""

from __future__ import annotations

import onnx_ir as ir

from pipeline.passes.graph_pass import GraphPass, RewriteReport
from pipeline.passes.linear import constant_operand, fold_backwards, sweep

__all__ = ["RESIDUAL_SCALE", "fold_residual_scale", "is_residual_scale"]


def fold_residual_scale(model: ir.Model) -> RewriteReport:
    """Fold the residual scale of arXiv 1602.07261, section 3.3, into the branch's up-projection.

    Given::

        u = Conv(h, W, b)               # 1×1, linear: the up-projection
        y = Add(x, Mul(u, s))           # s: a scalar (0.1 to 0.3) or one value a channel

    Result::

        y = Add(x, Conv(h, s W, s b))

    because ``x + s (W * h + b) = x + ((s W) * h + s b)``.

    It is a pass of its own, and comes before calibration, for what the Mul costs otherwise: engines fuse
    Conv + Add + ReLU into one kernel, and a Mul in between splits it into three; and the tensor ``u``
    would be quantized at up to ten times the range of what is added to ``x``.

    Left alone: a branch that does not end in a linear layer (its weight could not take the scale), an
    up-projection with a second consumer, a shared weight, a scale that varies over height or width.
    """
    return sweep(model, is_residual_scale, fold_backwards)


def is_residual_scale(node: ir.Node) -> bool:
    """Whether `node` multiplies by a constant what is then only added to another activation."""
    if node.op_type not in ("Mul", "Div") or constant_operand(node) is None:
        return False
    uses = node.outputs[0].uses()
    if len(uses) != 1 or node.outputs[0].is_graph_output():
        return False
    consumer = next(iter(uses)).node
    return consumer.op_type in ("Add", "Sum") and constant_operand(consumer) is None


RESIDUAL_SCALE = GraphPass("residual_scale", fold_residual_scale)
