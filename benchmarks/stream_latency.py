"""How old a frame is when its answer is out, on live sources of 30 FPS under ``newest``.

    python benchmarks/stream_latency.py --keep DIR [--video FILE] [--rounds N]

With an engine that keeps up (inception_v3 int8): the film played at its rate, and the synthetic camera on
frames rendered beforehand; the goal is a 99th percentile of at most twice the engine's median latency, measured
alone, and one frame interval. With one that does not (inception_resnet_v2 in fp32): bounded by ``--max-age``;
frames that were dropped as too old, and answers that came late, are reported beside, since only answers in
time have an age. Processes of their own, in turns, medians. Writes benchmarks/results/stream_latency.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from harness import machine_stamp, run_rounds, write_results
from stream_parts import bundle, film, worker

FAST, SLOW = ("inception_v3", "int8"), ("inception_resnet_v2", "fp32")
INTERVAL_MS = 1000 / 30
MAX_AGE_MS = 250.0
LIVE_FRAMES = "synthetic:1:64#loop"
N_ALONE = 100


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--video", type=Path, help="a film of 30 FPS, instead of one made here")
    parser.add_argument("--seconds", type=float, default=12.0, help="how long each stream runs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--keep", type=Path, help="keep film and models here, and reuse those already there")
    parser.add_argument("--name", default="stream_latency", help="of the JSON file in benchmarks/results")
    given = parser.parse_args()
    with TemporaryDirectory(prefix="edgefold-stream-") as temporary:
        folder = given.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        measure(given, folder)


def measure(given: argparse.Namespace, folder: Path) -> None:
    """Everything in turns, then the JSON."""
    stamp = machine_stamp()
    shown = film(folder, given.video)
    fast, slow = bundle(FAST[0], folder, FAST[1]), bundle(SLOW[0], folder, SLOW[1])
    seconds = str(given.seconds)
    sources = {
        "film": ("--source", f"{shown['path']}#loop", "--policy", "newest"),
        "synthetic camera": ("--source", LIVE_FRAMES, "--policy", "newest", "--fps", "30"),
    }
    commands = {"engine": worker("engine", fast, N_ALONE), "slow engine": worker("engine", slow, N_ALONE)}
    for name, options in sources.items():
        commands[name] = worker("once", fast, "--", *options, "--max-seconds", seconds)
    bounded = (*sources["synthetic camera"], "--max-age", MAX_AGE_MS, "--max-seconds", seconds)
    commands["slow"] = worker("once", slow, "--", *bounded)
    rounds = run_rounds(commands, given.rounds)
    made = {
        "machine": stamp,
        "film": shown | {"path": Path(shown["path"]).name},
        "seconds": given.seconds,
        "rounds_run": given.rounds,
        "fast_enough": {name: judge_fast(rounds[name], rounds["engine"]) for name in sources},
        "not_fast_enough": judge_slow(rounds["slow"], rounds["slow engine"]),
        "rounds": rounds,
    }
    print(
        json.dumps({key: made[key] for key in ("fast_enough", "not_fast_enough")}, indent=2), file=sys.stderr
    )
    print(write_results(given.name, made))


def judge_fast(streams: list[dict[str, Any]], engines: list[dict[str, Any]]) -> dict[str, Any]:
    """The age against what the engine takes."""
    engine_ms = statistics.median(run["latency_p50_ms"] for run in engines)
    age_ms = _ages(streams)
    limit_ms = 2 * engine_ms + INTERVAL_MS
    return {
        "engine_p50_ms": engine_ms,
        "age_ms": age_ms,
        "goal_p99_ms": limit_ms,
        "met": age_ms["p99"] <= limit_ms,
        "fps": statistics.median(run["fps"] for run in streams),
        "dropped": [run["dropped"] for run in streams],
    }


def judge_slow(streams: list[dict[str, Any]], engines: list[dict[str, Any]]) -> dict[str, Any]:
    """The age against the budget, and what keeping it cost."""
    age_ms = _ages(streams)
    return {
        "engine_p50_ms": statistics.median(run["latency_p50_ms"] for run in engines),
        "age_ms": age_ms,
        "goal_p99_ms": MAX_AGE_MS,
        "met": age_ms["p99"] <= MAX_AGE_MS,
        "fps": statistics.median(run["fps"] for run in streams),
        "dropped": [run["dropped"] for run in streams],
    }


def _ages(streams: list[dict[str, Any]]) -> dict[str, float]:
    return {
        percentile: statistics.median(run["age"][f"{percentile}_ms"] for run in streams)
        for percentile in ("p50", "p95", "p99", "max")
    }


if __name__ == "__main__":
    main()
