"""Runs a job in a worker process and gives every way it can end a name."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from engines.tensorrt.jobs import Job, job_to_json
from pipeline import errors
from pipeline.errors import EdgefoldError, EngineError

__all__ = ["Outcome", "run_job"]

# The child finds the same modules as this process, and none in whatever folder it was started from.
_BOOTSTRAP = "import sys; sys.path[:] = sys.argv[1:]; from engines.tensorrt.worker import main; main()"
_STDERR_TAIL_BYTES = 2000


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a job ended: with a result, or with an error."""

    result: dict[str, Any] | None
    error: EdgefoldError | None
    out_of_memory: bool = False


def run_job(job: Job, report: Callable[[int, int], None]) -> Outcome:
    """Run `job` to its end. Whatever interrupts this call ends the worker, too.

    Args:
        job: what to do.
        report: told of progress, in this thread.
    """
    with tempfile.TemporaryFile() as stderr:
        process = subprocess.Popen(
            [sys.executable, "-c", _BOOTSTRAP, *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        last: dict[str, Any] = {}
        try:
            with contextlib.suppress(BrokenPipeError):  # it died at once; its end says why
                process.stdin.write(job_to_json(job))
                process.stdin.flush()
            for line in process.stdout:
                if not line.endswith(b"\n"):
                    break  # it died in the middle of a word
                last = json.loads(line)
                if last["event"] == "progress":
                    report(last["done"], last["total"])
            # Standard output closes as the process ends, by itself or by a crash.
            returncode = process.wait()
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        if last.get("event") == "done":
            return Outcome(last, None)
        if last.get("event") == "failed":
            return Outcome(None, getattr(errors, last["error"])(last["message"]), last["out_of_memory"])
        stderr.seek(max(0, stderr.seek(0, 2) - _STDERR_TAIL_BYTES))
        return _death(returncode, stderr.read().decode(errors="replace"))


def _death(returncode: int, stderr: str) -> Outcome:
    """The process ended without a word of its own."""
    tail = " ".join(line.strip() for line in stderr.splitlines()[-5:] if line.strip())
    said = f"; it last wrote: {tail}" if tail else ""
    if returncode >= 0:
        return Outcome(None, EngineError(f"the TensorRT process ended with exit code {returncode}{said}"))
    try:
        name = signal.Signals(-returncode).name
    except ValueError:
        name = f"signal {-returncode}"
    if returncode == -signal.SIGKILL:
        why = "as the kernel does when memory runs out; close other programs, or build on a machine with more"
        return Outcome(None, EngineError(f"the TensorRT process was killed (SIGKILL), {why}"), True)
    return Outcome(None, EngineError(f"the TensorRT process crashed with {name}{said}"))
