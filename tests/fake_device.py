"""A `Device` in host memory, as asynchronous and as strict as a real one.

Work happens when a stream is synchronized and not before, so that a buffer read or reused too soon shows. Ranges are
checked when the work runs; outside of every allocation it is an illegal address, after which every call fails as on
a real device. The context must be current in the calling thread. ``fail`` makes the next call of a name fail.
The same tests hold it to the behaviour of the real bindings (``test_device_contract.py``).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.tensorrt.cuda_errors import STICKY, cuda_error
from engines.tensorrt.device import DeviceIdentity

Work = Callable[[], None]


class FakeDevice:
    """`engines.tensorrt.device.Device`; ``log`` has the names of the calls in their order."""

    def __init__(self, sm: int = 87) -> None:
        self.identity = DeviceIdentity("Fake GPU", sm, "580.95.05", "13.0")
        self.log: list[str] = []
        self.live = 0
        self.closed = False
        self.ranges: dict[int, tuple[NDArray[np.uint8], bool]] = {}
        self.streams: dict[int, FakeStream] = {}
        self.kernels: dict[str, Callable[..., Work]] = {"add_bytes": self._add_bytes}
        self.clock_ms = 0.0
        self.sticky = 0
        self._fail: tuple[str, int] | None = None
        self._thread = threading.local()

    def fail(self, call: str, code: int) -> None:
        """The next `call` fails with `code`; a sticky one for ever."""
        self._fail = (call, code)

    def depth(self) -> int:
        """How often this thread has entered the context."""
        return getattr(self._thread, "depth", 0)

    def enter(self, call: str) -> None:
        """What every call of a driver begins with."""
        self.log.append(call)
        if self.sticky:
            raise cuda_error(self.sticky, call)
        if self._fail is not None and self._fail[0] == call:
            code = self._fail[1]
            self._fail = None
            self.sticky = code if code in STICKY else 0
            raise cuda_error(code, call)
        if self.depth() == 0:
            raise cuda_error(201, call)

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        if self.sticky:
            raise cuda_error(self.sticky, "cuCtxPushCurrent")
        self._thread.depth = self.depth() + 1
        try:
            yield
        finally:
            self._thread.depth -= 1

    def _memory(self, n_bytes: int, device: bool, call: str) -> NDArray[np.uint8]:
        self.enter(call)
        if n_bytes > 1 << 40:
            raise cuda_error(2, call)
        if n_bytes <= 0:
            raise cuda_error(1, call)
        padded = np.full(n_bytes + 256, 0xA5, np.uint8)
        start = -padded.ctypes.data % 256
        array = padded[start : start + n_bytes]
        self.ranges[array.ctypes.data] = (array, device)
        self.live += 1
        return array

    def release(self, array: NDArray[np.uint8], call: str) -> None:
        self.enter(call)
        del self.ranges[array.ctypes.data]
        array[:] = 0x5A  # whoever still reads it sees rubbish
        self.live -= 1

    def view(self, address: int, n_bytes: int, device: bool = True) -> NDArray[np.uint8]:
        """The bytes at `address`, which must lie in one allocation of the kind."""
        for start, (array, on_device) in list(self.ranges.items()):
            if on_device == device and start <= address and address + n_bytes <= start + array.size:
                return array[address - start : address - start + n_bytes]
        self.sticky = 700
        raise cuda_error(700, "the device")

    def allocate(self, n_bytes: int) -> FakeDeviceMemory:
        return FakeDeviceMemory(self, self._memory(n_bytes, True, "cuMemAlloc"))

    def allocate_pinned(self, n_bytes: int) -> FakePinnedMemory:
        return FakePinnedMemory(self, self._memory(n_bytes, False, "cuMemHostAlloc"))

    def create_stream(self) -> FakeStream:
        self.enter("cuStreamCreate")
        stream = FakeStream(self)
        self.streams[stream.handle] = stream
        self.live += 1
        return stream

    def create_event(self) -> FakeEvent:
        self.enter("cuEventCreate")
        self.live += 1
        return FakeEvent(self)

    def _pinned(self, array: NDArray[Any], call: str) -> NDArray[np.uint8]:
        address = array.ctypes.data
        for start, (memory, on_device) in list(self.ranges.items()):
            if not on_device and start <= address and address + array.nbytes <= start + memory.size:
                return memory[address - start : address - start + array.nbytes]
        raise cuda_error(1, f"{call} of memory that is not page-locked")

    def copy_to_device(self, address: int, source: NDArray[Any], stream: FakeStream) -> None:
        self.enter("cuMemcpyHtoDAsync")
        pinned = self._pinned(source, "cuMemcpyHtoDAsync")

        def work() -> None:
            self.view(address, pinned.size)[:] = pinned

        stream.enqueue(work)

    def copy_to_host(self, target: NDArray[Any], address: int, stream: FakeStream) -> None:
        self.enter("cuMemcpyDtoHAsync")
        pinned = self._pinned(target, "cuMemcpyDtoHAsync")

        def work() -> None:
            pinned[:] = self.view(address, pinned.size)

        stream.enqueue(work)

    def load_kernel(self, image: bytes, name: str) -> FakeKernel:
        self.enter("cuModuleLoadData")
        if not image.startswith(b"\x7fELF") and b".version" not in image:
            raise cuda_error(200, "cuModuleLoadData")
        if name not in self.kernels:
            raise cuda_error(500, "cuModuleGetFunction")
        return FakeKernel(self, name)

    def _add_bytes(self, arguments: Sequence[Any], grid: Any, block: Any, shared_bytes: int) -> Work:
        to, source, n, add = (int(value) for value in arguments)

        def work() -> None:
            self.view(to, n)[:] = self.view(source, n) + np.uint8(add)

        return work

    def close(self) -> None:
        self.closed = True


class FakeDeviceMemory:
    def __init__(self, device: FakeDevice, array: NDArray[np.uint8]) -> None:
        self._device, self._array = device, array
        self.address, self.n_bytes, self._freed = array.ctypes.data, array.size, False

    def free(self) -> None:
        if not self._freed:
            self._freed = True
            self._device.release(self._array, "cuMemFree")


class FakePinnedMemory:
    def __init__(self, device: FakeDevice, array: NDArray[np.uint8]) -> None:
        self._device, self.array, self._freed = device, array, False

    def free(self) -> None:
        if not self._freed:
            self._freed = True
            self._device.release(self.array, "cuMemFreeHost")


class FakeStream:
    def __init__(self, device: FakeDevice) -> None:
        self._device = device
        self.handle = id(self)
        self.queue: list[Work] = []
        self.tape: list[Work] | None = None
        self._invalidated = False

    def enqueue(self, work: Work) -> None:
        (self.queue if self.tape is None else self.tape).append(work)

    def synchronize(self) -> None:
        self._device.enter("cuStreamSynchronize")
        if self.tape is not None:
            self._invalidated = True
            raise cuda_error(900, "cuStreamSynchronize")
        self.run()

    def run(self) -> None:
        queue, self.queue = self.queue, []
        for work in queue:
            self._device.clock_ms += 1
            work()

    def begin_capture(self) -> None:
        self._device.enter("cuStreamBeginCapture")
        if self.tape is not None:
            raise cuda_error(1, "cuStreamBeginCapture")
        self.tape, self._invalidated = [], False

    def end_capture(self) -> FakeGraph:
        tape, self.tape = self.tape, None
        self._device.enter("cuStreamEndCapture")
        if tape is None:
            raise cuda_error(1, "cuStreamEndCapture")
        if self._invalidated:
            raise cuda_error(901, "cuStreamEndCapture")
        self._device.live += 1
        return FakeGraph(self._device, tape)

    def close(self) -> None:
        self._device.enter("cuStreamDestroy")
        del self._device.streams[self.handle]
        self._device.live -= 1


class FakeGraph:
    def __init__(self, device: FakeDevice, tape: list[Work]) -> None:
        self._device, self._tape, self._closed = device, tape, False

    def launch(self, stream: FakeStream) -> None:
        self._device.enter("cuGraphLaunch")
        if self._closed:
            raise cuda_error(400, "cuGraphLaunch")
        for work in self._tape:
            stream.enqueue(work)

    def close(self) -> None:
        self._device.enter("cuGraphExecDestroy")
        self._closed = True
        self._device.live -= 1


class FakeEvent:
    def __init__(self, device: FakeDevice) -> None:
        self._device, self._stream, self._at_ms = device, None, None

    def record(self, stream: FakeStream) -> None:
        self._device.enter("cuEventRecord")
        self._stream, self._at_ms = stream, None

        def work() -> None:
            self._at_ms = self._device.clock_ms

        stream.enqueue(work)

    def synchronize(self) -> None:
        self._device.enter("cuEventSynchronize")
        if self._at_ms is None and self._stream is not None:
            self._stream.run()

    def elapsed_ms(self, start: FakeEvent) -> float:
        self._device.enter("cuEventElapsedTime")
        if self._at_ms is None or start._at_ms is None:
            raise cuda_error(600, "cuEventElapsedTime")
        return self._at_ms - start._at_ms

    def close(self) -> None:
        self._device.enter("cuEventDestroy")
        self._device.live -= 1


class FakeKernel:
    def __init__(self, device: FakeDevice, name: str) -> None:
        self._device, self._name = device, name

    def launch(
        self, grid: Any, block: Any, shared_bytes: int, arguments: Sequence[Any], stream: FakeStream
    ) -> None:
        self._device.enter("cuLaunchKernel")
        if min(*grid, *block) < 1 or int(np.prod(block)) > 1024:
            raise cuda_error(1, "cuLaunchKernel")
        if shared_bytes > 48 << 10:
            raise cuda_error(701, "cuLaunchKernel")
        assert all(isinstance(argument, (np.uint64, np.int32, np.float32)) for argument in arguments)
        stream.enqueue(self._device.kernels[self._name](list(arguments), grid, block, shared_bytes))
