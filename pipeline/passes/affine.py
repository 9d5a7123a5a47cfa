"""Arithmetic with constants into the linear layer before it."""

from __future__ import annotations

import onnx_ir as ir

from pipeline.passes.graph_pass import GraphPass, RewriteReport
from pipeline.passes.linear import constant_operand, fold_backwards, sweep
from pipeline.passes.residual_scale import is_residual_scale

__all__ = ["AFFINE", "fold_affine"]


def fold_affine(model: ir.Model) -> RewriteReport:
    """Fold chains of Mul, Add, Sub, Div by constants into the linear layer that feeds them.

    Given::

        y = Conv(x, W)
        z = Add(Mul(y, s), t)           # s, t: scalars or one value a channel

    Result::

        z = Conv(x, s W, t)

    because ``s (W * x + b) + t = (s W) * x + (s b + t)`` per output channel. ``y - c`` is ``y + (-c)``,
    ``c - y`` has scale -1, ``y / c`` has scale ``1 / c``; ``c / y`` is not affine.

    Left alone: a constant that varies over height or width or adds a dimension, and what `fold_batch_norm`
    leaves alone. Not a candidate: the scale of a residual branch (`pipeline.passes.residual_scale`).
    """
    return sweep(
        model,
        lambda node: constant_operand(node) is not None and not is_residual_scale(node),
        fold_backwards,
    )


AFFINE = GraphPass("affine_into_linear", fold_affine)
