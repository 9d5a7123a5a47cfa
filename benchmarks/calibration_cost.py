"""What calibration costs, in units of running the same images once in fp32.

    python benchmarks/calibration_cost.py [--models inception_v3 inception_resnet_v2] [--images 128]

For each network (seeded random weights, 299×299): the images, already decoded, are run once through the folded
fp32 graph, and once through the collection of statistics, in processes of their own and in turns. Then every
method's ranges are derived from those statistics, which is what a histogram method costs beyond the pass. A third
process makes bias correction and equalization, which come on top of that; beside its seconds without compiling, as
on both sides, stand those with it. It is run on half as many images as well: part of its time is the same for any number.
Goals: min/max at most 1.35 times the plain run, histogram methods at most 2.6 times, both corrections at most once
more. Writes
benchmarks/results/calibration_cost.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from harness import machine_stamp, paired_ratio, run_rounds, write_results

MODELS = ("inception_v3", "inception_resnet_v2")
METHODS = ("minmax", "percentile", "entropy", "mse")
WORKERS = ("plain", "collect", "correct")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--images", type=int, default=128, help="what `edgefold build` takes by default")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        print(json.dumps(_work(arguments.worker, arguments.folder)))
        return
    results: dict[str, Any] = {
        "machine": machine_stamp(),
        "images": arguments.images,
        "goal": {"minmax": 1.35, "percentile": 2.6, "entropy": 2.6, "mse": 2.6, "equalize,bias": 1.0},
        "models": {},
    }
    for name in arguments.models:
        with TemporaryDirectory() as folder:
            results["models"][name] = _compared(
                _rounds(name, arguments.images, WORKERS, arguments.rounds, Path(folder))
            )
            half = arguments.images // 2
            rounds = _rounds(name, half, ("plain", "correct"), arguments.rounds, Path(folder))
            results["models"][name][f"equalize,bias of {half} images"] = _corrected(rounds)
        print(name, json.dumps(results["models"][name]), file=sys.stderr)
    print(write_results("calibration_cost", results))


def _rounds(
    name: str, n_images: int, workers: tuple[str, ...], n_rounds: int, folder: Path
) -> dict[str, list[dict[str, Any]]]:
    _prepare(name, n_images, folder)
    script = [sys.executable, __file__, "--folder", str(folder), "--worker"]
    return run_rounds({worker: [*script, worker] for worker in workers}, n_rounds)


def _prepare(name: str, n_images: int, folder: Path) -> None:
    """The folded graph and decoded images, on disk for both workers."""
    from pipeline.compile import export_resolved
    from pipeline.datasets import batches, open_dataset
    from pipeline.models.resolve import resolve_model
    from pipeline.passes import fold

    model = resolve_model(name, weights="random:0")
    folded, _ = fold(export_resolved(model, folder / "exported.onnx"), folder / "model.onnx")
    frames = batches(open_dataset(f"synthetic:1:{n_images}"), folded.preprocess, folded.input_color, 1)
    np.save(folder / "images.npy", np.concatenate(list(frames())))


def _work(worker: str, folder: Path) -> dict[str, Any]:
    """All workers leave out loading and compiling: they cost the same, whatever the number of images."""
    from engines.openvino import fp32_runner

    images = np.load(folder / "images.npy", mmap_mode="r")
    if worker == "plain":
        with fp32_runner(folder / "model.onnx") as runner:
            feed = runner.inputs[0].name
            runner.infer({feed: np.ascontiguousarray(images[:1])})
            began = time.perf_counter()
            for i in range(len(images)):
                runner.infer({feed: np.ascontiguousarray(images[i : i + 1])})
            return {"seconds": time.perf_counter() - began}
    return _collect(folder, images) if worker == "collect" else _correct(folder, images)


def _correct(folder: Path, images: np.ndarray[Any, Any]) -> dict[str, Any]:
    from calibration.quantizer import StaticQuantizer
    from engines.openvino import fp32_runner

    compiling_s: list[float] = []

    def timed_runner(path: Path, extra_outputs: Any = ()) -> Any:
        began = time.perf_counter()
        runner = fp32_runner(path, extra_outputs)
        compiling_s.append(time.perf_counter() - began)
        return runner

    class Quantizer(StaticQuantizer):
        def statistics(self, *arguments: Any) -> Any:
            """The statistics are no part of the corrections, and neither is compiling their graph."""
            self.runner_factory, corrections = fp32_runner, self.runner_factory
            try:
                return super().statistics(*arguments)
            finally:
                self.runner_factory = corrections

    def passes() -> Any:
        return (np.ascontiguousarray(images[i : i + 1]) for i in range(len(images)))

    quantizer = Quantizer(runner_factory=timed_runner, corrections=("equalize", "bias"), work_dir=folder)
    made = quantizer.correct(_artifact(folder), passes, "0" * 64, lambda *_: None)
    whole = sum(made.original.history[-1].checks["seconds_of"].values())
    return {"seconds": whole - sum(compiling_s), "with_compiling_seconds": whole}


def _artifact(folder: Path) -> Any:
    from pipeline.artifacts import ModelArtifact, PreprocessSpec
    from pipeline.digest import file_sha256
    from pipeline.onnx_files import interface, load_model, opset_of

    path = folder / "model.onnx"
    graph = load_model(path)
    inputs, outputs = interface(graph)
    spec = PreprocessSpec((299, 299))
    return ModelArtifact(path, file_sha256(path), inputs, outputs, opset_of(graph), spec, "BGR")


def _collect(folder: Path, images: np.ndarray[Any, Any]) -> dict[str, Any]:
    from calibration.collect import collect
    from calibration.placement import PLACEMENTS
    from calibration.table import derive_table
    from engines.openvino import fp32_runner
    from pipeline.onnx_files import load_model

    model = _artifact(folder)
    observed = PLACEMENTS["cpu"](load_model(model.path)).observed
    ticks: list[float] = []

    def passes() -> Any:
        # The first image is seen twice: the engine warms up on it, as the plain worker's does.
        yield np.ascontiguousarray(images[:1])
        for i in range(len(images)):
            yield np.ascontiguousarray(images[i : i + 1])

    statistics = collect(
        model, observed, passes, "0" * 64, fp32_runner, lambda *_: ticks.append(time.perf_counter())
    )
    seconds = {"pass": ticks[-1] - ticks[0]}
    for method in METHODS:
        began = time.perf_counter()
        derive_table(statistics, method)
        seconds[method] = time.perf_counter() - began
    return {"seconds": seconds, "tensors": len(observed)}


def _compared(rounds: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    plain = [r["seconds"] for r in rounds["plain"]]
    table: dict[str, Any] = {"plain_seconds": plain, "tensors": rounds["collect"][0]["tensors"]}
    for method in METHODS:
        total = [r["seconds"]["pass"] + r["seconds"][method] for r in rounds["collect"]]
        table[method] = {"seconds": total, "ratio": asdict(paired_ratio(total, plain))}
    table["equalize,bias"] = _corrected(rounds)
    return table


def _corrected(rounds: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    plain, without, whole = (
        [r[key] for r in rounds[worker]]
        for worker, key in (
            ("plain", "seconds"),
            ("correct", "seconds"),
            ("correct", "with_compiling_seconds"),
        )
    )
    return {
        "plain_seconds": plain,
        "seconds": without,
        "ratio": asdict(paired_ratio(without, plain)),
        "with_compiling_seconds": whole,
        "with_compiling_ratio": asdict(paired_ratio(whole, plain)),
    }


if __name__ == "__main__":
    main()
