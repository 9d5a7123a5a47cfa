"""Builds a plan: checked before, in a process of its own, written in one step.

A build takes seconds to an hour, can exhaust a Jetson's memory and can crash; none of it may harm the
caller or leave half a plan behind. The worker writes to a temporary file beside the target, which is
renamed only when its header is that of the plan that was asked for.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from engines.tensorrt.api import TensorRtApi
from engines.tensorrt.device import DeviceIdentity, device_identity
from engines.tensorrt.jobs import BuildJob, ProbeJob
from engines.tensorrt.options import TensorRtOptions, check_build_options
from engines.tensorrt.plan import BuiltPlan, identify_plan
from engines.tensorrt.plan_file import PACKED, pack_plan
from engines.tensorrt.process import Outcome, run_job
from engines.tensorrt.timing_cache import timing_cache_path
from pipeline.artifacts import ModelArtifact
from pipeline.contracts import Progress
from pipeline.errors import EngineError, IntegrityError, UnsupportedError

__all__ = ["build_plan", "probe_plan"]

_FIRST_RETRY_BYTES = 2 << 30
"""TensorRT's default is all of the device's memory, whose size it does not tell before it fails."""
_SMALLEST_RETRY_BYTES = 128 << 20
_N_ATTEMPTS = 5


def build_plan(
    api: TensorRtApi, model: ModelArtifact, plan_path: Path, options: TensorRtOptions, progress: Progress
) -> BuiltPlan:
    """Build `model` into a plan at `plan_path`.

    Args:
        api: the flavour to build with.
        model: a strongly typed ONNX graph for TensorRT.
        plan_path: replaced atomically; its folder must exist. Packed where its name ends in `PACKED`.
        options: what to build for.
        progress: told ``("engine", thousandths, 1000)``.

    Raises:
        UsageError, UnsupportedError: the options cannot be met here; nothing was started.
        EngineError: TensorRT refuses the graph, crashed, or ran out of memory with every workspace tried.
        IntegrityError: the model file is not the one described.
    """
    check_build_options(options, api)
    device = find_device()
    options = replace(options, sms=_resolve_sms(api, options, device))
    timing_cache = None
    if options.timing_cache_dir is not None and api.uses_timing_cache and device is not None:
        timing_cache = timing_cache_path(
            options.timing_cache_dir, api.version_text, device.name, options.sms[0]
        )
    began = time.perf_counter()
    temporary = _reserve(plan_path)
    try:
        job = BuildJob(api.flavour, model.path, model.sha256, temporary, options, timing_cache)
        result, workspace_bytes, tried = _build_within_memory(job, device, progress)
        plan = temporary.read_bytes()
        _check_header(plan, api, options)
        kept = pack_plan(temporary, plan) if plan_path.suffix == PACKED else plan
        sha256 = hashlib.sha256(kept).hexdigest()
        loadable = device is not None and device.sm in options.sms
        inspector = _probe(api, temporary, sha256, "the new plan") if loadable else None
        _publish(temporary, plan_path)
    finally:
        temporary.unlink(missing_ok=True)
    return BuiltPlan(
        path=plan_path,
        sha256=sha256,
        size_bytes=len(kept),
        model_sha256=model.sha256,
        flavour=api.flavour,
        version=api.version_text,
        compute_capabilities=options.sms,
        device=device.name if device is not None and loadable else None,
        strongly_typed=result["strongly_typed"],
        profiles=options.profiles if result["has_profiles"] else (),
        workspace_bytes=workspace_bytes,
        seconds=round(time.perf_counter() - began, 3),
        timing_cache=timing_cache if result["timing_cache_written"] else None,
        warnings=(*tried, *result["notes"]),
        inspector=inspector,
        kernel_log=result["kernel_log"],
    )


def probe_plan(api: TensorRtApi, plan_path: Path, sha256: str) -> str | None:
    """Deserialize a plan in a process that may die of it.

    Returns:
        The engine inspector's JSON, where the library gives one.

    Raises:
        EngineError: the plan cannot be loaded here, or loading it crashed.
        IntegrityError: the file is not the one described.
    """
    return _probe(api, plan_path, sha256, f"plan {plan_path}")


def find_device() -> DeviceIdentity | None:
    """The GPU of this machine, or ``None`` where there is none that can be used."""
    try:
        return device_identity()
    except UnsupportedError:
        return None


def _probe(api: TensorRtApi, path: Path, sha256: str, what: str) -> str | None:
    outcome = run_job(ProbeJob(api.flavour, path, sha256), lambda done, total: None)
    if outcome.result is None:
        raise _named(outcome, f"{what} cannot be loaded by {api.title}")
    inspector: str | None = outcome.result["inspector"]
    return inspector


def _resolve_sms(
    api: TensorRtApi, options: TensorRtOptions, device: DeviceIdentity | None
) -> tuple[int, ...]:
    if api.has("compute_capabilities"):
        if options.sms:
            return tuple(sorted(options.sms))
        if device is None:
            raise UnsupportedError(
                f"no GPU was found and no compute capability named; name what {api.title} shall build for: "
                f"{', '.join(map(str, api.compute_capabilities))}"
            )
        check_build_options(replace(options, sms=(device.sm,)), api)
        return (device.sm,)
    if device is None:
        device_identity()  # raises, and says what is missing
    assert device is not None
    if options.sms and options.sms != (device.sm,):
        raise UnsupportedError(
            f"{api.title} builds for the GPU it finds, {device.name} (SM {device.sm}); SM {options.sms[0]} was "
            "asked for. Build on that device"
        )
    return (device.sm,)


def _build_within_memory(
    job: BuildJob, device: DeviceIdentity | None, progress: Progress
) -> tuple[dict[str, Any], int | None, tuple[str, ...]]:
    """Build with the workspace asked for, then with less and less of it.

    Ahead of time, without a device, there is one attempt: the workspace is device memory.
    """
    ladder = list(_workspaces(job.options.workspace_bytes))
    tried: list[str] = []
    for workspace in ladder if device is not None else ladder[:1]:
        attempt = replace(job, options=replace(job.options, workspace_bytes=workspace))
        outcome = run_job(attempt, lambda done, total: progress("engine", done, total))
        if outcome.result is not None:
            return outcome.result, workspace, tuple(f"out of memory with a workspace of {t}" for t in tried)
        tried.append("TensorRT's default" if workspace is None else f"{workspace >> 20} MiB")
        if not outcome.out_of_memory:
            break
    else:
        if device is not None:
            raise EngineError(
                f"building ran out of memory on {device.name} with a workspace of {', of '.join(tried)}; the "
                f"last time: {outcome.error}. Close other programs, build for a smaller batch, or lower the "
                "optimization level"
            )
    raise _named(outcome, f"model {job.model_path}")


def _workspaces(first: int | None) -> Iterator[int | None]:
    yield first
    size = _FIRST_RETRY_BYTES if first is None else first // 2
    for _ in range(_N_ATTEMPTS - 1):
        if size < _SMALLEST_RETRY_BYTES:
            return
        yield size
        size //= 2


def _reserve(plan_path: Path) -> Path:
    """A temporary file beside `plan_path`, on the same file system."""
    try:
        descriptor, name = tempfile.mkstemp(dir=plan_path.parent, prefix=f".{plan_path.name}.", suffix=".tmp")
    except OSError as error:
        raise EngineError(f"plan {plan_path} cannot be written: {error.strerror or error}") from error
    os.close(descriptor)
    return Path(name)


def _publish(temporary: Path, plan_path: Path) -> None:
    try:
        temporary.chmod(0o644)  # mkstemp's files are their owner's alone
        temporary.replace(plan_path)
    except OSError as error:
        raise EngineError(f"plan {plan_path} cannot be written: {error.strerror or error}") from error


def _check_header(plan: bytes, api: TensorRtApi, options: TensorRtOptions) -> None:
    """What was built is what was asked for."""
    try:
        header = identify_plan(plan)
    except IntegrityError as error:
        raise EngineError(f"{api.title} built something that cannot be told to be a plan: {error}") from error
    if header.flavour != api.flavour or header.sms not in (None, options.sms):
        raise EngineError(
            f"{api.title} built a plan for {header.flavour} and SM {header.sms}, {api.flavour} and SM "
            f"{options.sms} were asked for"
        )


def _named(outcome: Outcome, what: str) -> Exception:
    assert outcome.error is not None
    return type(outcome.error)(f"{what}: {outcome.error}")
