"""Time and memory of `edgefold build inception_resnet_v2 --target cpu` with 128 images.

    python benchmarks/build_cost.py [--images DIR]

Without --images the frames are the synthetic camera's, whose rendering (the decoding of this data) is
part of the time. Writes benchmarks/results/build_cost.json: seconds a stage, wall seconds and peak resident
memory of the whole process. Goal: under 180 s and 4 GB on 2 cores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from harness import machine_stamp, write_results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="inception_resnet_v2")
    parser.add_argument("--images", default="synthetic:1:128")
    arguments = parser.parse_args()
    stamp = machine_stamp()
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, "-c", "from apps.cli import main; main()", "build", arguments.model),
            *("--weights", "random:0", "--calib", arguments.images, "--calib-limit", "128"),
            *("--target", "cpu", "--out", str(Path(folder) / "bundle"), "--json"),
        ]
        # A cache of its own: statistics of an earlier run would leave out the calibration.
        environment = {**os.environ, "EDGEFOLD_CACHE": str(Path(folder) / "cache")}
        began = time.monotonic()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert process.stdout is not None
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        wall_s = time.monotonic() - began
    if status:
        sys.exit(f"the build failed with status {os.waitstatus_to_exitcode(status)}")
    built = json.loads(output)
    results = {
        "machine": stamp,
        "model": arguments.model,
        "images": Path(arguments.images).name,
        "goal": {"seconds": 180, "peak_gb": 4.0},
        "wall_seconds": round(wall_s, 1),
        "peak_gb": round(usage.ru_maxrss * 1024 / 1e9, 2),
        "stages": built["stages"],
    }
    print(json.dumps(results, indent=2), file=sys.stderr)
    print(write_results("build_cost", results))


if __name__ == "__main__":
    main()
