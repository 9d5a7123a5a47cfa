"""CUDA C++ compiled at run time by NVRTC, which needs no GPU.

The device code of a real architecture (``sm_87``) is kept, not only PTX: PTX of a toolkit newer than the driver is
refused by it (``UNSUPPORTED_PTX_VERSION``), and a cubin is what registers and shared memory were really
fitted for. NVRTC is called through ctypes: pycuda has no binding for it, and where cuda-python is
installed it may not find the library in a wheel of another environment.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import EngineError, UnsupportedError

__all__ = ["CompiledKernels", "compile_kernels", "nvrtc_version", "supported_sms"]

_SONAMES = ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so")


@dataclass(frozen=True, slots=True)
class CompiledKernels:
    """One source compiled for one architecture."""

    sm: int
    cubin: bytes
    """An ELF image that GPUs of compute capability `sm` load."""
    ptx: bytes
    """The same in PTX."""


def compile_kernels(source: str, name: str, sm: int) -> CompiledKernels:
    """Compile CUDA C++ for one architecture.

    Multiplications and additions are not contracted (``--fmad=false``), so that floats come out as on the CPU.

    Args:
        source: the program; kernels are ``extern "C"``.
        name: its file name in messages.
        sm: compute capability without its dot, e.g. 87.

    Raises:
        UnsupportedError: there is no NVRTC here, or this one does not know `sm`.
        EngineError: the program does not compile; NVRTC's log is in the message.
    """
    if sm not in supported_sms():
        major, minor = nvrtc_version()
        raise UnsupportedError(
            f"NVRTC {major}.{minor} does not compile for compute capability {sm}, only for "
            f"{', '.join(map(str, supported_sms()))}; use the NVRTC of a CUDA toolkit that supports this GPU"
        )
    program = ctypes.c_void_p()
    _call("nvrtcCreateProgram", ctypes.byref(program), source.encode(), name.encode(), 0, None, None)
    try:
        options = [f"--gpu-architecture=sm_{sm}".encode(), b"--fmad=false", b"--std=c++17"]
        array = (ctypes.c_char_p * len(options))(*options)
        if _nvrtc().nvrtcCompileProgram(program, len(options), array) != 0:
            log = _text(program, "nvrtcGetProgramLog").decode(errors="replace").strip()
            raise EngineError(f"{name} does not compile for compute capability {sm}: {log}")
        return CompiledKernels(sm, _text(program, "nvrtcGetCUBIN"), _text(program, "nvrtcGetPTX"))
    finally:
        _call("nvrtcDestroyProgram", ctypes.byref(program))


@functools.cache
def supported_sms() -> tuple[int, ...]:
    """The compute capabilities this NVRTC compiles for, sorted."""
    count = ctypes.c_int()
    _call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
    sms = (ctypes.c_int * count.value)()
    _call("nvrtcGetSupportedArchs", sms)
    return tuple(sorted(sms))


@functools.cache
def nvrtc_version() -> tuple[int, int]:
    """Its version, as the toolkit's: ``(13, 0)``."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


def _call(name: str, *arguments: Any) -> None:
    status = int(getattr(_nvrtc(), name)(*arguments))
    if status != 0:
        said = _nvrtc().nvrtcGetErrorString(status)
        raise EngineError(f"{name} failed: {said.decode() if said else status}")


def _text(program: ctypes.c_void_p, getter: str) -> bytes:
    size = ctypes.c_size_t()
    _call(f"{getter}Size", program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    _call(getter, program, buffer)
    return buffer.raw


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    failures = []
    for candidate in _candidates():
        try:
            # NVRTC opens its builtins by their bare name when it compiles; in a wheel's folder nothing finds them.
            for builtins in Path(candidate).parent.glob("libnvrtc-builtins.so.*") if "/" in candidate else ():
                ctypes.CDLL(str(builtins))
            library = ctypes.CDLL(candidate)
        except OSError as error:
            failures.append(str(error))
        else:
            library.nvrtcGetErrorString.restype = ctypes.c_char_p
            return library
    raise UnsupportedError(
        f"NVRTC, the CUDA run-time compiler, is not installed ({failures[0]}); it comes with the CUDA toolkit, and "
        "as a wheel with: pip install 'edgefold[tensorrt]'"
    )


def _candidates() -> Iterator[str]:
    """Where NVRTC may be: on the loader's path, in NVIDIA's wheels, in a toolkit."""
    yield from _SONAMES
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(folder) / part / "lib" for folder in (spec and spec.submodule_search_locations) or ()
               for part in ("cu13", "cuda_nvrtc")]  # fmt: skip
    toolkits = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_ROOT"), "/usr/local/cuda"]
    folders += [Path(toolkit) / "lib64" for toolkit in toolkits if toolkit]
    for folder in folders:
        yield from (str(folder / name) for name in _SONAMES if (folder / name).exists())
