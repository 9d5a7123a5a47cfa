"""The GPU, as little of it as an engine needs: memory, streams, copies, events, graphs, kernels.

`Device` is a protocol over the CUDA driver API with two implementations: pycuda, and NVIDIA's
cuda-python where pycuda is absent (pycuda is built from source and needs the toolkit; cuda-python comes as
wheels). Whoever runs an engine sees neither.

Rules that both keep:

* The context is the device's *primary* one, which TensorRT and every library on the CUDA runtime use too.
  It is current only inside ``with device.current():``, which pushes it in the calling thread and pops it again:
  nothing leaks into threads that belong to others, and each thread that infers enters it itself.
* Everything but `Device.identity` wants the context current. What was made is freed by whoever made it, with
  the context current, before `Device.close`.
* Copies are asynchronous and only between device and pinned memory. A buffer must not be touched before the
  stream has been synchronized.
* Failures are the errors of `engines.tensorrt.cuda_errors`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import UnsupportedError

__all__ = [
    "Binding",
    "Device",
    "DeviceIdentity",
    "DeviceMemory",
    "Event",
    "Graph",
    "Kernel",
    "KernelArgument",
    "PinnedMemory",
    "Stream",
    "cuda_version_text",
    "device_identity",
    "driver_version",
    "open_device",
]

Binding = Literal["pycuda", "cuda-python"]
KernelArgument = np.uint64 | np.int32 | np.float32
"""Pointers are ``uint64``; nothing else is passed to a kernel by value."""


@dataclass(frozen=True, slots=True)
class DeviceIdentity:
    """Which GPU, and what drives it."""

    name: str
    sm: int
    """Compute capability without its dot: 87 for 8.7."""
    driver: str
    """Version of the kernel driver, ``580.95.05``; ``unknown`` where the system does not tell."""
    cuda: str
    """The newest CUDA version the driver serves: ``13.0``."""


class DeviceMemory(Protocol):
    """Memory on the device."""

    @property
    def address(self) -> int:
        """Of its first byte; at least 256-byte aligned."""
        ...

    @property
    def n_bytes(self) -> int:
        """Its size."""
        ...

    def free(self) -> None:
        """Give it back; freeing again does nothing."""
        ...


class PinnedMemory(Protocol):
    """Page-locked memory on the host, the only kind the device copies asynchronously."""

    @property
    def array(self) -> NDArray[np.uint8]:
        """Its bytes, 1-d; not to be used after `free`."""
        ...

    def free(self) -> None:
        """Give it back; freeing again does nothing."""
        ...


class Graph(Protocol):
    """Captured work, ready to be launched again and again."""

    def launch(self, stream: Stream) -> None:
        """Enqueue all of it on `stream`."""
        ...

    def close(self) -> None:
        """Destroy it; it must not be running."""
        ...


class Stream(Protocol):
    """A queue of work on the device; does not wait for the legacy default stream."""

    @property
    def handle(self) -> int:
        """``CUstream``, which is also a ``cudaStream_t``."""
        ...

    def synchronize(self) -> None:
        """Wait until everything enqueued is done; other Python threads run meanwhile.

        Errors of asynchronous work appear here.
        """
        ...

    def begin_capture(self) -> None:
        """Record what this thread enqueues from now on instead of running it."""
        ...

    def end_capture(self) -> Graph:
        """The graph recorded since `begin_capture`."""
        ...

    def close(self) -> None:
        """Destroy it."""
        ...


class Event(Protocol):
    """A point in a stream, with its time."""

    def record(self, stream: Stream) -> None:
        """Mark the present end of `stream`."""
        ...

    def synchronize(self) -> None:
        """Wait until the device has reached the mark."""
        ...

    def elapsed_ms(self, start: Event) -> float:
        """Milliseconds from `start` to here, both recorded and reached (resolution about 0.5 µs)."""
        ...

    def close(self) -> None:
        """Destroy it."""
        ...


class Kernel(Protocol):
    """A function on the device."""

    def launch(
        self,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        shared_bytes: int,
        arguments: Sequence[KernelArgument],
        stream: Stream,
    ) -> None:
        """Enqueue it on `stream`; the arguments are copied at once."""
        ...


class Device(Protocol):
    """One GPU. `open_device` makes it; the module's docstring has the rules."""

    @property
    def identity(self) -> DeviceIdentity:
        """Which GPU this is."""
        ...

    def current(self) -> AbstractContextManager[None]:
        """Make the context current in this thread for the length of a ``with`` block; may be nested."""
        ...

    def allocate(self, n_bytes: int) -> DeviceMemory:
        """Device memory, contents undefined. Raises `EngineError` when there is not enough."""
        ...

    def allocate_pinned(self, n_bytes: int) -> PinnedMemory:
        """Page-locked host memory, contents undefined. Raises `EngineError` when there is not enough."""
        ...

    def create_stream(self) -> Stream:
        """A new non-blocking stream."""
        ...

    def create_event(self) -> Event:
        """A new event with timing."""
        ...

    def copy_to_device(self, address: int, source: NDArray[Any], stream: Stream) -> None:
        """Enqueue a copy of the contiguous, pinned `source` to device memory at `address`."""
        ...

    def copy_to_host(self, target: NDArray[Any], address: int, stream: Stream) -> None:
        """Enqueue a copy of device memory at `address` into the contiguous, pinned `target`."""
        ...

    def load_kernel(self, image: bytes, name: str) -> Kernel:
        """The kernel `name` of a cubin or PTX. It stays loaded until `close`."""
        ...

    def close(self) -> None:
        """Let go of the context. Closing again does nothing."""
        ...


def open_device(ordinal: int = 0, binding: Binding | None = None) -> Device:
    """The GPU `ordinal`, through pycuda where it can be imported, else through cuda-python.

    Args:
        ordinal: as CUDA counts, after ``CUDA_VISIBLE_DEVICES``.
        binding: insist on one of the two.

    Raises:
        UnsupportedError: neither can be imported, no driver is installed, or there is no such GPU.
    """
    failures = []
    if binding in (None, "pycuda"):
        try:
            from engines.tensorrt.device_pycuda import PycudaDevice
        except ImportError as error:  # also libcuda.so.1 missing, which pycuda is linked against
            failures.append(f"pycuda: {error}")
        else:
            return PycudaDevice(ordinal)
    if binding in (None, "cuda-python"):
        try:
            from engines.tensorrt.device_cuda_python import CudaPythonDevice
        except ImportError as error:
            failures.append(f"cuda-python: {error}")
        else:
            return CudaPythonDevice(ordinal)
    raise UnsupportedError(
        f"no GPU can be used here: {'; '.join(failures)}. Install the NVIDIA driver, and pycuda "
        "(pip install 'edgefold[jetson]', which needs the CUDA toolkit) or cuda-python "
        "(pip install 'edgefold[tensorrt]')"
    )


def device_identity(ordinal: int = 0) -> DeviceIdentity:
    """Which GPU `ordinal` is; nothing stays allocated on it.

    Raises:
        UnsupportedError: as `open_device`.
    """
    device = open_device(ordinal)
    try:
        return device.identity
    finally:
        device.close()


def driver_version(text: str | None = None) -> str:
    """The kernel driver's version from the text of ``/proc/driver/nvidia/version``, read where not given."""
    if text is None:
        try:
            text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return "unknown"
    match = re.search(r"Kernel Module.*?\s(\d+\.\d+(?:\.\d+)?)\s", text)
    return match[1] if match else "unknown"


def cuda_version_text(number: int) -> str:
    """``13.0`` for 13000, as ``cuDriverGetVersion`` counts."""
    return f"{number // 1000}.{number % 1000 // 10}"
