"""Hours of `edgefold stream` with a fault every few seconds: does it live, does it grow, does it count?

    python benchmarks/soak.py --minutes 60 [--every 20] [--bundle BUNDLE]

The scenario is `soak_scenario.py`'s. A fault is injected every `--every` seconds, in turn, and the app's own /metrics
must count it, and the app recover from it, before the next. Memory, file descriptors and threads of the process are
sampled every five seconds; the slope is a least-squares line over the samples after the warm-up.

Goals: no crash, slope below 1 MB/h, no more descriptors and threads at the end than after the warm-up, every fault
counted, exit code 0 on SIGTERM within 5 s. Writes benchmarks/results/soak.json.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

from harness import machine_stamp, write_results
from soak_app import EDGEFOLD, EXIT_LIMIT_S
from soak_scenario import shortfalls, soak

_N_FAULTS = 11
_SLOPE_LIMIT_MB_PER_HOUR = 1.0


def build_bundle(folder: Path) -> Path:
    """The road signs' network, as `make demo` builds it."""
    command = [*EDGEFOLD, "build", "inception_resnet_lite.signs"]
    command += ["--calib", "synthetic:1:64", "--out", str(folder / "signs")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder / "signs"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--every", type=float, default=20.0, help="seconds between faults")
    parser.add_argument("--warm-up", type=float, default=10.0, help="minutes left out of the slope")
    parser.add_argument("--bundle", type=Path, help="instead of one built for the run")
    parser.add_argument("--name", default="soak", help="of the JSON file in benchmarks/results")
    arguments = parser.parse_args()
    stamp = machine_stamp()
    round_s = arguments.every * _N_FAULTS
    with TemporaryDirectory() as folder:
        bundle = arguments.bundle or build_bundle(Path(folder))
        found = soak(
            bundle.resolve(),
            rounds=math.ceil(60 * arguments.minutes / round_s),
            warm_up_rounds=math.ceil(60 * arguments.warm_up / round_s),
            every_s=arguments.every,
        )
    found["shortfalls"] = shortfalls(found)
    slope = found["slope_mb_per_hour"]["rss_mb"]
    if slope >= _SLOPE_LIMIT_MB_PER_HOUR:
        found["shortfalls"].append(f"memory grew by {slope:.1f} MB an hour")
    goal = {
        "crashes": 0,
        "slope_mb_per_hour": _SLOPE_LIMIT_MB_PER_HOUR,
        "descriptors": "no growth",
        "threads": "no growth",
        "seconds_to_exit": EXIT_LIMIT_S,
    }
    print(write_results(arguments.name, {"machine": stamp, "goal": goal, **found}))
    print(json.dumps({key: value for key, value in found.items() if key != "samples"}, indent=2))


if __name__ == "__main__":
    main()
