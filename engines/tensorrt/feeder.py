"""Camera frames into a plan's input on the device: their crop is copied, and turned into pixels by the kernel.

::

    camera's buffer ─copied at `put`─▶ pinned, one an image ─▶ device, one a batch ─kernel─▶ the engine's input
                                       └──────────── on the stream of the run ───────────┘

`put` leaves the camera's buffer free. A batch's images pass through one frame's place on the device in turn, since
one stream takes them in order; what overlaps is another batch on another stream. So a batch costs pinned memory for each
of its frames and device memory for one.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from engines.tensorrt.device import DeviceMemory, PinnedMemory
from engines.tensorrt.lane import FillInput
from engines.tensorrt.preprocess import CudaPreprocessor, LoadedKernels
from engines.tensorrt.runner import TensorRtRunner
from pipeline.artifacts import Frame, PixelFormat, PreprocessSpec
from pipeline.contracts import Outputs
from pipeline.errors import DataError, EngineError
from pipeline.yuv import planes_to_bgr

__all__ = ["DeviceBatch", "DeviceFeeder"]

_MAX_PREPROCESSORS = 8
"""Plans kept for sizes and formats of frames: cameras of one site have few, and a plan costs some hundred kilobytes."""

_Key = tuple[tuple[int, ...], PixelFormat]


class DeviceFeeder:
    """Prepares frames on the device of one runner, and is closed with it. `put` and `engine_input` may be called from
    any thread."""

    def __init__(
        self,
        runner: TensorRtRunner,
        spec: PreprocessSpec,
        color: Literal["RGB", "BGR"],
        *,
        max_batch: int,
    ) -> None:
        """Load the kernel this network's frames need, so that what is missing shows now.

        Args:
            runner: whose only input takes pixels (uint8 NHWC), or float32 where nothing is folded.
            spec: the preprocessing, as on the CPU.
            color: the channel order that the graph takes.
            max_batch: images a batch has room for.

        Raises:
            UnsupportedError: NVRTC is missing or does not know this GPU.
            EngineError: the device refuses the kernel, or memory is short.
            DataError: the spec cannot be.
        """
        self._runner = runner
        self._spec = spec
        self._color = color
        self._folded = runner.inputs[0].dtype == "uint8"
        self._max_batch = max_batch
        self._kernels = LoadedKernels(runner.device)
        self._preprocessors: OrderedDict[_Key, CudaPreprocessor] = OrderedDict()
        self._batches: list[DeviceBatch] = []
        self._lock = threading.Lock()
        self._closed = False
        # A frame of the network's own size fits every spec; its kernel is the one that all frames use.
        self._preprocessor((*spec.input_hw, 3), "BGR")
        runner.before_release(self._free)

    def new_batch(self) -> DeviceBatch:
        """A batch to be filled again and again; its memory comes with its first frames and goes with the runner."""
        return self._new_batch(self._max_batch)

    def engine_input(self, frame: Frame) -> NDArray[Any]:
        """What `frame` becomes in the engine's input, (1, …), read back from the device: for checks.

        Raises:
            DataError: no frame that can be prepared.
            EngineError: the device failed, or the engine is closed.
        """
        batch = self._new_batch(1)
        try:
            batch.put(0, frame)
            return self._runner.read_filled(batch.fill(0))
        finally:
            with self._lock:
                if batch in self._batches:
                    self._batches.remove(batch)
                    with self._runner.device.current():
                        batch.free()

    def _new_batch(self, n_images: int) -> DeviceBatch:
        with self._lock:
            if self._closed:
                raise EngineError("this engine is closed; load it again")
            batch = DeviceBatch(self._runner, self._stage, n_images)
            self._batches.append(batch)
            return batch

    def _stage(self, slot: _Slot, place: _Place, frame: Frame) -> None:
        """Copy what is needed of `frame` into the buffers of `slot`, for the kernel of its size and format."""
        image, pixel_format = frame.image, frame.pixel_format
        if frame.yuv is not None and pixel_format == "I420":
            # The kernel takes a decoder's NV12 on the device, and no planes from the host.
            image, pixel_format = planes_to_bgr(image, frame.yuv), "BGR"
        if pixel_format == "GRAY" and isinstance(image, np.ndarray) and image.shape[2:] == (1,):
            image = image[:, :, 0]
        shape = image.shape if isinstance(image, np.ndarray) else ()
        if not 2 <= len(shape) <= 3:
            found = f"{image.dtype} {shape}" if isinstance(image, np.ndarray) else type(image).__name__
            raise DataError(f"a {pixel_format} frame is {found}; expected uint8, height×width×channels")
        with self._lock:
            if self._closed:
                raise EngineError("this engine is closed; load it again")
            slot.fill, slot.preprocessor = None, self._preprocessor(shape, pixel_format)
            slot.preprocessor.check(image)
            self._make_room(slot, place, slot.preprocessor.staged_bytes)
        assert slot.pinned is not None
        assert place.memory is not None
        slot.fill = slot.preprocessor.staged(image, slot.pinned, place.memory)

    def _preprocessor(self, shape: tuple[int, ...], pixel_format: PixelFormat) -> CudaPreprocessor:
        key = (shape, pixel_format)
        found = self._preprocessors.get(key)
        if found is None:
            found = CudaPreprocessor(
                self._spec,
                (shape[0], shape[1]),
                pixel_format,
                device=self._runner.device,
                color=self._color,
                folded=self._folded,
                kernels=self._kernels,
            )
            self._preprocessors[key] = found
            self._forget_oldest(found)
        self._preprocessors.move_to_end(key)
        return found

    def _forget_oldest(self, new: CudaPreprocessor) -> None:
        """Keep the latest few, and those whose frames may be under way."""
        used = {id(slot.preprocessor) for batch in self._batches for slot in batch.slots} | {id(new)}
        for key in list(self._preprocessors):
            if len(self._preprocessors) <= _MAX_PREPROCESSORS:
                return
            if id(self._preprocessors[key]) not in used:
                self._preprocessors.pop(key).close()

    def _make_room(self, slot: _Slot, place: _Place, n_bytes: int) -> None:
        """Buffers of at least `n_bytes`. The batch's last run is over, but its other slots hold fills for this run."""
        device = self._runner.device
        if slot.pinned is None or slot.pinned.array.size < n_bytes:
            with device.current():
                if slot.pinned is not None:
                    old, slot.pinned = slot.pinned, None
                    old.free()
                slot.pinned = device.allocate_pinned(n_bytes)
        if place.memory is None or place.memory.n_bytes < n_bytes:
            with device.current():
                if place.memory is not None:
                    place.outgrown.append(place.memory)  # fills of this batch may name it
                    place.memory = None
                place.memory = device.allocate(n_bytes)

    def _free(self) -> None:
        """Called by the runner; the device's context is current."""
        with self._lock:
            self._closed = True
            for batch in self._batches:
                batch.free()
            self._batches.clear()
            while self._preprocessors:
                self._preprocessors.popitem()[1].close()


@dataclass(slots=True)
class _Slot:
    """One image of a batch."""

    pinned: PinnedMemory | None = None
    preprocessor: CudaPreprocessor | None = None
    fill: FillInput | None = None


@dataclass(slots=True)
class _Place:
    """Where a batch's frames lie on the device, one after another."""

    memory: DeviceMemory | None
    outgrown: list[DeviceMemory]


class DeviceBatch:
    """A batch of frames for one runner. One run at a time; to be put into again when its future is done."""

    def __init__(
        self, runner: TensorRtRunner, stage: Callable[[_Slot, _Place, Frame], None], n_images: int
    ) -> None:
        """Made by `DeviceFeeder`."""
        self.slots = [_Slot() for _ in range(n_images)]
        self._runner = runner
        self._stage = stage
        self._place = _Place(None, [])

    def put(self, index: int, frame: Frame) -> None:
        """Copy `frame` to be image `index`; its buffer is not read any more afterwards.

        Raises:
            DataError: no frame that can be prepared.
            EngineError: memory is short, or the engine is closed.
        """
        self._stage(self.slots[index], self._place, frame)

    def fill(self, index: int) -> FillInput:
        """What writes image `index` into the engine's input."""
        fill = self.slots[index].fill
        assert fill is not None, "put comes first"
        return fill

    def submit(self, n_images: int) -> Future[Outputs]:
        """Run the first `n_images`, bounded as `pipeline.contracts.Runner.submit`."""
        return self._runner.submit_filled([self.fill(index) for index in range(n_images)])

    def free(self) -> None:
        """Give the buffers back; the context is current and no run under way."""
        for slot in self.slots:
            slot.fill = slot.preprocessor = None
            if slot.pinned is not None:
                slot.pinned.free()
                slot.pinned = None
        for memory in (*self._place.outgrown, *filter(None, [self._place.memory])):
            memory.free()
        self._place.outgrown.clear()
        self._place.memory = None
