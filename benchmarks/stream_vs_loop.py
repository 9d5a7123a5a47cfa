"""What `edgefold stream` costs beside engine and decoder, and how fast it is beside the usual loop.

    python benchmarks/stream_vs_loop.py --keep DIR [--video FILE] [--rounds N]

On a 1080p H.264 film under ``--policy every``. First, CPU: milliseconds a frame of the whole command, its
capture process included, against those of reading the film alone, with the decoder that the stream used, and of the
engine alone on the same settings; reading it with OpenCV is recorded besides. Second, throughput against the loop that everybody writes, in one process:

    OpenCV read → cv2.resize → RGB, normalize, NCHW in NumPy → int8 in OpenVINO → cv2.putText

with the same network, calibrated on the same images, but for the folded preprocessing: its graph takes the
normalized floats. OpenVINO has its latency settings there, which are the faster ones for one request at a
time; the stream has its own defaults. Third, the age of a frame when its answer is out: under ``every`` it
says how much waits in the queues. All are marginal costs (see `stream_parts`), in processes of their own, in
turns, medians of the rounds. Writes benchmarks/results/stream_vs_loop.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from harness import machine_stamp, paired_ratio, run_rounds, write_results
from stream_parts import CALIBRATION, bundle, film, worker

from apps.streaming.loading import THROUGHPUT_BATCH

GOALS = {
    "inception_v3": {"engine_and_decoding_of_cpu": 0.95, "throughput_over_loop": 1.15},
    "inception_resnet_lite.signs": {"throughput_over_loop": 1.25},
}
SHORT, LONG = 80, 380
N_ALONE = 300


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    workers = parser.add_subparsers(dest="worker")
    loop = workers.add_parser("loop", help="time the usual loop; prints JSON")
    loop.add_argument("model", type=Path)
    loop.add_argument("film", type=Path)
    loop.add_argument("frames", type=int)
    parser.add_argument("--models", nargs="+", default=list(GOALS))
    parser.add_argument("--video", type=Path, help="a film of at least 411 frames, instead of one made here")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--keep", type=Path, help="keep film and models here, and reuse those already there")
    parser.add_argument("--name", default="stream_vs_loop", help="of the JSON file in benchmarks/results")
    given = parser.parse_args()
    if given.worker == "loop":
        print(json.dumps(usual_loop(given.model, given.film, given.frames)))
        return
    with TemporaryDirectory(prefix="edgefold-stream-") as temporary:
        compare(given, given.keep or Path(temporary))


def compare(given: argparse.Namespace, folder: Path) -> None:
    """Make what is missing, run everything in turns, write the JSON and print the table."""
    stamp = machine_stamp()
    folder.mkdir(parents=True, exist_ok=True)
    shown = film(folder, given.video)
    networks: dict[str, Any] = {}
    for model in given.models:
        path, loop_model = bundle(model, folder), float_model(model, folder)
        commands = {
            "stream": worker(
                *("stream", path, SHORT, LONG, "--", "--source", shown["path"], "--policy", "every")
            ),
            "loop": [sys.executable, __file__, "loop", str(loop_model), shown["path"], str(N_ALONE)],
            "decode": worker("decode", shown["path"], N_ALONE, "--reader", "stream"),
            "decode_with_opencv": worker("decode", shown["path"], N_ALONE, "--reader", "opencv"),
            "engine": worker(*("engine", path, N_ALONE, "--mode", "throughput", "--batch", THROUGHPUT_BATCH)),
        }
        networks[model] = judge(run_rounds(commands, given.rounds), GOALS[model])
        print(model, json.dumps(networks[model]["results"], indent=2, default=str), file=sys.stderr)
    made = {
        "machine": stamp,
        "film": shown | {"path": Path(shown["path"]).name},
        "frames": {"short": SHORT, "long": LONG, "alone": N_ALONE},
        "rounds": given.rounds,
        "networks": networks,
    }
    print(write_results(given.name, made))


def judge(rounds: dict[str, list[dict[str, Any]]], goals: dict[str, float]) -> dict[str, Any]:
    """Medians, and what the goals speak of; ratios are of paired rounds."""
    cpu_ms = {name: [run["cpu_ms"] for run in runs] for name, runs in rounds.items()}
    wall_ms = {name: [run["wall_ms"] for run in runs] for name, runs in rounds.items()}
    alone_ms = [engine + decode for engine, decode in zip(cpu_ms["engine"], cpu_ms["decode"], strict=True)]
    return {
        "goals": goals,
        "decoder": rounds["decode"][0]["decoder"],
        "results": {
            "engine_and_decoding_of_cpu": paired_ratio(alone_ms, cpu_ms["stream"]),
            "throughput_over_loop": paired_ratio(wall_ms["loop"], wall_ms["stream"]),
            "images_a_request": statistics.median(run["mean_batch"] for run in rounds["stream"]),
            "age_ms": {
                percentile: statistics.median(run["age"][f"{percentile}_ms"] for run in rounds["stream"])
                for percentile in ("p50", "p95", "p99")
            },
        },
        "cpu_ms_per_frame": {name: statistics.median(values) for name, values in cpu_ms.items()},
        "wall_ms_per_frame": {name: statistics.median(values) for name, values in wall_ms.items()},
        "rounds": rounds,
    }


def float_model(model: str, folder: Path) -> Path:
    """The int8 graph of `model` that takes the network's own input, float NCHW; its `.json` says the rest."""
    from calibration.quantizer import StaticQuantizer
    from engines.openvino import fp32_runner
    from pipeline.compile import export_resolved
    from pipeline.datasets import batches, open_dataset
    from pipeline.models.resolve import resolve_model
    from pipeline.passes import fold
    from pipeline.preprocess import normalize

    path = folder / f"{model}.float.int8.onnx"
    if path.exists():
        return path
    print(f"building {path.name}", file=sys.stderr)
    resolved = resolve_model(model, weights=None if "." in model else "random:0")
    spec = resolved.preprocess
    with TemporaryDirectory(prefix="edgefold-float-") as work:
        exported = export_resolved(resolved, Path(work) / "exported.onnx")
        folded, _ = fold(exported, Path(work) / "model.onnx", fold_input=False)
        dataset = open_dataset(CALIBRATION)
        pixels = batches(dataset, spec, "BGR", 1)
        StaticQuantizer("percentile", "cpu", runner_factory=fp32_runner, corrections=()).quantize(
            folded,
            lambda: (normalize(batch, spec, "BGR") for batch in pixels()),
            dataset.sha256,
            path,
            lambda what, done, total: None,
        )
    path.with_suffix(".json").write_text(
        json.dumps({"side": spec.input_hw[0], "mean": spec.mean, "std": spec.std, "range": spec.value_range})
    )
    return path


def usual_loop(model_path: Path, film_path: Path, n_frames: int) -> dict[str, float]:
    """One frame after the other, as in any tutorial."""
    import cv2
    import numpy as np
    import openvino as ov

    from engines.openvino import compile_properties
    from pipeline.artifacts import EngineOptions

    asked = json.loads(model_path.with_suffix(".json").read_text())
    side, (low, high) = asked["side"], asked["range"]
    mean, std = np.float32(asked["mean"]), np.float32(asked["std"])
    core = ov.Core()
    network = core.read_model(model_path)
    network.reshape([1, 3, side, side])
    request = core.compile_model(network, "CPU", compile_properties(EngineOptions())).create_infer_request()
    capture = cv2.VideoCapture(str(film_path), cv2.CAP_FFMPEG)

    def step() -> None:
        ok, frame = capture.read()
        if not ok:
            raise SystemExit(f"{film_path} is too short")
        image = cv2.cvtColor(cv2.resize(frame, (side, side)), cv2.COLOR_BGR2RGB)
        values = (image.astype(np.float32) / 255 * (high - low) + low - mean) / std
        scores = request.infer({0: np.ascontiguousarray(values.transpose(2, 0, 1)[np.newaxis])})[0][0]
        text = f"class {int(scores.argmax())}"
        cv2.putText(frame, text, (20, 60), cv2.FONT_HERSHEY_SIMPLEX, 2, (0, 255, 0), 3)

    for _ in range(30):
        step()
    began_cpu_s, began_s = time.process_time(), time.monotonic()
    for _ in range(n_frames):
        step()
    return {
        "cpu_ms": 1e3 * (time.process_time() - began_cpu_s) / n_frames,
        "wall_ms": 1e3 * (time.monotonic() - began_s) / n_frames,
    }


if __name__ == "__main__":
    main()
