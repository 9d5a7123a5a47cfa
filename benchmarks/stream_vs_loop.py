"""What `edgefold stream` costs beside engine and decoder, and how fast it is beside the usual loop.

    python benchmarks/stream_vs_loop.py --keep DIR [--video FILE] [--rounds N]

On a 1080p H.264 film under ``--policy every``. First, CPU: milliseconds a frame of the whole stream, its
capture process included, against those of reading the film alone, with the decoder that the stream used, and of the
engine alone on the same settings; reading it with OpenCV is recorded besides. Second, throughput against the loop that
everybody writes, in one process:

    OpenCV read → cv2.resize → RGB, normalize, NCHW in NumPy → int8 in OpenVINO → cv2.putText

with the same network, calibrated on the same images, but for the folded preprocessing: its graph takes the
normalized floats. OpenVINO has its latency settings there, which are the faster ones for one request at a
time; the stream has its own defaults. All of these are processes that go on, of which one runs at a time, in short
turns (see `turns`); a ratio is of the sums of a round, and the figure is the median of the rounds.

Third, the age of a frame when its answer is out, in runs of their own: under ``every`` it says how much waits in the
queues. Writes benchmarks/results/stream_vs_loop.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from harness import machine_stamp, paired_ratio, run_rounds, write_results
from stream_candidates import candidate
from stream_parts import CALIBRATION, bundle, film, worker
from turns import run_turns

GOALS = {
    "inception_v3": {"engine_and_decoding_of_cpu": 0.95, "throughput_over_loop": 1.15},
    "inception_resnet_lite.signs": {"throughput_over_loop": 1.25},
}
REPEATED = 20
"""The film after itself, without decoding it: opening it anew, whoever does it, is not what is compared."""
AGES_ROUNDS, AGES_FRAMES = 3, 400


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(GOALS))
    parser.add_argument("--video", type=Path, help="a film, instead of the one made here")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--keep", type=Path, help="keep film and models here, and reuse those already there")
    parser.add_argument("--name", default="stream_vs_loop", help="of the JSON file in benchmarks/results")
    given = parser.parse_args()
    with TemporaryDirectory(prefix="edgefold-stream-") as temporary:
        compare(given, given.keep or Path(temporary))


def compare(given: argparse.Namespace, folder: Path) -> None:
    """Make what is missing, run everything in turns, write the JSON and print the table."""
    stamp = machine_stamp()
    folder.mkdir(parents=True, exist_ok=True)
    shown = film(folder, given.video)
    long_film = repeated(Path(shown["path"]), folder)
    networks: dict[str, Any] = {}
    for model in given.models:
        path, loop_model = bundle(model, folder), float_model(model, folder)
        rounds = run_turns(
            {
                "stream": candidate("stream", path, long_film),
                "loop": candidate("loop", loop_model, long_film),
                "decode": candidate("decode", long_film, "--reader", "stream"),
                "decode_with_opencv": candidate("decode", long_film, "--reader", "opencv"),
                "engine": candidate("engine", path),
            },
            given.rounds,
        )
        options = ("--source", long_film, "--policy", "every", "--max-frames", AGES_FRAMES)
        ages = run_rounds({"stream": worker("once", path, "--", *options)}, AGES_ROUNDS)["stream"]
        networks[model] = judge(rounds, ages, GOALS[model])
        print(model, json.dumps(networks[model]["results"], indent=2, default=str), file=sys.stderr)
    made = {
        "machine": stamp,
        "film": shown | {"path": Path(shown["path"]).name, "repeated": REPEATED},
        "rounds": given.rounds,
        "networks": networks,
    }
    print(write_results(given.name, made))


def judge(
    rounds: dict[str, list[dict[str, Any]]], ages: list[dict[str, Any]], goals: dict[str, float]
) -> dict[str, Any]:
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
            "images_a_request": statistics.median(run["mean_batch"] for run in ages),
            "age_ms": {
                percentile: statistics.median(run["age"][f"{percentile}_ms"] for run in ages)
                for percentile in ("p50", "p95", "p99")
            },
        },
        "cpu_ms_per_frame": {name: statistics.median(values) for name, values in cpu_ms.items()},
        "wall_ms_per_frame": {name: statistics.median(values) for name, values in wall_ms.items()},
        "rounds": rounds,
        "ages": ages,
    }


def repeated(path: Path, folder: Path) -> Path:
    """The film, `REPEATED` times after itself in one file of `folder`."""
    made = folder / f"{path.stem}.{REPEATED}{path.suffix}"
    if not made.exists():
        partial = folder / f"{path.stem}.partial{path.suffix}"
        command = ["ffmpeg", "-hide_banner", "-loglevel", "error", "-y", "-stream_loop", str(REPEATED - 1)]
        subprocess.run([*command, "-i", str(path), "-c", "copy", str(partial)], check=True)
        partial.replace(made)
    return made


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


if __name__ == "__main__":
    main()
