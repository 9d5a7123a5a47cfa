"""`Device` over pycuda.

pycuda keeps a stack of contexts for each thread beside the driver's own. Its objects remember the context that
was current when they were made, and free themselves only where it can be made current: so everything is
freed explicitly, inside `PycudaDevice.current`.

It raises exceptions that carry CUDA's text and no number; `engines.tensorrt.cuda_errors.number_of` reads them.
It has no stream capture (looked for in 2026.1): `engines.tensorrt.driver_ctypes` has.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import pycuda.driver as driver
from numpy.typing import NDArray

from engines.tensorrt.cuda_errors import cuda_error, number_of
from engines.tensorrt.device import (
    DeviceIdentity,
    Event,
    KernelArgument,
    Stream,
    cuda_version_text,
    driver_version,
)
from engines.tensorrt.driver_ctypes import CtypesGraph, begin_capture, end_capture, pop_context
from pipeline.errors import DeviceFaultError, EngineError

__all__ = ["PycudaDevice"]

_T = TypeVar("_T")
_NON_BLOCKING = 1
"""``CU_STREAM_NON_BLOCKING``, which pycuda has no name for."""


def _guarded(call: Callable[[], _T], about: str) -> _T:
    """What `call` returns; pycuda's exceptions become ours."""
    try:
        return call()
    except driver.Error as error:
        number = number_of(str(error))
        if number is None:
            raise EngineError(f"CUDA failed in {about}: {error}") from error
        raise cuda_error(number, about) from error


class PycudaDevice:
    """`engines.tensorrt.device.Device` over ``pycuda.driver``."""

    def __init__(self, ordinal: int) -> None:
        """Retain the primary context of GPU `ordinal`.

        Raises:
            UnsupportedError: no driver, or no such GPU.
        """
        _guarded(driver.init, "cuInit")
        device = _guarded(lambda: driver.Device(ordinal), f"cuDeviceGet(GPU {ordinal})")
        self._context: Any = _guarded(device.retain_primary_context, "cuDevicePrimaryCtxRetain")
        self._kernels: list[_Kernel] = []
        self._fault: DeviceFaultError | None = None
        major, minor = device.compute_capability()
        self._identity = DeviceIdentity(
            name=device.name(),
            sm=10 * major + minor,
            driver=driver_version(),
            cuda=cuda_version_text(driver.get_driver_version()),
        )

    @property
    def identity(self) -> DeviceIdentity:
        """Which GPU this is."""
        return self._identity

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """Push the context in this thread, and pop it at the end."""
        if self._fault is not None:
            raise DeviceFaultError(str(self._fault))
        _guarded(self._context.push, "cuCtxPushCurrent")
        try:
            yield
        finally:
            try:
                _guarded(driver.Context.pop, "cuCtxPopCurrent")
            except DeviceFaultError as fault:  # the call that found the context dead has raised it
                self._fault = fault
                self._forget()

    def _forget(self) -> None:
        """Take the dead context off pycuda's stack of this thread: where a thread ends with one on it, pycuda aborts the
        process, and its exit code is lost."""
        with contextlib.suppress(driver.Error):  # another thread has detached it
            self._context.detach()
        with contextlib.suppress(driver.Error):
            driver.Event()  # needs a context, looks for one, and drops those that are detached

    def allocate(self, n_bytes: int) -> _DeviceMemory:
        """Device memory."""
        return _DeviceMemory(n_bytes)

    def allocate_pinned(self, n_bytes: int) -> _PinnedMemory:
        """Page-locked host memory."""
        return _PinnedMemory(n_bytes)

    def create_stream(self) -> _Stream:
        """A non-blocking stream."""
        return _Stream()

    def create_event(self) -> _Event:
        """An event with timing."""
        return _Event()

    def copy_to_device(self, address: int, source: NDArray[Any], stream: Stream) -> None:
        """Enqueue ``cuMemcpyHtoDAsync``."""
        assert isinstance(stream, _Stream)
        _guarded(
            lambda: driver.memcpy_htod_async(address, source, stream.stream),
            f"cuMemcpyHtoDAsync({source.nbytes} bytes)",
        )

    def copy_to_host(self, target: NDArray[Any], address: int, stream: Stream) -> None:
        """Enqueue ``cuMemcpyDtoHAsync``."""
        assert isinstance(stream, _Stream)
        _guarded(
            lambda: driver.memcpy_dtoh_async(target, address, stream.stream),
            f"cuMemcpyDtoHAsync({target.nbytes} bytes)",
        )

    def load_kernel(self, image: bytes, name: str) -> _Kernel:
        """Load `image` and find `name` in it."""
        module = _guarded(lambda: driver.module_from_buffer(image + b"\0"), f"cuModuleLoadData({name})")
        kernel = _Kernel(_guarded(lambda: module.get_function(name), f"cuModuleGetFunction({name})"))
        self._kernels.append(kernel)  # a function keeps its module loaded
        return kernel

    def close(self) -> None:
        """Unload the kernels and release the primary context."""
        context, self._context = self._context, None
        if context is None or self._fault is not None:
            return
        with contextlib.suppress(DeviceFaultError):  # a dead context goes with its process
            # Detached while current, since pycuda silently keeps a context that another thread than its maker
            # detaches. Releasing a primary context does not take it off the driver's stack, and pycuda forgets
            # that it is there.
            _guarded(context.push, "cuCtxPushCurrent")
            while self._kernels:
                self._kernels.pop().unload()
            _guarded(context.detach, "cuDevicePrimaryCtxRelease")
            pop_context()


class _DeviceMemory:
    def __init__(self, n_bytes: int) -> None:
        self.n_bytes = n_bytes
        self._memory: Any = _guarded(lambda: driver.mem_alloc(n_bytes), f"cuMemAlloc({n_bytes} bytes)")
        self.address = int(self._memory)

    def free(self) -> None:
        memory, self._memory = self._memory, None
        if memory is not None:
            _guarded(memory.free, "cuMemFree")


class _PinnedMemory:
    def __init__(self, n_bytes: int) -> None:
        self.array: NDArray[np.uint8] = _guarded(
            lambda: driver.pagelocked_empty(n_bytes, np.uint8), f"cuMemHostAlloc({n_bytes} bytes)"
        )
        self._memory: Any = self.array.base

    def free(self) -> None:
        memory, self._memory = self._memory, None
        if memory is not None:
            _guarded(memory.free, "cuMemFreeHost")


class _Stream:
    def __init__(self) -> None:
        self.stream: Any = _guarded(lambda: driver.Stream(_NON_BLOCKING), "cuStreamCreate")
        self.handle = int(self.stream.handle)

    def synchronize(self) -> None:
        _guarded(self.stream.synchronize, "cuStreamSynchronize")

    def begin_capture(self) -> None:
        begin_capture(self.handle)

    def end_capture(self) -> CtypesGraph:
        return end_capture(self.handle)

    def close(self) -> None:
        self.stream = None  # pycuda destroys it with the object; the context is current


class _Event:
    def __init__(self) -> None:
        self._event: Any = _guarded(driver.Event, "cuEventCreate")

    def record(self, stream: Stream) -> None:
        assert isinstance(stream, _Stream)
        _guarded(lambda: self._event.record(stream.stream), "cuEventRecord")

    def synchronize(self) -> None:
        _guarded(self._event.synchronize, "cuEventSynchronize")

    def elapsed_ms(self, start: Event) -> float:
        assert isinstance(start, _Event)
        return float(_guarded(lambda: self._event.time_since(start._event), "cuEventElapsedTime"))

    def close(self) -> None:
        self._event = None


class _Kernel:
    def __init__(self, function: Any) -> None:
        self._function: Any = function

    def unload(self) -> None:
        self._function = None

    def launch(
        self,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        shared_bytes: int,
        arguments: Sequence[KernelArgument],
        stream: Stream,
    ) -> None:
        assert isinstance(stream, _Stream)
        _guarded(
            lambda: self._function(
                *arguments, grid=grid, block=block, shared=shared_bytes, stream=stream.stream
            ),
            f"cuLaunchKernel(grid {grid}, block {block}, {shared_bytes} bytes shared)",
        )
