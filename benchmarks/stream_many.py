"""Eight synthetic cameras on one engine: fair shares, CPU outside the engine, and what batches bring.

    python benchmarks/stream_many.py --keep DIR [--rounds N]

The cameras replay frames that were rendered beforehand, 30 a second each, more than inception_v3 can take, so
every share is contended. Goals: each camera within 10% of a fair share; at most 15% of the CPU time outside
the engine, whose own is measured alone at the same batch; batches across cameras faster than batch 1. Counted
after all cameras have come up; processes of their own, in turns, medians. Writes
benchmarks/results/stream_many.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from harness import machine_stamp, paired_ratio, run_rounds, write_results
from stream_parts import bundle, worker

MODEL = "inception_v3"
N_CAMERAS = 8
N_ALONE = 304
GOALS = {"worst_from_fair_share": 0.10, "cpu_outside_engine": 0.15, "throughput_over_batch_1": 1.0}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=8, help="of the batched run")
    parser.add_argument("--seconds", type=float, default=8.0, help="how long each process counts")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--keep", type=Path, help="keep the model here, and reuse the one already there")
    parser.add_argument("--name", default="stream_many", help="of the JSON file in benchmarks/results")
    given = parser.parse_args()
    with TemporaryDirectory(prefix="edgefold-stream-") as temporary:
        folder = given.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        stamp = machine_stamp()
        path = bundle(MODEL, folder)
        batches = {"batch 1": 1, f"batch {given.batch}": given.batch}
        commands: dict[str, list[str]] = {}
        for name, size in batches.items():
            commands[name] = worker("many", path, N_CAMERAS, given.seconds, "--batch", size)
            commands[f"engine, {name}"] = worker("engine", path, N_ALONE, "--batch", size)
        rounds = run_rounds(commands, given.rounds)
    made = {
        "machine": stamp,
        "model": MODEL,
        "cameras": N_CAMERAS,
        "seconds": given.seconds,
        "goals": GOALS,
        "results": {name: judge(rounds[name], rounds[f"engine, {name}"]) for name in batches},
        "throughput_over_batch_1": paired_ratio(
            *([run["wall_ms"] for run in rounds[name]] for name in batches)
        ),
        "rounds": rounds,
    }
    shown = {key: made[key] for key in ("results", "throughput_over_batch_1")}
    print(json.dumps(shown, indent=2, default=str), file=sys.stderr)
    print(write_results(given.name, made))


def judge(streams: list[dict[str, Any]], engines: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of the rounds; the share of CPU is of paired rounds."""
    engine_of_all = paired_ratio([run["cpu_ms"] for run in engines], [run["cpu_ms"] for run in streams])
    return {
        "worst_from_fair_share": statistics.median(run["worst_from_fair_share"] for run in streams),
        "cpu_outside_engine": 1 - engine_of_all.median,
        "frames_per_s": statistics.median(1e3 / run["wall_ms"] for run in streams),
        "mean_batch": statistics.median(run["mean_batch"] for run in streams),
    }


if __name__ == "__main__":
    main()
