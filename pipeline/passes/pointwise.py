"""Consecutive 1×1 convolutions without an activation between them into one."""

from __future__ import annotations

import math

import onnx_ir as ir

from pipeline.passes.graph_pass import GraphPass, LeaveAlone, RewriteReport
from pipeline.passes.linear import STANDARD_DOMAINS, LinearLayer, describe, sole_consumer, sweep

__all__ = ["POINTWISE", "merge_pointwise"]


def merge_pointwise(model: ir.Model) -> RewriteReport:
    """Merge two linear 1×1 convolutions where that lowers the arithmetic.

    Given::

        y = Conv(x, W1, b1)              # 1×1, C0 → C1 channels, stride s1
        z = Conv(y, W2, b2)              # 1×1, C1 → C2 channels, stride s2

    Result::

        z = Conv(x, W2 W1, W2 b1 + b2)   # 1×1, C0 → C2, stride s1 s2

    A 1×1 convolution is a matrix at each pixel, so ``W2 (W1 x + b1) + b2 = (W2 W1) x + (W2 b1 + b2)``.
    For each output pixel the pair costs ``C1 (s2² C0 + C2)`` multiplications and the merged one
    ``C0 C2``: a bottleneck (small ``C1``) is cheaper as it is and left alone.

    Also left alone: grouped convolutions, padding (zeros between the two are not ``b1``), a second
    consumer of ``y``, shared weights.
    """
    return sweep(model, _is_pair, _merge)


def _is_pair(second: ir.Node) -> bool:
    if not _is_pointwise(second) or second.inputs[0] is None:
        return False
    first = second.inputs[0].producer()
    return first is not None and _is_pointwise(first)


def _is_pointwise(node: ir.Node) -> bool:
    if node.op_type != "Conv" or node.domain not in STANDARD_DOMAINS or node.inputs[1] is None:
        return False
    shape = node.inputs[1].shape
    return shape is not None and all(size == 1 for size in shape[2:])


def _merge(node: ir.Node) -> int:
    between = node.inputs[0]
    assert between is not None
    first_node = between.producer()
    assert first_node is not None
    sole_consumer(between)
    first, second = LinearLayer.of(first_node), LinearLayer.of(node)
    for layer in (first, second):
        if layer.groups != 1:
            raise LeaveAlone(f"{describe(layer.node)} has {layer.groups} groups")
        if layer.pads:
            raise LeaveAlone(f"{describe(layer.node)} has padding")
    stride = [_strides(first), _strides(second)]
    pair_cost = second.in_channels * (math.prod(stride[1]) * first.in_channels + second.out_channels)
    merged_cost = first.in_channels * second.out_channels
    if merged_cost >= pair_cost:
        raise LeaveAlone(
            f"{first.in_channels}→{second.in_channels}→{second.out_channels} channels cost {pair_cost} "
            f"multiplications a pixel as two and {merged_cost} as one"
        )
    w1 = first.weight_array().reshape(first.out_channels, first.in_channels)
    w2 = second.weight_array().reshape(second.out_channels, second.in_channels)
    weight = (w2 @ w1).reshape(second.out_channels, first.in_channels, *second.kernel)
    second.store(weight, w2 @ first.bias_array() + second.bias_array())
    node.attributes["strides"] = ir.AttrInt64s("strides", [a * b for a, b in zip(*stride, strict=True)])
    node.replace_input_with(0, first_node.inputs[0])
    graph = first_node.graph
    assert graph is not None
    graph.remove(first_node, safe=True)
    return 1


def _strides(layer: LinearLayer) -> list[int]:
    return list(layer.node.attributes.get_ints("strides", [1] * (layer.rank - 2)))


POINTWISE = GraphPass("consecutive_pointwise", merge_pointwise)
