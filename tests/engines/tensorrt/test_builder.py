"""Plans of the real TensorRT-RTX, built without a GPU."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
import pytest

from engines.tensorrt import builder
from engines.tensorrt.builder import build_plan
from engines.tensorrt.device import DeviceIdentity
from engines.tensorrt.options import BatchProfile, TensorRtOptions
from engines.tensorrt.plan import identify_plan
from pipeline.errors import EngineError, IntegrityError, UnsupportedError

ADA = TensorRtOptions(sms=(89,))


def quiet(*told):
    """No progress."""


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    """What is built here must not depend on what is in this machine."""

    def absent():
        raise UnsupportedError("no driver")

    monkeypatch.setattr(builder, "device_identity", absent)


def test_what_is_told_of_a_plan(rtx, make_model, tmp_path):
    reports = []
    options = TensorRtOptions(sms=(120, 80), profiles=(BatchProfile(1, 4, 8), BatchProfile(8, 16, 32)))
    model = make_model()
    built = build_plan(rtx, model, tmp_path / "model.plan", options, lambda *told: reports.append(told))
    data = (tmp_path / "model.plan").read_bytes()
    assert built.path == tmp_path / "model.plan"
    assert built.sha256 == hashlib.sha256(data).hexdigest()
    assert built.size_bytes == len(data)
    assert built.model_sha256 == model.sha256
    assert (built.flavour, built.version) == ("tensorrt_rtx", rtx.version_text)
    assert built.compute_capabilities == identify_plan(data).sms == (80, 120)
    assert built.strongly_typed
    assert built.profiles == options.profiles
    assert built.device is built.inspector is built.timing_cache is built.workspace_bytes is None
    assert built.warnings == ()
    assert {what for what, _, _ in reports} == {"engine"}
    assert reports[-1] == ("engine", 1000, 1000)
    assert len(reports) > 5


def test_a_fixed_batch_has_no_profile(rtx, make_model, tmp_path):
    model = make_model("g (float[2,3,8,8] x) => (float[2,3,8,8] y) { y = Relu(x) }")
    assert build_plan(rtx, model, tmp_path / "p", ADA, quiet).profiles == ()


def test_options_reach_the_builder(rtx, make_model, tmp_path):
    """A level or a tiling it does not know is refused by the library; what it knows is taken."""
    options = dataclasses.replace(ADA, optimization_level=0, workspace_bytes=64 << 20, tiling="fast")
    built = build_plan(rtx, make_model(), tmp_path / "p", options, quiet)
    assert built.workspace_bytes == 64 << 20


def test_rtx_does_not_use_a_timing_cache(rtx, make_model, tmp_path):
    options = dataclasses.replace(ADA, timing_cache_dir=tmp_path / "timings")
    assert build_plan(rtx, make_model(), tmp_path / "p", options, quiet).timing_cache is None
    assert not (tmp_path / "timings").exists()


def test_without_gpu_an_sm_must_be_named(rtx, make_model, tmp_path):
    with pytest.raises(UnsupportedError, match=r"no GPU was found.*75, 80, 86, 89, 120"):
        build_plan(rtx, make_model(), tmp_path / "p", TensorRtOptions(), quiet)


@pytest.mark.parametrize("sm", [89, 90])
def test_with_a_gpu_it_is_built_for_that(rtx, make_model, tmp_path, monkeypatch, sm):
    monkeypatch.setattr(builder, "device_identity", lambda: DeviceIdentity("NVIDIA X", sm, "580", "13.0"))
    monkeypatch.setattr(builder, "_probe", lambda api, path, sha256, what: '{"Layers": []}')
    if sm == 90:  # Hopper, which TensorRT-RTX does not compile for
        with pytest.raises(UnsupportedError, match="does not compile for SM 90"):
            build_plan(rtx, make_model(), tmp_path / "p", TensorRtOptions(), quiet)
        return
    built = build_plan(rtx, make_model(), tmp_path / "p", TensorRtOptions(), quiet)
    assert (built.compute_capabilities, built.device) == ((89,), "NVIDIA X")
    assert built.inspector == '{"Layers": []}'


def test_a_plan_for_another_gpu_is_not_loaded_here(rtx, make_model, tmp_path, monkeypatch):
    monkeypatch.setattr(builder, "device_identity", lambda: DeviceIdentity("NVIDIA X", 86, "580", "13.0"))
    built = build_plan(rtx, make_model(), tmp_path / "p", ADA, quiet)
    assert built.device is built.inspector is None


def test_float32_matrix_products_are_not_compiled_for_turing(rtx, make_model, tmp_path):
    model = make_model(
        "g (float[1,8] x) => (float[1,8] y) { y = MatMul(x, w) }", w=np.eye(8, dtype=np.float32)
    )
    with pytest.raises(
        EngineError, match=r"SM75\): FP32 GEMM is not supported.*build the fp16 or the int8 graph"
    ):
        build_plan(rtx, model, tmp_path / "p", TensorRtOptions(sms=(75,)), quiet)
    assert build_plan(rtx, model, tmp_path / "p", ADA, quiet).compute_capabilities == (89,)


def test_a_changed_model_is_not_parsed(rtx, make_model, tmp_path):
    model = make_model()
    model.path.write_bytes(model.path.read_bytes() + b"\0")
    with pytest.raises(IntegrityError, match=rf"{model.sha256} is expected; it was not parsed"):
        build_plan(rtx, model, tmp_path / "p", ADA, quiet)
    assert {path.name for path in tmp_path.iterdir()} == {"graph.onnx"}


def test_an_old_plan_stays_where_a_build_fails(rtx, make_model, tmp_path):
    (tmp_path / "p").write_bytes(b"old")
    model = make_model("g (float[1,3] x) => (float[1,3] y) { y = Foo(x) }")
    with pytest.raises(EngineError, match="Foo"):
        build_plan(rtx, model, tmp_path / "p", ADA, quiet)
    assert (tmp_path / "p").read_bytes() == b"old"
    assert {path.name for path in tmp_path.iterdir()} == {"graph.onnx", "p"}


def test_a_folder_that_is_missing_or_a_target_that_is_one(rtx, make_model, tmp_path):
    with pytest.raises(EngineError, match="cannot be written: No such file"):
        build_plan(rtx, make_model(), tmp_path / "absent" / "p", ADA, quiet)
    (tmp_path / "p").mkdir()
    with pytest.raises(EngineError, match="cannot be written: Is a directory"):
        build_plan(rtx, make_model(), tmp_path / "p", ADA, quiet)
    assert {path.name for path in tmp_path.iterdir()} == {"graph.onnx", "p"}


def test_a_plan_cannot_be_loaded_without_a_driver(rtx, make_model, tmp_path):
    """The real library's refusal, through the process that may die."""
    if builder.find_device() is not None or _driver_present():
        pytest.skip("there is a driver here")
    built = build_plan(rtx, make_model(), tmp_path / "p", ADA, quiet)
    with pytest.raises(
        EngineError, match=rf"plan {built.path} cannot be loaded by TensorRT-RTX .*CUDA driver"
    ):
        builder.probe_plan(rtx, built.path, built.sha256)
    with pytest.raises(IntegrityError, match="it was not loaded"):
        builder.probe_plan(rtx, built.path, "0" * 64)


def _driver_present() -> bool:
    import ctypes

    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def test_int8_and_half_precision_graph(rtx, make_model, tmp_path):
    """Float16 scales from opset 19 on: what the TensorRT placement writes."""
    half = np.float16
    graph = """g (uint8[batch,8,8,3] image) => (float[batch,4,8,8] y) {
        f = Cast <to = 10> (image)
        t = Transpose <perm = [0, 3, 1, 2]> (f)
        q = QuantizeLinear(t, one, zero)
        x = DequantizeLinear(q, one, zero)
        w = DequantizeLinear <axis = 0> (w8, ws, wz)
        c = Conv(x, w, b)
        r = Relu(c)
        y = Cast <to = 1> (r) }"""
    model = make_model(
        graph,
        19,
        one=half(1),
        zero=np.int8(0),
        w8=np.ones((4, 3, 1, 1), np.int8),
        ws=np.full(4, 0.5, half),
        wz=np.zeros(4, np.int8),
        b=np.zeros(4, half),
    )
    assert build_plan(rtx, model, tmp_path / "p", ADA, quiet).strongly_typed
