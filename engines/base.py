"""What every runner does the same way: checks, bounded submission, closing."""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self

from pipeline.artifacts import EngineArtifact, EngineOptions, Fingerprint, ModelArtifact, TensorSpec
from pipeline.contracts import Outputs
from pipeline.errors import EdgefoldError, EngineError, UsageError

__all__ = [
    "CheckedRunner",
    "available_cpus",
    "check_options",
    "fixed_batch_message",
    "portable_artifact",
    "reason",
]

Arrays = list[NDArray[Any]]


class CheckedRunner(ABC):
    """A `pipeline.contracts.Runner` but for how the engine is called.

    Requests run on ``n_streams`` streams. Twice as many may be submitted, so that a stream always
    finds its next request waiting; `submit` blocks at that bound. The outputs the *model* declares
    are checked for NaN and Inf on every run; tensors exposed besides are not (calibration looks at
    those itself, and they may be hundreds of megabytes).
    """

    def __init__(
        self,
        engine: str,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        *,
        n_streams: int,
        n_waiters: int,
        n_checked_outputs: int,
    ) -> None:
        """Set up the bookkeeping.

        Args:
            engine: name used in messages.
            inputs: what `infer` accepts, in the engine's order.
            outputs: what `infer` returns, in the engine's order.
            n_streams: requests that run at the same time.
            n_waiters: threads that complete submitted requests.
            n_checked_outputs: how many of the first outputs must be finite.
        """
        self._engine = engine
        self._inputs = tuple(inputs)
        self._outputs = tuple(outputs)
        self._n_streams = n_streams
        self._n_checked_outputs = n_checked_outputs
        self._slots = threading.BoundedSemaphore(2 * n_streams)
        self._waiters = ThreadPoolExecutor(n_waiters, thread_name_prefix=f"{engine}-runner")
        self._lifecycle = threading.Lock()
        self._infer_lock = threading.Lock()
        self._closed = False

    @abstractmethod
    def _infer(self, arrays: Arrays) -> Arrays:
        """Run once and wait; `infer` never calls it concurrently."""

    @abstractmethod
    def _start(self, arrays: Arrays) -> Callable[[], Arrays]:
        """Start a run if the engine can by itself; the result waits for it and returns owned arrays."""

    @abstractmethod
    def _release(self) -> None:
        """Let go of the engine's objects; nothing is running any more."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What `infer` accepts."""
        return self._inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What `infer` returns."""
        return self._outputs

    @property
    def reuses_outputs(self) -> bool:
        """Whether the next `infer` overwrites what the last one returned."""
        return False

    @property
    def n_streams(self) -> int:
        """How many submitted requests run at the same time."""
        return self._n_streams

    def infer(self, inputs: Mapping[str, NDArray[Any]]) -> Outputs:
        """Run once and wait.

        Raises:
            EngineError: the inputs are not the declared ones, the engine failed, an output of the
                model holds NaN or Inf, or the runner is closed.
        """
        arrays = self._checked_inputs(inputs)
        with self._infer_lock:
            self._refuse_if_closed()
            return self._completed(lambda: self._infer(arrays))

    def submit(self, inputs: Mapping[str, NDArray[Any]]) -> Future[Outputs]:
        """Start a run; blocks while ``2 * n_streams`` requests are under way.

        Requests start in the order of submission. A request cannot be cancelled. Failures of the run
        are the future's exception.

        Raises:
            EngineError: the inputs are not the declared ones, or the runner is closed.
        """
        arrays = self._checked_inputs(inputs)
        self._slots.acquire()
        future: Future[Outputs] = Future()
        future.set_running_or_notify_cancel()
        try:
            with self._lifecycle:  # nothing may start once `close` has begun to wait
                self._refuse_if_closed()
                wait = self._guarded(lambda: self._start(arrays))
                self._waiters.submit(self._complete, wait, future)
        except BaseException:
            self._slots.release()
            raise
        return future

    def close(self) -> None:
        """Wait for submitted requests, then free the engine. Closing again does nothing."""
        with self._lifecycle:
            if self._closed:
                return
            self._closed = True
        self._waiters.shutdown(wait=True)
        with self._infer_lock:
            self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _complete(self, wait: Callable[[], Arrays], future: Future[Outputs]) -> None:
        try:
            outputs = self._completed(wait)
        except BaseException as error:
            self._slots.release()
            future.set_exception(error)
        else:
            self._slots.release()  # first, so that whoever the result wakes finds the slot free
            future.set_result(outputs)

    def _completed(self, run: Callable[[], Arrays]) -> Outputs:
        arrays = self._guarded(run)
        for spec, array in zip(self._outputs[: self._n_checked_outputs], arrays, strict=False):
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                n_bad = int(array.size - np.count_nonzero(np.isfinite(array)))
                raise EngineError(
                    f"{self._engine} produced NaN or Inf in {n_bad} of {array.size} values of output "
                    f"{spec.name!r}; check the model's weights and the input for NaN"
                )
        return dict(zip((spec.name for spec in self._outputs), arrays, strict=True))

    def _guarded(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except EdgefoldError:
            raise
        except MemoryError as error:
            raise EngineError(f"{self._engine} ran out of memory; use a smaller batch") from error
        except Exception as error:  # engines raise RuntimeError and types of their own
            raise EngineError(f"{self._engine} failed while running: {reason(error)}") from error

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise EngineError(f"this {self._engine} runner is closed; load the engine again")

    def _checked_inputs(self, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        expected = {spec.name for spec in self._inputs}
        if inputs.keys() != expected:
            raise EngineError(f"inputs {sorted(inputs)} given, the engine takes {sorted(expected)}")
        arrays = []
        for spec in self._inputs:
            array = inputs[spec.name]
            if not isinstance(array, np.ndarray):
                raise EngineError(
                    f"input {spec.name!r} is a {type(array).__name__}, the engine takes an array"
                )
            if array.dtype != np.dtype(spec.dtype):
                raise EngineError(
                    f"input {spec.name!r} has dtype {array.dtype}, the engine takes {spec.dtype}"
                )
            fits = len(array.shape) == len(spec.shape) and all(
                size == wanted if isinstance(wanted, int) else size > 0
                for size, wanted in zip(array.shape, spec.shape, strict=True)
            )
            if not fits:
                raise EngineError(
                    f"input {spec.name!r} has shape {list(array.shape)}, "
                    f"the engine takes [{', '.join(map(str, spec.shape))}]"
                )
            # Not left to the outputs: OpenVINO's ReLU turns NaN into 0, and a label comes out.
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise EngineError(f"input {spec.name!r} holds NaN or Inf; check where the pixels come from")
            arrays.append(np.ascontiguousarray(array))
        return arrays


def check_options(options: EngineOptions) -> None:
    """Refuse counts below one.

    Raises:
        UsageError: ``threads``, ``batch`` or ``streams`` is not positive.
    """
    for name, value in (("threads", options.threads), ("batch", options.batch), ("streams", options.streams)):
        if value is not None and value < 1:
            raise UsageError(f"{name} is {value}; it must be at least 1")


def available_cpus() -> int:
    """How many CPUs this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def fixed_batch_message(path: Path, fixed: int, asked: int) -> str:
    """Why a model cannot be compiled for the batch that was asked for."""
    return (
        f"model {path} has a fixed batch of {fixed}, {asked} was asked for; "
        "export it with a free batch dimension"
    )


def portable_artifact(model: ModelArtifact, backend: str, fingerprint: Fingerprint) -> EngineArtifact:
    """The engine of a CPU backend: the ONNX file itself, by reference."""
    return EngineArtifact(
        path=model.path,
        sha256=model.sha256,
        model_sha256=model.sha256,
        backend=backend,
        fingerprint=fingerprint,
        portable=True,
    )


def reason(error: BaseException) -> str:
    """An engine's message on one line, without the engine's own source locations."""
    lines = (line.strip() for line in str(error).splitlines())
    kept = [line for line in lines if line and not line.startswith(("Exception from ", "Check '"))]
    return " ".join(kept)[:600] or type(error).__name__
