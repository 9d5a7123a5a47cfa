"""Time and memory of `edgefold validate`: whether either depends on more than the images it was given.

    python benchmarks/validation_cost.py BUNDLE --data DIR [--images 1000 10000] [--crops 1 12]

Each run is a process of its own. Writes benchmarks/results/validation_cost.json: wall seconds, images a second and
peak resident memory for every number of images and crops. The chain starts at the folded fp32 graph, so that
PyTorch's own memory and time are not measured.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from harness import machine_stamp, write_results


def validated(bundle: Path, data: Path, images: int, crops: int) -> dict[str, Any]:
    """One run of the command."""
    command = [
        *(sys.executable, "-c", "from apps.cli import main; main()", "validate", str(bundle)),
        *("--data", str(data), "--limit", str(images), "--crops", str(crops), "--against", "onnx", "--json"),
    ]
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    wall_s = time.monotonic() - began
    if status:
        sys.exit(f"validate failed with status {os.waitstatus_to_exitcode(status)}")
    result = json.loads(output)
    return {
        "images": result["n_images"],
        "crops": crops,
        "wall_seconds": round(wall_s, 2),
        "judging_seconds": round(result["seconds"], 2),
        "images_per_second": round(result["n_images"] / result["seconds"], 1),
        "peak_mb": round(usage.ru_maxrss * 1024 / 1e6, 1),
        "top1": [stage["top1"] for stage in result["stages"]],
        "drop_points": result["total"]["drop_points"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 10000])
    parser.add_argument("--crops", type=int, nargs="+", default=[1, 12])
    arguments = parser.parse_args()
    stamp = machine_stamp()
    runs = []
    for crops in arguments.crops:
        for images in arguments.images:
            runs.append(validated(arguments.bundle, arguments.data, images, crops))
            print(json.dumps(runs[-1]), file=sys.stderr, flush=True)
    results = {"machine": stamp, "bundle": arguments.bundle.name, "data": arguments.data.name, "runs": runs}
    print(write_results("validation_cost", results))


if __name__ == "__main__":
    main()
