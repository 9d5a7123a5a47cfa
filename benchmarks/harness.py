"""What the benchmarks share: processes in turns, intervals of paired ratios, a stamp, and a JSON file."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engines.fingerprint import cpu_identity
from engines.measure import run_alternating

__all__ = ["Interval", "machine_stamp", "paired_ratio", "run_rounds", "warn_of_load", "write_results"]

RESULTS = Path(__file__).parent / "results"
QUIET_LOAD = 0.3
"""A one-minute load average above this, before anything is measured, is somebody else's work."""

_PACKAGES = ("edgefold", "numpy", "onnx", "onnxruntime", "openvino", "torch", "nncf", "opencv-python", "av")


@dataclass(frozen=True, slots=True)
class Interval:
    """A median and the ends of its 95% bootstrap interval."""

    median: float
    low: float
    high: float


def paired_ratio(numerators: Sequence[float], denominators: Sequence[float], seed: int = 0) -> Interval:
    """The median ratio of paired rounds, with a 95% percentile-bootstrap interval over the rounds.

    Pairs are kept together: what slows the machine for a whole round slows both sides of a ratio.

    Args:
        numerators: one score a round.
        denominators: the other candidate's score in the same rounds.
        seed: of the resampling.

    Raises:
        ValueError: the two differ in length, or there is no round.
    """
    if len(numerators) != len(denominators) or not numerators:
        raise ValueError(f"{len(numerators)} and {len(denominators)} rounds are no pairs")
    ratios = np.asarray(numerators, np.float64) / np.asarray(denominators, np.float64)
    draws = np.random.default_rng(seed).integers(0, len(ratios), (10_000, len(ratios)))
    low, high = np.percentile(np.median(ratios[draws], axis=1), [2.5, 97.5])
    return Interval(float(np.median(ratios)), float(low), float(high))


def machine_stamp(peer_python: Path | None = None) -> dict[str, Any]:
    """What a number depends on besides the code: machine, load, versions (the peers' own too) and commit."""
    cpu = cpu_identity()
    stamp: dict[str, Any] = {
        "utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "cpu": cpu.model,
        "isa": list(cpu.isa),
        "cpus": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "load_average_1min": os.getloadavg()[0],
        "versions": {name: _version(name) for name in _PACKAGES if _version(name)},
        "commit": _commit(),
    }
    if peer_python is not None:
        code = "import json, importlib.metadata as m; print(json.dumps({d.name: d.version for d in m.distributions()}))"
        done = subprocess.run([str(peer_python), "-c", code], capture_output=True, text=True, check=True)
        installed = json.loads(done.stdout)
        stamp["peer_versions"] = {name: installed[name] for name in _PACKAGES if name in installed}
    return stamp


def run_rounds(commands: Mapping[str, Sequence[str]], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """`engines.measure.run_alternating` with a line on standard error for each process."""
    warn_of_load()
    started = time.monotonic()

    def report(name: str, index: int) -> None:
        elapsed_s = time.monotonic() - started
        print(f"[{elapsed_s:6.1f} s] round {index + 1}/{rounds}: {name}", file=sys.stderr, flush=True)

    return run_alternating(commands, rounds, report)


def warn_of_load() -> None:
    """Says on standard error that somebody else works here."""
    if os.getloadavg()[0] > QUIET_LOAD:
        print(
            f"load average {os.getloadavg()[0]:.2f}: the machine is not quiet; provisional", file=sys.stderr
        )


def write_results(name: str, results: Mapping[str, Any], folder: Path = RESULTS) -> Path:
    """Write ``NAME.json`` in one step; dataclasses among the values become objects."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(results, indent=2, default=asdict) + "\n", encoding="utf-8")
    temporary.replace(path)
    return path


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit measured, marked where the working tree differs from it."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None
