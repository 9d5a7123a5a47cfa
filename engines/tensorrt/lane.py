"""One execution context with everything a run needs: a stream, buffers, and the CUDA graph of its work.

TensorRT allows one run at a time in an execution context. The buffers are made once, for the largest batch,
so that their addresses never change: a captured graph holds them.

The order of a run: copy the inputs into pinned memory, enqueue their copies to the device, enqueue the engine, enqueue
the copies of the outputs, synchronize. Nothing before that last step waits for the device.

The engine's own work is captured in a CUDA graph at the second run of a shape: TensorRT wants a plain run after a
change of shapes, in which it does what cannot be captured, and a shape that comes once is not worth a capture.
The copies stay outside, so that pixels may also come from a kernel on the device (`Lane.run_filled`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.tensorrt.device import Device, DeviceMemory, Graph, PinnedMemory, Stream
from engines.tensorrt.interface import EngineInterface
from pipeline.artifacts import TensorSpec
from pipeline.errors import EdgefoldError, EngineError

__all__ = ["FillInput", "Lane"]

FillInput = Callable[[int, Stream], None]
"""``fill(address, stream)`` enqueues on `stream` what writes the input tensor at the device address."""


class Lane:
    """Runs one request at a time. Made, used and closed with the device's context current."""

    def __init__(
        self,
        device: Device,
        context: Any,
        interface: EngineInterface,
        last_words: Callable[[], str],
        *,
        capture: bool,
    ) -> None:
        """Make the stream and the buffers.

        Args:
            device: the GPU; its context is current.
            context: an ``IExecutionContext`` nobody else uses.
            interface: of its engine.
            last_words: what TensorRT logged last, for messages.
            capture: replay a CUDA graph; not where the library does so by itself.

        Raises:
            EngineError: there is not enough memory.
        """
        self._device = device
        self._context = context
        self._interface = interface
        self._last_words = last_words
        self._capture = capture
        self._shapes: tuple[tuple[int, ...], ...] | None = None
        self._warm = False
        self._graph: Graph | None = None
        self.graph_refusal: str | None = None
        """Why the engine's work cannot be captured."""
        self._memory: dict[str, DeviceMemory] = {}
        self._pinned: dict[str, PinnedMemory] = {}
        self._stream = device.create_stream()
        try:
            for spec in (*interface.inputs, *interface.outputs):
                n_bytes = _n_bytes(spec, interface.batches[1])
                self._memory[spec.name] = device.allocate(n_bytes)
                self._pinned[spec.name] = device.allocate_pinned(n_bytes)
                if not context.set_tensor_address(spec.name, self._memory[spec.name].address):
                    raise self._refused(f"the address of tensor {spec.name!r}")
            if interface.profile != 0:
                if not context.set_optimization_profile_async(interface.profile, self._stream.handle):
                    raise self._refused(f"optimization profile {interface.profile}")
                self._stream.synchronize()
        except BaseException:
            self.close()
            raise

    @property
    def replays(self) -> bool:
        """Whether a graph has been captured for the present shapes."""
        return self._graph is not None

    def run(self, arrays: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        """Run on `arrays`, contiguous and in the engine's order; the results belong to the caller.

        Raises:
            EngineError: the batch is not the engine's, or TensorRT refuses to run.
            DeviceFaultError: the device failed; the context is dead.
        """
        self._set_shapes(tuple(array.shape for array in arrays))
        with self._settled():
            for spec, array in zip(self._interface.inputs, arrays, strict=True):
                staged = self._staged(spec, array.shape)
                np.copyto(staged, array)
                self._device.copy_to_device(self._memory[spec.name].address, staged, self._stream)
            results = self._finish()
        return results

    def run_filled(self, fills: Sequence[FillInput]) -> list[NDArray[Any]]:
        """Run on a batch of as many images as `fills`, each written into its place of the engine's only input.

        Raises:
            EngineError: the engine takes several inputs, or not a batch of this size; or as `run`.
            DeviceFaultError: the device failed; the context is dead.
        """
        spec = self._only_input()
        self._set_shapes(((len(fills), *(int(size) for size in spec.shape[1:])),))
        with self._settled():
            self._fill(spec, fills)
            results = self._finish()
        return results

    def read_filled(self, fill: FillInput) -> NDArray[Any]:
        """What `fill` writes for one image, (1, …) in the input's dtype; the engine does not run.

        Raises:
            EngineError: the engine takes several inputs.
            DeviceFaultError: the device failed; the context is dead.
        """
        spec = self._only_input()
        with self._settled():
            self._fill(spec, [fill])
            staged = self._staged(spec, (1, *(int(size) for size in spec.shape[1:])))
            self._device.copy_to_host(staged, self._memory[spec.name].address, self._stream)
            self._stream.synchronize()
        found: NDArray[Any] = staged.copy()
        return found

    def close(self) -> None:
        """Free everything; the execution context goes before the buffers whose addresses it holds."""
        self._drop_graph()
        self._context = None
        for pinned in self._pinned.values():
            pinned.free()
        for memory in self._memory.values():
            memory.free()
        self._pinned.clear()
        self._memory.clear()
        self._stream.close()

    def _only_input(self) -> TensorSpec:
        if len(self._interface.inputs) != 1:
            names = [spec.name for spec in self._interface.inputs]
            raise EngineError(f"the engine takes {names}; only one input can be filled on the device")
        return self._interface.inputs[0]

    def _fill(self, spec: TensorSpec, fills: Sequence[FillInput]) -> None:
        address, image_bytes = self._memory[spec.name].address, _image_bytes(spec)
        for index, fill in enumerate(fills):
            fill(address + index * image_bytes, self._stream)

    @contextlib.contextmanager
    def _settled(self) -> Iterator[None]:
        """Wait, where the block fails, for what it enqueued: that uses buffers of the caller's, which the caller may
        hand to another lane next."""
        try:
            yield
        except BaseException:
            with contextlib.suppress(EdgefoldError):  # the first failure is the better explanation
                self._stream.synchronize()
            raise

    def _finish(self) -> list[NDArray[Any]]:
        self._enqueue()
        results = []
        for spec in self._interface.outputs:
            shape = tuple(int(size) for size in self._context.get_tensor_shape(spec.name))
            staged = self._staged(spec, shape)
            self._device.copy_to_host(staged, self._memory[spec.name].address, self._stream)
            results.append(staged)
        self._stream.synchronize()
        return [staged.copy() for staged in results]

    def _set_shapes(self, shapes: tuple[tuple[int, ...], ...]) -> None:
        if shapes == self._shapes:
            return
        low, high = self._interface.batches
        for spec, shape in zip(self._interface.inputs, shapes, strict=True):
            if not low <= shape[0] <= high:
                raise EngineError(
                    f"input {spec.name!r} has a batch of {shape[0]}, the engine was built for {low} to {high}; "
                    "split the batch, or build the engine for larger ones"
                )
        self._drop_graph()
        self._shapes, self._warm = None, False
        if self._interface.is_dynamic:
            for spec, shape in zip(self._interface.inputs, shapes, strict=True):
                if not self._context.set_input_shape(spec.name, shape):
                    raise self._refused(f"shape {list(shape)} of input {spec.name!r}")
        self._shapes = shapes

    def _enqueue(self) -> None:
        if self._graph is None and self._warm and self._capture and self.graph_refusal is None:
            self._graph = self._captured()
        if self._graph is not None:
            self._graph.launch(self._stream)
        elif not self._context.execute_async_v3(self._stream.handle):
            self._stream.synchronize()  # a fault of the device shows here, and is the better explanation
            raise self._refused("to run")
        self._warm = True

    def _captured(self) -> Graph | None:
        """The graph of a run, or ``None`` and `graph_refusal`."""
        self._stream.begin_capture()
        try:
            accepted = self._context.execute_async_v3(self._stream.handle)
        except BaseException:
            with contextlib.suppress(EngineError):
                self._stream.end_capture().close()
            raise
        try:
            graph = self._stream.end_capture()
        except EngineError as error:
            self.graph_refusal = str(error)
            return None
        if not accepted:
            graph.close()
            self.graph_refusal = f"TensorRT refused to be captured{self._last_words()}"
            return None
        return graph

    def _drop_graph(self) -> None:
        graph, self._graph = self._graph, None
        if graph is not None:
            graph.close()

    def _staged(self, spec: TensorSpec, shape: tuple[int, ...]) -> NDArray[Any]:
        """The pinned memory of a tensor as an array of `shape`."""
        dtype = np.dtype(spec.dtype)
        n_bytes = math.prod(shape) * dtype.itemsize
        return self._pinned[spec.name].array[:n_bytes].view(dtype).reshape(shape)

    def _refused(self, what: str) -> EngineError:
        return EngineError(f"TensorRT refused {what}{self._last_words()}")


def _image_bytes(spec: TensorSpec) -> int:
    return math.prod(int(size) for size in spec.shape[1:]) * np.dtype(spec.dtype).itemsize


def _n_bytes(spec: TensorSpec, largest_batch: int) -> int:
    sizes = [size if isinstance(size, int) else largest_batch for size in spec.shape]
    return math.prod(sizes) * np.dtype(spec.dtype).itemsize
