"""From ONNX bytes to a serialized plan: the calls of TensorRT itself, the same for every version.

Precision is in the graph (casts and Q/DQ), and the network is strongly typed, which every supported
version has. Where TensorRT refuses a graph so and still knows weak typing (10.x), the graph is built
a second time under the flags its own types call for.

Runs in the worker process: whatever goes wrong in here may take its process along.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engines.tensorrt.api import TensorRtApi
from engines.tensorrt.options import BatchProfile, TensorRtOptions
from engines.tensorrt.parser_errors import ParserFailure, explain_parser_failures, explain_uint8_quantization
from engines.tensorrt.progress import BuildProgress
from engines.tensorrt.timing_cache import TimingCacheFile
from pipeline.errors import EngineError

__all__ = ["BuildMemoryError", "CompiledNetwork", "Log", "compile_network", "make_logger"]

_OUT_OF_MEMORY = re.compile(
    r"out ?of ?memory|bad_alloc|memory allocation (failed|error)|allocation failed|insufficient memory", re.I
)
_SHOWN_ERRORS = 4
_KERNEL = ", LayerType: "
"""In every line with which a log of verbosity VERBOSE describes a kernel of the finished engine."""
_HINTS = (
    (
        re.compile(r"FP32 GEMM is not supported"),
        "float32 matrix products are not compiled for this GPU: build the fp16 or the int8 graph for it",
    ),
)
"""What to do about errors of the build itself, in the words of TensorRT-RTX 1.7."""


class BuildMemoryError(EngineError):
    """TensorRT ran out of memory; less workspace may do."""


@dataclass(frozen=True, slots=True)
class CompiledNetwork:
    """A serialized plan and how it was made."""

    plan: Any
    """A buffer (``IHostMemory``)."""
    strongly_typed: bool
    profiles: tuple[BatchProfile, ...]
    notes: tuple[str, ...]
    timing_cache_written: bool
    kernel_log: str | None
    """The lines of the log that describe the engine's kernels, where the library writes them."""


@dataclass(frozen=True, slots=True)
class Log:
    """What TensorRT said: warnings and errors without repetitions, and the kernels it describes at the end."""

    warnings: list[str]
    errors: list[str]
    kernels: list[str]


def make_logger(api: TensorRtApi) -> tuple[Any, Log]:
    """A logger for TensorRT and the lists it fills."""
    trt = api.module
    log = Log([], [], [])
    severities = trt.ILogger.Severity
    severe = (severities.INTERNAL_ERROR, severities.ERROR)

    def collect(self: Any, severity: Any, message: str) -> None:
        if _KERNEL in message:
            log.kernels.extend(line for line in message.splitlines() if _KERNEL in line)
            return
        lines = log.errors if severity in severe else log.warnings
        if severity in (*severe, severities.WARNING) and message not in lines:
            lines.append(message)

    # The base class is only known at run time.
    return type("Collector", (trt.ILogger,), {"log": collect})(), log


def compile_network(
    api: TensorRtApi,
    onnx_bytes: bytes,
    options: TensorRtOptions,
    timing_cache: Path | None,
    report: Callable[[int, int], None],
) -> CompiledNetwork:
    """Parse `onnx_bytes` and build its plan.

    Args:
        api: the flavour to build with.
        onnx_bytes: a self-contained ONNX model.
        options: checked by `engines.tensorrt.options.check_build_options`; ``sms`` filled in.
        timing_cache: file of kernel timings to start from and to add to.
        report: told of the build in thousandths.

    Raises:
        EngineError: TensorRT refuses the graph or fails; with its own words and the remedy.
        BuildMemoryError: it ran out of memory.
    """
    try:
        return _Attempt(api, onnx_bytes, options, timing_cache, report, strongly_typed=True).run()
    except BuildMemoryError:
        raise
    except EngineError as error:
        if not api.has("weak_typing"):
            raise
        refusal = str(error)  # the exception itself would keep the first network in memory
    try:
        weak = _Attempt(api, onnx_bytes, options, timing_cache, report, strongly_typed=False).run()
    except BuildMemoryError:
        raise
    except EngineError:
        raise EngineError(refusal) from None
    note = f"built weakly typed, because {api.title} refuses the graph strongly typed: {refusal}"
    return replace(weak, notes=(note, *weak.notes))


class _Attempt:
    """One network, one configuration, one build. TensorRT's objects live as long as this one."""

    def __init__(
        self,
        api: TensorRtApi,
        onnx_bytes: bytes,
        options: TensorRtOptions,
        timing_cache: Path | None,
        report: Callable[[int, int], None],
        *,
        strongly_typed: bool,
    ) -> None:
        self._api = api
        self._trt = api.module
        self._onnx_bytes = onnx_bytes
        self._options = options
        self._timing_file = TimingCacheFile(timing_cache) if timing_cache is not None else None
        self._report = report
        self._strongly_typed = strongly_typed
        self._logger, self._log = make_logger(api)
        self._builder = self._trt.Builder(self._logger)
        flags = 0
        if strongly_typed:
            flags |= 1 << int(self._trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        self._network = self._builder.create_network(flags)
        self._parser = self._trt.OnnxParser(self._network, self._logger)
        self._config = self._builder.create_builder_config()

    def run(self) -> CompiledNetwork:
        self._parse()
        self._configure()
        profiles = self._add_profiles()
        if self._timing_file is not None:
            self._attach_timing_cache(self._timing_file)
        monitor = _make_monitor(self._trt, BuildProgress(self._report))
        self._config.progress_monitor = monitor
        plan = self._builder.build_serialized_network(self._network, self._config)
        if plan is None:
            raise self._failure("cannot build the network")
        written = self._timing_file is not None and self._timing_file.merge(self._merged_timings)
        kernels = "\n".join(self._log.kernels) or None
        warnings = tuple(self._log.warnings)
        return CompiledNetwork(plan, self._strongly_typed, profiles, warnings, written, kernels)

    def _parse(self) -> None:
        if not self._parser.parse(self._onnx_bytes):
            if any(map(_OUT_OF_MEMORY.search, self._log.errors)):
                raise self._failure("cannot parse the model")
            failures = [_parser_failure(self._parser.get_error(i)) for i in range(self._parser.num_errors)]
            raise EngineError(explain_parser_failures(failures, self._onnx_bytes))
        refused = explain_uint8_quantization(self._log.warnings, self._onnx_bytes)
        if refused is not None:
            raise EngineError(refused)

    def _configure(self) -> None:
        trt, config, options = self._trt, self._config, self._options
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # the inspector names layers by it
        if options.workspace_bytes is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
        if options.optimization_level is not None:
            config.builder_optimization_level = options.optimization_level
        if options.version_compatible:
            # A plan with the lean runtime in it carries host code, which loading would have to allow.
            config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
            config.set_flag(trt.BuilderFlag.EXCLUDE_LEAN_RUNTIME)
        if options.hardware_compatibility != "none":
            level = getattr(trt.HardwareCompatibilityLevel, options.hardware_compatibility.upper())
            config.hardware_compatibility_level = level
        if options.tiling != "none":
            config.tiling_optimization_level = getattr(trt.TilingOptimizationLevel, options.tiling.upper())
        if self._api.has("compute_capabilities"):
            config.num_compute_capabilities = len(options.sms)  # first, or setting one is refused
            for index, sm in enumerate(options.sms):
                if not config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), index):
                    raise EngineError(f"{self._api.title} refuses to build for SM {sm}")
        if not self._strongly_typed:
            for flag in _precision_flags(trt, self._network):
                config.set_flag(flag)

    def _add_profiles(self) -> tuple[BatchProfile, ...]:
        inputs = [self._network.get_input(i) for i in range(self._network.num_inputs)]
        shapes = {tensor.name: tuple(tensor.shape) for tensor in inputs}
        for name, shape in shapes.items():
            if -1 in shape[1:]:
                raise EngineError(
                    f"input {name!r} has shape {list(shape)}: only the batch (the first dimension) may be "
                    "free; export the model with a fixed image size"
                )
        free = {name: shape for name, shape in shapes.items() if shape[:1] == (-1,)}
        if not free:
            return ()
        for wanted in self._options.profiles:
            profile = self._builder.create_optimization_profile()
            for name, shape in free.items():
                sizes = (wanted.minimum, wanted.optimum, wanted.maximum)
                profile.set_shape(name, *((size, *shape[1:]) for size in sizes))
            if self._config.add_optimization_profile(profile) < 0:
                raise self._failure(f"refuses the batch profile {sizes}")
        return self._options.profiles

    def _attach_timing_cache(self, file: TimingCacheFile) -> None:
        stored = file.read()
        cache = self._config.create_timing_cache(stored or b"")
        if not (cache and self._config.set_timing_cache(cache, ignore_mismatch=False)):
            file.discard("TensorRT does not accept it")
            cache = self._config.create_timing_cache(b"")
            self._config.set_timing_cache(cache, ignore_mismatch=False)

    def _merged_timings(self, stored: bytes | None) -> bytes:
        """Our timings and whatever another build has stored since ours began."""
        cache = self._config.get_timing_cache()
        if stored:
            other = self._config.create_timing_cache(stored)
            if other:
                cache.combine(other, ignore_mismatch=False)
        return bytes(cache.serialize())

    def _failure(self, what: str) -> EngineError:
        errors = self._log.errors or ["it gives no reason"]
        message = f"{self._api.title} {what}: {' '.join(errors[:_SHOWN_ERRORS])[:1200]}"
        if any(map(_OUT_OF_MEMORY.search, errors)):
            return BuildMemoryError(message)
        hints = (f"; {hint}" for pattern, hint in _HINTS if pattern.search(message))
        return EngineError(message + "".join(hints))


def _parser_failure(error: Any) -> ParserFailure:
    return ParserFailure(
        code=error.code().name,
        description=error.desc(),
        node_index=error.node(),
        node_name=error.node_name(),
        operator=error.node_operator(),
        in_function=bool(error.local_function_stack()),
    )


def _precision_flags(trt: Any, network: Any) -> Sequence[Any]:
    """The flags under which a weakly typed network may use the types its graph spells out."""
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    types = {layer.get_output(i).dtype for layer in layers for i in range(layer.num_outputs)}
    flags = []
    if any(layer.type == trt.LayerType.QUANTIZE for layer in layers):
        flags.append(trt.BuilderFlag.INT8)
    if trt.DataType.HALF in types:
        flags.append(trt.BuilderFlag.FP16)
    if trt.DataType.BF16 in types:
        flags.append(trt.BuilderFlag.BF16)
    return flags


def _make_monitor(trt: Any, progress: BuildProgress) -> Any:
    """An ``IProgressMonitor``. Where nobody reads any more, the process is about to end."""

    def phase_start(self: Any, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        with contextlib.suppress(OSError):
            progress.start(phase_name, parent_phase, num_steps)

    def phase_finish(self: Any, phase_name: str) -> None:
        with contextlib.suppress(OSError):
            progress.finish(phase_name)

    def step_complete(self: Any, phase_name: str, step: int) -> bool:
        try:
            progress.step(phase_name, step)
        except OSError:
            return False  # TensorRT stops building
        return True

    methods = {"phase_start": phase_start, "phase_finish": phase_finish, "step_complete": step_complete}
    return type("Monitor", (trt.IProgressMonitor,), methods)()
