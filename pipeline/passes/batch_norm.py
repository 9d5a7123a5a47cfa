"""Batch norm into the linear layer before it."""

from __future__ import annotations

import onnx_ir as ir

from pipeline.passes.graph_pass import GraphPass, RewriteReport
from pipeline.passes.linear import STANDARD_DOMAINS, fold_backwards, sweep

__all__ = ["BATCH_NORM", "fold_batch_norm", "is_batch_norm"]


def is_batch_norm(node: ir.Node) -> bool:
    """Whether `node` is a BatchNormalization of the standard operator set."""
    return node.op_type == "BatchNormalization" and node.domain in STANDARD_DOMAINS


def fold_batch_norm(model: ir.Model) -> RewriteReport:
    """Fold inference batch norm into the Conv, ConvTranspose, Gemm or MatMul that feeds it.

    Given::

        y = Conv(x, W, b)
        z = BatchNormalization(y, gamma, beta, mean, var)

    Result::

        z = Conv(x, W', b')

    Batch norm at inference is ``z = gamma (y - mean) / sqrt(var + eps) + beta``, affine per channel. With
    ``a = gamma / sqrt(var + eps)``, for each output channel ``o`` (whatever its group)::

        z[o] = a[o] (sum W[o] * x + b[o]) + beta[o] - a[o] mean[o]
             = sum (a[o] W[o]) * x  +  a[o] (b[o] - mean[o]) + beta[o]
                     W'[o]                       b'[o]

    A bias that stands between the two as an Add, as Keras and Caffe write it, is folded along.

    Left alone: another op before it (see `pipeline.passes.affine_before`), a second consumer or a graph
    output between the two, a shared weight, training mode, parameters that are not constants.
    """
    return sweep(model, is_batch_norm, fold_backwards)


BATCH_NORM = GraphPass("batch_norm_into_linear", fold_batch_norm)
