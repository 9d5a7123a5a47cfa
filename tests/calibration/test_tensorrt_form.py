"""Strongly typed graphs for TensorRT: numbers on a CPU, and TensorRT-RTX's own parser and compiler."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnx_text import onnx_model, weight
from rtx_compiler import compile_plan
from tolerances import HALF_SQNR_DB, TENSORRT_INT8_SQNR_DB

from calibration.placement import observed_by_all
from calibration.quantizer import StaticQuantizer, apply_table
from calibration.table import derive_table
from calibration.tensorrt_form import TensorRTForms, choose_remainder
from pipeline.artifacts import CalibrationTable, ModelArtifact, PreprocessSpec, TensorRange
from pipeline.errors import CalibrationError, IntegrityError, UsageError
from pipeline.onnx_files import interface, load_model, save_model
from pipeline.passes.half_precision import widen

pytest.importorskip("openvino")
from engines.openvino import fp32_runner

HW = 17
DATASET = "d" * 64
GRAPH = f"""g (uint8[batch,{HW},{HW},3] image) => (float[batch,5] logits)
    {{ i = Transpose<perm=[0,3,1,2]>(image) x = Cast<to=1>(i)
      a = Conv<strides=[2,2]>(x, w, b) ra = Relu(a)
      c = Conv<pads=[1,1,1,1]>(ra, v) rc = Relu(c)
      d = Conv(ra, u) rd = Relu(d)
      t = Concat<axis=1>(rc, rd)
      e = Conv(t, up) s = Add(ra, e) rs = Relu(s)
      m = MaxPool<kernel_shape=[2,2], strides=[2,2]>(rs)
      f = Conv(m, last) rf = Relu(f)
      p = GlobalAveragePool(rf) q = Flatten(p) logits = Gemm(q, h, k) }}"""


def make_model(path: Path, **changed) -> ModelArtifact:
    weights = {
        "w": weight(16, 3, 3, 3) / 64.0,  # pixels reach 255
        "b": weight(16),
        "v": weight(16, 16, 3, 3),
        "u": weight(16, 16, 1, 1),
        "up": weight(16, 32, 1, 1) / 4.0,
        "last": weight(24, 16, 1, 1),
        "h": weight(24, 5),
        "k": weight(5),
    }
    model = onnx_model(GRAPH, **{**weights, **changed})
    digest = save_model(model, path)
    inputs, outputs = interface(model)
    return ModelArtifact(path, digest, inputs, outputs, 18, PreprocessSpec(input_hw=(HW, HW)))


def images(n: int, seed: int):
    """A tint each, or averaging makes all images alike."""
    rng = np.random.default_rng(seed)
    return (rng.integers(0, 256, (n, HW, HW, 3)) * rng.random((n, 1, 1, 3))).astype(np.uint8)


def batches():
    yield from np.array_split(images(24, seed=1), 3)


@pytest.fixture
def model(tmp_path):
    return make_model(tmp_path / "model.onnx")


@pytest.fixture
def statistics(model):
    quantizer = StaticQuantizer(runner_factory=fp32_runner)
    return quantizer.statistics(model, batches, DATASET, lambda *_: None)[0]


@pytest.fixture
def table(statistics):
    return derive_table(statistics, "minmax")


def logits(path: Path, *, widened: bool = False):
    if widened:
        graph = load_model(path)
        widen(graph)
        path = path.with_suffix(".wide.onnx")
        save_model(graph, path)
    # ONNX Runtime: OpenVINO's low-precision transformations get a bare residual branch wrong.
    runner = pytest.importorskip("engines.onnxruntime").fp32_runner(path)
    with runner:
        return np.array(runner.infer({"image": images(16, seed=2)})["logits"])


def quality_db(model, form):
    expected, got = logits(model.path), logits(form.path, widened=True)
    signal = expected - expected.mean(axis=0)  # what tells images apart; a shared offset is no signal
    return 10 * np.log10(np.sum(signal**2) / np.sum((got - expected) ** 2))


def float32_values(path):
    graph = load_model(path).graph
    values = [*graph.initializers.values(), *(v for node in graph for v in node.outputs)]
    return {value.name for value in values if value.dtype == ir.DataType.FLOAT}


@pytest.mark.parametrize("remainder", ["float16", "bfloat16"])
def test_int8_logits_are_close_to_fp32(model, table, tmp_path, remainder):
    forms = TensorRTForms(model, table, remainder)
    form, record = forms.int8(forms.placement(), tmp_path / "int8.onnx")
    assert quality_db(model, form) > TENSORRT_INT8_SQNR_DB
    assert float32_values(form.path) == {"logits"}
    assert (form.inputs, form.outputs) == (model.inputs, model.outputs)
    assert form.sha256 == hashlib.sha256(form.path.read_bytes()).hexdigest()
    assert form.history[-1] == record
    assert record.checks["n_quantized_layers"] == 5
    assert record.checks["remainder"] == remainder
    assert [entry["name"] for entry in record.checks["passes"]] == ["center_pixels", f"to_{remainder}"]
    kinds = Counter(node.op_type for node in load_model(form.path).graph)
    # pixel, ra, rc, rd, t, rs, m; the identity and both branches share the Q of ra.
    assert kinds["QuantizeLinear"] == 7
    assert kinds["DequantizeLinear"] == 7 + 5


@pytest.mark.parametrize(("tensor", "factor"), [("ra", 10.0), ("rs", 10.0), ("ra", 0.1), ("rs", 0.1)])
def test_a_wrong_scale_falls_below_the_floor(model, table, tmp_path, tensor, factor):
    """The floor above can fail."""
    right = table.ranges[tensor]
    ranges = {**table.ranges, tensor: TensorRange(factor * right.low, factor * right.high)}
    forms = TensorRTForms(model, dataclasses.replace(table, ranges=ranges))
    form, _ = forms.int8(forms.placement(), tmp_path / "wrong.onnx")
    assert quality_db(model, form) < TENSORRT_INT8_SQNR_DB


@pytest.mark.parametrize("remainder", ["float16", "bfloat16"])
def test_half_precision_needs_no_table(model, tmp_path, remainder):
    form, record = TensorRTForms(model, None, remainder).half(tmp_path / "half.onnx")
    assert quality_db(model, form) > HALF_SQNR_DB[remainder]
    assert float32_values(form.path) == {"logits"}
    assert record.stage == "lower"
    forms = TensorRTForms(model, None)
    with pytest.raises(UsageError, match="without a calibration table"):
        forms.int8(forms.placement(), tmp_path / "int8.onnx")


def test_the_quantizer_writes_either_form_from_one_pass(model, tmp_path):
    passes = []

    def factory(path, outputs):
        passes.append(path)
        return fp32_runner(path, outputs)

    results = {
        placement: StaticQuantizer(
            "minmax", placement, runner_factory=factory, cache_dir=tmp_path / "cache"
        ).quantize(model, batches, DATASET, tmp_path / f"{placement}.onnx", lambda *_: None)
        for placement in ("cpu", "tensorrt")
    }
    assert len(passes) == 1
    assert results["cpu"][1] == results["tensorrt"][1], "one table gives both forms"
    assert results["tensorrt"][2].checks["placement"] == "tensorrt"
    assert results["tensorrt"][2].checks["statistics_from_cache"] is True
    again, _ = apply_table(model, results["cpu"][1], "tensorrt", tmp_path / "again.onnx")
    assert again.sha256 == results["tensorrt"][0].sha256


def test_a_model_with_nothing_to_quantize_is_refused(tmp_path):
    path = tmp_path / "head.onnx"
    graph = onnx_model("g (float[N,16] x) => (float[N,5] y) { r = Relu(x) y = Gemm(r, h) }", h=weight(16, 5))
    digest = save_model(graph, path)
    inputs, outputs = interface(graph)
    model = ModelArtifact(path, digest, inputs, outputs, 18, PreprocessSpec(input_hw=(1, 1)))
    table = table_of(model, {})
    with pytest.raises(CalibrationError, match=r"no layer that can be quantized: .*fully connected"):
        apply_table(model, table, "tensorrt", tmp_path / "int8.onnx")
    assert not (tmp_path / "int8.onnx").exists()


def test_a_table_of_another_model_is_refused(model, table, tmp_path):
    other = make_model(tmp_path / "other.onnx", k=weight(5, seed=1))
    with pytest.raises(IntegrityError, match=f"{model.sha256}.*{other.sha256}"):
        TensorRTForms(other, table)


def table_of(model, ranges):
    return CalibrationTable(ranges, "minmax", 1, "s" * 64, model.sha256, DATASET, "p" * 64)


def test_what_overflows_float16_is_named_or_bfloat16_is_chosen(model, table, tmp_path):
    assert TensorRTForms(model, table).remainder == "float16"
    high = {**table.ranges, "rs": TensorRange(0.0, 4e4)}
    forms = TensorRTForms(model, dataclasses.replace(table, ranges=high))
    assert forms.remainder == "bfloat16"
    assert "'rs' reaches 40000" in forms.remainder_reason
    with pytest.raises(
        CalibrationError, match=r"'rs' reaches 40000 in calibration, above 32752.*choose bfloat16"
    ):
        TensorRTForms(model, dataclasses.replace(table, ranges=high), "float16")
    graph = load_model(make_model(tmp_path / "large.onnx", k=np.full(5, 7e4)).path)
    assert choose_remainder(graph, {})[0] == "bfloat16"
    with pytest.raises(CalibrationError, match="constant 'k' reaches 70000; float16 holds 65504"):
        choose_remainder(graph, {}, "float16")


@pytest.mark.parametrize(
    "name",
    [
        "inception_resnet_lite.cifar10",
        # tests/engines/tensorrt/test_networks.py compiles a full network for four SMs; this adds the candidates.
        pytest.param("inception_resnet_lite.signs", marks=pytest.mark.slow),
        pytest.param("inception_v3", marks=pytest.mark.slow),
    ],
)
def test_tensorrt_rtx_parses_and_builds_it(name, tmp_path):
    """Ranges are made up: they decide nothing here."""
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx, which compiles without a GPU")
    pytest.importorskip("torch")
    from pipeline.compile import export_resolved
    from pipeline.models.resolve import resolve_model
    from pipeline.passes import fold

    full = name == "inception_v3"
    resolved = resolve_model(name, weights="random:0" if full else None, input_size=75 if full else None)
    folded, _ = fold(export_resolved(resolved, tmp_path / "exported.onnx"), tmp_path / "model.onnx")
    ranges = {tensor: TensorRange(-1.0, 6.0) for tensor in observed_by_all(load_model(folded.path))}
    for remainder in ("float16",) if full else ("float16", "bfloat16"):
        forms = TensorRTForms(folded, table_of(folded, ranges), remainder)
        everywhere = forms.placement()
        some = frozenset(point.consumer.node for point in everywhere.weights[::7])
        mixed = forms.placement(float_layers=some, untied_concats=frozenset(forms.concats()))
        int8, _ = forms.int8(everywhere, tmp_path / "int8.onnx")
        other, _ = forms.int8(mixed, tmp_path / "mixed.onnx")
        half, _ = forms.half(tmp_path / "half.onnx")
        for form in (int8, other, half):
            compiled = compile_plan(form.path)
            assert len(compiled.float32_layers) == 1, "only the Cast of the logits may be float32"
            assert compiled.plan_bytes > 0
