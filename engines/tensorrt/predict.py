"""The static audit: what TensorRT will make of a graph, proved on the graph, without TensorRT.

Every residual add and every concatenation is either found free or listed with the reason; so is every kernel
that only rewrites memory, every layer that stays in float in a quantized graph, and every fp32 kernel among
narrower ones.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from engines.tensorrt.audit import COMPUTING, AuditedLayer, AuditReport, Edit, Finding, Tally
from engines.tensorrt.epilogue import LINEAR
from engines.tensorrt.fusion import plan_layers
from engines.tensorrt.layers import FusedLayer, rewritten_tensor
from engines.tensorrt.quantized_graph import QuantizedGraph, float_source, node_name
from engines.tensorrt.sums import concat_finding, float_add, residual_sums, unfused_add

__all__ = ["is_tensorrt_bound", "predict_audit"]


def is_tensorrt_bound(model: ir.Model) -> bool:
    """Whether `model` is a graph for TensorRT: it quantizes activations to int8, or declares half precision.

    A CPU form quantizes them to uint8 and keeps float32.
    """
    half = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    return any(
        value.dtype in half or (node.op_type == "QuantizeLinear" and value.dtype == ir.DataType.INT8)
        for node in model.graph
        for value in node.outputs
    )


def predict_audit(model: ir.Model) -> AuditReport:
    """Audit a TensorRT-bound graph. Called *predicted* wherever it is shown.

    Raises:
        UnsupportedError: as `engines.tensorrt.fusion.predict_layers`.
    """
    return _Audit(QuantizedGraph(model)).run()


class _Audit:
    def __init__(self, graph: QuantizedGraph) -> None:
        self._graph = graph
        self._layers = plan_layers(graph)
        self._layer_of = {name: layer for layer in self._layers for name in layer.nodes}
        self._nodes = {node_name(node): node for node in graph.nodes}
        self._values = {
            value.name: value
            for value in [*graph.graph.inputs, *(v for node in graph.nodes for v in node.outputs)]
        }
        precisions = {layer.precision for layer in self._layers if layer.kind in COMPUTING}
        self._quantized = "int8" in precisions
        self._mixed = precisions != {"fp32"}
        self._behind_a_layer: set[ir.Node] = set()
        for node in graph.nodes:
            sources = {value.producer() for value in node.inputs if value is not None}
            if node.op_type in LINEAR or sources & self._behind_a_layer:
                self._behind_a_layer.add(node)

    def run(self) -> AuditReport:
        sums = residual_sums(self._graph)
        add_findings = [finding for add in sums if (finding := self._add(add)) is not None]
        concats = [node for node in self._graph.nodes if node.op_type == "Concat" and self._is_data(node)]
        concat_findings = [finding for concat in concats if (finding := self._concat(concat)) is not None]
        return AuditReport(
            source="predicted",
            layers=tuple(
                AuditedLayer(layer.name, layer.kind, layer.precision, layer.nodes, layer.reason)
                for layer in self._layers
            ),
            findings=(
                *add_findings,
                *concat_findings,
                *self._asymmetric(),
                *(finding for layer in self._layers for finding in self._layer(layer)),
            ),
            adds=Tally(len(sums), len(sums) - len(add_findings)),
            concats=Tally(len(concats), len(concats) - len(concat_findings)),
        )

    def _is_data(self, node: ir.Node) -> bool:
        return self._graph.precision(node.outputs[0]) is not None

    def _add(self, add: ir.Node) -> Finding | None:
        layer = self._layer_of[node_name(add)]
        if layer.kind not in ("conv", "fc"):
            return unfused_add(self._graph, add, layer.name)
        return float_add(self._graph, add, layer.name)

    def _concat(self, concat: ir.Node) -> Finding | None:
        layer = self._layer_of[node_name(concat)]
        return concat_finding(self._graph, concat, layer.name, layer.kind == "concat")

    def _asymmetric(self) -> Iterator[Finding]:
        for node in self._graph.nodes:
            if node.op_type == "QuantizeLinear" and self._graph.grid(node).zero_point:
                tensor = node.inputs[0].name if node.inputs[0] is not None else None
                yield Finding(
                    "asymmetric",
                    self._layer_of[node_name(node)].name,
                    f"tensor {tensor!r} is quantized with {self._graph.grid(node)}; TensorRT takes zero point 0 only",
                    "quantize with TensorRT's placement, which is symmetric",
                )

    def _layer(self, layer: FusedLayer) -> Iterator[Finding]:
        if layer.kind in ("quantize", "dequantize", "requantize"):
            finding = self._rewrite(layer)
            if finding is not None:
                yield finding
        elif layer.kind == "reformat":
            yield Finding(
                "reformat",
                layer.name,
                f"{layer.name} {layer.reason}: {layer.input_bytes} bytes read, {layer.output_bytes} written an image",
                self._border(layer) or "use one type and one order of axes on both sides of it",
            )
        if layer.kind in ("conv", "fc") and layer.precision != "int8" and self._quantized:
            yield self._float_layer(layer)
        if layer.kind in COMPUTING and layer.precision == "fp32" and self._mixed:
            yield Finding(
                "fp32_island",
                layer.name,
                f"{layer.name} runs in fp32 among narrower kernels ({layer.reason})",
                "lower the float remainder to fp16, or to bf16 where fp16 overflows",
                Edit("lower", (), layer.nodes),
            )

    def _border(self, layer: FusedLayer) -> str | None:
        """Why a kernel at the edge of the graph has no remedy; ``None``: it is not at the edge."""
        nodes = [self._nodes[name] for name in layer.nodes if name in self._nodes]
        if not any(node in self._behind_a_layer for node in nodes):
            return "none: it brings the graph's input into the form that the first layer takes"
        if any(value.is_graph_output() for node in nodes for value in node.outputs):
            return "none: it brings the result into the form of the graph's output"
        return None

    def _float_layer(self, layer: FusedLayer) -> Finding:
        node = next(self._nodes[name] for name in layer.nodes if name in self._nodes and self._nodes[name].op_type in LINEAR)  # fmt: skip
        data, weight = node.inputs[0], node.inputs[1]
        missing = [v.name or "" for v in (data, weight) if v is not None and not self._is_int8(v)]
        half = len(missing) == 1
        return Finding(
            "half_quantized" if half else "float_layer",
            layer.name,
            f"{layer.name} runs in {layer.precision}: {layer.reason}",
            "quantize the other one too, or neither: alone it only costs accuracy"
            if half
            else "quantize its input and its weight, unless it was left in float on purpose",
            Edit("insert_qdq", tuple(missing), (node_name(node),)),
        )

    def _is_int8(self, value: ir.Value) -> bool:
        if self._graph.is_constant(value):
            return self._graph.is_int8_weight(value)
        return self._graph.reads_int8(value) is not None

    def _rewrite(self, layer: FusedLayer) -> Finding | None:
        name = rewritten_tensor(layer)
        value = self._values[name]
        readers = [node for node, _ in value.uses()]
        detail = f"{layer.name}: {layer.reason}"
        if layer.kind == "requantize":
            if any(node.op_type == "Concat" for node in readers):
                return None  # told with the concatenation
            return Finding(
                "requantization",
                layer.name,
                detail,
                "give the tensor one scale for all its readers",
                Edit("share_scale", (float_source(value).name or "", name)),
            )
        if layer.kind == "quantize":
            in_float = [node for node in readers if node.op_type != "QuantizeLinear"]
            border = self._border(layer)
            if border is not None:
                remedy, edit = border, None
            elif in_float:
                remedy = "let these readers take the quantized tensor too"
                edit = Edit("insert_qdq", (name,), tuple(map(node_name, in_float)))
            else:
                remedy = "quantize the input and the weight of the layer that writes it, if it has any"
                edit = None
            return Finding("reformat", layer.name, detail, remedy, edit)
        return Finding(
            "reformat",
            layer.name,
            detail,
            "quantize its reader as well, unless that was left in float on purpose",
        )
