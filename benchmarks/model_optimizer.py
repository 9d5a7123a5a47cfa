"""Model Optimizer's two doors: its calibrators with our placement, and its own ONNX graphs.

    out/modelopt/env/bin/python benchmarks/model_optimizer.py --photographs DIR      # after `make test-modelopt`

The first door is `edgefold build --calibrator modelopt`: run here, on EfficientNet-Lite1 with the two folds of
photographs of accuracy_peers.py, beside our own calibrators without corrections, as those of Model Optimizer are. The
second, ``modelopt.onnx``, pins packages that collide with ours, so that accuracy_peers.py runs it in another
environment; its figures are read from that script's JSON. Seconds are of a machine that may be busy, for their order of
magnitude only. Writes benchmarks/results/model_optimizer.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from calibrators import logits_of
from efficientnet_lite1 import artifact, prepare
from harness import machine_stamp, write_results

from calibration.modelopt import METHOD, ModelOptQuantizer, modelopt_version
from calibration.quantizer import StaticQuantizer
from engines.openvino import fp32_runner
from pipeline.metrics import agreement, sqnr_db

_OURS = ("percentile", "entropy", "mse")
_PEERS = Path(__file__).parent / "results" / "accuracy_peers.json"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photographs", type=Path, required=True, help="folder with images/ and labels.csv")
    given = parser.parse_args()
    peers = json.loads(_PEERS.read_text())["candidates"]
    results: dict[str, Any] = {
        "machine": machine_stamp(),
        "modelopt": modelopt_version(),
        "its calibrators, our placement": {},
        "its own graphs (accuracy_peers.json)": {
            name: {"logits_sqnr_db": found["logits_sqnr_db"], "agreement": found["agreement"]}
            for name, found in peers.items()
            if name.startswith("Model Optimizer")
        },
        "our calibrators, no corrections": {},
    }
    with TemporaryDirectory(prefix="edgefold-modelopt-") as temporary:
        folder = Path(temporary)
        prepare(given.photographs, folder)
        images = np.load(folder / "images_uint8.npy")
        model = artifact(folder / "model.onnx")
        fp32 = logits_of(model.path, images)
        for method in (METHOD, *_OURS):
            part = "its calibrators, our placement" if method == METHOD else "our calibrators, no corrections"
            results[part][method] = _pooled(method, model, images, fp32, folder)
            print(method, json.dumps(results[part][method]), file=sys.stderr, flush=True)
    print(write_results("model_optimizer", results))


def _pooled(method: str, model: Any, images: Any, fp32: Any, folder: Path) -> dict[str, Any]:
    """Calibrated on each half, judged on the other."""
    int8, seconds = np.zeros_like(fp32), []
    for fold in (0, 1):
        calibration = images[fold::2]
        quantizer = (
            ModelOptQuantizer(runner_factory=fp32_runner)
            if method == METHOD
            else StaticQuantizer(method, runner_factory=fp32_runner)
        )
        began = time.perf_counter()
        out = folder / f"{method}.onnx"
        quantizer.quantize(
            model,
            lambda calibration=calibration: (calibration[i : i + 1] for i in range(len(calibration))),
            "0" * 64,
            out,
            lambda *_: None,
        )
        seconds.append(time.perf_counter() - began)
        int8[1 - fold :: 2] = logits_of(out, images[1 - fold :: 2])
    return {
        "logits_sqnr_db": sqnr_db(fp32, int8),
        "agreement": agreement(fp32, int8),
        "seconds_a_fold": seconds,
    }


if __name__ == "__main__":
    main()
