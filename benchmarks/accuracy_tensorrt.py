"""What the TensorRT candidates of a network cost in accuracy, emulated on this CPU.

    python benchmarks/accuracy_tensorrt.py --calib DIR/train --data DIR/test
        [--model inception_resnet_lite.cifar10] [--calibrators percentile mse] [--images 128] [--limit N]

Candidates are made as `edgefold build` makes them, with its default corrections, and once without any. Each
candidate (`calibration.candidates`) is judged beside fp32 on the same images: its graph is widened to
float32 with the constants it ships (`pipeline.passes.half_precision.widen`) and run by ONNX Runtime. Emulated
means: the int8 grids and the rounded constants are the engine's, the order of sums and float16 rounding between
the Q/DQ are not. Writes benchmarks/results/accuracy_tensorrt.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from harness import machine_stamp, write_results

from calibration.candidates import Candidate, tensorrt_candidates
from calibration.correction import AUTO
from calibration.quantizer import StaticQuantizer
from engines.onnxruntime import fp32_runner
from engines.openvino import fp32_runner as calibration_runner
from pipeline.artifacts import ModelArtifact
from pipeline.compile import export_resolved
from pipeline.datasets import batches, open_dataset
from pipeline.judges import engine_judge
from pipeline.models.resolve import resolve_model
from pipeline.onnx_files import load_model, save_model
from pipeline.passes import fold
from pipeline.passes.half_precision import widen
from pipeline.validation import judge_chain

GOAL_DROP_POINTS = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="inception_resnet_lite.cifar10")
    parser.add_argument("--calib", required=True, help="images to calibrate on, none of --data")
    parser.add_argument("--data", required=True, help="labelled images to judge on")
    parser.add_argument("--calibrators", nargs="+", default=["mse"])
    parser.add_argument("--images", type=int, default=128, help="to calibrate on")
    parser.add_argument("--limit", type=int, help="judge on so many images")
    arguments = parser.parse_args()
    results: dict[str, Any] = {
        "machine": machine_stamp(),
        "goal_drop_points": GOAL_DROP_POINTS,
        "model": arguments.model,
        "calibration_images": arguments.images,
        "calibrators": {},
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        resolved = resolve_model(arguments.model, weights=None)
        model, _ = fold(export_resolved(resolved, folder / "exported.onnx"), folder / "model.onnx")
        images = open_dataset(arguments.calib, limit=arguments.images)
        passes = batches(images, model.preprocess, model.input_color, 32)
        reference: dict[tuple[str, ...], Any] = {}
        for calibrator, corrections in itertools.product(arguments.calibrators, ((AUTO,), ())):
            name = calibrator if corrections else f"{calibrator}, uncorrected"
            out = folder / name
            out.mkdir()
            quantizer = StaticQuantizer(
                calibrator,
                "tensorrt",
                runner_factory=calibration_runner,
                cache_dir=folder / "statistics",
                corrections=corrections,
                work_dir=out,
            )
            made = quantizer.correct(model, passes, images.sha256, lambda *_: None)
            candidates = tensorrt_candidates(
                made.original, made.table, out, statistics=made.statistics, corrected=made.model
            )
            results["calibrators"][name] = judged = {}
            for candidate in candidates:
                judged[candidate.name] = _judge(model, candidate, arguments.data, arguments.limit, reference)
                print(name, candidate.name, json.dumps(judged[candidate.name]), file=sys.stderr)
    print(write_results("accuracy_tensorrt", results))


def _judge(
    model: ModelArtifact,
    candidate: Candidate,
    data: str,
    limit: int | None,
    reference: dict[tuple[str, ...], Any],
) -> dict[str, Any]:
    """Judge one candidate; `reference` keeps fp32's logits by the images' keys, for the next one."""
    graph = load_model(candidate.model.path)
    widen(graph)
    emulated = candidate.model.path.with_suffix(".emulated.onnx")
    save_model(graph, emulated)
    dataset = open_dataset(data, labels=model.labels or None, limit=limit)
    look = {"spec": model.preprocess, "color": model.input_color}
    with fp32_runner(model.path) as before, fp32_runner(emulated) as after:
        fp32 = engine_judge(before, name="fp32", part="reference", **look)

        def remembered(samples: Any, pixels: Any) -> Any:
            keys = tuple(sample.key for sample in samples)
            if keys not in reference:
                reference[keys] = fp32.logits(samples, pixels)
            return reference[keys]

        judges = [
            replace(fp32, logits=remembered),
            engine_judge(after, name=candidate.name, part="INT8", **look),
        ]
        found = judge_chain(judges, dataset, labels=model.labels, batch_size=100, **look)
    total = found.total
    return {
        "reason": candidate.reason,
        "float_layers": sorted(candidate.float_layers),
        "untied_concats": sorted(candidate.untied_concats),
        "bytes": candidate.model.path.stat().st_size,
        "n_images": found.n_images,
        "fp32_top1": found.stages[0].top1,
        "top1": found.stages[-1].top1,
        "drop_points": total.drop_points,
        "drop_interval_points": asdict(total.interval_points),
        "agreement": total.agreement,
        "logits_sqnr_db": total.sqnr_db,
    }


if __name__ == "__main__":
    main()
