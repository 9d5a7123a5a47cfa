"""Plans as they lie on disk: TensorRT's as they are, TensorRT-RTX's packed.

A plan of TensorRT-RTX carries its pointwise kernels as CUDA C and compiles them where it is loaded. In 1.7 each brings
130 KB of the same declarations, and an int8 convolution has one behind it: of the light network's 7.7 MB, 5.7 are such
text. Packed by Zstandard (``.zst``: any ``zstd -d`` gives the plan back) it has 1.8 MB, and is packed and unpacked in some
milliseconds. A plan of TensorRT is machine code, is loaded by trtexec as it lies there, and stays as it is.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from types import ModuleType

from engines.tensorrt.api import Flavour
from pipeline.errors import EngineError, IntegrityError, UnsupportedError

__all__ = ["PACKED", "PLAN_NAMES", "pack_plan", "read_plan"]

PACKED = ".zst"
"""How the name of a packed plan ends."""
PLAN_NAMES: dict[Flavour, str] = {"tensorrt": "model.plan", "tensorrt_rtx": f"model.rtx.plan{PACKED}"}
_MAGIC = b"\x28\xb5\x2f\xfd"
_LEVEL = 3  # the kernels shrink hardly more with a higher one, and weights with none
_MAX_PLAN_BYTES = 4 << 30


def pack_plan(path: Path, plan: bytes) -> bytes:
    """Replaces the content of `path`, a plan nobody reads yet, by its packed form, and returns that.

    Args:
        path: the file.
        plan: what is in it.

    Raises:
        UnsupportedError: the package that packs is missing.
        EngineError: it cannot be written.
    """
    packed: bytes = _zstandard().ZstdCompressor(level=_LEVEL, write_checksum=True).compress(plan)
    try:
        with path.open("wb") as file:
            file.write(packed)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise EngineError(f"writing the plan failed: {error.strerror or error}") from error
    return packed


def read_plan(path: Path, sha256: str) -> bytes:
    """A plan's own bytes, proved to be the ones that were built.

    Args:
        path: a plan, packed or not; its first bytes say which.
        sha256: of the file.

    Raises:
        EngineError: it cannot be read.
        IntegrityError: the file is not the one described, or what was packed is not whole; names the file.
        UnsupportedError: the package that unpacks is missing.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise EngineError(f"plan {path} cannot be read: {error.strerror or error}") from error
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise IntegrityError(
            f"plan {path} has SHA-256 {found}, but {sha256} is expected; it was not loaded. "
            "Build it again (edgefold finish), or copy it again from where it was built"
        )
    return _unpack(path, data) if data.startswith(_MAGIC) else data


def _unpack(path: Path, data: bytes) -> bytes:
    zstandard = _zstandard()
    try:
        # Told in front, and never more than that is unpacked: a few bytes can stand for more than there is memory.
        told = zstandard.get_frame_parameters(data).content_size
        if told > _MAX_PLAN_BYTES:
            raise IntegrityError(
                f"plan {path} unpacks to {told} bytes, more than the {_MAX_PLAN_BYTES} that are taken; it was not "
                "loaded. Build it again"
            )
        plan: bytes = zstandard.ZstdDecompressor().decompress(data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise IntegrityError(
            f"plan {path} cannot be unpacked ({error}); build it again, or copy it again from where it was built"
        ) from error
    return plan


def _zstandard() -> ModuleType:
    try:
        import zstandard
    except ImportError as error:
        raise UnsupportedError(
            "plans of TensorRT-RTX are kept packed, and the package that does it is missing; pip install zstandard"
        ) from error
    return zstandard
