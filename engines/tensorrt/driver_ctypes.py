"""What pycuda lacks: a few calls of the driver library that it has loaded already.

A stream's and a context's handles are the driver's own, whoever made them, so these calls mix with pycuda's.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

from engines.tensorrt.cuda_errors import cuda_error
from engines.tensorrt.device import Stream
from pipeline.errors import UnsupportedError

__all__ = ["CtypesGraph", "begin_capture", "end_capture", "pop_context"]

_THREAD_LOCAL = 1
"""``CU_STREAM_CAPTURE_MODE_THREAD_LOCAL``: what other threads allocate meanwhile does not invalidate the capture."""


@functools.cache
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise UnsupportedError(
            f"the CUDA driver cannot be loaded ({error}); install the NVIDIA driver"
        ) from error


def _call(name: str, *arguments: Any) -> None:
    status = int(getattr(_driver(), name)(*arguments))
    if status != 0:
        raise cuda_error(status, name)


class CtypesGraph:
    """`engines.tensorrt.device.Graph`: a ``CUgraphExec``."""

    def __init__(self, executable: ctypes.c_void_p) -> None:
        """Take over `executable`."""
        self._executable: ctypes.c_void_p | None = executable

    def launch(self, stream: Stream) -> None:
        """Enqueue all of it on `stream`."""
        _call("cuGraphLaunch", self._executable, ctypes.c_void_p(stream.handle))

    def close(self) -> None:
        """Destroy it."""
        executable, self._executable = self._executable, None
        if executable is not None:
            _call("cuGraphExecDestroy", executable)


def begin_capture(stream_handle: int) -> None:
    """Record what this thread enqueues on the stream."""
    # ``_v2`` has the mode; without the suffix the library exports CUDA 10.0's call, which has none.
    _call("cuStreamBeginCapture_v2", ctypes.c_void_p(stream_handle), ctypes.c_int(_THREAD_LOCAL))


def end_capture(stream_handle: int) -> CtypesGraph:
    """The graph recorded since `begin_capture`."""
    graph = ctypes.c_void_p()
    _call("cuStreamEndCapture", ctypes.c_void_p(stream_handle), ctypes.byref(graph))
    executable = ctypes.c_void_p()
    try:
        # 11.4 and later; the older cuGraphInstantiate has other arguments.
        _call("cuGraphInstantiateWithFlags", ctypes.byref(executable), graph, ctypes.c_ulonglong(0))
    finally:
        _call("cuGraphDestroy", graph)
    return CtypesGraph(executable)


def pop_context() -> None:
    """Take the top of this thread's stack of contexts away, whatever pycuda believes is on it."""
    _call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))
