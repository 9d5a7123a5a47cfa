"""What each correction gains, and what it costs, on EfficientNet-Lite1 and on a bundled network.

    python benchmarks/corrections.py --photographs DIR [--cifar10 DIR]

DIR of --photographs has images/ and labels.csv: half calibrates, the other half is judged. DIR of --cifar10 has
train/ (512 images calibrate) and test/ (2,000 are judged). For every set of corrections: SQNR of the logits against
the fp32 graph, agreement, how many corrections were made and undone, and seconds of the correcting beside those of
one fp32 pass over the calibration images. Each runs in a process of its own. Writes
benchmarks/results/corrections.json.

Goals: bias correction and equalization together cost at most one more fp32 pass; adaptive rounding of
EfficientNet-Lite1 takes at most 300 s on 2 cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from harness import machine_stamp, write_results

SETS = (
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
_CIFAR_CALIBRATION, _CIFAR_JUDGED = 512, 2000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photographs", type=Path)
    parser.add_argument("--cifar10", type=Path)
    parser.add_argument("--sets", nargs="+", default=list(SETS))
    parser.add_argument("--worker", metavar="SET", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker is not None:
        print(json.dumps(_work(given.folder, given.worker)))
        return
    results: dict[str, Any] = {"machine": machine_stamp(), "networks": {}}
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
            for corrections in given.sets:
                command = [sys.executable, __file__, "--folder", str(folder), "--worker", corrections]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                found[corrections] = json.loads(done.stdout.splitlines()[-1])
                print(network, corrections, json.dumps(found[corrections]), file=sys.stderr, flush=True)
    print(write_results("corrections", results))


def _prepare_lite1(photographs: Path, folder: Path) -> None:
    from efficientnet_lite1 import artifact, prepare

    prepare(photographs, folder)
    images = np.load(folder / "images_uint8.npy")
    np.savez(folder / "images.npz", calibration=images[0::2], judged=images[1::2])
    _describe(artifact(folder / "model.onnx"), folder)


def _prepare_cifar10(data: Path, folder: Path) -> None:
    from pipeline.compile import export_resolved
    from pipeline.datasets import batches, open_dataset
    from pipeline.models.resolve import resolve_model
    from pipeline.passes import fold

    model = resolve_model("inception_resnet_lite.cifar10", weights=None)
    folded, _ = fold(
        export_resolved(model, folder / "exported.onnx"), folder / "model.onnx", input_color="BGR"
    )
    images = {
        name: np.concatenate(
            list(batches(open_dataset(str(data / part), limit=n), folded.preprocess, "BGR", 64)())
        )
        for name, part, n in (
            ("calibration", "train", _CIFAR_CALIBRATION),
            ("judged", "test", _CIFAR_JUDGED),
        )
    }
    np.savez(folder / "images.npz", **images)
    _describe(folded, folder)


def _describe(model: Any, folder: Path) -> None:
    from pydantic import TypeAdapter

    from pipeline.artifacts import ModelArtifact

    (folder / "model.json").write_bytes(TypeAdapter(ModelArtifact).dump_json(model))


def _work(folder: Path, corrections: str) -> dict[str, Any]:
    from pydantic import TypeAdapter

    from calibration.correction import parse_corrections
    from calibration.quantizer import StaticQuantizer
    from engines.openvino import fp32_runner
    from pipeline.artifacts import ModelArtifact
    from pipeline.metrics import agreement, sqnr_db

    model = TypeAdapter(ModelArtifact).validate_json((folder / "model.json").read_bytes())
    images = np.load(folder / "images.npz")
    calibration, judged = images["calibration"], images["judged"]

    def singly() -> Any:
        return (np.ascontiguousarray(calibration[i : i + 1]) for i in range(len(calibration)))

    began = time.perf_counter()
    _logits(model.path, calibration)
    plain_s = time.perf_counter() - began
    quantizer = StaticQuantizer("mse", runner_factory=fp32_runner, corrections=parse_corrections(corrections))
    cpu = time.process_time()
    out = folder / "int8.onnx"
    _, _, record = quantizer.quantize(model, singly, "0" * 64, out, lambda *_: None)
    cpu = time.process_time() - cpu
    fp32, int8 = _logits(model.path, judged), _logits(out, judged)
    layers = record.checks["corrected_layers"]
    return {
        "logits_sqnr_db": sqnr_db(fp32, int8),
        "agreement": agreement(fp32, int8),
        "made": len(layers),
        "undone": sum(entry[4] == "undone" for entry in layers),
        "fp32_pass_seconds": plain_s,
        "statistics_seconds": record.checks["statistics_seconds"],
        "corrections_seconds": record.checks["corrections_seconds"],
        "corrections_in_fp32_passes": record.checks["corrections_seconds"] / plain_s,
        "cpu_seconds_of_all": cpu,
    }


def _logits(path: Path, images: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    from engines.openvino import fp32_runner

    with fp32_runner(path) as runner:
        name, output = runner.inputs[0].name, runner.outputs[0].name
        return np.concatenate(
            [
                np.array(runner.infer({name: np.ascontiguousarray(images[i : i + 1])})[output])
                for i in range(len(images))
            ]
        )


if __name__ == "__main__":
    main()
