"""Candidates side by side: all are alive, one of them runs at a time, in turns of half a second.

Whole runs after one another differ by ten percent on a machine whose neighbours come and go within seconds. In short turns
what slows one candidate slows all of them, and their ratio moves less than either.

A candidate is a process that works until it is killed. It calls `answer_counts` with what says how many frames it has
done; the other side asks at the end of each turn. Between its turns it is stopped (SIGSTOP), with all its children, so
that it must not mind that time passes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from harness import warn_of_load

__all__ = ["answer_counts", "run_turns"]

_WARM_S = 2.0
_TICKS_A_S = os.sysconf("SC_CLK_TCK")


def answer_counts(count: Callable[[], int], **facts: object) -> None:
    """In a candidate, once it works: says so, and from then on answers how many frames it has done.

    Args:
        count: frames done until now; called in a thread.
        facts: for the one who asks, at the start.
    """

    def answer() -> None:
        for _ in sys.stdin:
            print(count(), flush=True)

    print(json.dumps(facts), flush=True)
    threading.Thread(target=answer, daemon=True).start()


def run_turns(
    commands: Mapping[str, Sequence[str]], rounds: int, *, turns: int = 12, turn_s: float = 0.5
) -> dict[str, list[dict[str, Any]]]:
    """Milliseconds of CPU and of time a frame of each candidate, a round at a time.

    Args:
        commands: by name. All of them have to fit into memory together.
        rounds: how many numbers to make of each.
        turns: of each candidate in a round, one after the other in alternating order.
        turn_s: how long a turn is.

    Returns:
        By name, of each round ``frames``, ``cpu_ms`` and ``wall_ms`` a frame, and what the candidate said at its start.

    Raises:
        RuntimeError: a candidate ended, or did nothing in a round.
    """
    warn_of_load()
    with ExitStack() as stack:
        candidates = []
        for name, command in commands.items():
            print(f"starting {name}", file=sys.stderr, flush=True)
            candidate = _Candidate(name, command)
            stack.callback(candidate.close)
            candidate.warm_up()
            candidates.append(candidate)
        made: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
        for index in range(rounds):
            print(f"round {index + 1}/{rounds}", file=sys.stderr, flush=True)
            for turn in range(turns):
                for candidate in candidates if turn % 2 == 0 else reversed(candidates):
                    candidate.run_for(turn_s)
            for candidate in candidates:
                made[candidate.name].append(candidate.round())
    return made


class _Candidate:
    def __init__(self, name: str, command: Sequence[str]) -> None:
        self.name = name
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self._facts: dict[str, Any] = {}
        self._frames = 0
        self._from = 0, 0.0
        self._ran_s = 0.0

    def close(self) -> None:
        """Kills it, and what it started."""
        with self._process:
            for pid in _with_children(self._process.pid) if self._process.poll() is None else []:
                os.kill(pid, signal.SIGKILL)

    def warm_up(self) -> None:
        """Waits until it works, and lets it: what it is slow at in its first moments is not compared."""
        self._facts = json.loads(self._line())
        self.run_for(_WARM_S)
        self._begin_round()

    def run_for(self, seconds: float) -> None:
        """One turn."""
        pids = _with_children(self._process.pid)
        began_s = time.monotonic()
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        time.sleep(seconds)
        self._frames = self._ask()
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        self._ran_s += time.monotonic() - began_s

    def round(self) -> dict[str, Any]:
        """What was done since the last call."""
        frames, cpu_s = self._frames - self._from[0], self._cpu_s() - self._from[1]
        if frames <= 0:
            raise RuntimeError(f"{self.name} did no frame in {self._ran_s:.1f} s")
        done = {
            "frames": frames,
            "cpu_ms": 1e3 * cpu_s / frames,
            "wall_ms": 1e3 * self._ran_s / frames,
            **self._facts,
        }
        self._begin_round()
        return done

    def _begin_round(self) -> None:
        self._from = self._frames, self._cpu_s()
        self._ran_s = 0.0

    def _ask(self) -> int:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return int(self._line())

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with status {self._process.wait()}")
        return line

    def _cpu_s(self) -> float:
        """Of it and its children, in steps of the kernel's clock, 10 ms."""
        ticks = 0
        for pid in _with_children(self._process.pid):
            fields = _stat(pid)
            ticks += int(fields[11]) + int(fields[12])
        return ticks / _TICKS_A_S


def _with_children(pid: int) -> list[int]:
    """A process and all below it."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int(_stat(int(entry.name))[1])
            except OSError:  # gone meanwhile
                continue
    found = [pid]
    for known in found:
        found += [child for child, parent in parents.items() if parent == known]
    return found


def _stat(pid: int) -> list[str]:
    """The fields behind the name, from the state on; proc_pid_stat(5) counts them from three."""
    return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
