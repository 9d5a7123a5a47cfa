"""The process that builds and probes: TensorRT may crash it, and only it.

Reads one job from standard input and answers with events, a JSON object a line, on what was its
standard output; TensorRT's own prints go to standard error. Standard input stays open as long as the
parent lives: when it closes, the worker removes what it was writing and ends.
"""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import threading
from typing import Any

from engines.model_file import read_model_bytes
from engines.tensorrt.api import load_api
from engines.tensorrt.jobs import BuildJob, Job, ProbeJob, job_from_json
from engines.tensorrt.network import BuildMemoryError, compile_network, make_logger
from engines.tensorrt.plan_file import read_plan
from pipeline.errors import EdgefoldError, EngineError

__all__ = ["main"]


def main() -> None:
    """Do one job."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends this process
    events = _Events()
    job = job_from_json(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_parent, args=(job,), daemon=True).start()
    try:
        result = _build(job, events) if isinstance(job, BuildJob) else _probe(job)
    except EdgefoldError as error:
        events.failed(error)
    except MemoryError:
        events.failed(BuildMemoryError("this process ran out of memory"))
    except OSError as error:
        events.failed(EngineError(f"writing the plan failed: {error.strerror or error}"))
    else:
        events.send(event="done", **result)


class _Events:
    """The way to the parent, apart from what libraries print."""

    def __init__(self) -> None:
        self._stream = io.TextIOWrapper(os.fdopen(os.dup(1), "wb"), encoding="utf-8", line_buffering=True)
        os.dup2(2, 1)
        self._lock = threading.Lock()  # TensorRT reports progress from threads of its own

    def send(self, **event: Any) -> None:
        with self._lock:
            self._stream.write(json.dumps(event) + "\n")

    def progress(self, done: int, total: int) -> None:
        self.send(event="progress", done=done, total=total)

    def failed(self, error: EdgefoldError) -> None:
        memory = isinstance(error, BuildMemoryError)
        kind = "EngineError" if memory else type(error).__name__
        self.send(event="failed", error=kind, message=str(error), out_of_memory=memory)


def _end_with_parent(job: Job) -> None:
    sys.stdin.buffer.read()  # returns when the other end is closed: killed, too
    if isinstance(job, BuildJob):
        job.plan_path.unlink(missing_ok=True)
    os._exit(1)


def _build(job: BuildJob, events: _Events) -> dict[str, Any]:
    api = load_api(job.flavour)
    data = read_model_bytes(job.model_path, job.model_sha256)
    compiled = compile_network(api, data, job.options, job.timing_cache, events.progress)
    with job.plan_path.open("wb") as file:
        file.write(memoryview(compiled.plan))
        file.flush()
        os.fsync(file.fileno())
    return {
        "strongly_typed": compiled.strongly_typed,
        "has_profiles": bool(compiled.profiles),
        "notes": compiled.notes,
        "timing_cache_written": compiled.timing_cache_written,
        "kernel_log": compiled.kernel_log,
    }


def _probe(job: ProbeJob) -> dict[str, Any]:
    api = load_api(job.flavour)
    plan = read_plan(job.plan_path, job.plan_sha256)
    logger, log = make_logger(api)
    runtime = api.module.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise EngineError(
            f"{api.title} cannot load the plan: {' '.join(log.errors)[:1200] or 'no reason given'}"
        )
    inspector = engine.create_engine_inspector()
    # Without a context whose shapes are set, the types of a free batch are "N/A due to dynamic shapes".
    context = _context_at_optimum(api.module, engine)
    inspector.execution_context = context
    information = inspector.get_engine_information(api.module.LayerInformationFormat.JSON)
    return {"inspector": information or None}


def _context_at_optimum(trt: Any, engine: Any) -> Any:
    """An execution context at the optimum of the first profile."""
    context = engine.create_execution_context()
    if context is None:
        raise EngineError(
            "the plan loads, but there is not enough GPU memory to run it; free some, or use a smaller batch"
        )
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT and -1 in tuple(
            engine.get_tensor_shape(name)
        ):
            _, optimum, _ = engine.get_tensor_profile_shape(name, 0)
            context.set_input_shape(name, optimum)
    return context
