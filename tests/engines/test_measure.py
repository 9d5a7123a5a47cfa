from __future__ import annotations

import json
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pytest

from engines.measure import main, make_inputs, run_alternating, time_infer, time_submit, worker_command
from pipeline.artifacts import EngineOptions, TensorSpec
from pipeline.errors import EngineError


class SleepingRunner:
    """Takes `seconds` a request, on `n_streams` threads."""

    inputs = (TensorSpec("input", "uint8", (1, 4, 4, 3)),)
    outputs = (TensorSpec("logits", "float32", (1, 2)),)
    reuses_outputs = False

    def __init__(self, seconds: float, n_streams: int = 1) -> None:
        self.n_streams = n_streams
        self._seconds = seconds
        self._pool = ThreadPoolExecutor(n_streams)

    def infer(self, inputs):
        time.sleep(self._seconds)
        return {}

    def submit(self, inputs) -> Future:
        while self._pool._work_queue.qsize() > self.n_streams:
            time.sleep(0.0005)
        return self._pool.submit(self.infer, inputs)


def test_latency_is_the_time_of_a_request():
    timing = time_infer(SleepingRunner(0.01), make_inputs(SleepingRunner.inputs, 1), seconds=0.3)
    assert 10 <= timing.p50_ms <= timing.p95_ms <= timing.p99_ms
    assert timing.p50_ms < 10 + 90  # in seconds it would be 0.01, and with the runs added up 300
    assert timing.images_per_s <= 100
    assert timing.n_runs >= 5


def test_throughput_counts_streams_that_overlap():
    inputs = make_inputs(SleepingRunner.inputs, 1)
    one = time_submit(SleepingRunner(0.02, n_streams=1), inputs, seconds=0.4)
    four = time_submit(SleepingRunner(0.02, n_streams=4), inputs, seconds=0.4)
    assert one.images_per_s <= 50.5
    assert four.images_per_s > 1.5 * one.images_per_s


def test_batch_counts_as_images():
    inputs = {"input": np.zeros((8, 4, 4, 3), np.uint8)}
    timing = time_infer(SleepingRunner(0.01), inputs, seconds=0.1)
    assert timing.batch == 8
    assert 100 < timing.images_per_s <= 800  # counting requests, it would be 100 at most


def test_make_inputs():
    specs = (TensorSpec("p", "uint8", ("batch", 4, 4, 3)), TensorSpec("f", "float32", (2, 3)))
    arrays = make_inputs(specs, batch=5, seed=1)
    assert (arrays["p"].dtype, arrays["p"].shape) == (np.uint8, (5, 4, 4, 3))
    assert (arrays["f"].dtype, arrays["f"].shape) == (np.float32, (2, 3))
    assert arrays["p"].max() > 200
    assert np.array_equal(arrays["p"], make_inputs(specs, batch=5, seed=1)["p"])
    with pytest.raises(EngineError, match="free dimensions"):
        make_inputs((TensorSpec("p", "uint8", ("batch", "h", 4, 3)),), batch=1)


def _print(text: str) -> list[str]:
    return [sys.executable, "-S", "-c", text]


def test_rounds_alternate_and_reverse(tmp_path):
    log = tmp_path / "log"
    commands = {
        name: _print(
            f"open({str(log)!r}, 'a').write({name!r}); print('noise'); print('{{\"n\": \"{name}\"}}')"
        )
        for name in "abc"
    }
    seen = []
    results = run_alternating(commands, rounds=3, on_result=lambda name, index: seen.append((name, index)))
    assert log.read_text() == "abc" + "cba" + "abc"
    assert results == {name: [{"n": name}] * 3 for name in "abc"}
    assert seen[3] == ("c", 1)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import sys; sys.exit('the reason')", "exit code 1: the reason"),
        ("pass", "nothing was printed"),
        ("print('no json')", "printed no JSON"),
    ],
)
def test_a_failing_measurement_is_named(code, said):
    with pytest.raises(EngineError, match=f"measuring mine .*{said}"):
        run_alternating({"mine": _print(code)}, rounds=1)


@pytest.mark.parametrize("mode", ["latency", "throughput"])
def test_worker_prints_what_it_measured(make_tiny, mode, capsys):
    pytest.importorskip("openvino")
    model = make_tiny("int8").artifact
    options = EngineOptions(mode=mode, threads=1, batch=2)
    command = worker_command(model.path, model.sha256, "openvino", options, seconds=0.1)
    assert command[:3] == [sys.executable, "-m", "engines.measure"]
    assert main(command[3:]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["batch"] == 2
    assert result["n_runs"] >= 5
    assert result["fingerprint"]["engine"] == "openvino"
    assert 0 < result["p50_ms"] <= result["p99_ms"]


def test_worker_refuses_another_file(make_tiny, capsys):
    pytest.importorskip("openvino")
    model = make_tiny("int8").artifact
    command = worker_command(model.path, "0" * 64, "openvino", EngineOptions(), seconds=0.1)
    assert main(command[3:]) == 5
    assert "SHA-256" in capsys.readouterr().err
