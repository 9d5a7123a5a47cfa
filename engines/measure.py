"""How fast a loaded engine is, and runs of many engines each in a process of its own.

Engines spoil one another's times when they share a process (ONNX Runtime's and OpenVINO's thread
pools fight for the cores), and a machine's speed drifts. So each measurement is a new process, and
the candidates alternate, round after round.

    python -m engines.measure --model m.onnx --engine openvino --seconds 3

prints one JSON object: what `Timing` holds, and how the engine was loaded.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines import BACKENDS, get_backend
from pipeline.artifacts import EngineArtifact, EngineOptions, TensorSpec
from pipeline.contracts import Runner
from pipeline.errors import EdgefoldError, EngineError

__all__ = ["Timing", "main", "make_inputs", "run_alternating", "time_infer", "time_submit", "worker_command"]

_MIN_RUNS = 5


@dataclass(frozen=True, slots=True)
class Timing:
    """Latency percentiles of one engine in one process, in milliseconds, and images a second.

    With `time_submit` latency runs from submission to completion, waiting included.
    """

    n_runs: int
    batch: int
    p50_ms: float
    p95_ms: float
    p99_ms: float
    images_per_s: float


def make_inputs(specs: Sequence[TensorSpec], batch: int, seed: int = 0) -> dict[str, NDArray[Any]]:
    """Seeded random arrays that fit `specs`: uint8 over its whole range, floats standard normal.

    Raises:
        EngineError: a dimension other than the first is free, so that no size is right.
    """
    rng = np.random.default_rng(seed)
    arrays: dict[str, NDArray[Any]] = {}
    for spec in specs:
        shape = [
            batch if index == 0 and isinstance(size, str) else size for index, size in enumerate(spec.shape)
        ]
        if not all(isinstance(size, int) for size in shape):
            raise EngineError(
                f"input {spec.name!r} has free dimensions {list(spec.shape)}; give it fixed ones"
            )
        sizes = [int(size) for size in shape]
        if np.dtype(spec.dtype).kind == "f":
            arrays[spec.name] = rng.standard_normal(sizes).astype(spec.dtype)
        else:
            arrays[spec.name] = rng.integers(0, 256, sizes).astype(spec.dtype)
    return arrays


def time_infer(runner: Runner, inputs: Mapping[str, NDArray[Any]], seconds: float) -> Timing:
    """One request after another for about `seconds`, after a fifth of that to warm up."""
    latencies_s: list[float] = []
    _repeat(lambda: runner.infer(inputs), seconds / 5)
    start = time.perf_counter()

    def once() -> None:
        begin = time.perf_counter()
        runner.infer(inputs)
        latencies_s.append(time.perf_counter() - begin)

    _repeat(once, seconds)
    return _summary(latencies_s, time.perf_counter() - start, _batch(inputs))


def time_submit(runner: Runner, inputs: Mapping[str, NDArray[Any]], seconds: float) -> Timing:
    """As many requests in flight as `submit` allows, for about `seconds`."""
    latencies_s: list[float] = []
    in_flight: deque[Future[Any]] = deque()

    def record(begin: float) -> Callable[[Future[Any]], None]:
        return lambda _: latencies_s.append(time.perf_counter() - begin)

    def once() -> None:
        begin = time.perf_counter()
        future = runner.submit(inputs)
        future.add_done_callback(record(begin))
        in_flight.append(future)
        while in_flight and in_flight[0].done():
            in_flight.popleft().result()

    def drain() -> None:
        while in_flight:
            in_flight.popleft().result()

    _repeat(once, seconds / 5)
    drain()
    latencies_s.clear()
    start = time.perf_counter()
    _repeat(once, seconds)
    drain()
    return _summary(latencies_s, time.perf_counter() - start, _batch(inputs))


def worker_command(
    model: Path, sha256: str, engine: str, options: EngineOptions, seconds: float
) -> list[str]:
    """The command line of a process that measures one engine and prints JSON."""
    command = [sys.executable, "-m", "engines.measure", "--model", str(model), "--sha256", sha256]
    command += ["--engine", engine, "--mode", options.mode, "--seconds", str(seconds)]
    if options.threads is not None:
        command += ["--threads", str(options.threads)]
    if options.batch is not None:
        command += ["--batch", str(options.batch)]
    if options.cache_dir is not None:
        command += ["--cache-dir", str(options.cache_dir)]
    return command


def run_alternating(
    commands: Mapping[str, Sequence[str]], rounds: int, on_result: Callable[[str, int], None] | None = None
) -> dict[str, list[dict[str, Any]]]:
    """Run every command `rounds` times, one process at a time, in turns.

    Every other round runs in the reverse order, so that a steady drift favours nobody.

    Args:
        commands: command lines by name; the last line each prints is a JSON object.
        rounds: how many times each runs.
        on_result: called with the name and the round after each process.

    Returns:
        The objects printed, by name, in the order of the rounds.

    Raises:
        EngineError: a process failed or printed no JSON; its last words are in the message.
    """
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
    for index in range(rounds):
        order = list(commands.items())
        for name, command in order if index % 2 == 0 else reversed(order):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            lines = done.stdout.strip().splitlines()
            if done.returncode != 0 or not lines:
                words = (done.stderr.strip() or done.stdout.strip()).splitlines()
                said = words[-1] if words else "nothing was printed"
                raise EngineError(f"measuring {name} failed with exit code {done.returncode}: {said}")
            try:
                results[name].append(json.loads(lines[-1]))
            except ValueError as error:
                raise EngineError(f"measuring {name} printed no JSON but {lines[-1]!r}") from error
            if on_result is not None:
                on_result(name, index)
    return results


def _repeat(call: Callable[[], object], seconds: float) -> None:
    deadline = time.perf_counter() + seconds
    n_runs = 0
    while n_runs < _MIN_RUNS or time.perf_counter() < deadline:
        call()
        n_runs += 1


def _batch(inputs: Mapping[str, NDArray[Any]]) -> int:
    return int(next(iter(inputs.values())).shape[0])


def _summary(latencies_s: Sequence[float], elapsed_s: float, batch: int) -> Timing:
    p50, p95, p99 = (float(value) * 1e3 for value in np.percentile(latencies_s, [50, 95, 99]))
    n_runs = len(latencies_s)
    return Timing(n_runs, batch, p50, p95, p99, images_per_s=n_runs * batch / elapsed_s)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure as the command line says and print JSON; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m engines.measure", description="Time one engine.")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--sha256", required=True)
    parser.add_argument("--engine", choices=list(BACKENDS), required=True)
    parser.add_argument("--mode", choices=["latency", "throughput"], default="latency")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--cache-dir", type=Path)
    parser.add_argument("--seconds", type=float, default=3.0)
    given = parser.parse_args(arguments)
    options = EngineOptions(given.mode, given.threads, given.batch, given.cache_dir)
    try:
        backend = get_backend(given.engine)
        fingerprint = backend.fingerprint()
        artifact = EngineArtifact(given.model, given.sha256, given.sha256, given.engine, fingerprint)
        begin = time.perf_counter()
        with backend.load(artifact, options) as runner:
            load_s = time.perf_counter() - begin
            inputs = make_inputs(runner.inputs, options.batch or 1)
            timed = time_infer if options.mode == "latency" else time_submit
            timing = timed(runner, inputs, given.seconds)
            n_streams = runner.n_streams
    except EdgefoldError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    result = {"load_s": load_s, "n_streams": n_streams, "fingerprint": asdict(fingerprint), **asdict(timing)}
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
