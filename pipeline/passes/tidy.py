"""Constants evaluated, identities and dead nodes removed: what every exporter leaves behind."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from pipeline.passes.graph_pass import GraphPass, RewriteReport
from pipeline.passes.linear import STANDARD_DOMAINS, add_initializer, bypass

__all__ = ["TIDY", "tidy"]

# A classifier's largest constant subgraph is a transposed head (2048 × 21841 weights); what is larger
# (a Range or Tile over millions) would only blow up the file.
_FOLDABLE_ELEMENTS = 1 << 26


def tidy(model: ir.Model) -> RewriteReport:
    """Bring a graph into the form that the other passes match.

    Given::

        w' = Transpose(w);  y = Gemm(x, w');  z = Identity(Dropout(y));  k = Constant();  …

    Result::

        z = Gemm(x, w'')          # w'' and k are initializers

    A Reshape to a computed shape gets a constant one. Functions are inlined first. ``n_rewrites`` counts the nodes and unused initializers that went.
    """
    from onnxscript import optimizer  # a second to import, and only building needs it

    before = _size(model)
    common.InlinePass()(model)
    optimizer.fold_constants(model, input_size_limit=_FOLDABLE_ELEMENTS, output_size_limit=_FOLDABLE_ELEMENTS)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    for node in list(model.graph):
        if _is_inference_dropout(node):
            source = node.inputs[0]
            assert source is not None
            if not (node.outputs[0].is_graph_output() and source.is_graph_input()):
                bypass(node, source)
    for node in model.graph:
        _fix_reshape_target(node)
    common.IdentityEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedOpsetsPass()(model)
    common.NameFixPass()(model)
    return RewriteReport(max(0, before - _size(model)))


def _fix_reshape_target(node: ir.Node) -> None:
    """Replace a computed target shape with a constant, where at most one size of the result is free.

    ``Reshape(x, Concat(Shape(image)[0], 1536))`` is ``Reshape(x, [-1, 1536])``. Exporters write the former
    for a free batch; it keeps the model's input in use by more than the first layer.
    """
    if node.op_type != "Reshape" or node.domain not in STANDARD_DOMAINS or node.outputs[0].shape is None:
        return
    target = node.inputs[1]
    sizes = [size if isinstance(size, int) else -1 for size in node.outputs[0].shape]
    computed = target is not None and ir.convenience.get_const_tensor(target) is None
    if not computed or sizes.count(-1) > 1 or 0 in sizes or node.graph is None:
        return
    assert isinstance(node.graph, ir.Graph)
    constant = add_initializer(node.graph, f"{node.outputs[0].name}.shape", np.array(sizes, np.int64))
    node.replace_input_with(1, constant)


def _size(model: ir.Model) -> int:
    """Nodes and unused initializers; a Constant node that becomes an initializer counts as gone."""
    unused = sum(not value.uses() for value in model.graph.initializers.values())
    return sum(1 for _ in model.graph.all_nodes()) + unused


def _is_inference_dropout(node: ir.Node) -> bool:
    if node.op_type != "Dropout" or node.domain not in STANDARD_DOMAINS or node.inputs[0] is None:
        return False
    if any(output.uses() or output.is_graph_output() for output in node.outputs[1:]):
        return False
    training = node.inputs[2] if len(node.inputs) > 2 else None
    if training is None:
        return True
    mode = ir.convenience.get_const_tensor(training)
    return mode is not None and not mode.numpy().any()


TIDY = GraphPass("tidy", tidy)
