"""Preprocessing on the GPU: from a camera's frame into the engine's input buffer, in one kernel.

::

    with CudaPreprocessor(spec, (1080, 1920), "BGR", device=device, color="RGB") as preprocess:
        outputs = runner.infer_filled(preprocess.from_host(frame.image))

A frame that is on the device already (a decoder's, NV12 on a Jetson) is named by a `DeviceFrame`, with its
pitches, and is not copied: ``runner.infer_filled(lambda address, stream: preprocess.enqueue(frame, address,
stream))``. The runner and the preprocessor must be given the same device.

The kernel is compiled for the device when the preprocessor is made, which takes about a second the first time.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from importlib import resources
from types import TracebackType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self

from engines.tensorrt.device import Device, DeviceMemory, Kernel, PinnedMemory, Stream
from engines.tensorrt.lane import FillInput
from engines.tensorrt.nvrtc import CompiledKernels, compile_kernels
from engines.tensorrt.preprocess_plan import CameraFormat, bytes_per_pixel, make_plan
from pipeline.artifacts import PreprocessSpec, YuvMatrix
from pipeline.errors import DataError

__all__ = ["CudaPreprocessor", "DeviceFrame", "LoadedKernels", "preprocess_kernels"]

_SOURCE = "preprocess.cu"


@dataclass(frozen=True, slots=True)
class DeviceFrame:
    """Where a frame lies in device memory. A pitch is the bytes from one row to the next."""

    address: int
    """Of the first pixel, or for NV12 of the luma."""
    pitch: int
    chroma_address: int = 0
    """NV12: of the plane with U and V in turns."""
    chroma_pitch: int = 0


@functools.cache
def preprocess_kernels(sm: int) -> CompiledKernels:
    """The kernels compiled for compute capability `sm`; kept for the process.

    Raises:
        UnsupportedError: there is no NVRTC here, or it does not know `sm`.
    """
    source = resources.files("engines.tensorrt").joinpath(_SOURCE).read_text(encoding="utf-8")
    return compile_kernels(source, _SOURCE, sm)


class LoadedKernels:
    """The kernels on one device, each loaded once however many preprocessors use it: a module stays until the device
    is closed."""

    def __init__(self, device: Device) -> None:
        """Load nothing yet."""
        self._device = device
        self._loaded: dict[str, Kernel] = {}

    def get(self, name: str) -> Kernel:
        """The kernel `name`; the device's context is current.

        Raises:
            UnsupportedError: NVRTC is missing or does not know this GPU.
            EngineError: the device refuses the kernel.
        """
        if name not in self._loaded:
            image = preprocess_kernels(self._device.identity.sm).cubin
            self._loaded[name] = self._device.load_kernel(image, name)
        return self._loaded[name]


class CudaPreprocessor:
    """Turns frames of one size and format into network inputs. One frame at a time."""

    def __init__(
        self,
        spec: PreprocessSpec,
        frame_hw: tuple[int, int],
        pixel_format: CameraFormat,
        *,
        device: Device,
        color: Literal["RGB", "BGR"],
        folded: bool = True,
        yuv: YuvMatrix = "bt601",
        kernels: LoadedKernels | None = None,
    ) -> None:
        """Compile the kernel and put its plan on the device.

        Args:
            spec: the preprocessing, as on the CPU.
            frame_hw: height and width of the frames.
            pixel_format: of the frames.
            device: the GPU of the engine.
            color: the channel order that the graph takes (``ModelArtifact.input_color``).
            folded: the graph takes uint8 NHWC pixels (``ModelArtifact.preprocess_folded``); else the kernel also
                normalizes, to float32 in ``spec.layout``, and `color` must be ``spec.color``.
            yuv: the matrix of NV12 frames, limited range.
            kernels: of `device`, to share them among preprocessors.

        Raises:
            DataError: a format or size that cannot be, or a spec that does not fit the frame.
            UnsupportedError: NVRTC is missing or does not know this GPU.
            EngineError: memory is short.
        """
        if not folded and color != spec.color:
            raise DataError(
                f"a graph without folded preprocessing takes {spec.color}, its network's order, not {color}"
            )
        self._plan = make_plan(spec, frame_hw, pixel_format, color=color, folded=folded, yuv=yuv)
        self._device = device
        self._frame_hw = frame_hw
        self._format = pixel_format
        self._closed = False
        self._memory: DeviceMemory | None = None
        self._frame: tuple[PinnedMemory, DeviceMemory] | None = None
        with device.current():
            self._kernel = (kernels or LoadedKernels(device)).get(self._plan.kernel)
            self._memory = self._uploaded(self._plan.words)

    @property
    def output_bytes(self) -> int:
        """How much `enqueue` writes."""
        return self._plan.output_bytes

    def enqueue(self, frame: DeviceFrame, output_address: int, stream: Stream) -> None:
        """Enqueue the kernel; the device's context is current.

        Args:
            frame: in device memory until the stream has passed; its size and format are the preprocessor's.
            output_address: of the engine's input tensor, `output_bytes` long.
            stream: the engine's.

        Raises:
            DataError: a pitch shorter than a row, or NV12 without its chroma plane.
        """
        self._check(frame)
        self._launch(frame, output_address, stream)

    def _launch(self, frame: DeviceFrame, output_address: int, stream: Stream) -> None:
        assert self._memory is not None
        arguments = [
            np.uint64(self._memory.address),
            np.uint64(frame.address),
            np.int32(frame.pitch),
            np.uint64(frame.chroma_address),
            np.int32(frame.chroma_pitch),
            np.uint64(output_address),
        ]
        plan = self._plan
        self._kernel.launch(plan.grid, plan.block, plan.shared_bytes, arguments, stream)

    def from_host(self, image: NDArray[np.uint8]) -> FillInput:
        """What fills an engine's input from a frame in host memory, for `TensorRtRunner.infer_filled`.

        What is needed of the frame is copied into pinned memory now; the result must have been used, and its run be over, before
        the next call.

        Args:
            image: uint8, H×W×C of the preprocessor's size and format; for NV12 (3·H/2)×W, as OpenCV has it.

        Raises:
            DataError: another shape or dtype.
        """
        self.check(image)
        pinned, memory = self._frame_buffers(self.staged_bytes)
        return self.staged(image, pinned, memory)

    def staged(self, image: NDArray[np.uint8], pinned: PinnedMemory, memory: DeviceMemory) -> FillInput:
        """As `from_host`, through buffers of the caller's, each of `staged_bytes` or more.

        Only what the kernel reads is copied: of a full HD frame and a square crop less than half.

        Args:
            image: copied into `pinned` now; checked by `check`.
            pinned: kept until the run of the result is over.
            memory: where the frame lies for the kernel. Fills that run on one stream may share it.
        """
        window, source = self._plan.window, pinned.array[: self.staged_bytes]
        pitch = window.width * bytes_per_pixel(self._format)
        columns = slice(window.left, window.left + window.width)
        parts = [(window.top, window.height)]
        if self._format == "NV12":
            # Below, a row of chroma for every two of luma, its pairs as wide as two pixels.
            parts.append((self._frame_hw[0] + window.top // 2, window.height // 2))
        begin = 0
        for top, n_rows in parts:
            view = image[top : top + n_rows, columns]
            np.copyto(source[begin : begin + n_rows * pitch].reshape(view.shape), view)
            begin += n_rows * pitch
        # Where the frame would begin of which the window has been copied; nothing is read there.
        skipped = window.left * bytes_per_pixel(self._format)
        frame = DeviceFrame(
            memory.address - window.top * pitch - skipped,
            pitch,
            memory.address + window.height * pitch - window.top // 2 * pitch - skipped,
            pitch,
        )

        def fill(address: int, stream: Stream) -> None:
            self._device.copy_to_device(memory.address, source, stream)
            self._launch(frame, address, stream)

        return fill

    @property
    def staged_bytes(self) -> int:
        """Of what the kernel reads of a frame, row after row."""
        window = self._plan.window
        n_rows = window.height * 3 // 2 if self._format == "NV12" else window.height
        return n_rows * window.width * bytes_per_pixel(self._format)

    def check(self, image: NDArray[np.uint8]) -> None:
        """Refuse what is not a frame of the preprocessor's size and format.

        Raises:
            DataError: another shape or dtype.
        """
        expected = self._image_shape()
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.shape != expected:
            found = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
            raise DataError(
                f"a {self._format} frame is {found}, the preprocessor was made for uint8 {expected}; make another one "
                "when the camera changes its size"
            )

    def close(self) -> None:
        """Free the plan and the frame's buffers. Closing again does nothing."""
        if self._closed:
            return
        self._closed = True
        with self._device.current():
            for part in (self._memory, *(self._frame or ())):
                if part is not None:
                    part.free()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _image_shape(self) -> tuple[int, ...]:
        height, width = self._frame_hw
        if self._format == "NV12":
            return height * 3 // 2, width
        n_bytes = bytes_per_pixel(self._format)
        return (height, width) if n_bytes == 1 else (height, width, n_bytes)

    def _check(self, frame: DeviceFrame) -> None:
        row_bytes = self._frame_hw[1] * bytes_per_pixel(self._format)
        if frame.pitch < row_bytes:
            raise DataError(
                f"a {self._format} frame has a pitch of {frame.pitch} bytes, a row takes {row_bytes}"
            )
        if self._format == "NV12" and (not frame.chroma_address or frame.chroma_pitch < row_bytes):
            raise DataError(
                f"an NV12 frame's chroma is at {frame.chroma_address:#x} with a pitch of {frame.chroma_pitch} bytes; "
                f"its address and a pitch of at least {row_bytes} are needed"
            )

    def _uploaded(self, words: NDArray[Any]) -> DeviceMemory:
        """`words` in device memory; waits for the copy."""
        with contextlib.ExitStack() as made:
            stream = self._device.create_stream()
            made.callback(stream.close)
            pinned = self._device.allocate_pinned(words.nbytes)
            made.callback(pinned.free)
            memory = self._device.allocate(words.nbytes)
            with contextlib.ExitStack() as on_failure:
                on_failure.callback(memory.free)
                pinned.array[:] = words.view(np.uint8)
                self._device.copy_to_device(memory.address, pinned.array, stream)
                stream.synchronize()
                on_failure.pop_all()
            return memory

    def _frame_buffers(self, n_bytes: int) -> tuple[PinnedMemory, DeviceMemory]:
        """Where a frame from the host is staged, made at the first one."""
        if self._frame is None:
            with self._device.current():
                pinned = self._device.allocate_pinned(n_bytes)
                try:
                    self._frame = pinned, self._device.allocate(n_bytes)
                except BaseException:
                    pinned.free()
                    raise
        return self._frame
