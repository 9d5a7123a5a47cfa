"""The real command over four sources, a fault in turn, and what the app itself says of each.

`benchmarks/soak.py` runs it for an hour, ``make test-soak`` for three rounds. The app is a process of its own, with the
page, events, a recording under a quota, and JSON logs. It looks at two cameras on loopback that can be told to
misbehave (MJPEG), at a video that is played in a loop, and at the synthetic camera. Before the first fault, it is
watched for a while in peace: a reading that rises by itself proves nothing of a fault, and is reported.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from soak_app import EXIT_LIMIT_S, USUAL, Limits, SoakApp, running
from soak_faults import Fault, faults

__all__ = ["GROWTH_LIMIT_MB", "disturb", "shortfalls", "soak"]

GROWTH_LIMIT_MB = 5.0
"""Of a short run; an hour is judged by its slope."""

_SETTLE_LIMIT_S = 60.0


def disturb(app: SoakApp, fault: Fault, patience_s: float) -> bool:
    """Injects a fault that is undone once the app counted it, or did not in time; whether it did."""
    before = fault.reading()
    fault.inject()
    counted = app.wait(lambda: fault.reading() > before, patience_s)
    fault.undo()
    return counted


def soak(
    bundle: Path,
    *,
    rounds: int,
    warm_up_rounds: int,
    every_s: float = 0.0,
    quiet_s: float = 10.0,
    patience_s: float = 30.0,
    limits: Limits = USUAL,
) -> dict[str, Any]:
    """Runs, disturbs, stops; everything that was seen, JSON-compatible.

    Args:
        bundle: what infers.
        rounds: how often each of the faults is injected.
        warm_up_rounds: after which memory, descriptors and threads are compared with those of the end.
        every_s: between the beginnings of two faults at least; the app has recovered from the one before.
        quiet_s: before the first, in which no reading may rise.
        patience_s: for the app to count a fault.
        limits: of the app.
    """
    with running(bundle, limits) as app:
        began = time.monotonic()
        kinds = faults(app)
        injected: dict[str, int] = {}
        counted: dict[str, int] = {}
        app.wait(app.is_settled, _SETTLE_LIMIT_S)
        before = {fault.name: fault.reading() for fault in kinds}
        app.wait(lambda: False, quiet_s)
        rising = [fault.name for fault in kinds if not fault.reading() <= before[fault.name]]
        unsettled: list[str] = []
        first = app.sample()
        for turn in range(rounds * len(kinds)):
            if not app.alive():
                break
            fault, due_s = kinds[turn % len(kinds)], time.monotonic() + every_s
            injected[fault.name] = injected.get(fault.name, 0) + 1
            counted[fault.name] = counted.get(fault.name, 0) + disturb(app, fault, patience_s)
            if not app.wait(app.is_settled, _SETTLE_LIMIT_S):
                unsettled.append(fault.name)
            app.wait(lambda due_s=due_s: time.monotonic() >= due_s, every_s)  # type: ignore[misc]
            if turn + 1 == warm_up_rounds * len(kinds) and app.alive():
                first = app.sample()

        def is_as_before() -> bool:  # what is about to be closed has a while for it; a leak stays
            now = app.sample()
            return all(now[key] <= first[key] for key in ("descriptors", "threads"))

        app.wait(is_as_before, _SETTLE_LIMIT_S)
        crashed = not app.alive()
        exit_code, exit_s = app.stop()
        log = (app.folder / "log.jsonl").read_text()
    return {
        "seconds": time.monotonic() - began,
        "crashes": int(crashed),
        "exit_code": exit_code,
        "seconds_to_exit": exit_s,
        "tracebacks": log.count("Traceback"),
        "rising_by_itself": rising,
        "injected": injected,
        "counted": counted,
        "not_recovered_from": unsettled,
        **_growth(app.samples, first),
        "frames_inferred": app.samples[-1]["frames"],
        "last_log_lines": log.splitlines()[-5:] if crashed or exit_code else [],
    }


def shortfalls(found: dict[str, Any]) -> list[str]:
    """What of a run is not as it must be, in words; memory is judged by the caller."""
    missed = {name: n - found["counted"].get(name, 0) for name, n in found["injected"].items()}
    checks = {
        "the app crashed": found["crashes"],
        f"exit code {found['exit_code']}": found["exit_code"] != 0,
        f"{found['seconds_to_exit']:.1f} s to exit": found["seconds_to_exit"] >= EXIT_LIMIT_S,
        f"{found['tracebacks']} tracebacks in the log": found["tracebacks"],
        "nothing was inferred": not found["frames_inferred"] > 0,
        "no fault was injected": not found["injected"],
        f"rose though nothing was done: {found['rising_by_itself']}": found["rising_by_itself"],
        f"not counted: { ({name: n for name, n in missed.items() if n}) }": any(missed.values()),
        f"not recovered from: {found['not_recovered_from']}": found["not_recovered_from"],
        f"descriptors grew by {found['grown']['descriptors']:g}": found["grown"]["descriptors"] > 0,
        f"threads grew by {found['grown']['threads']:g}": found["grown"]["threads"] > 0,
    }
    return [words for words, wrong in checks.items() if wrong]


def _growth(samples: list[dict[str, float]], first: dict[str, float]) -> dict[str, Any]:
    """What is held more at the end than at `first`, and the slope of memory between them by least squares."""
    last, kept = samples[-1], [s for s in samples if s["seconds"] >= first["seconds"]]
    hours = np.array([s["seconds"] for s in kept]) / 3600
    slopes = {
        key: float(np.polyfit(hours, [s[key] for s in kept], 1)[0]) if len(kept) > 2 else 0.0
        for key in ("rss_mb", "anonymous_mb")
    }
    return {
        "warm_up_seconds": first["seconds"] - samples[0]["seconds"],
        "slope_mb_per_hour": slopes,
        "grown": {
            key: round(last[key] - first[key], 2)
            for key in ("rss_mb", "anonymous_mb", "descriptors", "threads")
        },
        "rss_mb": [first["rss_mb"], last["rss_mb"], max(s["rss_mb"] for s in kept)],
        "descriptors": [first["descriptors"], last["descriptors"]],
        "threads": [first["threads"], last["threads"]],
        "samples": [
            [round(value, 2) for value in s.values()] for s in samples[:: max(1, len(samples) // 120)]
        ],
    }
