"""Latency at batch 1 of our int8 model against NNCF's, and against fp32, on this CPU.

    python benchmarks/cpu_vs_peers.py --peer-python PATH/TO/NNCF/VENV/bin/python

For each network, with seeded random weights: our pipeline exports, folds and quantizes it; NNCF
quantizes the same exported fp32 ONNX (and, as a second candidate, our folded graph) on the same
images, with its defaults, in its own environment. Then every candidate runs in a process of its
own, in turns, through the same loop: one bare inference request, static batch 1, the whole machine.

OpenVINO runs with ``INFERENCE_PRECISION_HINT=f32`` unless a candidate says otherwise: on CPUs with
bf16 arithmetic its default turns fp32 graphs into bf16, which no longer is an fp32 reference. What
the default gives is measured beside it. ONNX Runtime runs with its defaults (spinning threads).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

# Nothing of edgefold at the top: this file also runs in the peer's environment, which lacks it.

MODELS = ("inception_v3", "inception_resnet_v2")
OPENVINO_SETTINGS = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1"}


@dataclass(frozen=True)
class Candidate:
    """A file, the engine that runs it, and OpenVINO's precision hint (``None``: its default)."""

    file: str
    engine: str
    precision: str | None = "f32"


CANDIDATES = {
    "ours int8, OpenVINO": Candidate("model.int8.onnx", "openvino"),
    "ours int8, OpenVINO, default precision": Candidate("model.int8.onnx", "openvino", None),
    "ours int8, ONNX Runtime": Candidate("model.int8.onnx", "onnxruntime"),
    "NNCF int8, OpenVINO": Candidate("nncf.xml", "openvino"),
    "NNCF int8, OpenVINO, default precision": Candidate("nncf.xml", "openvino", None),
    "NNCF int8 of our folded graph, OpenVINO": Candidate("nncf_folded.xml", "openvino"),
    "fp32, OpenVINO": Candidate("exported.onnx", "openvino"),
    "fp32, OpenVINO, default precision": Candidate("exported.onnx", "openvino", None),
    "fp32, ONNX Runtime": Candidate("exported.onnx", "onnxruntime"),
}
OURS = "ours int8, OpenVINO"
RATIOS = tuple(name for name in CANDIDATES if name != OURS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command")
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--peer-python", type=Path, help="the Python of an environment with nncf")
    parser.add_argument("--images", type=int, default=128, help="calibration images")
    parser.add_argument("--calibrator", default="percentile")
    parser.add_argument("--input-size", type=int, default=299)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--seconds", type=float, default=5.0, help="how long each process measures")
    parser.add_argument("--name", default="cpu_vs_peers", help="of the JSON file in benchmarks/results")
    parser.add_argument("--keep", type=Path, help="keep the models here, and reuse those already there")
    nncf = commands.add_parser("nncf", help="quantize with NNCF; runs in the peer's environment")
    nncf.add_argument("model", type=Path)
    nncf.add_argument("images_npy", type=Path)
    nncf.add_argument("out", type=Path)
    timing = commands.add_parser("time", help="time one candidate; prints JSON")
    timing.add_argument("model", type=Path)
    timing.add_argument("engine", choices=["openvino", "onnxruntime"])
    timing.add_argument("precision")
    timing.add_argument("seconds", type=float)
    given = parser.parse_args()
    if given.command == "nncf":
        quantize_with_nncf(given.model, given.images_npy, given.out)
    elif given.command == "time":
        print(json.dumps(time_candidate(given.model, given.engine, given.precision, given.seconds)))
    else:
        compare(given)


def compare(given: argparse.Namespace) -> None:
    """Make the models, time them in turns, write the JSON and print the table."""
    from harness import machine_stamp, paired_ratio, run_rounds, write_results

    tree: dict[str, Any] = {
        "machine": machine_stamp(given.peer_python),
        "settings": {
            "images": given.images,
            "calibrator": given.calibrator,
            "input_size": given.input_size,
            "rounds": given.rounds,
            "seconds": given.seconds,
            "openvino": OPENVINO_SETTINGS,
        },
        "networks": {},
    }
    with TemporaryDirectory(prefix="edgefold-peers-") as temporary:
        for model in given.models:
            folder = (given.keep or Path(temporary)) / model
            prepare(model, folder, given)
            present = {name: c for name, c in CANDIDATES.items() if (folder / c.file).exists()}
            workers = {name: _worker(folder, c, given.seconds) for name, c in present.items()}
            rounds = run_rounds(workers, given.rounds)
            scores = {name: [run["p50_ms"] for run in runs] for name, runs in rounds.items()}
            ratios = {name: paired_ratio(scores[OURS], scores[name]) for name in RATIOS if name in scores}
            tree["networks"][model] = {
                "p50_ms": {name: float(np.median(values)) for name, values in scores.items()},
                "min_ms": {name: min(run["min_ms"] for run in runs) for name, runs in rounds.items()},
                "ours_over": ratios,
                "rounds_p50_ms": scores,
            }
            _print(model, tree["networks"][model])
    print(f"written: {write_results(given.name, tree)}", file=sys.stderr)


def prepare(model: str, folder: Path, given: argparse.Namespace) -> None:
    """Make every file of `CANDIDATES` in `folder` that is not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "model.int8.onnx").exists():
        build_ours(model, folder, given)
    if given.peer_python is None:
        print("no --peer-python: NNCF is left out", file=sys.stderr)
        return
    for source, images, out in (
        ("exported.onnx", "images_float.npy", "nncf.xml"),
        ("model.onnx", "images_uint8.npy", "nncf_folded.xml"),
    ):
        if not (folder / out).exists():
            files = [str(folder / name) for name in (source, images, out)]
            subprocess.run([str(given.peer_python), __file__, "nncf", *files], check=True)


def build_ours(model: str, folder: Path, given: argparse.Namespace) -> None:
    """``exported.onnx``, ``model.onnx``, ``model.int8.onnx`` and the calibration images, in `folder`."""
    from calibration.quantizer import StaticQuantizer
    from engines import get_backend
    from engines.openvino import fp32_runner
    from pipeline.artifacts import EngineOptions
    from pipeline.compile import Calibration, compile_model
    from pipeline.datasets import batches, open_dataset
    from pipeline.models.resolve import resolve_model
    from pipeline.preprocess import normalize

    resolved = resolve_model(model, weights="random:0", num_classes=None, input_size=given.input_size)
    dataset = open_dataset(f"synthetic:0:{given.images}")
    passes = batches(dataset, resolved.preprocess, "BGR", 1)
    compile_model(
        resolved,
        work_dir=folder,
        bundle_dir=folder,
        calibration=Calibration(
            StaticQuantizer(given.calibrator, runner_factory=fp32_runner, corrections=()),
            passes,
            dataset.sha256,
        ),
        input_color="BGR",
        backend=get_backend("openvino"),
        options=EngineOptions(batch=1),
        progress=lambda what, done, total: None,
    )
    pixels = np.concatenate(list(passes()))
    np.save(folder / "images_uint8.npy", pixels)
    np.save(folder / "images_float.npy", normalize(pixels, resolved.preprocess, "BGR"))


def quantize_with_nncf(model: Path, images_npy: Path, out: Path) -> None:
    """NNCF's post-training quantization with its defaults, on every image of the file."""
    import nncf
    import openvino as ov

    images = np.load(images_npy, mmap_mode="r")
    network = ov.Core().read_model(model)
    dataset = nncf.Dataset([images[index : index + 1] for index in range(len(images))])
    ov.save_model(nncf.quantize(network, dataset, subset_size=len(images)), out, compress_to_fp16=False)


def time_candidate(model: Path, engine: str, precision: str, seconds: float) -> dict[str, float]:
    """Median and least milliseconds of one request at batch 1, after a fifth of the time to warm up."""
    run = _openvino(model, precision) if engine == "openvino" else _onnxruntime(model)
    _repeat(run, seconds / 5)
    times_ms = np.asarray(_repeat(run, seconds)) * 1e3
    return {"p50_ms": float(np.median(times_ms)), "min_ms": float(times_ms.min()), "n_runs": len(times_ms)}


def _worker(folder: Path, candidate: Candidate, seconds: float) -> list[str]:
    arguments = [
        str(folder / candidate.file),
        candidate.engine,
        candidate.precision or "default",
        str(seconds),
    ]
    return [sys.executable, __file__, "time", *arguments]


def _openvino(model: Path, precision: str) -> Callable[[], object]:
    import openvino as ov

    core = ov.Core()
    network = core.read_model(model)
    shape = network.input(0).partial_shape
    shape[0] = 1
    network.reshape({network.input(0): shape})
    settings = OPENVINO_SETTINGS | ({} if precision == "default" else {"INFERENCE_PRECISION_HINT": precision})
    request = core.compile_model(network, "CPU", settings).create_infer_request()
    port = network.input(0)
    pixels = _pixels([int(size) for size in port.shape], port.element_type.to_dtype())
    return lambda: request.infer({0: pixels}, share_inputs=True)


def _onnxruntime(model: Path) -> Callable[[], object]:
    import onnxruntime as ort

    session = ort.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    (port,) = session.get_inputs()
    shape = [1, *port.shape[1:]]
    pixels = _pixels(shape, np.dtype(np.uint8 if port.type == "tensor(uint8)" else np.float32))
    return lambda: session.run(None, {port.name: pixels})


def _pixels(shape: list[int], dtype: Any) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(0)
    if np.dtype(dtype) == np.uint8:
        return rng.integers(0, 256, shape, dtype=np.uint8)
    return rng.standard_normal(shape).astype(dtype)


def _repeat(run: Callable[[], object], seconds: float) -> list[float]:
    times_s: list[float] = []
    deadline = time.perf_counter() + seconds
    while len(times_s) < 5 or time.perf_counter() < deadline:
        begin = time.perf_counter()
        run()
        times_s.append(time.perf_counter() - begin)
    return times_s


def _print(model: str, network: dict[str, Any]) -> None:
    print(f"\n{model}")
    for name, p50_ms in network["p50_ms"].items():
        ratio = network["ours_over"].get(name)
        words = "" if ratio is None else f"  ours/this {ratio.median:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"
        print(f"  {name:45s} {p50_ms:8.2f} ms (least {network['min_ms'][name]:.2f}){words}")


if __name__ == "__main__":
    main()
