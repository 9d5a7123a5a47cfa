"""`Device` over cuda-python, the driver API as NVIDIA binds it.

The calls used here have the same signatures in cuda-bindings 12.9 and 13.5 (looked at in both);
``cuCtxCreate``, whose signature changed with 13, is avoided by taking the primary context. Every call
returns a tuple whose first element is the ``CUresult``. Importing the module does not need a driver; the first
call looks for it and raises ``RuntimeError`` (12.x) or pathfinder's ``DynamicLibNotFoundError``, which is one.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from cuda.bindings import driver
from numpy.typing import NDArray

from engines.tensorrt.cuda_errors import cuda_error
from engines.tensorrt.device import (
    DeviceIdentity,
    Event,
    KernelArgument,
    Stream,
    cuda_version_text,
    driver_version,
)
from pipeline.errors import DeviceFaultError, UnsupportedError

__all__ = ["CudaPythonDevice"]

_MAJOR = "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR"
_MINOR = "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR"


def _call(function: Any, *arguments: Any, about: str = "") -> Any:
    """Call the driver; its one result, or ``None``. Raises what `cuda_error` makes of a failure."""
    status, *results = function(*arguments)
    if int(status) != 0:
        name = getattr(function, "__name__", str(function))
        raise cuda_error(int(status), f"{name}({about})")
    return results[0] if results else None


class CudaPythonDevice:
    """`engines.tensorrt.device.Device` over ``cuda.bindings.driver``."""

    def __init__(self, ordinal: int) -> None:
        """Retain the primary context of GPU `ordinal`.

        Raises:
            UnsupportedError: no driver, or no such GPU.
        """
        try:
            _call(driver.cuInit, 0)
        except RuntimeError as error:
            raise UnsupportedError(
                f"the CUDA driver cannot be loaded ({str(error).strip()}); install the NVIDIA driver "
                "(on a Jetson it comes with JetPack)"
            ) from error
        self._device = _call(driver.cuDeviceGet, ordinal, about=f"GPU {ordinal}")
        self._context: Any = _call(driver.cuDevicePrimaryCtxRetain, self._device)
        self._modules: list[Any] = []
        major, minor = (
            int(_call(driver.cuDeviceGetAttribute, getattr(driver.CUdevice_attribute, name), self._device))
            for name in (_MAJOR, _MINOR)
        )
        name = _call(driver.cuDeviceGetName, 256, self._device)
        self._identity = DeviceIdentity(
            name=bytes(name).split(b"\0", 1)[0].decode(errors="replace"),
            sm=10 * major + minor,
            driver=driver_version(),
            cuda=cuda_version_text(int(_call(driver.cuDriverGetVersion))),
        )

    @property
    def identity(self) -> DeviceIdentity:
        """Which GPU this is."""
        return self._identity

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """Push the context in this thread, and pop it at the end."""
        _call(driver.cuCtxPushCurrent, self._context)
        try:
            yield
        finally:
            with contextlib.suppress(DeviceFaultError):  # the call that found the context dead has raised it
                _call(driver.cuCtxPopCurrent)

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
        _call(
            driver.cuMemcpyHtoDAsync,
            driver.CUdeviceptr(address),
            source.ctypes.data,
            source.nbytes,
            driver.CUstream(stream.handle),
            about=f"{source.nbytes} bytes",
        )

    def copy_to_host(self, target: NDArray[Any], address: int, stream: Stream) -> None:
        """Enqueue ``cuMemcpyDtoHAsync``."""
        _call(
            driver.cuMemcpyDtoHAsync,
            target.ctypes.data,
            driver.CUdeviceptr(address),
            target.nbytes,
            driver.CUstream(stream.handle),
            about=f"{target.nbytes} bytes",
        )

    def load_kernel(self, image: bytes, name: str) -> _Kernel:
        """Load `image` and find `name` in it."""
        # Text must end in a zero byte; a cubin does not mind one more.
        module = _call(driver.cuModuleLoadData, image + b"\0", about=f"the image of {name}")
        self._modules.append(module)
        return _Kernel(_call(driver.cuModuleGetFunction, module, name.encode(), about=name))

    def close(self) -> None:
        """Unload the kernels and release the primary context."""
        if self._context is None:
            return
        with contextlib.suppress(DeviceFaultError):  # a dead context goes with its process
            with self.current():
                while self._modules:
                    _call(driver.cuModuleUnload, self._modules.pop())
            _call(driver.cuDevicePrimaryCtxRelease, self._device)
        self._context = None


class _DeviceMemory:
    def __init__(self, n_bytes: int) -> None:
        self.n_bytes = n_bytes
        self._pointer: Any = _call(driver.cuMemAlloc, n_bytes, about=f"{n_bytes} bytes")
        self.address = int(self._pointer)

    def free(self) -> None:
        pointer, self._pointer = self._pointer, None
        if pointer is not None:
            _call(driver.cuMemFree, pointer)


class _PinnedMemory:
    def __init__(self, n_bytes: int) -> None:
        self._pointer: Any = _call(driver.cuMemHostAlloc, n_bytes, 0, about=f"{n_bytes} bytes")
        self.array: NDArray[np.uint8] = np.ctypeslib.as_array(
            (ctypes.c_uint8 * n_bytes).from_address(int(self._pointer))
        )

    def free(self) -> None:
        pointer, self._pointer = self._pointer, None
        if pointer is not None:
            _call(driver.cuMemFreeHost, pointer)


class _Stream:
    def __init__(self) -> None:
        flags = int(driver.CUstream_flags.CU_STREAM_NON_BLOCKING)
        self._stream: Any = _call(driver.cuStreamCreate, flags)
        self.handle = int(self._stream)

    def synchronize(self) -> None:
        _call(driver.cuStreamSynchronize, self._stream)

    def begin_capture(self) -> None:
        # Thread-local: what other threads allocate meanwhile does not invalidate this capture.
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        _call(driver.cuStreamBeginCapture, self._stream, mode)

    def end_capture(self) -> _Graph:
        graph = _call(driver.cuStreamEndCapture, self._stream)
        try:
            return _Graph(_call(driver.cuGraphInstantiate, graph, 0))
        finally:
            _call(driver.cuGraphDestroy, graph)

    def close(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            _call(driver.cuStreamDestroy, stream)


class _Graph:
    def __init__(self, executable: Any) -> None:
        self._executable = executable

    def launch(self, stream: Stream) -> None:
        _call(driver.cuGraphLaunch, self._executable, driver.CUstream(stream.handle))

    def close(self) -> None:
        executable, self._executable = self._executable, None
        if executable is not None:
            _call(driver.cuGraphExecDestroy, executable)


class _Event:
    def __init__(self) -> None:
        self._event: Any = _call(driver.cuEventCreate, int(driver.CUevent_flags.CU_EVENT_DEFAULT))

    def record(self, stream: Stream) -> None:
        _call(driver.cuEventRecord, self._event, driver.CUstream(stream.handle))

    def synchronize(self) -> None:
        _call(driver.cuEventSynchronize, self._event)

    def elapsed_ms(self, start: Event) -> float:
        assert isinstance(start, _Event)
        return float(_call(driver.cuEventElapsedTime, start._event, self._event))

    def close(self) -> None:
        event, self._event = self._event, None
        if event is not None:
            _call(driver.cuEventDestroy, event)


class _Kernel:
    def __init__(self, function: Any) -> None:
        self._function = function

    def launch(
        self,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        shared_bytes: int,
        arguments: Sequence[KernelArgument],
        stream: Stream,
    ) -> None:
        values = [np.array(argument) for argument in arguments]
        # `void **kernelParams`: the address of every argument, which the driver copies before it returns.
        pointers = np.array([value.ctypes.data for value in values], dtype=np.uint64)
        _call(
            driver.cuLaunchKernel,
            self._function,
            *grid,
            *block,
            shared_bytes,
            driver.CUstream(stream.handle),
            pointers.ctypes.data,
            0,
            about=f"grid {grid}, block {block}, {shared_bytes} bytes shared",
        )
