"""The part of ``pycuda.driver`` that the device layer uses, over whatever ``libcuda.so.1`` is found.

pycuda is built from source against the CUDA toolkit, which CI does not have. This has the same names, takes
the same argument types, keeps its own stack of contexts, raises the same exceptions with the same
texts and leaves the same context behind on ``detach`` (read from ``src/cpp/cuda.hpp`` and
``src/wrapper/wrap_cudadrv.cpp`` of pycuda 2026.1; the tests were also run with that pycuda itself).
"""

import ctypes
import os
import struct
import sys
import threading

import numpy as np

_cuda = ctypes.CDLL("libcuda.so.1")


class _Stack(threading.local):
    """Of one thread. Where one ends with a context on it, pycuda ends the process."""

    def __init__(self):
        self.contexts = _Contexts()


class _Contexts(list):
    def __del__(self):
        if self:
            print(
                "PyCUDA ERROR: The context stack was not empty upon module cleanup.",
                file=sys.stderr,
                flush=True,
            )
            os.abort()


_stack = _Stack()


class Error(Exception):
    pass


class MemoryError(Error):
    pass


class LogicError(Error):
    pass


class LaunchError(Error):
    pass


class RuntimeError(Error):
    pass


def _call(name, *arguments):
    status = getattr(_cuda, name)(*arguments)
    if status:
        text = ctypes.c_char_p()
        _cuda.cuGetErrorString(status, ctypes.byref(text))
        kind = {2: MemoryError, 701: LaunchError, 702: LaunchError, 719: LaunchError}.get(status)
        if kind is None:
            kind = RuntimeError if status in (100, 209, 301, 600) else Error if status == 999 else LogicError
        raise kind(f"{name} failed: {text.value.decode()}")


def _contexts():
    return _stack.contexts


def init(flags=0):
    _call("cuInit", flags)


def get_driver_version():
    version = ctypes.c_int()
    _call("cuDriverGetVersion", ctypes.byref(version))
    return version.value


class Device:
    def __init__(self, ordinal):
        if not isinstance(ordinal, int):
            raise TypeError("Boost.Python.ArgumentError")
        self._device = ctypes.c_int()
        _call("cuDeviceGet", ctypes.byref(self._device), ordinal)

    def name(self):
        name = ctypes.create_string_buffer(1024)
        _call("cuDeviceGetName", name, 1024, self._device)
        return name.value.decode()

    def compute_capability(self):
        major, minor = ctypes.c_int(), ctypes.c_int()
        _call("cuDeviceComputeCapability", ctypes.byref(major), ctypes.byref(minor), self._device)
        return major.value, minor.value

    def retain_primary_context(self):
        handle = ctypes.c_void_p()
        _call("cuDevicePrimaryCtxRetain", ctypes.byref(handle), self._device)
        return Context(handle, self._device)


class Context:
    def __init__(self, handle, device):
        self._handle, self._device, self._valid = handle, device, True

    def push(self):
        if _contexts():
            _call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))
        _call("cuCtxPushCurrent_v2", self._handle)
        _contexts().append(self)

    @staticmethod
    def pop():
        if not _contexts():
            raise LogicError("context::pop failed: invalid device context - cannot pop non-current context")
        _call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))
        _contexts().pop()
        if _contexts():
            _call("cuCtxPushCurrent_v2", _contexts()[-1]._handle)

    def detach(self):
        if not self._valid:
            raise LogicError(
                "context::detach failed: invalid device context - cannot detach from invalid context"
            )
        # A failure of these is printed, no more.
        if not (_contexts() and _contexts()[-1] is self):
            _cuda.cuCtxPushCurrent_v2(self._handle)
        _cuda.cuDevicePrimaryCtxRelease_v2(self._device)
        self._valid = False
        while _contexts() and not _contexts()[-1]._valid:
            _contexts().pop()


def _need_context():
    while _contexts() and not _contexts()[-1]._valid:
        _contexts().pop()
    if not _contexts():
        raise LogicError(
            "explicit_context_dependent failed: invalid device context - no currently active context?"
        )


class DeviceAllocation:
    def __init__(self, n_bytes):
        _need_context()
        self._address = ctypes.c_uint64()
        _call("cuMemAlloc_v2", ctypes.byref(self._address), ctypes.c_size_t(n_bytes))

    def __int__(self):
        return self._address.value

    def free(self):
        _call("cuMemFree_v2", self._address)


def mem_alloc(n_bytes):
    return DeviceAllocation(n_bytes)


class PagelockedHostAllocation:
    def __init__(self, n_bytes):
        _need_context()
        self._address = ctypes.c_void_p()
        _call("cuMemHostAlloc", ctypes.byref(self._address), ctypes.c_size_t(n_bytes), 0)
        self.__array_interface__ = {
            "data": (self._address.value, False), "shape": (n_bytes,), "typestr": "|u1", "version": 3,
        }  # fmt: skip

    def free(self):
        _call("cuMemFreeHost", self._address)


class _WithBase(np.ndarray):
    base = None


def pagelocked_empty(shape, dtype, order="C", mem_flags=0):
    assert isinstance(shape, int)
    assert dtype is np.uint8
    allocation = PagelockedHostAllocation(shape)
    array = np.asarray(allocation).view(_WithBase)
    array.base = allocation
    return array


def _integer(value):
    if isinstance(value, DeviceAllocation):
        return int(value)
    if not isinstance(value, int):
        raise TypeError("Boost.Python.ArgumentError: CUdeviceptr")
    return value


def _stream(value):
    if value is not None and not isinstance(value, Stream):
        raise TypeError("Boost.Python.ArgumentError: Stream")
    return None if value is None else ctypes.c_void_p(value.handle)


def memcpy_htod_async(dest, src, stream=None):
    view = memoryview(src)
    if not view.contiguous:
        raise BufferError("ndarray is not contiguous")
    _call(
        "cuMemcpyHtoDAsync_v2", ctypes.c_uint64(_integer(dest)), ctypes.c_void_p(np.asarray(src).ctypes.data),
        ctypes.c_size_t(view.nbytes), _stream(stream),
    )  # fmt: skip


def memcpy_dtoh_async(dest, src, stream=None):
    view = memoryview(dest)
    if not view.contiguous or view.readonly:
        raise BufferError("ndarray is not contiguous and writable")
    _call(
        "cuMemcpyDtoHAsync_v2", ctypes.c_void_p(np.asarray(dest).ctypes.data), ctypes.c_uint64(_integer(src)),
        ctypes.c_size_t(view.nbytes), _stream(stream),
    )  # fmt: skip


class Stream:
    def __init__(self, flags=0):
        _need_context()
        self._stream = ctypes.c_void_p()
        _call("cuStreamCreate", ctypes.byref(self._stream), flags)

    @property
    def handle(self):
        return self._stream.value

    def synchronize(self):
        _call("cuStreamSynchronize", self._stream)

    def __del__(self):
        if getattr(self, "_stream", None):
            _cuda.cuStreamDestroy_v2(self._stream)


class Event:
    def __init__(self, flags=0):
        _need_context()
        self._event = ctypes.c_void_p()
        _call("cuEventCreate", ctypes.byref(self._event), flags)

    def record(self, stream=None):
        _call("cuEventRecord", self._event, _stream(stream))
        return self

    def synchronize(self):
        _call("cuEventSynchronize", self._event)
        return self

    def time_since(self, start):
        ms = ctypes.c_float()
        _call("cuEventElapsedTime", ctypes.byref(ms), start._event, self._event)
        return ms.value

    def __del__(self):
        if getattr(self, "_event", None):
            _cuda.cuEventDestroy_v2(self._event)


class Module:
    def __init__(self, image):
        self._module = ctypes.c_void_p()
        _call("cuModuleLoadDataEx", ctypes.byref(self._module), image, 0, None, None)

    def get_function(self, name):
        function = ctypes.c_void_p()
        _call("cuModuleGetFunction", ctypes.byref(function), self._module, name.encode())
        return Function(function, self)

    def __del__(self):
        if getattr(self, "_module", None):
            _cuda.cuModuleUnload(self._module)


def module_from_buffer(buffer, options=(), message_handler=None):
    return Module(bytes(buffer))


class Function:
    def __init__(self, function, module):
        self._function, self._module = function, module

    def __call__(self, *args, grid=(1, 1), stream=None, block=None, shared=0):
        layout = ""
        for index, argument in enumerate(args):
            if not isinstance(argument, np.number):
                raise TypeError(f"invalid type on parameter #{index} (0-based)")
            layout += argument.dtype.char
        packed = struct.pack(layout, *(argument.item() for argument in args))
        size = ctypes.c_size_t(len(packed))
        buffer = ctypes.create_string_buffer(packed, len(packed))
        extra = (ctypes.c_void_p * 5)(1, ctypes.addressof(buffer), 2, ctypes.addressof(size), 0)
        _call("cuLaunchKernel", self._function, *grid, *block, shared, _stream(stream), None, extra)
