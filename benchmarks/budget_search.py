"""How many judgements it takes to find a plan within an accuracy budget: ours beside NNCF's accuracy control.

    python benchmarks/budget_search.py [--images N] [--max-drop POINTS] [--widened N]

The network is `inception_resnet_lite.signs`, made hard on purpose without changing what it computes: one channel
between two convolutions is made a thousand times wider, and the weights that read it as much smaller, so that one
range for the whole tensor (min/max) leaves the other channels next to no steps. Both tools get this ONNX graph, the
same calibration images, the same labelled images and budget, and min/max ranges. A judgement is one pass of an engine
over images: with NNCF, a call of its `validation_fn`. The counts are exact whatever else the machine does. Writes
benchmarks/results/budget_search.json.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import onnx_ir as ir
import openvino as ov
from harness import machine_stamp, write_results
from numpy.typing import NDArray

from calibration.budget import Budget
from calibration.quantizer import StaticQuantizer, apply_table
from calibration.search import Plan, search_precision
from calibration.sensitivity import measure_sensitivity
from calibration.table import derive_table
from engines.measure import make_inputs, time_infer
from engines.openvino import BACKEND, fp32_runner
from pipeline.artifacts import EngineArtifact, EngineOptions, ModelArtifact
from pipeline.compile import prepare
from pipeline.datasets import batches, labelled_batches, open_dataset
from pipeline.models.resolve import resolve_model
from pipeline.onnx_files import load_model, save_model
from pipeline.statistics import paired_drop_interval

_MODEL = "inception_resnet_lite.signs"
_CALIBRATION, _EVALUATION = "synthetic:1:128", "synthetic:2"
_WIDER = 1000.0
_BATCH = 16


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--max-drop", type=float, default=1.0)
    parser.add_argument("--widened", type=int, default=8, help="tensors with a channel made wider")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, widened = _hard_network(folder, arguments.widened)
        data = _Data(model, arguments.images)
        results = {
            "machine": machine_stamp(),
            "model": _MODEL,
            "widened_tensors": widened,
            "wider_by": _WIDER,
            "max_drop_points": arguments.max_drop,
            "n_images": len(data.labels),
            "fp32_top1": data.top1(functools.partial(_logits, model.path)),
            "edgefold": _edgefold(model, data, arguments.max_drop, folder),
            "nncf": _nncf(model, data, arguments.max_drop),
        }
    ours, theirs = (results[name]["n_evaluations"] for name in ("edgefold", "nncf"))
    results["evaluations_ratio"] = ours / theirs
    print(write_results("budget_search", results))


class _Data:
    def __init__(self, model: ModelArtifact, n_images: int) -> None:
        calibration = open_dataset(_CALIBRATION)
        evaluation = open_dataset(f"{_EVALUATION}:{n_images}")
        take = functools.partial(batches, spec=model.preprocess, color=model.input_color)
        self.calibration, self.calibration_sha256 = take(calibration, batch_size=1), calibration.sha256
        labels: list[int] = []
        pixels = []
        for samples, some in labelled_batches(evaluation, model.preprocess, model.input_color, _BATCH):
            labels += [sample.label for sample in samples if sample.label is not None]
            pixels.append(some)
        order = np.random.default_rng(0).permutation(len(labels))
        self.pixels, self.labels = np.concatenate(pixels)[order], np.array(labels)[order]

    def top1(self, logits: Any) -> float:
        with logits() as run:
            right = [
                run(self.pixels[i : i + _BATCH]).argmax(axis=1) for i in range(0, len(self.labels), _BATCH)
            ]
        return float(np.mean(np.concatenate(right) == self.labels))


def _hard_network(folder: Path, n_tensors: int) -> tuple[ModelArtifact, list[str]]:
    prepared = prepare(
        resolve_model(_MODEL, weights=None),
        work_dir=folder,
        bundle_dir=folder,
        input_color="RGB",
        progress=lambda *_: None,
    )
    graph = load_model(prepared.folded.path)
    pairs = [pair for node in graph.graph if (pair := _conv_relu_conv(node)) is not None]
    chosen = [pairs[i] for i in np.linspace(0, len(pairs) - 1, min(n_tensors, len(pairs))).astype(int)]
    for first, readers in chosen:
        _scale(first.inputs[1], 0, _WIDER)
        if len(first.inputs) > 2 and first.inputs[2] is not None:
            _scale(first.inputs[2], 0, _WIDER)
        for reader in readers:
            _scale(reader.inputs[1], 1, 1.0 / _WIDER)
    path = folder / "hard.onnx"
    sha256 = save_model(graph, path)
    names = [str(readers[0].inputs[0].name) for _, readers in chosen if readers[0].inputs[0] is not None]
    return dataclasses.replace(prepared.folded, path=path, sha256=sha256), names


def _conv_relu_conv(node: ir.Node) -> tuple[ir.Node, list[ir.Node]] | None:
    """A convolution whose Relu is read by ungrouped convolutions only."""
    uses = [user for user, _ in node.outputs[0].uses()]
    if node.op_type != "Conv" or len(uses) != 1 or uses[0].op_type != "Relu":
        return None
    readers = [user for user, _ in uses[0].outputs[0].uses()]
    plain = all(user.op_type == "Conv" and user.attributes.get_int("group", 1) == 1 for user in readers)
    return (node, readers) if readers and plain else None


def _scale(value: ir.Value | None, axis: int, factor: float) -> None:
    """Channel 0 of a constant times `factor`, in place."""
    assert value is not None
    assert value.const_value is not None
    array = value.const_value.numpy().copy()
    array[(slice(None),) * axis + (0,)] *= factor
    value.const_value = ir.tensor(array, name=value.name)


@contextlib.contextmanager
def _logits(path: Path) -> Iterator[Any]:
    with fp32_runner(path, ()) as runner:
        name, output = runner.inputs[0].name, runner.outputs[0].name
        yield lambda pixels: np.array(runner.infer({name: pixels})[output])


def _edgefold(model: ModelArtifact, data: _Data, max_drop: float, folder: Path) -> dict[str, Any]:
    quantizer = StaticQuantizer("minmax", runner_factory=fp32_runner)
    statistics, _ = quantizer.statistics(model, data.calibration, data.calibration_sha256, lambda *_: None)
    table = derive_table(statistics, "minmax")
    ranking = measure_sensitivity(model, table, statistics, data.calibration, fp32_runner, lambda *_: None)
    with _logits(model.path) as run:
        starts = range(0, len(data.labels), _BATCH)
        fp32 = np.concatenate([run(data.pixels[i : i + _BATCH]).argmax(axis=1) for i in starts])

    def engine(plan: Plan) -> EngineArtifact:
        made, _ = apply_table(model, table, "cpu", folder / f"plan{len(plan)}.onnx", plan)
        return EngineArtifact(made.path, made.sha256, made.sha256, BACKEND.name, BACKEND.fingerprint())

    def judge(plan: Plan) -> Iterator[NDArray[np.int8]]:
        with BACKEND.load(engine(plan), EngineOptions()) as runner:
            for i in range(0, len(data.labels), _BATCH):
                rows = slice(i, i + _BATCH)
                outputs = runner.infer({runner.inputs[0].name: data.pixels[rows]})
                answers = outputs[runner.outputs[0].name].argmax(axis=1)
                right = data.labels[rows]
                yield (fp32[rows] == right).astype(np.int8) - (answers == right).astype(np.int8)

    def timer(plans: Sequence[Plan]) -> list[float]:
        found: list[list[float]] = [[] for _ in plans]
        with contextlib.ExitStack() as stack:
            runners = [stack.enter_context(BACKEND.load(engine(p), EngineOptions(batch=1))) for p in plans]
            inputs = make_inputs(runners[0].inputs, 1)
            for _ in range(5):
                for runner, times in zip(runners, found, strict=True):
                    times.append(time_infer(runner, inputs, 0.2).p50_ms)
        return [float(np.median(times)) for times in found]

    result = search_precision(ranking, Budget.of_drop(max_drop), len(data.labels), judge, timer)
    print("edgefold", json.dumps(result.to_json()), file=sys.stderr)
    # Latencies steer the search, but are no figure of this benchmark: the machine need not be quiet for it.
    found = {name: value for name, value in result.to_json().items() if not name.endswith("_ms")}
    return {**found, "n_layers": len(ranking), "drop_points": found["change_percent"]}


def _nncf(model: ModelArtifact, data: _Data, max_drop: float) -> dict[str, Any]:
    n_images: list[int] = []
    last: dict[str, float] = {}

    def validate(compiled: ov.CompiledModel, items: Iterable[Any]) -> tuple[float, list[float]]:
        right = [float(compiled(pixels[None])[0].argmax() == label) for pixels, label in items]
        n_images.append(len(right))
        last["top1"] = sum(right) / len(right)
        return last["top1"], right

    calibration = nncf.Dataset([pixels[0][None] for pixels in data.calibration()])
    evaluation = nncf.Dataset(list(zip(data.pixels, data.labels, strict=True)), lambda item: item[0][None])
    quantized = nncf.quantize_with_accuracy_control(
        ov.Core().read_model(model.path),
        calibration,
        evaluation,
        validate,
        max_drop=max_drop / 100.0,
        subset_size=128,
    )
    n_evaluations, n_judged = len(n_images), sum(n_images)
    compiled = ov.Core().compile_model(quantized, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    top1, right = validate(compiled, zip(data.pixels, data.labels, strict=True))
    with _logits(model.path) as run:
        fp32 = np.concatenate([run(row[None]).argmax(axis=1) for row in data.pixels]) == data.labels
    lost, gained = int(np.sum(fp32 & (np.array(right) == 0))), int(np.sum(~fp32 & (np.array(right) == 1)))
    interval = paired_drop_interval(lost, gained, len(fp32)).scaled(100.0)
    return {
        "n_evaluations": n_evaluations,
        "n_images_judged": n_judged,
        "top1": top1,
        "drop_points": 100.0 * (lost - gained) / len(fp32),
        "drop_interval_points": [interval.low, interval.high],
        "within_budget": 100.0 * (lost - gained) / len(fp32) <= max_drop,
    }


if __name__ == "__main__":
    main()
