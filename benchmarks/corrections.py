"""What each correction gains, and what it costs, on EfficientNet-Lite1 and on a bundled network.

    python benchmarks/corrections.py --photographs DIR [--cifar10 DIR]

DIR of --photographs has images/ and labels.csv: half calibrates, the other half is judged. DIR of --cifar10 has
train/ (512 images calibrate) and test/ (all are judged). For every set of corrections: SQNR of the logits against
the fp32 graph, agreement, the drop of top-1 with its 95% interval, how many corrections were made and undone, and
seconds of the correcting beside those of one fp32 pass over the calibration images. Then the same for what
`edgefold build` makes unasked (mse, 128 images), with its corrections and without, for a CPU and in TensorRT's
form, which ONNX Runtime emulates. Each runs in a process of its own. Writes benchmarks/results/corrections.json.

Goals: on CIFAR-10, a drop of at most 0.05 points on the CPU and 0.1 in TensorRT's form; adaptive rounding of
EfficientNet-Lite1 in at most 300 s on 2 cores. What bias correction and equalization cost is calibration_cost.py's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from harness import machine_stamp, write_results

SETS = (
    "auto",
    "none",
    "equalize",
    "ranges",
    "bias",
    "equalize,bias",
    "adaround",
    "bias,adaround",
    "ranges,bias,adaround",
    "equalize,ranges,bias,adaround",
)
_CIFAR_CALIBRATION = 512


@dataclass(frozen=True, slots=True)
class Case:
    """One way to quantize a network."""

    corrections: str
    placement: str = "cpu"
    calibrator: str = "mse"
    n_images: int | None = None
    """To calibrate on; ``None``: all there are."""


BUILDS = {
    f"build for {target}, {corrections}": Case(corrections, placement, "mse", 128)
    for target, placement in (("a CPU", "cpu"), ("TensorRT", "tensorrt"))
    for corrections in ("auto", "none")
}
"""`edgefold build` with its defaults."""
GOAL_DROP_POINTS = {"build for a CPU, auto": 0.05, "build for TensorRT, auto": 0.1}
GOAL_HALF_WIDTH_POINTS = 0.15


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photographs", type=Path)
    parser.add_argument("--cifar10", type=Path)
    parser.add_argument("--sets", nargs="+", default=list(SETS))
    parser.add_argument("--worker", metavar="CASE", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker is not None:
        print(json.dumps(_work(given.folder, Case(**json.loads(given.worker)))))
        return
    results: dict[str, Any] = {
        "machine": machine_stamp(),
        "goal_cifar10_drop_points": GOAL_DROP_POINTS,
        "goal_half_width_points": GOAL_HALF_WIDTH_POINTS,
        "networks": {},
    }
    for network, data in (
        ("efficientnet_lite1", given.photographs),
        ("inception_resnet_lite", given.cifar10),
    ):
        if data is None:
            print(f"{network} is left out: no folder of images was given", file=sys.stderr)
            continue
        with TemporaryDirectory(prefix="edgefold-corrections-") as temporary:
            folder = Path(temporary)
            (_prepare_lite1 if network == "efficientnet_lite1" else _prepare_cifar10)(data, folder)
            found = results["networks"][network] = {}
            for name, case in {**{text: Case(text) for text in given.sets}, **BUILDS}.items():
                command = [sys.executable, __file__, "--folder", str(folder)]
                command += ["--worker", json.dumps(asdict(case))]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                found[name] = json.loads(done.stdout.splitlines()[-1])
                print(network, name, json.dumps(found[name]), file=sys.stderr, flush=True)
    print(write_results("corrections", results))


def _prepare_lite1(photographs: Path, folder: Path) -> None:
    from efficientnet_lite1 import artifact, prepare

    prepare(photographs, folder)
    images = np.load(folder / "images_uint8.npy")
    labels = np.load(folder / "labels.npy")
    np.savez(folder / "images.npz", calibration=images[0::2], judged=images[1::2], labels=labels[1::2])
    _describe(artifact(folder / "model.onnx"), folder)


def _prepare_cifar10(data: Path, folder: Path) -> None:
    from pipeline.compile import export_resolved
    from pipeline.datasets import labelled_batches, open_dataset
    from pipeline.models.resolve import resolve_model
    from pipeline.passes import fold

    model = resolve_model("inception_resnet_lite.cifar10", weights=None)
    folded, _ = fold(
        export_resolved(model, folder / "exported.onnx"), folder / "model.onnx", input_color="BGR"
    )
    found: dict[str, Any] = {}
    for name, part, limit in (("calibration", "train", _CIFAR_CALIBRATION), ("judged", "test", None)):
        dataset = open_dataset(str(data / part), labels=model.labels or None, limit=limit)
        pairs = list(labelled_batches(dataset, folded.preprocess, "BGR", 64))
        found[name] = np.concatenate([pixels for _, pixels in pairs])
        found["labels"] = np.array([sample.label for samples, _ in pairs for sample in samples])
    np.savez(folder / "images.npz", **found)
    _describe(folded, folder)


def _describe(model: Any, folder: Path) -> None:
    from pydantic import TypeAdapter

    from pipeline.artifacts import ModelArtifact

    (folder / "model.json").write_bytes(TypeAdapter(ModelArtifact).dump_json(model))


def _work(folder: Path, case: Case) -> dict[str, Any]:
    from pydantic import TypeAdapter

    from calibration.correction import parse_corrections
    from calibration.quantizer import StaticQuantizer
    from engines.onnxruntime import fp32_runner as emulator
    from engines.openvino import fp32_runner
    from pipeline.artifacts import ModelArtifact
    from pipeline.metrics import agreement, sqnr_db

    model = TypeAdapter(ModelArtifact).validate_json((folder / "model.json").read_bytes())
    images = np.load(folder / "images.npz")
    calibration, judged = images["calibration"], images["judged"]
    if case.n_images is not None:
        calibration = calibration[:: max(1, len(calibration) // case.n_images)][: case.n_images]

    def singly() -> Any:
        return (np.ascontiguousarray(calibration[i : i + 1]) for i in range(len(calibration)))

    began = time.perf_counter()
    _logits(fp32_runner, model.path, calibration)
    plain_s = time.perf_counter() - began
    quantizer = StaticQuantizer(
        case.calibrator,
        case.placement,
        runner_factory=fp32_runner,
        corrections=parse_corrections(case.corrections),
    )
    cpu = time.process_time()
    out = folder / "int8.onnx"
    quantized, _, _ = quantizer.quantize(model, singly, "0" * 64, out, lambda *_: None)
    cpu = time.process_time() - cpu
    made = next((record.checks for record in quantized.history if record.stage == "correct"), None)
    fp32 = _logits(fp32_runner, model.path, judged)
    if case.placement == "tensorrt":
        int8 = _logits(emulator, _widened(out), judged)
    else:
        int8 = _logits(fp32_runner, out, judged)
    layers = [] if made is None else made["corrected_layers"]
    seconds = {} if made is None else made["seconds_of"]
    return {
        "case": asdict(case),
        "logits_sqnr_db": sqnr_db(fp32, int8),
        "agreement": agreement(fp32, int8),
        **top1_drop(fp32.argmax(1), int8.argmax(1), images["labels"]),
        "corrections": [] if made is None else made["corrections"],
        "made": len(layers),
        "undone": sum(entry[4] == "undone" for entry in layers),
        "fp32_pass_seconds": plain_s,
        "corrections_seconds": seconds,
        "corrections_in_fp32_passes": sum(seconds.values()) / plain_s,
        "cpu_seconds_of_all": cpu,
    }


def top1_drop(fp32: Any, int8: Any, labels: Any) -> dict[str, Any]:
    from pipeline.statistics import paired_drop_interval

    lost = int(((fp32 == labels) & (int8 != labels)).sum())
    gained = int(((fp32 != labels) & (int8 == labels)).sum())
    interval = paired_drop_interval(lost, gained, len(labels))
    return {
        "n_images": len(labels),
        "fp32_top1": float((fp32 == labels).mean()),
        "int8_top1": float((int8 == labels).mean()),
        "drop_points": 100.0 * (lost - gained) / len(labels),
        "drop_interval_points": [100.0 * interval.low, 100.0 * interval.high],
    }


def _widened(path: Path) -> Path:
    """A copy in float32 with the constants of `path`, as a CPU can execute it."""
    from pipeline.onnx_files import load_model, save_model
    from pipeline.passes.half_precision import widen

    graph = load_model(path)
    widen(graph)
    save_model(graph, path.with_suffix(".widened.onnx"))
    return path.with_suffix(".widened.onnx")


def _logits(open_runner: Any, path: Path, images: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    with open_runner(path) as runner:
        name, output = runner.inputs[0].name, runner.outputs[0].name
        return np.concatenate(
            [
                np.array(runner.infer({name: np.ascontiguousarray(images[i : i + 1])})[output])
                for i in range(len(images))
            ]
        )


if __name__ == "__main__":
    main()
