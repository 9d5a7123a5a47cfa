"""Plans as they lie on disk: TensorRT's as they are, TensorRT-RTX's packed.

A plan of TensorRT-RTX carries its pointwise kernels as CUDA C and compiles them where it is loaded. In 1.7 each brings
130 KB of the same declarations, and an int8 convolution has one behind it: of the light network's 7.7 MB, 5.7 are such
text. Packed by xz (``.xz``: any ``xz -dk`` gives the plan back) it has 1.8 MB. A plan of TensorRT is machine code, is loaded by
trtexec as it lies there, and stays as it is.
"""

from __future__ import annotations

import hashlib
import lzma
import os
from pathlib import Path

from engines.tensorrt.api import Flavour
from pipeline.errors import EngineError, IntegrityError

__all__ = ["PACKED", "PLAN_NAMES", "pack_plan", "read_plan"]

PACKED = ".xz"
"""How the name of a packed plan ends."""
PLAN_NAMES: dict[Flavour, str] = {"tensorrt": "model.plan", "tensorrt_rtx": f"model.rtx.plan{PACKED}"}
_XZ_MAGIC = b"\xfd7zXZ\x00"
# The fastest: the kernels shrink as much as with the slowest, weights do not shrink with any.
_PRESET = 0
_MAX_PLAN_BYTES = 4 << 30
_PIECE_BYTES = 1 << 24


def pack_plan(path: Path, plan: bytes) -> bytes:
    """Replaces the content of `path`, a plan nobody reads yet, by its packed form, and returns that.

    Args:
        path: the file.
        plan: what is in it.

    Raises:
        EngineError: it cannot be written.
    """
    packed = lzma.compress(plan, preset=_PRESET)
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
    return _unpack(path, data) if data.startswith(_XZ_MAGIC) else data


def _unpack(path: Path, data: bytes) -> bytes:
    """Piece by piece: a few bytes can stand for more than there is memory."""
    stream = lzma.LZMADecompressor(lzma.FORMAT_XZ)
    plan = bytearray()
    try:
        piece = stream.decompress(data, _PIECE_BYTES)
        while piece:
            plan += piece
            if len(plan) > _MAX_PLAN_BYTES:
                raise IntegrityError(
                    f"plan {path} unpacks to more than {_MAX_PLAN_BYTES >> 30} GiB; it was not loaded. Build it again"
                )
            piece = b"" if stream.eof else stream.decompress(b"", _PIECE_BYTES)
    except lzma.LZMAError as error:
        raise IntegrityError(f"plan {path} cannot be unpacked ({error}); build it again") from error
    if not stream.eof or stream.unused_data:
        raise IntegrityError(
            f"plan {path} is {'followed by other bytes' if stream.eof else 'cut off'}; build it again, or copy it "
            "again from where it was built"
        )
    return bytes(plan)
