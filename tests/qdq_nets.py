"""Small quantized networks as a TensorRT-bound ONNX file holds them, node by node."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.helper as oh
import onnx_ir as ir


class QdqNet:
    """Builds a graph; ``channels`` are those of every tensor so far. Every method returns the name of what it computes.

    Node names are given or counted; tensors are called after the node that makes them. Float tensors are
    of type `float_type`; scales too, as opset 19 allows.
    """

    def __init__(
        self, channels: int = 16, size: int = 8, float_type: Any = np.float16, batch: Any = "N"
    ) -> None:
        self._dtype = np.dtype(float_type)
        self._onnx_type = oh.np_dtype_to_tensor_dtype(self._dtype)
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[onnx.TensorProto] = []
        self.channels = {"x": channels}
        self._input = oh.make_tensor_value_info("x", self._onnx_type, [batch, channels, size, size])

    def model(self, *outputs: str) -> ir.Model:
        infos = [oh.make_tensor_value_info(name, self._onnx_type, None) for name in outputs]
        graph = oh.make_graph(self._nodes, "net", [self._input], infos, self._constants)
        proto = oh.make_model(graph, opset_imports=[oh.make_opsetid("", 19)], ir_version=9)
        proto = onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True)
        onnx.checker.check_model(proto, full_check=True)
        return ir.serde.deserialize_model(proto)

    def unread(self) -> list[str]:
        """What nothing reads yet."""
        read = {name for node in self._nodes for name in node.input}
        return [name for node in self._nodes for name in node.output if name not in read]

    def op(self, op_type: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        name = name or f"{op_type}_n{len(self._nodes)}"
        node = oh.make_node(op_type, list(inputs), [f"{name}_out"], name=name, **attributes)
        self._nodes.append(node)
        self.channels[f"{name}_out"] = (
            sum(self.channels[v] for v in inputs) if op_type == "Concat" else self.channels.get(inputs[0], 0)
        )
        return f"{name}_out"

    def constant(self, values: Any, dtype: Any = None) -> str:
        name = f"constant_{len(self._constants)}"
        self._constants.append(onnx.numpy_helper.from_array(np.asarray(values, dtype or self._dtype), name))
        return name

    def quantize(self, value: str, scale: float, name: str = "") -> str:
        return self.op("QuantizeLinear", value, self.constant(scale), self.constant(0, np.int8), name=name)

    def dequantize(self, value: str, scale: float) -> str:
        return self.op("DequantizeLinear", value, self.constant(scale), self.constant(0, np.int8))

    def qdq(self, value: str, scale: float, name: str = "") -> str:
        return self.dequantize(self.quantize(value, scale, name), scale)

    def conv(
        self,
        value: str,
        out: int,
        kernel: int = 1,
        *,
        int8: bool = True,
        name: str = "",
        weight_quantizer: str = "",
        **attributes: Any,
    ) -> str:
        """A convolution with bias, padded to keep its size.

        With `int8` its weight stands behind DQ: as int8, or, with a name for the Q, as float behind Q and DQ.
        """
        shape = (out, self.channels[value] // attributes.get("group", 1), kernel, kernel)
        weight = self.constant(np.ones(shape), np.int8 if int8 and not weight_quantizer else None)
        if int8:
            scales, zeros = self.constant(np.full(out, 0.01)), self.constant(np.zeros(out), np.int8)
            if weight_quantizer:
                weight = self.op("QuantizeLinear", weight, scales, zeros, axis=0, name=weight_quantizer)
            weight = self.op("DequantizeLinear", weight, scales, zeros, axis=0)
        attributes.setdefault("pads", [kernel // 2] * 4)
        result = self.op("Conv", value, weight, self.constant(np.zeros(out)), name=name, **attributes)
        self.channels[result] = out
        return result
