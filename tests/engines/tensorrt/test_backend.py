from __future__ import annotations

import dataclasses
import hashlib
import json

import numpy as np
import pytest
from tolerances import ENGINE_TF32_ATOL

from engines import get_backend
from engines.tensorrt import backend as backend_module
from engines.tensorrt import builder
from engines.tensorrt.api import load_api
from engines.tensorrt.backend import BUILD_RECORD_NAME, INSPECTOR_NAME, TensorRtBackend
from engines.tensorrt.device import DeviceIdentity, device_identity
from engines.tensorrt.options import BatchProfile, TensorRtOptions
from pipeline.artifacts import EngineOptions, Fingerprint
from pipeline.contracts import EngineBackend
from pipeline.errors import EngineError, IntegrityError, UnsupportedError, UsageError

NO_GPU = UnsupportedError("the CUDA driver cannot be loaded")


@pytest.fixture
def gpu(monkeypatch):
    """``gpu(sm)``: a device of that SM; ``gpu(None)``: none."""

    def put(sm):
        def identity():
            if sm is None:
                raise NO_GPU
            return DeviceIdentity("NVIDIA L4", sm, "580.95", "13.0")

        monkeypatch.setattr(builder, "device_identity", identity)
        monkeypatch.setattr(backend_module, "device_identity", identity)

    put(None)
    return put


@pytest.fixture
def runner(monkeypatch):
    """Records what a runner is made of."""
    monkeypatch.setattr(
        backend_module, "TensorRtRunner", lambda plan, api, options, path: (plan, api, options, path)
    )


@pytest.fixture
def ada(rtx, gpu) -> TensorRtBackend:
    return TensorRtBackend("tensorrt_rtx", TensorRtOptions(sms=(86, 89)))


@pytest.fixture
def artifact(ada, make_model, tmp_path):
    return ada.build(make_model(), tmp_path, EngineOptions())


@pytest.fixture
def on_an_l4(gpu, runner, monkeypatch):
    """A machine that could run it: the driver, the trial load and the runner are replaced, no check is."""
    gpu(89)
    probed = []
    monkeypatch.setattr(backend_module, "probe_plan", lambda api, path, sha256: probed.append(sha256))
    return probed


def with_fingerprint(artifact, **changes):
    return dataclasses.replace(artifact, fingerprint=dataclasses.replace(artifact.fingerprint, **changes))


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt_rtx"])
def test_registered(name, request):
    if name == "tensorrt":
        request.getfixturevalue("fake_tensorrt")()
    else:
        pytest.importorskip("tensorrt_rtx")
    backend: EngineBackend = get_backend(name)
    assert backend.name == name


def test_built_ahead_of_time(ada, artifact, make_model, tmp_path):
    plan = (tmp_path / "model.rtx.plan.zst").read_bytes()
    assert artifact.path == tmp_path / "model.rtx.plan.zst"
    assert artifact.sha256 == hashlib.sha256(plan).hexdigest()
    assert artifact.model_sha256 == make_model().sha256
    assert artifact.backend == ada.name == "tensorrt_rtx"
    assert artifact.portable is False
    assert artifact.fingerprint.device == "ahead of time"
    assert artifact.fingerprint.capabilities == ("sm_86", "sm_89")
    record = json.loads((tmp_path / BUILD_RECORD_NAME).read_text())
    assert record["sha256"] == artifact.sha256
    assert record["size_bytes"] == len(plan)
    assert record["path"] == "model.rtx.plan.zst"  # not where it happened to be built
    assert str(tmp_path) not in (tmp_path / BUILD_RECORD_NAME).read_text()
    assert not (tmp_path / INSPECTOR_NAME).exists()


def test_built_on_a_device(fake_tensorrt, orin, monkeypatch, make_model, tmp_path):
    fake_tensorrt("10.3.0")
    options = TensorRtOptions(version_compatible=True, hardware_compatibility="ampere_plus")
    artifact = TensorRtBackend("tensorrt", options).build(make_model(), tmp_path, EngineOptions())
    assert artifact.path == tmp_path / "model.plan"
    assert (tmp_path / INSPECTOR_NAME).read_text() == '{"Layers": ["conv at [2, 3, 8, 8]"]}'
    assert artifact.fingerprint == Fingerprint(
        "tensorrt", "10.3.0", orin.name, ("sm_87", "version_compatible", "ampere_plus")
    )


def test_one_batch(fake_tensorrt, orin, make_model, tmp_path):
    fake_tensorrt()
    backend = TensorRtBackend("tensorrt", TensorRtOptions(profiles=(BatchProfile(1, 2, 4),)))
    backend.build(make_model(), tmp_path, EngineOptions(batch=3))
    told = json.loads((tmp_path / "model.plan").read_bytes()[64:])
    assert told["profiles"] == [{"x": [[3, 3, 8, 8]] * 3}]


def test_another_batch_than_the_models(ada, make_model, tmp_path):
    model = make_model("g (float[2,3] x) => (float[2,3] y) { y = Relu(x) }")
    with pytest.raises(EngineError, match="fixed batch of 2, 3 was asked for"):
        ada.build(model, tmp_path, EngineOptions(batch=3))
    with pytest.raises(UsageError, match="batch is 0"):
        ada.build(model, tmp_path, EngineOptions(batch=0))


def test_loaded(ada, artifact, on_an_l4):
    import zstandard  # comes with TensorRT-RTX, which built the artifact

    options = EngineOptions(mode="throughput")
    plan, api, given, path = ada.load(artifact, options)
    assert plan == zstandard.decompress(artifact.path.read_bytes())
    assert api.flavour == "tensorrt_rtx"
    assert given is options
    assert path == artifact.path
    assert on_an_l4 == [artifact.sha256]


def test_without_a_driver_it_says_so(ada, artifact):
    with pytest.raises(UnsupportedError, match="the CUDA driver cannot be loaded"):
        ada.load(artifact, EngineOptions())
    with pytest.raises(UnsupportedError, match="the CUDA driver cannot be loaded"):
        ada.fingerprint()


def test_fingerprint(ada, gpu):
    gpu(89)
    assert ada.fingerprint().device == "NVIDIA L4"
    assert ada.fingerprint().capabilities == ("sm_89", "driver 580.95", "CUDA 13.0")


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-1], lambda b: b"", lambda b: b[:999] + bytes([b[999] ^ 1]) + b[1000:]]
)
def test_a_damaged_plan_is_refused_before_anything_loads_it(ada, artifact, on_an_l4, damage):
    artifact.path.write_bytes(damage(artifact.path.read_bytes()))
    with pytest.raises(IntegrityError, match=rf"{artifact.sha256} is expected; it was not loaded"):
        ada.load(artifact, EngineOptions())
    assert on_an_l4 == []


def test_a_plan_that_is_missing(ada, artifact):
    artifact.path.unlink()
    with pytest.raises(EngineError, match="cannot be read: No such file"):
        ada.load(artifact, EngineOptions())


def test_another_flavours_plan(fake_tensorrt, artifact, on_an_l4):
    """It would crash the process that deserializes it, so its header is read first."""
    fake_tensorrt()
    with pytest.raises(EngineError, match="built for 'tensorrt_rtx', not for 'tensorrt'"):
        TensorRtBackend("tensorrt").load(artifact, EngineOptions())
    renamed = dataclasses.replace(artifact, backend="tensorrt")
    with pytest.raises(IntegrityError, match="is one of 'tensorrt_rtx', the manifest says 'tensorrt'"):
        TensorRtBackend("tensorrt").load(renamed, EngineOptions())
    assert on_an_l4 == []


def test_a_manifest_that_promises_other_sms(ada, artifact, on_an_l4):
    promised = with_fingerprint(artifact, capabilities=("sm_89", "sm_120"))
    with pytest.raises(IntegrityError, match="code for SM 86, 89, the manifest says 89, 120"):
        ada.load(promised, EngineOptions())
    assert on_an_l4 == []


def test_another_gpu(ada, artifact, gpu, on_an_l4):
    gpu(120)
    with pytest.raises(
        UnsupportedError, match=r"for SM 86, 89 \(ahead of time\), this GPU is NVIDIA L4, SM 120"
    ):
        ada.load(artifact, EngineOptions())
    assert on_an_l4 == []


def test_another_version(ada, artifact, on_an_l4, rtx):
    older = with_fingerprint(artifact, version="1.6.0.3")
    with pytest.raises(UnsupportedError, match=rf"built by tensorrt_rtx 1\.6\.0\.3, {rtx.version_text} is"):
        ada.load(older, EngineOptions())
    assert on_an_l4 == []


@pytest.mark.parametrize(
    ("compatible", "built", "here", "loads"),
    [
        (False, "10.3.0", "10.3.0", True),
        (False, "10.3.0", "10.13.2", False),
        (True, "10.3.0", "10.13.2", True),
        (True, "10.3.0", "11.4.0", True),
        (True, "11.4.0", "10.13.2", False),
    ],
)
def test_version_compatible_plans_go_forward_only(
    fake_tensorrt, orin, on_an_l4, gpu, make_model, tmp_path, compatible, built, here, loads
):
    gpu(87)
    fake_tensorrt(built)
    backend = TensorRtBackend("tensorrt", TensorRtOptions(version_compatible=compatible))
    artifact = backend.build(make_model(), tmp_path, EngineOptions())
    fake_tensorrt(here)
    if loads:
        backend.load(artifact, EngineOptions())
    else:
        with pytest.raises(UnsupportedError, match=rf"built by tensorrt {built}, {here} is installed here"):
            backend.load(artifact, EngineOptions())
    assert len(on_an_l4) == loads


@pytest.mark.parametrize(("sm", "loads"), [(87, True), (89, True), (75, False)])
def test_hardware_compatible_plans_run_on_ampere_and_later(
    fake_tensorrt, orin, on_an_l4, gpu, make_model, tmp_path, sm, loads
):
    gpu(87)
    fake_tensorrt()
    backend = TensorRtBackend("tensorrt", TensorRtOptions(hardware_compatibility="ampere_plus"))
    artifact = backend.build(make_model(), tmp_path, EngineOptions())
    gpu(sm)
    if loads:
        backend.load(artifact, EngineOptions())
    else:
        with pytest.raises(UnsupportedError, match="SM 75"):
            backend.load(artifact, EngineOptions())
    assert len(on_an_l4) == loads


@pytest.mark.gpu
@pytest.mark.parametrize("flavour", ["tensorrt", "tensorrt_rtx"])
def test_on_a_gpu(flavour, make_model, tmp_path):
    """Built for the GPU that is here, inspected, loaded and run; a bit flipped, and it is refused."""
    try:
        api = load_api(flavour)
        device = device_identity()
    except UnsupportedError as error:
        pytest.skip(str(error))
    if api.has("compute_capabilities") and device.sm not in api.compute_capabilities:
        pytest.skip(f"{api.title} does not compile for SM {device.sm}")
    backend = TensorRtBackend(flavour)
    artifact = backend.build(make_model(), tmp_path, EngineOptions())
    assert artifact.fingerprint.device == device.name
    assert artifact.fingerprint.capabilities == (f"sm_{device.sm}",)
    assert json.loads((tmp_path / INSPECTOR_NAME).read_text())["Layers"]
    x = np.random.default_rng(0).standard_normal((1, 3, 8, 8)).astype(np.float32)
    with backend.load(artifact, EngineOptions()) as runner:
        y = runner.infer({"x": x})["y"]
    expected = np.maximum(x.sum(axis=1, keepdims=True), 0).repeat(4, axis=1)
    np.testing.assert_allclose(y, expected, atol=ENGINE_TF32_ATOL)
    plan = artifact.path.read_bytes()
    artifact.path.write_bytes(plan[:-9] + bytes([plan[-9] ^ 1]) + plan[-8:])
    with pytest.raises(IntegrityError):
        backend.load(artifact, EngineOptions())
