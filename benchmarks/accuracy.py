"""What INT8 costs the two bundled networks: built by `edgefold build`, judged on data they never saw.

    python benchmarks/accuracy.py signs
    python benchmarks/accuracy.py cifar10 --cifar10 DIR      (DIR has train/ and test/)

With the default corrections of `edgefold build`. Writes benchmarks/results/accuracy_NAME.json. For ``signs`` the same frames also go through
`edgefold stream` with every frame inferred, and the two accuracies are compared.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from harness import machine_stamp, write_results

# Calibration frames come from the training side: another synthetic camera, or CIFAR-10's train/.
_SIGNS = ("inception_resnet_lite.signs", "synthetic:1:128", "synthetic:2:2000", 0.3)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=["signs", "cifar10"])
    parser.add_argument("--cifar10", type=Path, help="folder with train/ and test/")
    arguments = parser.parse_args()
    if arguments.name == "signs":
        model, calib, data, goal = _SIGNS
    elif arguments.cifar10 is None:
        parser.error("cifar10 needs --cifar10 DIR")
    else:
        model, goal = "inception_resnet_lite.cifar10", 0.05
        calib, data = str(arguments.cifar10 / "train"), str(arguments.cifar10 / "test")
    results: dict[str, Any] = {
        "machine": machine_stamp(),
        "goal_drop_points": goal,
        "model": model,
        "methods": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        for method in ("minmax", "percentile", "entropy", "mse"):
            bundle = Path(folder) / method
            _edgefold("build", model, "--calib", calib, "--calibrator", method, "--out", str(bundle))
            report = json.loads(_edgefold("validate", str(bundle), "--data", data, "--json"))
            results["methods"][method] = _summary(report)
            print(method, json.dumps(results["methods"][method]), file=sys.stderr)
        if arguments.name == "signs":
            bundle = Path(folder) / "mse"
            stream = json.loads(
                _edgefold(
                    "stream", str(bundle), "--source", data, "--policy", "every", "--headless", "--json"
                )
            )
            results["through_the_stream"] = {
                "frames": stream["frames_inferred"],
                "top1": stream["top1"],
                "equals_validate": stream["top1"] == results["methods"]["mse"]["int8_top1"],
            }
    print(write_results(f"accuracy_{arguments.name}", results))


def _edgefold(*arguments: str) -> str:
    command = [sys.executable, "-c", "from apps.cli import main; main()", *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout


def _summary(report: dict[str, Any]) -> dict[str, Any]:
    first, last, total = report["stages"][0], report["stages"][-1], report["total"]
    return {
        "n_images": report["n_images"],
        "fp32_top1": first["top1"],
        "int8_top1": last["top1"],
        "drop_points": total["drop_points"],
        "drop_interval_points": total["interval_points"],
        "lost": total["lost"],
        "gained": total["gained"],
        "agreement": total["agreement"],
        "logits_sqnr_db": total["sqnr_db"],
    }


if __name__ == "__main__":
    main()
