"""A stand-in engine that is a real CUDA kernel, for the runner on a real GPU where there is no TensorRT.

`CudaLibrary` is the ``tensorrt`` module of `fake_tensorrt` with execution contexts that launch `SOURCE`, compiled by
NVRTC, on the stream they are handed. It reaches the driver as TensorRT does: by itself, in the context that is
current, with nothing of a binding but the stream's handle. What TensorRT refuses it refuses too, and asks the driver
whether a stream is capturing.

Its plan is an ONNX file, so that `FakeLibrary` computes the same in host memory: the same tests run there.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx.parser
from fake_device import FakeDevice
from fake_tensorrt import FakeContext, FakeEngine, FakeLibrary
from numpy.typing import NDArray
from onnx import numpy_helper

from engines.tensorrt.device import Device, open_device
from engines.tensorrt.nvrtc import compile_kernels

__all__ = ["N_CLASSES", "CudaLibrary", "engine_plan", "expected_logits", "open_library"]

N_CLASSES = 5
DRIVER_IN_HOST_MEMORY = "EDGEFOLD_TEST_BINDING" in os.environ
"""Set by ``test_device_bindings.py``."""
_NO_ADDRESS = 4096
"""Nothing is ever mapped there."""

# Waits for half of its time before it reads and for the other half before it writes: who overwrites the input or
# reads the output too soon gets a wrong answer. One block an image, so that it occupies a small part of the GPU.
SOURCE = r"""
__device__ unsigned long long now_ns() {
    unsigned long long t;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
    return t;
}

extern "C" __global__ void stand_in_engine(float *logits, unsigned char *echo, const unsigned char *pixels,
                                           int image_bytes, int spin_us) {
    __shared__ int sums[5];
    __shared__ unsigned long long begin;
    if (threadIdx.x == 0) begin = now_ns();
    if (threadIdx.x < 5) sums[threadIdx.x] = 0;
    __syncthreads();
    while (now_ns() < begin + spin_us * 500ull) {}
    __syncthreads();
    const unsigned char *image = pixels + (size_t)blockIdx.x * image_bytes;
    int mine[5] = {0, 0, 0, 0, 0};
    for (int i = threadIdx.x; i < image_bytes; i += blockDim.x)
        for (int k = 0; k < 5; k++) mine[k] += image[i] * ((7 * i + 13 * k) % 31);
    for (int k = 0; k < 5; k++) atomicAdd(&sums[k], mine[k]);
    while (now_ns() < begin + spin_us * 1000ull) {}
    __syncthreads();
    if (threadIdx.x < 5) logits[blockIdx.x * 5 + threadIdx.x] = (float)sums[threadIdx.x];
    if (echo)
        for (int i = threadIdx.x; i < image_bytes; i += blockDim.x)
            echo[(size_t)blockIdx.x * image_bytes + i] = image[i];
}
"""


def engine_plan(hw: tuple[int, int], *, batch: int | str = "batch", echo: bool = True) -> bytes:
    """uint8 NHWC ``pixels`` in, ``logits`` (batch, 5) out, and with `echo` the pixels again."""
    height, width = hw
    pixels = f"uint8[{batch},{height},{width},3]"
    outputs = f"float[{batch},{N_CLASSES}] logits" + (f", {pixels} echo" if echo else "")
    text = (
        f'<ir_version: 9, opset_import: ["" : 18]> g ({pixels} pixels) => ({outputs}) {{ '
        "flat = Flatten(pixels)  real = Cast<to=1>(flat)  logits = MatMul(real, w) "
        f"{'echo = Identity(pixels)' if echo else ''} }}"
    )
    model = onnx.parser.parse_model(text)
    weights = _weights(height * width * 3).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weights, "w"))
    plan: bytes = model.SerializeToString()
    return plan


def expected_logits(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """What the engine makes of `images`: whole numbers, exact in float32 while below 2**24."""
    flat = images.reshape(len(images), -1).astype(np.int64)
    logits: NDArray[np.float32] = (flat @ _weights(flat.shape[1])).astype(np.float32)
    return logits


def _weights(image_bytes: int) -> NDArray[np.int64]:
    weights: NDArray[np.int64] = (7 * np.arange(image_bytes)[:, None] + 13 * np.arange(N_CLASSES)) % 31
    return weights


class CudaLibrary(FakeLibrary):
    """The stand-in on a real device. Made and closed with its context current."""

    def __init__(self, device: Device, **wanted: Any) -> None:
        """Compile and load the kernel; `wanted` as `FakeLibrary` takes it."""
        super().__init__(device, **wanted)
        self.spin_us = 0
        """How long each of the next launches takes; a captured one keeps what it was captured with."""
        self.n_launches = 1
        """Kernels of a run, one after another, as an engine has layers."""
        self.reads_nowhere = False
        """The next launches read an address that is mapped nowhere."""
        self._cuda = ctypes.CDLL("libcuda.so.1")
        self._module, self._kernel = ctypes.c_void_p(), ctypes.c_void_p()
        self._must("cuModuleLoadData", ctypes.byref(self._module), _image(device.identity.sm) + b"\0")
        self._must("cuModuleGetFunction", ctypes.byref(self._kernel), self._module, b"stand_in_engine")

    def close(self) -> None:
        self._must("cuModuleUnload", self._module)

    def in_context(self) -> bool:
        context = ctypes.c_void_p()
        return self._cuda.cuCtxGetCurrent(ctypes.byref(context)) == 0 and bool(context.value)

    def has_stream(self, handle: int) -> bool:
        return handle != 0

    def is_capturing(self, handle: int) -> bool:
        status = ctypes.c_int()
        self._must("cuStreamIsCapturing", ctypes.c_void_p(handle), ctypes.byref(status))
        return status.value == 1

    def fault(self) -> int:
        return 0  # the driver's to say, by what the launch returns

    def make_context(self, engine: FakeEngine, config: Any) -> CudaContext:
        return CudaContext(engine, config)

    def died(self, what: str) -> None:
        self.events.append(f"{what}{'' if self.in_context() else ' outside of the context'}")

    def launch(self, handle: int, n_images: int, image_bytes: int, addresses: dict[str, int]) -> int:
        """Enqueue the kernel; the driver's status."""
        values = [
            ctypes.c_uint64(addresses["logits"]),
            ctypes.c_uint64(addresses.get("echo", 0)),
            ctypes.c_uint64(_NO_ADDRESS if self.reads_nowhere else addresses["pixels"]),
            ctypes.c_int32(image_bytes),
            ctypes.c_int32(self.spin_us),
        ]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        sizes = [ctypes.c_uint(size) for size in (n_images, 1, 1, 256, 1, 1, 0)]
        return int(self._cuda.cuLaunchKernel(self._kernel, *sizes, ctypes.c_void_p(handle), pointers, None))

    def _must(self, name: str, *arguments: Any) -> None:
        status = getattr(self._cuda, name)(*arguments)
        if status:
            raise RuntimeError(f"{name} returned {status}")


@functools.cache
def _image(sm: int) -> bytes:
    if (
        DRIVER_IN_HOST_MEMORY
    ):  # it looks at no more than the first bytes, and NVRTC does not stand its presence
        return b"\x7fELF"
    return compile_kernels(SOURCE, "stand_in_engine.cu", sm).cubin


class CudaContext(FakeContext):
    """An ``IExecutionContext`` whose work is the kernel."""

    library: CudaLibrary

    def enqueue(self, handle: int, shapes: dict[str, tuple[int, ...]]) -> bool:
        n_images, *rest = shapes["pixels"]
        for _ in range(self.library.n_launches):
            status = self.library.launch(handle, n_images, int(np.prod(rest)), self.addresses)
            if status:
                return self._error(f"Error Code 1: Cuda Driver ({status})")
        return True


@contextlib.contextmanager
def open_library(kind: str, **wanted: Any) -> Iterator[FakeLibrary]:
    """The stand-in on ``fake``, a device in host memory, or through the binding ``pycuda`` or ``cuda-python``."""
    if kind == "fake":
        yield FakeLibrary(FakeDevice(), **wanted)
        return
    device = open_device(binding=kind)
    try:
        with device.current():
            library = CudaLibrary(device, **wanted)
        yield library
        with device.current():
            library.close()
    finally:
        device.close()
