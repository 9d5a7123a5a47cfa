"""What the engine settings of `engines` gain or cost on this CPU; the table of ``docs/engines.md``.

    python benchmarks/engine_properties.py

One network, seeded random weights, batch 1, every variant in a process of its own, in turns. CPU time
is the processor time of all threads for one request: what spinning threads take from everybody else.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from cpu_vs_peers import build_ours
from harness import machine_stamp, paired_ratio, run_rounds, write_results

from engines import get_backend
from engines.measure import make_inputs
from engines.openvino import compile_properties
from pipeline.artifacts import EngineArtifact, EngineOptions
from pipeline.contracts import Runner

FILES = {"int8": "model.int8.onnx", "fp32": "model.onnx"}
VARIANTS = {
    "OpenVINO int8, f32 remainder": ("openvino", "int8", "f32"),
    "OpenVINO int8, default remainder": ("openvino", "int8", "default"),
    "OpenVINO fp32, f32": ("openvino", "fp32", "f32"),
    "OpenVINO fp32, default": ("openvino", "fp32", "default"),
    "our runner int8, infer": ("runner", "int8", "infer"),
    "our runner int8, submit": ("runner", "int8", "submit"),
    "ONNX Runtime int8, spinning": ("onnxruntime", "int8", "1"),
    "ONNX Runtime int8, not spinning": ("onnxruntime", "int8", "0"),
}
PAIRS = (
    ("OpenVINO int8, f32 remainder", "OpenVINO int8, default remainder"),
    ("OpenVINO fp32, f32", "OpenVINO fp32, default"),
    ("our runner int8, infer", "OpenVINO int8, f32 remainder"),
    ("our runner int8, submit", "our runner int8, infer"),
    ("ONNX Runtime int8, not spinning", "ONNX Runtime int8, spinning"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="inception_v3")
    parser.add_argument("--input-size", type=int, default=299)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--calibrator", default="minmax")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--name", default="engine_properties")
    parser.add_argument("--worker", nargs=4, metavar=("FOLDER", "KIND", "PRECISION", "SETTING"))
    given = parser.parse_args()
    if given.worker:
        folder, kind, precision, setting = given.worker
        print(json.dumps(measure(Path(folder), kind, precision, setting, given.seconds)))
        return
    with TemporaryDirectory(prefix="edgefold-properties-") as temporary:
        folder = Path(temporary)
        build_ours(given.model, folder, given)
        worker = [sys.executable, __file__, "--seconds", str(given.seconds), "--worker", str(folder)]
        rounds = run_rounds({name: [*worker, *variant] for name, variant in VARIANTS.items()}, given.rounds)
        cache = time_cache(folder, given.rounds)
    scores = {name: {key: [run[key] for run in runs] for key in runs[0]} for name, runs in rounds.items()}
    tree: dict[str, Any] = {
        "machine": machine_stamp(),
        "settings": {"model": given.model, "input_size": given.input_size, "rounds": given.rounds},
        "median": {
            name: {key: float(np.median(value)) for key, value in score.items()}
            for name, score in scores.items()
        },
        "ratios": {
            f"{a} / {b}": {key: paired_ratio(scores[a][key], scores[b][key]) for key in scores[a]}
            for a, b in PAIRS
        },
        "load_s": cache,
    }
    print(json.dumps(tree["median"] | {"load_s": cache}, indent=2))
    print(f"written: {write_results(given.name, tree)}", file=sys.stderr)


def measure(folder: Path, kind: str, precision: str, setting: str, seconds: float) -> dict[str, float]:
    """Medians of wall-clock and CPU milliseconds for one request."""
    path = folder / FILES[precision]
    run = {"openvino": _openvino, "runner": _runner, "onnxruntime": _onnxruntime}[kind](path, setting)
    wall_s: list[float] = []
    cpu_s: list[float] = []
    warm_until = time.perf_counter() + seconds / 5
    end = warm_until + seconds
    while time.perf_counter() < end or len(wall_s) < 5:
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        if wall >= warm_until:
            cpu_s.append(time.process_time() - cpu)
            wall_s.append(time.perf_counter() - wall)
    return {"p50_ms": float(np.median(wall_s)) * 1e3, "cpu_ms": float(np.mean(cpu_s)) * 1e3}


def time_cache(folder: Path, rounds: int) -> dict[str, float]:
    """Median seconds to load the int8 engine, compiled and imported from the cache."""
    options = EngineOptions(batch=1)
    cached = EngineOptions(batch=1, cache_dir=folder / "cache")
    _load(folder / FILES["int8"], cached).close()  # fills the cache
    times: dict[str, list[float]] = {"compiled": [], "imported": []}
    for _ in range(rounds):
        for name, chosen in (("compiled", options), ("imported", cached)):
            begin = time.perf_counter()
            runner = _load(folder / FILES["int8"], chosen)
            times[name].append(time.perf_counter() - begin)
            runner.close()
    return {name: float(np.median(values)) for name, values in times.items()}


def _load(path: Path, options: EngineOptions) -> Runner:
    backend = get_backend("openvino")
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return backend.load(EngineArtifact(path, sha256, sha256, "openvino", backend.fingerprint()), options)


def _runner(path: Path, setting: str) -> Callable[[], object]:
    runner = _load(path, EngineOptions(batch=1))
    inputs = make_inputs(runner.inputs, 1)
    if setting == "submit":
        return lambda: runner.submit(inputs).result()
    return lambda: runner.infer(inputs)


def _openvino(path: Path, setting: str) -> Callable[[], object]:
    import openvino as ov

    core = ov.Core()
    network = core.read_model(path)
    shape = network.input(0).partial_shape
    shape[0] = 1
    network.reshape({network.input(0): shape})
    properties = compile_properties(EngineOptions())
    if setting == "default":
        del properties["INFERENCE_PRECISION_HINT"]
    request = core.compile_model(network, "CPU", properties).create_infer_request()
    pixels = np.random.default_rng(0).integers(0, 256, list(network.input(0).shape), dtype=np.uint8)
    return lambda: request.infer({0: pixels}, share_inputs=True)


def _onnxruntime(path: Path, setting: str) -> Callable[[], object]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.add_session_config_entry("session.intra_op.allow_spinning", setting)
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (port,) = session.get_inputs()
    pixels = np.random.default_rng(0).integers(0, 256, [1, *port.shape[1:]], dtype=np.uint8)
    return lambda: session.run(None, {port.name: pixels})


if __name__ == "__main__":
    main()
