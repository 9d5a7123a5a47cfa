"""What a DLA would leave to the GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx_text import onnx_model, weight
from qdq_nets import QdqNet

from engines.tensorrt.dla import report_dla
from pipeline.errors import UnsupportedError, UsageError


def _reasons(graph: str, precision: Any = "int8", **weights: np.ndarray) -> dict[str, str]:
    report = report_dla(onnx_model(graph, **weights), precision=precision)
    return {fallback.op_type: fallback.reason for fallback in report.fallbacks}


_LAYERS = "c = Conv <pads = [1, 1, 1, 1]> (x, w) r = Relu (c) p = MaxPool <kernel_shape = [2, 2]> (r)"


def test_a_plain_network_runs_whole() -> None:
    report = report_dla(
        onnx_model(
            f"agraph (float[N,4,8,8] x) => (float[N,10] z) {{ {_LAYERS} a = Add (p, p) "
            "v = AveragePool <kernel_shape = [7, 7]> (a) f = Flatten (v) z = Gemm <transB = 1> (f, h) }",
            w=weight(8, 4, 3, 3),
            h=weight(10, 8),
        )
    )
    assert report.fallbacks == ()
    assert (report.n_dla, report.n_loadables, report.fits) == (7, 1, True)


@pytest.mark.parametrize(
    ("graph", "op", "reason", "shapes"),
    [
        ("(float[N,4,60,60] x) => (float[N,2,28,28] z) { z = Conv (x, w) }", "Conv", r"kernel \[33, 33\]; a DLA takes 1 to 32", (2, 4, 33, 33)),
        ("(float[N,4,60,60] x) => (float[N,2,7,7] z) { z = Conv <strides = [9, 9]> (x, w) }", "Conv", r"stride \[9, 9\]; a DLA takes 1 to 8", (2, 4, 3, 3)),
        ("(float[N,4,8,8] x) => (float[N,2,14,14] z) { z = Conv <pads = [3, 3, 3, 3]> (x, w) }", "Conv", "not smaller than the kernel", (2, 4, 1, 1)),
        ("(float[N,4,8,8] x) => (float[N,4,17,17] z) { z = ConvTranspose <strides = [2, 2], pads = [0, 0, 0, 0]> (x, w) }", None, "", (4, 4, 3, 3)),
        ("(float[N,4,8,8] x) => (float[N,4,15,15] z) { z = ConvTranspose <strides = [2, 2], pads = [1, 1, 1, 1]> (x, w) }", "ConvTranspose", "takes no padding", (4, 4, 3, 3)),
        ("(float[N,4,8,8] x) => (float[N,4,1,1] z) { z = GlobalAveragePool (x) }", "GlobalAveragePool", "runs it as a reduction", None),
        ("(float[N,4,12,12] x) => (float[N,4,4,4] z) { z = MaxPool <kernel_shape = [9, 9]> (x) }", "MaxPool", r"window \[9, 9\]; a DLA takes 1 to 8", None),
        ("(float[N,4,8,8] x) => (float[N,4,16,8] z) { z = Concat <axis = 2> (x, x) }", "Concat", "joins channels only", None),
        ("(float[N,4,8,8] x) => (float[N,4,8,8] z) { z = Softmax <axis = 1> (x) }", "Softmax", "takes one vector", None),
        ("(float[N,4,8,8] x) => (float[N,256] z) { z = Flatten (x) }", "Flatten", "keeps four dimensions", None),
        ("(float[N,4,8,8] x) => (float[N,4,8,8] z) { z = Erf (x) }", "Erf", "the DLA has no Erf", None),
        ("(float[N,4,8,9000] x) => (float[N,4,8,9000] z) { z = Relu (x) }", "Relu", "at most 8192 in each dimension", None),
        ("(uint8[N,4,8,8] x) => (float[N,4,8,8] z) { z = Cast <to = 1> (x) }", "Cast", "'x' is UINT8", None),
    ],
)  # fmt: skip
def test_what_falls_back_and_why(
    graph: str, op: str | None, reason: str, shapes: tuple[int, ...] | None
) -> None:
    import re

    weights = {} if shapes is None else {"w": weight(*shapes)}
    reasons = _reasons(f"agraph {graph}", **weights)
    if op is None:
        assert reasons == {}
    else:
        assert re.search(reason, reasons[op]), reasons


def test_the_convolution_buffer_holds_less_in_fp16() -> None:
    # int8: one bank of weights, ceil(ceil(512 / 32) * 256 / 4 * 3 / 256) = 12 of rows; fp16: 1 + 24.
    graph = "agraph (float[N,512,8,256] x) => (float[N,2,6,254] z) { z = Conv (x, w) }"
    kernel = {"w": weight(2, 512, 3, 3)}
    assert _reasons(graph, "int8", **kernel) == {}
    assert "25 banks of the convolution buffer" in _reasons(graph, "fp16", **kernel)["Conv"]


def test_every_return_from_the_gpu_is_a_loadable_more() -> None:
    model = onnx_model(
        """agraph (float[N,4,8,8] x) => (float[N,8,8,8] z) {
            a = Conv (x, w) b = Erf (a) c = Conv (b, w) d = Erf (c) e = Conv (d, w) s = Relu (a) z = Concat <axis = 1> (e, s) }""",
        w=weight(4, 4, 1, 1),
    )
    report = report_dla(model)
    # a and s; c; e and z, which must wait for e
    assert (report.by_operator, report.n_dla, report.n_loadables) == ({"Erf": 2}, 5, 3)
    assert report.as_json()["by_operator"] == {"Erf": 2}


def test_more_loadables_than_a_core_holds() -> None:
    chain = " ".join(f"a{n} = Conv (b{n}, w) b{n + 1} = Erf (a{n})" for n in range(17))
    model = onnx_model(
        f"agraph (float[N,4,8,8] b0) => (float[N,4,8,8] b17) {{ {chain} }}", w=weight(4, 4, 1, 1)
    )
    report = report_dla(model)
    assert (report.n_loadables, report.fits) == (17, False)


def test_what_cannot_be_asked() -> None:
    net = QdqNet()
    with pytest.raises(UnsupportedError, match="2 Q/DQ nodes, and a DLA takes none"):
        report_dla(net.model(net.qdq("x", 0.1)))
    plain = QdqNet()
    model = plain.model(plain.conv("x", 8, int8=False))
    for batch in (0, 4097):
        with pytest.raises(UsageError, match=f"batch is {batch}; a DLA takes 1 to 4096"):
            report_dla(model, batch=batch)
