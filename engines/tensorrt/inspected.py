"""The audit of an engine that was built: what TensorRT says it runs, mapped back to the ONNX graph.

The graph tells what each kernel was meant to be, `engines.tensorrt.inspector` what it became. Where the two
differ, the finding's reason and edit come from the graph (`engines.tensorrt.predict`); where the graph gives
no reason, the builder chose otherwise, and the finding says so.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace

import onnx_ir as ir

from engines.tensorrt.audit import COMPUTING, AuditedLayer, AuditReport, Finding, Tally
from engines.tensorrt.epilogue import LINEAR, POINTWISE, runs_in_int8
from engines.tensorrt.inspector import Kernel, kernels_of_build_log, kernels_of_inspector
from engines.tensorrt.layers import Kind, Precision
from engines.tensorrt.predict import predict_audit
from engines.tensorrt.quantized_graph import QuantizedGraph, is_move, node_name
from engines.tensorrt.sums import concat_finding, float_add, residual_sums, unfused_add
from pipeline.errors import EngineError
from pipeline.passes.linear import describe

__all__ = ["audit_build_log", "audit_engine"]

_COMPUTES = re.compile(r"conv|correlation|gemm|fullyconnected|matrixmultiply|fusion", re.IGNORECASE)
_NO_KERNEL = re.compile(r"noop|trainstation|signal|wait|constant", re.IGNORECASE)
_COMPILED = re.compile(r"(\.\d+)?(_\d+)?_myl\d+$")
"""What a compiled kernel's tensor has behind the name it has in the graph."""
_WIDTH = {"int8": 1, "bf16": 2, "fp16": 2, "fp32": 4}


def audit_engine(information: str, model: ir.Model) -> AuditReport:
    """Audit a built engine.

    Args:
        information: the engine inspector's JSON.
        model: the ONNX graph that was built.

    Raises:
        EngineError: `information` cannot be read, or leaves the types of dynamic shapes open.
        UnsupportedError: as `engines.tensorrt.predict.predict_audit`.
    """
    return _Audit(kernels_of_inspector(information), model).run()


def audit_build_log(log: str, model: ir.Model) -> AuditReport:
    """As `audit_engine`, from a verbose build log: for engines that cannot be loaded where they are built."""
    return _Audit(kernels_of_build_log(log), model).run()


class _Audit:
    def __init__(self, kernels: Sequence[Kernel], model: ir.Model) -> None:
        self._graph = QuantizedGraph(model)
        self._predicted = predict_audit(model)
        self._nodes = {node_name(node): node for node in self._graph.graph}
        self._kernels = kernels
        self._layers = [self._layer(kernel) for kernel in kernels]
        self._copies: set[str] = set()
        """Kernels that a finding about a concatenation tells of already."""
        self._order = {layer.name: index for index, layer in enumerate(self._layers)}
        self._of_node: dict[str, list[AuditedLayer]] = defaultdict(list)
        for layer in self._layers:
            for name in layer.nodes:
                self._of_node[name].append(layer)

    def run(self) -> AuditReport:
        sums = residual_sums(self._graph)
        adds = [finding for add in sums if (finding := self._add(add)) is not None]
        joined = [node for node in self._graph.nodes if node.op_type == "Concat"]
        joined = [node for node in joined if self._graph.precision(node.outputs[0]) is not None]
        concats = [finding for concat in joined if (finding := self._concat(concat)) is not None]
        linear = [node for node in self._graph.nodes if node.op_type in LINEAR]
        return AuditReport(
            source="inspector",
            layers=tuple(self._layers),
            findings=(
                *(finding for node in linear for finding in self._linear(node)),
                *adds,
                *concats,
                *self._rewrites(),
                *self._islands(),
            ),
            adds=Tally(len(sums), len(sums) - len(adds)),
            concats=Tally(len(joined), len(joined) - len(concats)),
        )

    # What a kernel is ----------------------------------------------------------------------------------

    def _layer(self, kernel: Kernel) -> AuditedLayer:
        nodes = kernel.metadata or tuple(name for name in _tokens(kernel.name) if name in self._nodes)
        kind = self._kind(kernel, [self._nodes[name] for name in nodes if name in self._nodes])
        reason = kernel.layer_type + (f", {kernel.tactic}" if kernel.tactic else "")
        return AuditedLayer(kernel.name, kind, self._precision(kernel, kind), nodes, reason)

    def _kind(self, kernel: Kernel, nodes: Sequence[ir.Node]) -> Kind:
        running = [node for node in nodes if node in set(self._graph.nodes)]
        ops = {node.op_type for node in running}
        if _NO_KERNEL.search(kernel.layer_type):
            return "noop"
        if ops & LINEAR and _COMPUTES.search(kernel.layer_type):
            return "conv" if ops & {"Conv", "ConvTranspose"} else "fc"
        if "Concat" in ops and not ops & POINTWISE:
            return "concat"
        if kernel.layer_type == "Reformat" or ops <= {"QuantizeLinear", "DequantizeLinear"}:
            return _rewriting(kernel)
        if ops & (POINTWISE - {"Cast"}) or ops & LINEAR:
            return "elementwise"
        if any("Pool" in op for op in ops) or "pool" in kernel.layer_type.lower():
            return "pool"
        if any(op.startswith("Reduce") for op in ops):
            return "reduce"
        if "Softmax" in ops:
            return "softmax"
        return "reformat" if all(is_move(node) or node.op_type in _TYPE_OPS for node in running) else "other"

    def _precision(self, kernel: Kernel, kind: Kind) -> Precision:
        """What the kernel computes in: the type of its weights, else the widest that it reads or writes."""
        told = [p for _, p in (*kernel.inputs, *kernel.outputs) if p is not None]
        if kind in ("conv", "fc"):
            read = [p for _, p in kernel.inputs[:1] if p is not None]
            precision = kernel.weights or next(iter(read), None)
            if precision is not None:
                return precision
        if told:
            return max(told, key=_WIDTH.__getitem__)
        if kind in COMPUTING:
            raise EngineError(
                f"the inspector does not tell the types of {kernel.name!r}: give it an execution context with the "
                "input shapes set (inspector.execution_context), or build with fixed shapes"
            )
        return "fp32"

    # Findings ------------------------------------------------------------------------------------------

    def _linear(self, node: ir.Node) -> Iterator[Finding]:
        name = node_name(node)
        kernels = self._of_node[name]
        computing = [layer for layer in kernels if layer.kind in ("conv", "fc")]
        for finding in self._predicted.of("float_layer", "half_quantized"):
            if finding.edit is not None and finding.edit.nodes == (name,) and computing:
                yield replace(finding, layer=computing[0].name)
        if not runs_in_int8(self._graph, node):
            return
        if not computing:
            yield Finding(
                "not_int8",
                kernels[0].name if kernels else "",
                f"{describe(node)} is quantized in the graph, but no kernel that computes it is named",
                "look the node up in the inspector's output",
            )
        elif computing[0].precision != "int8":
            layer = computing[0]
            yield Finding(
                "not_int8",
                layer.name,
                f"{describe(node)} is quantized in the graph but runs in {layer.precision} ({layer.reason})",
                "leave it in float in the graph too, or give it a shape that int8 kernels take: channels a multiple "
                "of 4 a group, better of 32",
            )
        others = [
            layer
            for layer in kernels
            if computing
            and layer.kind == "elementwise"
            and self._order[layer.name] > self._order[computing[0].name]
        ]
        if others:
            yield Finding(
                "split_layer",
                computing[0].name,
                f"{describe(node)} is computed in {computing[0].name!r} and finished in {others[0].name!r}, with a "
                "pass over memory between",
                "none in the graph: this compiler does not put the rest into the convolution's kernel",
            )

    def _add(self, add: ir.Node) -> Finding | None:
        kernels = self._of_node[node_name(add)]
        if any(layer.kind in ("conv", "fc") for layer in kernels):
            return float_add(self._graph, add, kernels[0].name)
        where = kernels[0].name if kernels else ""
        if any(
            node_name(add) in layer.nodes and layer.kind in ("conv", "fc") for layer in self._predicted.layers
        ):
            return Finding(
                "unfused_add",
                where,
                f"{describe(add)} could run in a convolution, but runs in {where!r}"
                if where
                else f"{describe(add)} could run in a convolution; no kernel names it",
                "none in the graph: the builder chose other kernels",
            )
        return unfused_add(self._graph, add, where)

    def _concat(self, concat: ir.Node) -> Finding | None:
        name, value = node_name(concat), concat.outputs[0]
        joined = {value.name, *(node.outputs[0].name for node in self._graph.quantizers(value))}
        copies = [
            layer.name
            for kernel, layer in zip(self._kernels, self._layers, strict=True)
            if (layer.kind == "concat" and name in layer.nodes)
            or (layer.name.startswith(name) and layer.name.endswith(" copy"))
            or (not layer.nodes and any(_COMPILED.sub("", tensor) in joined for tensor, _ in kernel.outputs))
        ]
        self._copies.update(copies)
        finding = concat_finding(self._graph, concat, copies[0] if copies else name, copied=False)
        if finding is None and copies:
            return Finding(
                "concat_copied",
                copies[0],
                f"{describe(concat)}: {len(copies)} of its parts are copied by {', '.join(map(repr, copies))}",
                "none in the graph: the builder could not let their producers write in place",
            )
        return finding

    def _rewrites(self) -> Iterator[Finding]:
        """Kernels that only rewrite memory."""
        causes = {
            name: finding
            for finding in self._predicted.of("reformat", "requantization")
            for layer in self._predicted.layers
            if layer.name == finding.layer
            for name in layer.nodes
        }
        interface = {v.name for v in (*self._graph.graph.inputs, *self._graph.graph.outputs)}
        for kernel, layer in zip(self._kernels, self._layers, strict=True):
            if layer.name in self._copies or layer.kind not in _REWRITING:
                continue
            cause = next((causes[name] for name in layer.nodes if name in causes), None)
            if cause is not None:
                yield replace(cause, layer=layer.name)
                continue
            tensors = [name for name, _ in (*kernel.inputs, *kernel.outputs)]
            at_border = any(name in interface for name in tensors)
            yield Finding(
                "reformat",
                layer.name,
                f"{layer.name} rewrites {' to '.join(map(repr, tensors))}",
                "none: the graph's input or output arrives in another type or layout"
                if at_border
                else "none in the graph: the kernels around it take different layouts",
            )

    def _islands(self) -> Iterator[Finding]:
        computing = [layer for layer in self._layers if layer.kind in COMPUTING]
        if all(layer.precision == "fp32" for layer in computing):
            return
        causes = {finding.layer: finding for finding in self._predicted.of("fp32_island")}
        owner = {name: layer.name for layer in self._predicted.layers for name in layer.nodes}
        for layer in computing:
            finishes = layer.kind == "elementwise" and any(
                name in self._nodes and self._nodes[name].op_type in LINEAR for name in layer.nodes
            )
            if layer.precision == "fp32" and not finishes:  # what finishes a split layer is told with it
                cause = next((causes[owner[n]] for n in layer.nodes if owner.get(n) in causes), None)
                yield Finding(
                    "fp32_island",
                    layer.name,
                    f"{layer.name} reads or writes fp32 among narrower kernels ({layer.reason})",
                    cause.remedy if cause is not None else "none in the graph, which is narrower there",
                    cause.edit if cause is not None else None,
                )


_REWRITING = frozenset({"quantize", "dequantize", "requantize", "reformat"})
_TYPE_OPS = frozenset({"Cast", "QuantizeLinear", "DequantizeLinear"})


def _rewriting(kernel: Kernel) -> Kind:
    read = {precision for _, precision in kernel.inputs}
    written = {precision for _, precision in kernel.outputs}
    if kernel.origin == "REFORMAT" or read == written != {"int8"} or None in read | written:
        return "quantize" if kernel.origin == "QDQ" else "reformat"
    if written == {"int8"}:
        quantizes = kernel.origin == "QDQ" or bool(kernel.metadata)
        return ("requantize" if read == {"int8"} else "quantize") if quantizes else "reformat"
    return "dequantize" if read == {"int8"} else "reformat"


def _tokens(name: str) -> list[str]:
    """The parts of a kernel's name, which before TensorRT 8.6 is all that tells its ONNX nodes."""
    bare = re.sub(r"PWN\(|\)", "", name)
    return [part.strip() for part in re.split(r" \+ | \|\| |, ", bare)]
