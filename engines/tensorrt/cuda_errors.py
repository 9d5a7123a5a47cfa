"""CUDA's result codes as errors of ours, with what to do about each.

Names, numbers and texts are those of the driver API's ``CUresult`` (``cuda.h`` of CUDA 13.0) and of
``cuGetErrorString``. They are kept here because pycuda raises exceptions that carry the text alone, and
because looking a name up needs a driver that may be what is missing.

A *sticky* code leaves the CUDA context dead: every later call of the process returns it again. ``cuda.h`` says
of those "This leaves the process in an inconsistent state and any further CUDA work will return the same error.
To continue using CUDA, the process must be terminated and relaunched", and of a device-side assertion that the
context cannot be used any more. Uncorrectable ECC and NVLink errors and a destroyed context are treated alike,
since results after them mean nothing. All become `DeviceFaultError`, whose exit code tells a supervisor to start the
process again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from pipeline.errors import DeviceFaultError, EdgefoldError, EngineError, UnsupportedError

__all__ = ["CUDA_CODES", "STICKY", "CudaCode", "cuda_error", "number_of"]


@dataclass(frozen=True, slots=True)
class CudaCode:
    """One ``CUresult``: its name without ``CUDA_ERROR_``, CUDA's text, and what becomes of it."""

    name: str
    text: str
    error: type[EdgefoldError] = EngineError
    remedy: str = ""


_RESTART = "the CUDA context of this process is lost; restart the process"
_DRIVER = "install or update the NVIDIA driver; `nvidia-smi` (on a Jetson: `jetson_release`) shows the installed one"
_MEMORY = (
    "use a smaller batch or fewer streams, or end other processes on the GPU; "
    "on a Jetson the CPU's programs share this memory"
)
_REBUILD = "compile it for this GPU and with a toolkit no newer than its driver"
_CAPTURE = "the work cannot be captured in a CUDA graph"


def _fault(name: str, text: str, cause: str = "") -> CudaCode:
    return CudaCode(name, text, DeviceFaultError, f"{cause}{'; ' if cause else ''}{_RESTART}")


CUDA_CODES: Mapping[int, CudaCode] = MappingProxyType(
    {
        1: CudaCode("INVALID_VALUE", "invalid argument"),
        2: CudaCode("OUT_OF_MEMORY", "out of memory", EngineError, _MEMORY),
        3: CudaCode("NOT_INITIALIZED", "initialization error", UnsupportedError, _DRIVER),
        4: CudaCode(
            "DEINITIALIZED", "driver shutting down", EngineError, "close the engine before the process ends"
        ),
        34: CudaCode(
            "STUB_LIBRARY",
            "CUDA driver is a stub library",
            UnsupportedError,
            "take the toolkit's `stubs` folder out of LD_LIBRARY_PATH",
        ),
        46: CudaCode(
            "DEVICE_UNAVAILABLE",
            "CUDA-capable device(s) is/are busy or unavailable",
            UnsupportedError,
            "another process holds the GPU exclusively, or it needs a reset",
        ),
        100: CudaCode(
            "NO_DEVICE",
            "no CUDA-capable device is detected",
            UnsupportedError,
            "check that a GPU is present and CUDA_VISIBLE_DEVICES does not hide it",
        ),
        101: CudaCode(
            "INVALID_DEVICE", "invalid device ordinal", UnsupportedError, "name one of the GPUs there are"
        ),
        200: CudaCode("INVALID_IMAGE", "device kernel image is invalid", UnsupportedError, _REBUILD),
        201: CudaCode(
            "INVALID_CONTEXT", "invalid device context", EngineError, "no CUDA context is current here"
        ),
        209: CudaCode(
            "NO_BINARY_FOR_GPU",
            "no kernel image is available for execution on the device",
            UnsupportedError,
            _REBUILD,
        ),
        214: _fault(
            "ECC_UNCORRECTABLE", "uncorrectable ECC error encountered", "the GPU's memory is failing"
        ),
        218: CudaCode("INVALID_PTX", "a PTX JIT compilation failed", UnsupportedError, _REBUILD),
        220: _fault("NVLINK_UNCORRECTABLE", "uncorrectable NVLink error detected during the execution"),
        222: CudaCode(
            "UNSUPPORTED_PTX_VERSION",
            "the provided PTX was compiled with an unsupported toolchain.",
            UnsupportedError,
            _REBUILD,
        ),
        226: _fault("CONTAINED", "Invalid access of peer GPU memory over nvlink or a hardware error"),
        400: CudaCode("INVALID_HANDLE", "invalid resource handle"),
        500: CudaCode("NOT_FOUND", "named symbol not found"),
        600: CudaCode("NOT_READY", "device not ready"),
        700: _fault("ILLEGAL_ADDRESS", "an illegal memory access was encountered"),
        701: CudaCode("LAUNCH_OUT_OF_RESOURCES", "too many resources requested for launch"),
        702: _fault(
            "LAUNCH_TIMEOUT",
            "the launch timed out and was terminated",
            "a kernel ran longer than the display's watchdog allows",
        ),
        709: _fault("CONTEXT_IS_DESTROYED", "context is destroyed"),
        710: _fault("ASSERT", "device-side assert triggered"),
        714: _fault("HARDWARE_STACK_ERROR", "hardware stack error"),
        715: _fault("ILLEGAL_INSTRUCTION", "an illegal instruction was encountered"),
        716: _fault("MISALIGNED_ADDRESS", "misaligned address"),
        717: _fault("INVALID_ADDRESS_SPACE", "operation not supported on global/shared address space"),
        718: _fault("INVALID_PC", "invalid program counter"),
        719: _fault("LAUNCH_FAILED", "unspecified launch failure"),
        721: _fault("TENSOR_MEMORY_LEAK", "tensor memory not completely freed"),
        800: CudaCode("NOT_PERMITTED", "operation not permitted"),
        801: CudaCode("NOT_SUPPORTED", "operation not supported", UnsupportedError),
        802: CudaCode("SYSTEM_NOT_READY", "system not yet initialized", UnsupportedError, _DRIVER),
        803: CudaCode(
            "SYSTEM_DRIVER_MISMATCH",
            "system has unsupported display driver / cuda driver combination",
            UnsupportedError,
            "the driver was updated while loaded: reboot",
        ),
        804: CudaCode(
            "COMPAT_NOT_SUPPORTED_ON_DEVICE",
            "forward compatibility was attempted on non supported HW",
            UnsupportedError,
            _DRIVER,
        ),
        900: CudaCode(
            "STREAM_CAPTURE_UNSUPPORTED",
            "operation not permitted when stream is capturing",
            EngineError,
            _CAPTURE,
        ),
        901: CudaCode(
            "STREAM_CAPTURE_INVALIDATED",
            "operation failed due to a previous error during capture",
            EngineError,
            _CAPTURE,
        ),
        904: CudaCode("STREAM_CAPTURE_UNJOINED", "capturing stream has unjoined work", EngineError, _CAPTURE),
        905: CudaCode(
            "STREAM_CAPTURE_ISOLATION",
            "dependency created on uncaptured work in another stream",
            EngineError,
            _CAPTURE,
        ),
        906: CudaCode(
            "STREAM_CAPTURE_IMPLICIT",
            "operation would make the legacy stream depend on a capturing blocking stream",
            EngineError,
            _CAPTURE,
        ),
        911: _fault("EXTERNAL_DEVICE", "an async error has occured in external entity outside of CUDA"),
        999: CudaCode("UNKNOWN", "unknown error", EngineError, "`dmesg` shows what the driver logged"),
    }
)
"""What CUDA may answer to the calls made here, by number. Others are reported by their number."""

STICKY: frozenset[int] = frozenset(
    number for number, code in CUDA_CODES.items() if code.error is DeviceFaultError
)
"""Codes after which the context is dead."""

_BY_TEXT = {code.text: number for number, code in CUDA_CODES.items()}


def number_of(text: str) -> int | None:
    """The code whose `CudaCode.text` ends pycuda's message ``call failed: text`` (more may follow after `` - ``)."""
    said = text.partition(" failed: ")[2].strip()
    return _BY_TEXT.get(said) or _BY_TEXT.get(said.partition(" - ")[0].strip())


def cuda_error(number: int, call: str) -> EdgefoldError:
    """The error for `number`, which `call` returned; to be raised by the caller.

    Args:
        number: a ``CUresult`` other than 0.
        call: what was called, e.g. ``cuMemAlloc(1048576 bytes)``.
    """
    code = CUDA_CODES.get(number)
    if code is None:
        return EngineError(f"CUDA error {number} from {call}; `CUresult` in CUDA's documentation explains it")
    remedy = f": {code.remedy}" if code.remedy else ""
    return code.error(f"CUDA error {number} ({code.name}, {code.text}) from {call}{remedy}")
