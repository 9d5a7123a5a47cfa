"""Which way of choosing ranges is the better default: every method on four networks, with bias correction and without.

    python benchmarks/calibrators.py --photographs DIR --cifar10 DIR

DIR of --photographs has images/ and labels.csv: half calibrates, the other half is judged, for EfficientNet-Lite1 with its
public weights and for Inception-v3 with seeded random ones. DIR of --cifar10 has train/ (128 images calibrate, as in
a build) and test/ (all are judged). The road signs come from the synthetic camera. What is compared are the logits of the
int8 graph with the folded fp32 graph's (SQNR), how many answers agree and, where the labels mean something, the drop
of top-1. None of it depends on the load of the machine. Writes benchmarks/results/calibrators.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from corrections import top1_drop
from harness import machine_stamp, write_results

from calibration.ranges import METHODS
from pipeline.artifacts import ModelArtifact

CORRECTIONS: tuple[tuple[str, ...], ...] = ((), ("bias",))
N_CALIBRATION = 128
N_SIGNS = 2000
_BATCH = 16

Images = np.ndarray[Any, np.dtype[np.uint8]]
Labels = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class Network:
    """A folded fp32 graph, the images it is calibrated on and those it is judged on."""

    model: ModelArtifact
    calibration: Images
    judged: Images
    labels: Labels | None
    """``None``: the weights are random, and no answer is right."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photographs", type=Path, required=True)
    parser.add_argument("--cifar10", type=Path, required=True)
    given = parser.parse_args()
    networks: dict[str, Callable[[Path], Network]] = {
        "inception_resnet_lite.cifar10": lambda folder: _bundled(
            folder, "cifar10", str(given.cifar10 / "train"), str(given.cifar10 / "test")
        ),
        "inception_resnet_lite.signs": lambda folder: _bundled(
            folder, "signs", f"synthetic:1:{N_CALIBRATION}", f"synthetic:2:{N_SIGNS}"
        ),
        "efficientnet_lite1": lambda folder: _lite1(folder, given.photographs),
        "inception_v3, random weights": lambda folder: _random(folder, given.photographs),
    }
    found: dict[str, Any] = {}
    for name, make in networks.items():
        with TemporaryDirectory(prefix="edgefold-calibrators-") as temporary:
            found[name] = _compare(name, make(Path(temporary)), Path(temporary))
    print(write_results("calibrators", {"machine": machine_stamp(), "networks": found}))


def _compare(name: str, network: Network, folder: Path) -> dict[str, Any]:
    from calibration.quantizer import StaticQuantizer
    from engines.openvino import fp32_runner
    from pipeline.metrics import agreement, sqnr_db

    def singly() -> Iterator[Images]:
        return (network.calibration[i : i + 1] for i in range(len(network.calibration)))

    fp32 = logits_of(network.model.path, network.judged)
    result: dict[str, Any] = {
        "n_calibration_images": len(network.calibration),
        "n_judged_images": len(network.judged),
    }
    for method in METHODS:
        for corrections in CORRECTIONS:
            quantizer = StaticQuantizer(
                method, runner_factory=fp32_runner, cache_dir=folder, corrections=corrections
            )
            out = folder / "int8.onnx"
            quantizer.quantize(network.model, singly, "0" * 64, out, lambda *_: None)
            int8 = logits_of(out, network.judged)
            found = {"logits_sqnr_db": sqnr_db(fp32, int8), "agreement": agreement(fp32, int8)}
            if network.labels is not None:
                found |= top1_drop(fp32.argmax(1), int8.argmax(1), network.labels)
            case = "+".join((method, *corrections))
            result[case] = found
            print(name, case, json.dumps(found), file=sys.stderr, flush=True)
    return result


def _bundled(folder: Path, weights: str, calibration: str, judged: str) -> Network:
    from pipeline.models.resolve import resolve_model

    resolved = resolve_model(f"inception_resnet_lite.{weights}", weights=None)
    model = _folded(resolved, folder)
    pixels, _ = _read(calibration, resolved, model, N_CALIBRATION)
    images, labels = _read(judged, resolved, model, None)
    return Network(model, pixels, images, labels)


def _lite1(folder: Path, photographs: Path) -> Network:
    from efficientnet_lite1 import artifact, prepare

    prepare(photographs, folder)
    images, labels = np.load(folder / "images_uint8.npy"), np.load(folder / "labels.npy")
    return Network(artifact(folder / "model.onnx"), images[0::2], images[1::2], labels[1::2])


def _random(folder: Path, photographs: Path) -> Network:
    from pipeline.models.resolve import resolve_model

    resolved = resolve_model("inception_v3", weights="random:0")
    model = _folded(resolved, folder)
    images, _ = _read(str(photographs), None, model, None)
    return Network(model, images[0::2], images[1::2], None)


def _folded(resolved: Any, folder: Path) -> ModelArtifact:
    from pipeline.compile import export_resolved
    from pipeline.passes import fold

    exported = export_resolved(resolved, folder / "exported.onnx")
    return fold(exported, folder / "model.onnx", input_color="BGR")[0]


def _read(data: str, resolved: Any, model: ModelArtifact, limit: int | None) -> tuple[Images, Labels]:
    from pipeline.datasets import labelled_batches, open_dataset

    dataset = open_dataset(data, labels=(resolved and resolved.labels) or None, limit=limit)
    pairs = list(labelled_batches(dataset, model.preprocess, "BGR", _BATCH))
    return (
        np.concatenate([pixels for _, pixels in pairs]),
        np.array([sample.label for samples, _ in pairs for sample in samples]),
    )


def logits_of(path: Path, images: Images) -> np.ndarray[Any, np.dtype[np.float32]]:
    from engines.openvino import fp32_runner

    with fp32_runner(path, ()) as runner:
        name, output = runner.inputs[0].name, runner.outputs[0].name
        step = runner.inputs[0].shape[0] if isinstance(runner.inputs[0].shape[0], int) else _BATCH
        return np.concatenate(
            [
                np.array(runner.infer({name: np.ascontiguousarray(images[i : i + step])})[output])
                for i in range(0, len(images), step)
            ]
        )


if __name__ == "__main__":
    main()
