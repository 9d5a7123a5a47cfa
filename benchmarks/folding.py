"""What folding does to the networks, and what export and folding cost.

    python benchmarks/folding.py [MODEL ...]

Runs `edgefold inspect MODEL --weights random:0 --json` in a process of its own for each network, and writes
benchmarks/results/folding.json: op counts, parameters and MACs before and after, what each pass did, seconds
(wall and CPU) and peak resident memory of the whole process, import of PyTorch included.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from typing import Any

from harness import machine_stamp, write_results

_MODELS = (
    "inception_v2",
    "inception_v3",
    "inception_v4",
    "inception_resnet_v1",
    "inception_resnet_v2",
    "inception_resnet_lite",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=_MODELS)
    results: dict[str, Any] = {"machine": machine_stamp(), "models": {}}
    for model in parser.parse_args().models:
        results["models"][model] = _inspect(model)
        print(model, results["models"][model]["cpu_seconds"], "CPU s", file=sys.stderr)
    write_results("folding", results)


def _inspect(model: str) -> dict[str, Any]:
    command = [sys.executable, "-c", "from apps.cli import main; main()"]
    command += ["inspect", model, "--weights", "random:0", "--json"]
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"inspecting {model} failed with status {os.waitstatus_to_exitcode(status)}")
    return {
        **json.loads(output),
        "wall_seconds": round(time.monotonic() - began, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_gb": round(usage.ru_maxrss * 1024 / 1e9, 2),
    }


if __name__ == "__main__":
    main()
