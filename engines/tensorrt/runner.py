"""A TensorRT or TensorRT-RTX plan, ready to infer.

``n_streams`` execution contexts (`engines.tensorrt.lane`), each with its own stream and buffers, wait in a pool;
`infer` takes one, and so does each thread that serves `submit`. Latency mode has one; throughput mode has
``threads``, or two, so that one request's copies overlap another one's computation.

CUDA graphs: for TensorRT the lanes capture and replay. TensorRT-RTX compiles kernels for a shape in the
background and knows when they can be captured, so there it is told to do it itself
(``IRuntimeConfig.cuda_graph_strategy``), and what it compiled is kept in its runtime cache, in
``EngineOptions.cache_dir``.

``engine_host_code_allowed`` is never set: it lets a plan run code of its own on the host.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import queue
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engines.base import Arrays, CheckedRunner, check_options, reason
from engines.blob_cache import BlobCache, blob_key
from engines.tensorrt.api import TensorRtApi
from engines.tensorrt.device import Device, open_device
from engines.tensorrt.interface import read_interface
from engines.tensorrt.lane import FillInput, Lane
from pipeline.artifacts import EngineOptions, Fingerprint
from pipeline.contracts import Outputs
from pipeline.errors import DeviceFaultError, EngineError

__all__ = ["TensorRtRunner"]

_log = logging.getLogger(__name__)
_THROUGHPUT_STREAMS = 2
_N_LAST_WORDS = 3


class TensorRtRunner(CheckedRunner):
    """`pipeline.contracts.Runner` over a plan."""

    def __init__(
        self,
        plan: bytes,
        api: TensorRtApi,
        options: EngineOptions,
        *,
        path: Path = Path("of these bytes"),
        device: Device | None = None,
    ) -> None:
        """Deserialize the plan and make everything a run needs, so that what is missing shows now.

        The plan must be known to be what was built here or for here: deserializing a plan of another flavour has
        ended the process.

        Args:
            plan: the plan; not needed any more afterwards.
            api: the flavour that built it.
            options: ``batch`` fixes the batch; ``streams``, or else in throughput mode ``threads``, is the number of streams;
                ``cache_dir`` keeps TensorRT-RTX's compiled kernels.
            path: where the plan is from, for messages.
            device: the GPU; opened, and closed with the runner, where not given.

        Raises:
            UsageError: a count in `options` is below one.
            UnsupportedError: no GPU can be used here.
            EngineError: the plan cannot be deserialized here, has an interface that is not served, or memory is short.
        """
        check_options(options)
        by_mode = 1 if options.mode == "latency" else options.threads or _THROUGHPUT_STREAMS
        n_streams = options.streams or by_mode
        self._owns_device = device is None
        self._device = open_device() if device is None else device
        self._loaded: _LoadedPlan | None = None
        try:
            with self._device.current():
                self._loaded = _LoadedPlan(plan, api, options, path, self._device, n_streams)
        except BaseException:
            self._close_device()
            raise
        interface = self._loaded.interface
        super().__init__(
            api.flavour,
            interface.inputs,
            interface.outputs,
            n_streams=n_streams,
            n_waiters=n_streams,
            n_checked_outputs=len(interface.outputs),
        )
        # The lane used last comes first: its graph is the likeliest to fit.
        self._idle: queue.LifoQueue[Lane] = queue.LifoQueue()
        for lane in self._loaded.lanes:
            self._idle.put(lane)

    @property
    def cuda_graphs(self) -> str:
        """Whether runs replay a CUDA graph, in words: for reports."""
        loaded = self._loaded
        if loaded is None:
            return "closed"
        if not loaded.captures:
            return "left to TensorRT-RTX"
        refusal = next((lane.graph_refusal for lane in loaded.lanes if lane.graph_refusal), None)
        if refusal is not None:
            return f"not used: {refusal}"
        return "replayed" if any(lane.replays for lane in loaded.lanes) else "captured at the second run"

    def infer_filled(self, fill: FillInput) -> Outputs:
        """Run once on an image that a kernel writes straight into the engine's input, and wait.

        Args:
            fill: e.g. `engines.tensorrt.preprocess.CudaPreprocessor.enqueue` with its frame; called once,
                with the context current, and must not wait for the device.

        Raises:
            EngineError: the engine has several inputs or takes no batch of one; or as `infer`.
        """
        with self._infer_lock:
            self._refuse_if_closed()
            return self._completed(lambda: self._with_lane(lambda lane: lane.run_filled(fill)))

    def _infer(self, arrays: Arrays) -> Arrays:
        return self._with_lane(lambda lane: lane.run(arrays))

    def _start(self, arrays: Arrays) -> Callable[[], Arrays]:
        return lambda: self._infer(arrays)

    def _with_lane(self, run: Callable[[Lane], Arrays]) -> Arrays:
        lane = self._idle.get()
        try:
            with self._device.current():
                return run(lane)
        finally:
            self._idle.put(lane)

    def _release(self) -> None:
        loaded, self._loaded = self._loaded, None
        self._idle = queue.LifoQueue()
        try:
            if loaded is not None:
                with contextlib.suppress(DeviceFaultError), self._device.current():
                    loaded.close()
        finally:
            self._close_device()

    def _close_device(self) -> None:
        if self._owns_device:
            self._device.close()


class _LoadedPlan:
    """The engine and its lanes, in the order of their lives; made and closed with the context current."""

    def __init__(
        self,
        plan: bytes,
        api: TensorRtApi,
        options: EngineOptions,
        path: Path,
        device: Device,
        n_streams: int,
    ) -> None:
        self._api = api
        self.captures = not api.has("runtime_cache")
        self.lanes: list[Lane] = []
        self._last_words, self._logger = _make_logger(api)
        self._runtime: Any = api.module.Runtime(self._logger)
        self._engine: Any = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise EngineError(
                f"plan {path} cannot be deserialized by {api.title} on {device.identity.name}{self._words()}; "
                "plans fit the version and the GPU they were built for: build it again with edgefold finish"
            )
        self.interface = read_interface(self._engine, api.module, path, options.batch)
        self._cache: Any = None
        self._blob: bytes | None = None
        self._store, self._key = _kernel_store(plan, api, options, device)
        try:
            for _ in range(n_streams):
                context = self._execution_context()
                if context is None:
                    raise EngineError(
                        f"no execution context for plan {path}{self._words()}; free GPU memory, or use a smaller "
                        "batch or fewer streams"
                    )
                self.lanes.append(Lane(device, context, self.interface, self._words, capture=self.captures))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Contexts and their buffers first, then the engine, the runtime, and the logger they all used."""
        self._save_kernels()
        while self.lanes:
            self.lanes.pop().close()
        self._cache = None
        self._engine = None
        self._runtime = None
        self._logger = None

    def _words(self) -> str:
        """What TensorRT said last, to be put behind a message."""
        return f": {' '.join(self._last_words)}" if self._last_words else ""

    def _execution_context(self) -> Any:
        if not self._api.has("runtime_cache"):
            return self._engine.create_execution_context()
        config = self._engine.create_runtime_config()
        config.cuda_graph_strategy = self._api.module.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        if self._cache is None:  # one for all the contexts; a configuration each
            self._cache = config.create_runtime_cache()
            self._blob = None if self._store is None else self._store.get(self._key)
            if self._blob is not None and not self._cache.deserialize(self._blob):
                self._blob = None  # of another driver, say: TensorRT-RTX compiles again
        config.set_runtime_cache(self._cache)
        return self._engine.create_execution_context(config)

    def _save_kernels(self) -> None:
        if self._store is None or self._cache is None:
            return
        blob = bytes(self._cache.serialize())
        if blob != self._blob:
            self._store.put(self._key, blob)


def _kernel_store(
    plan: bytes, api: TensorRtApi, options: EngineOptions, device: Device
) -> tuple[BlobCache | None, str]:
    if options.cache_dir is None or not api.has("runtime_cache"):
        return None, ""
    identity = device.identity
    fingerprint = Fingerprint(
        api.flavour, api.version_text, identity.name, (f"sm_{identity.sm}", identity.driver, identity.cuda)
    )
    return BlobCache(options.cache_dir), blob_key(hashlib.sha256(plan).hexdigest(), fingerprint, {})


def _make_logger(api: TensorRtApi) -> tuple[deque[str], Any]:
    """TensorRT's last errors and warnings, and the logger that collects them."""
    trt = api.module
    words: deque[str] = deque(maxlen=_N_LAST_WORDS)
    severe = (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR)

    def collect(self: Any, severity: Any, message: str) -> None:
        if severity in severe:
            words.append(reason(Exception(message)))
        if severity in (*severe, trt.ILogger.WARNING):
            _log.debug("%s: %s", api.title, message)

    # The base class is only known at run time.
    return words, type("Collector", (trt.ILogger,), {"log": collect})()
