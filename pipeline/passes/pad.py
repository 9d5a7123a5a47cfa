"""Zero padding into the convolution after it."""

from __future__ import annotations

import onnx_ir as ir

from pipeline.passes.graph_pass import GraphPass, LeaveAlone, RewriteReport
from pipeline.passes.linear import STANDARD_DOMAINS, bypass, describe, sole_consumer, sweep

__all__ = ["PAD", "fold_pad"]


def fold_pad(model: ir.Model) -> RewriteReport:
    """Make a Pad the padding of the convolution that it feeds.

    Given::

        y = Pad(x, p)                    # zeros around height and width
        z = Conv<pads = q>(y, W, b)

    Result::

        z = Conv<pads = p + q>(x, W, b)

    since a convolution pads with zeros too, on each side by its own amount. TensorFlow's "same" padding
    with stride 2 is lopsided, and exporters write it as a Pad, which int8 engines run by itself.

    Left alone: other values or modes (reflect, edge), padding of batch or channels, cropping (negative
    amounts), computed amounts, ``auto_pad``, a second consumer, another op than Conv after it.
    """
    return sweep(model, lambda node: node.op_type == "Pad" and node.domain in STANDARD_DOMAINS, _fold)


def _fold(node: ir.Node) -> int:
    convolution = sole_consumer(node.outputs[0])
    if convolution.op_type != "Conv" or convolution.inputs[0] is not node.outputs[0]:
        raise LeaveAlone(f"its output goes to {describe(convolution)}, which is not a convolution")
    auto_pad = convolution.attributes.get_string("auto_pad", "NOTSET")
    if auto_pad not in ("NOTSET", "VALID"):
        raise LeaveAlone(f"{describe(convolution)} computes its padding itself ({auto_pad})")
    weight, data = convolution.inputs[1], node.inputs[0]
    if weight is None or weight.shape is None or data is None:
        raise LeaveAlone(f"{describe(convolution)} has a weight of unknown shape")
    rank = len(weight.shape)
    amounts = _amounts(node, rank)
    if any(amounts[:2]) or any(amounts[rank : rank + 2]):
        raise LeaveAlone("it pads batch or channels")
    if min(amounts) < 0:
        raise LeaveAlone("it crops")
    spatial = [*amounts[2:rank], *amounts[rank + 2 :]]
    own = convolution.attributes.get_ints("pads", ()) if auto_pad == "NOTSET" else ()
    total = [a + b for a, b in zip(spatial, own or [0] * len(spatial), strict=True)]
    convolution.attributes["pads"] = ir.AttrInt64s("pads", total)
    convolution.attributes.pop("auto_pad", None)
    bypass(node, data)
    return 1


def _amounts(node: ir.Node, rank: int) -> list[int]:
    """Padding of every axis, begins then ends; raises `LeaveAlone` unless it is constant zeros."""
    mode = node.attributes.get_string("mode", "constant")
    inputs = [*node.inputs, None, None][:4]
    pads, value, axes = (None if x is None else ir.convenience.get_const_tensor(x) for x in inputs[1:])
    if mode != "constant" or (inputs[2] is not None and (value is None or value.numpy().any())):
        raise LeaveAlone("it pads with something else than zeros")
    if pads is None or (inputs[3] is not None and axes is None):
        raise LeaveAlone("its amounts are not constants")
    padded_axes = list(range(rank)) if axes is None else [int(axis) % rank for axis in axes.numpy()]
    amounts = [0] * (2 * rank)
    for index, axis in enumerate(padded_axes):
        amounts[axis] = int(pads.numpy()[index])
        amounts[rank + axis] = int(pads.numpy()[index + len(padded_axes)])
    return amounts


PAD = GraphPass("pad_into_conv", fold_pad)
