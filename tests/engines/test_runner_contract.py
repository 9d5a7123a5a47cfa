"""What every backend must do, run over every backend for CPUs and both precisions."""

from __future__ import annotations

import dataclasses
import hashlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future

import numpy as np
import onnx.parser
import pytest
from fake_tensorrt import FakeTensorRtBackend

from engines import BACKENDS, CPU_BACKENDS, get_backend
from pipeline.artifacts import EngineArtifact, EngineOptions
from pipeline.contracts import EngineBackend, Runner
from pipeline.errors import EngineError, IntegrityError, UsageError

TENSORRT_STAND_IN = "tensorrt without a GPU"
"""TensorRT's runner over a device and a library in host memory."""


@pytest.fixture(params=[*CPU_BACKENDS, TENSORRT_STAND_IN])
def backend(request: pytest.FixtureRequest) -> EngineBackend:
    if request.param == TENSORRT_STAND_IN:
        return FakeTensorRtBackend()
    pytest.importorskip(BACKENDS[request.param].requires)
    return get_backend(request.param)


@pytest.fixture
def artifact(backend, tiny, tmp_path):
    return backend.build(tiny.artifact, tmp_path, EngineOptions(threads=1))


@pytest.fixture
def runner(backend, artifact) -> Iterator[Runner]:
    with backend.load(artifact, EngineOptions(threads=1)) as loaded:
        yield loaded


def test_build_is_the_model_itself(backend, artifact, tiny):
    assert artifact.portable
    assert artifact.path == tiny.artifact.path
    assert artifact.sha256 == artifact.model_sha256 == tiny.artifact.sha256
    assert artifact.backend == backend.name
    assert artifact.fingerprint == backend.fingerprint()


def test_declares_the_models_interface(runner, tiny):
    assert isinstance(runner, Runner)
    (given,), (made,) = runner.inputs, runner.outputs
    (wanted_in,), (wanted_out,) = tiny.artifact.inputs, tiny.artifact.outputs
    assert (given.name, given.dtype, given.shape[1:]) == (
        wanted_in.name,
        wanted_in.dtype,
        wanted_in.shape[1:],
    )
    assert (made.name, made.dtype, made.shape[1:]) == (
        wanted_out.name,
        wanted_out.dtype,
        wanted_out.shape[1:],
    )
    assert isinstance(given.shape[0], str)


@pytest.mark.parametrize("batch", [1, 3])
def test_computes_what_numpy_computes(runner, tiny, batch):
    sample = tiny.sample(batch, seed=batch)
    outputs = runner.infer(sample)
    assert outputs.keys() == {"logits"}
    assert outputs["logits"].dtype == np.float32
    np.testing.assert_allclose(outputs["logits"], tiny.expected(sample["input"]), atol=tiny.atol, rtol=0)
    # the tolerance tells right from wrong: another image is farther away
    other = tiny.expected(tiny.sample(batch, seed=99)["input"])
    assert np.abs(outputs["logits"] - other).max() > 10 * tiny.atol


def test_non_contiguous_and_read_only_inputs(runner, tiny):
    x = tiny.sample(2, seed=1)["input"]
    turned = x[:, ::-1]
    np.testing.assert_allclose(
        runner.infer({"input": turned})["logits"], tiny.expected(turned), atol=tiny.atol, rtol=0
    )
    x.flags.writeable = False
    np.testing.assert_allclose(runner.infer({"input": x})["logits"], tiny.expected(x), atol=tiny.atol, rtol=0)


def test_inputs_are_not_written_to(backend, tmp_path):
    """Inputs are handed over without a copy; an element-wise first layer might work in place."""
    text = """<ir_version: 9, opset_import: ["" : 18]>
        g (float[batch,4] x) => (float[batch,4] y) <float two = {2}> { r = Relu(x)  y = Mul(r, two) }"""
    data = onnx.parser.parse_model(text).SerializeToString()
    (tmp_path / "m.onnx").write_bytes(data)
    sha256 = hashlib.sha256(data).hexdigest()
    artifact = EngineArtifact(tmp_path / "m.onnx", sha256, sha256, backend.name, backend.fingerprint())
    for batch in (None, 2):
        with backend.load(artifact, EngineOptions(threads=1, batch=batch)) as runner:
            x = np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 4)
            before = x.copy()
            y = runner.infer({"x": x})["y"]
            assert np.array_equal(x, before)
            assert np.array_equal(runner.submit({"x": x}).result(timeout=30)["y"], y)
            assert np.array_equal(x, before)
            assert np.array_equal(y, 2 * np.maximum(before, 0))
            y[:] = -7  # nor are outputs inputs
            assert np.array_equal(x, before)


def test_wrong_inputs_name_both_sides(runner, tiny):
    x = tiny.sample(1, seed=0)["input"]
    for call in (runner.infer, runner.submit):
        with pytest.raises(EngineError, match=r"\['pixels'\].*\['input'\]"):
            call({"pixels": x})
        with pytest.raises(EngineError, match=r"'extra'.*\['input'\]"):
            call({"input": x, "extra": x})
        with pytest.raises(EngineError, match=rf"float64.*{x.dtype}"):
            call({"input": x.astype(np.float64)})
        with pytest.raises(EngineError, match="list"):
            call({"input": x.tolist()})
        with pytest.raises(EngineError, match=r"shape \[1, .*takes \[batch, "):
            call({"input": np.ascontiguousarray(np.swapaxes(x, 1, 3))})
        with pytest.raises(EngineError, match="shape"):
            call({"input": x[0]})
        with pytest.raises(EngineError, match="shape"):
            call({"input": x[:0]})
    np.testing.assert_allclose(runner.infer({"input": x})["logits"], tiny.expected(x), atol=tiny.atol, rtol=0)


@pytest.mark.parametrize("mode", ["latency", "throughput"])
@pytest.mark.parametrize("threads", [1, 2])
def test_modes_and_threads(backend, artifact, tiny, mode, threads):
    with backend.load(artifact, EngineOptions(mode=mode, threads=threads, batch=2)) as runner:
        assert runner.n_streams == (1 if mode == "latency" else min(threads, runner.n_streams))
        assert runner.n_streams >= 1
        samples = [tiny.sample(2, seed) for seed in range(12)]
        futures = [runner.submit(sample) for sample in samples]
        for sample, future in zip(samples, futures, strict=True):
            np.testing.assert_allclose(
                future.result(timeout=30)["logits"], tiny.expected(sample["input"]), atol=tiny.atol, rtol=0
            )


def test_submitted_outputs_belong_to_the_caller(runner, tiny):
    samples = [tiny.sample(1, seed) for seed in range(8)]
    kept = [runner.submit(sample).result(timeout=30)["logits"] for sample in samples]
    for index, (sample, logits) in enumerate(zip(samples, kept, strict=True)):
        assert not any(np.shares_memory(logits, other) for other in kept[:index])
        logits += 0  # writable
        np.testing.assert_allclose(logits, tiny.expected(sample["input"]), atol=tiny.atol, rtol=0)


def test_infer_says_whether_it_reuses_buffers(runner, tiny):
    first = runner.infer(tiny.sample(1, seed=0))["logits"]
    before = first.copy()
    runner.infer(tiny.sample(1, seed=1))
    assert np.array_equal(first, before) is not runner.reuses_outputs


def test_infer_and_submit_from_several_threads(runner, tiny):
    errors: list[str] = []

    def work(seed: int) -> None:
        for turn in range(5):
            sample = tiny.sample(1, seed=seed * 100 + turn)
            outputs = runner.infer(sample) if turn % 2 else runner.submit(sample).result(timeout=30)
            if np.abs(outputs["logits"] - tiny.expected(sample["input"])).max() > tiny.atol:
                errors.append(f"thread {seed} got another thread's answer")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert errors == []


def test_submit_is_bounded(runner, tiny):
    """A completion callback that does not return keeps its slot's successors waiting, never more than the bound."""
    sample = tiny.sample(1, seed=0)
    bound = 2 * runner.n_streams
    gate = threading.Event()
    futures: list[Future] = []

    def hold(_: Future) -> None:
        gate.wait(timeout=30)

    def submit_many() -> None:
        for _ in range(bound + 6):
            futures.append(runner.submit(sample))
            futures[-1].add_done_callback(hold)

    thread = threading.Thread(target=submit_many)
    thread.start()
    time.sleep(0.3)
    n_accepted = len(futures)
    gate.set()
    thread.join(timeout=30)
    assert n_accepted <= bound + runner.n_streams  # those held in a callback have given their slot back
    assert len(futures) == bound + 6
    assert all(future.result(timeout=30).keys() == {"logits"} for future in futures)


def test_a_future_cannot_be_cancelled_under_the_engine(runner, tiny):
    future = runner.submit(tiny.sample(1, seed=0))
    assert not future.cancel()
    assert future.result(timeout=30)


def test_close_waits_then_refuses(backend, artifact, tiny):
    runner = backend.load(artifact, EngineOptions(threads=1))
    futures = [runner.submit(tiny.sample(1, seed)) for seed in range(2)]
    runner.close()
    runner.close()
    assert all(future.done() and future.exception() is None for future in futures)
    for call in (runner.infer, runner.submit):
        with pytest.raises(EngineError, match="closed"):
            call(tiny.sample(1, seed=0))


def test_context_manager_closes_on_error(backend, artifact, tiny):
    with pytest.raises(KeyError), backend.load(artifact, EngineOptions(threads=1)) as runner:
        raise KeyError("anything")
    with pytest.raises(EngineError, match="closed"):
        runner.infer(tiny.sample(1, seed=0))


def test_fixed_batch(backend, artifact, tiny):
    with backend.load(artifact, EngineOptions(threads=1, batch=4)) as runner:
        assert runner.inputs[0].shape[0] == 4
        assert runner.outputs[0].shape == (4, 5)
        sample = tiny.sample(4, seed=2)
        np.testing.assert_allclose(
            runner.infer(sample)["logits"], tiny.expected(sample["input"]), atol=tiny.atol, rtol=0
        )
        with pytest.raises(EngineError, match=r"\[1, .*takes \[4, "):
            runner.infer(tiny.sample(1, seed=2))


@pytest.mark.parametrize("kind", ["fp32", "int8"])
def test_another_batch_than_the_models_own(backend, make_tiny, kind, tmp_path):
    fixed = make_tiny(kind, batch=2)
    artifact = backend.build(fixed.artifact, tmp_path, EngineOptions(threads=1, batch=2))
    with backend.load(artifact, EngineOptions(threads=1)) as runner:
        assert runner.inputs[0].shape[0] == 2
    with pytest.raises(EngineError, match="fixed batch of 2, 3 was asked for"):
        backend.load(artifact, EngineOptions(batch=3))


@pytest.mark.parametrize(
    "options", [EngineOptions(threads=0), EngineOptions(batch=0), EngineOptions(batch=-1)]
)
def test_counts_below_one_are_refused(backend, artifact, options):
    with pytest.raises(UsageError, match="at least 1"):
        backend.load(artifact, options)


def test_altered_file_is_refused_before_parsing(backend, artifact, monkeypatch):
    data = bytearray(artifact.path.read_bytes())
    data[len(data) // 2] ^= 1
    artifact.path.write_bytes(data)
    parsers = {
        "openvino": "openvino.Core.read_model",
        "onnxruntime": "onnxruntime.InferenceSession",
        "tensorrt": "fake_tensorrt.FakeRuntime.deserialize_cuda_engine",
    }

    def parsed(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("the file was parsed")

    monkeypatch.setattr(parsers[backend.name], parsed)
    with pytest.raises(IntegrityError, match=artifact.sha256):
        backend.load(artifact, EngineOptions())


def test_missing_file_and_wrong_backend(backend, artifact):
    with pytest.raises(EngineError, match="other"):
        backend.load(dataclasses.replace(artifact, backend="other"), EngineOptions())
    artifact.path.unlink()
    with pytest.raises(EngineError, match="cannot be read"):
        backend.load(artifact, EngineOptions())


def test_garbage_is_a_named_error(backend, tiny, tmp_path):
    data = b"this is no ONNX file" * 50
    path = tmp_path / "garbage.onnx"
    path.write_bytes(data)
    model = dataclasses.replace(tiny.artifact, path=path, sha256=hashlib.sha256(data).hexdigest())
    with pytest.raises(EngineError, match=r"garbage\.onnx"):
        backend.build(model, tmp_path, EngineOptions())
    with pytest.raises(EngineError, match=r"garbage\.onnx"):
        backend.build(model, tmp_path, EngineOptions(batch=1))


def test_nan_logits_are_an_error_not_a_label(backend, make_tiny, tmp_path):
    tiny = make_tiny("fp32")
    artifact = backend.build(tiny.artifact, tmp_path, EngineOptions(threads=1))
    sample = tiny.sample(1, seed=0)
    overflowing = {"input": np.full_like(sample["input"], 3e38)}
    with backend.load(artifact, EngineOptions(threads=1)) as runner:
        with pytest.raises(EngineError, match="NaN or Inf in 5 of 5 values of output 'logits'"):
            runner.infer(overflowing)
        # one bad frame does not spoil the runner, and gives its slot back
        for _ in range(2 * runner.n_streams + 1):
            with pytest.raises(EngineError, match="'logits'"):
                runner.submit(overflowing).result(timeout=30)
        assert np.isfinite(runner.infer(sample)["logits"]).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_in_the_input_is_an_error(backend, make_tiny, tmp_path, value):
    """OpenVINO's ReLU turns NaN into 0, so that the logits would not show it."""
    tiny = make_tiny("fp32")
    artifact = backend.build(tiny.artifact, tmp_path, EngineOptions(threads=1))
    poisoned = tiny.sample(1, seed=0)
    poisoned["input"][0, 1, 2, 3] = value
    with backend.load(artifact, EngineOptions(threads=1)) as runner:
        for call in (runner.infer, runner.submit):
            with pytest.raises(EngineError, match="input 'input' holds NaN or Inf"):
                call(poisoned)


def test_fingerprint_identifies_version_and_device(backend):
    first, second = backend.fingerprint(), backend.fingerprint()
    assert first == second
    assert first.engine == backend.name
    assert first.version[0].isdigit()
    assert first.device
