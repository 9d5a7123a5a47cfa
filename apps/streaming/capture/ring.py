"""Frames in memory that two processes share, without a name and without a copy.

A ring is an anonymous file (`memfd_create(2)`) of equal slots. The capture process creates it when
it knows the size of a frame, and hands over the descriptor; both map it. It has no name, so whoever
is killed leaves nothing behind: the kernel frees it with the last mapping. A larger frame gets a new
ring (a *generation*); the old mapping lives on in the frames that still lie in it.

The file is sealed at its size: a capture process that went wild could otherwise shrink it, and the
reader would die of SIGBUS. The reader maps it read-only, so nobody draws into a frame by mistake.
"""

from __future__ import annotations

import fcntl
import math
import mmap
import os

import numpy as np
from numpy.typing import NDArray

__all__ = ["RingReader", "RingWriter"]

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_MAX_RING_BYTES = 4 << 30


def _slot_stride(slot_bytes: int) -> int:
    """Slots begin on pages, so that no two share one."""
    return -(-slot_bytes // mmap.PAGESIZE) * mmap.PAGESIZE


class RingWriter:
    """The capture process's side.

    Args:
        n_slots: frames that may be in use at the same time.
        slot_bytes: of the largest frame that fits.
    """

    def __init__(self, n_slots: int, slot_bytes: int) -> None:
        self.n_slots = n_slots
        self.slot_bytes = slot_bytes
        self._stride = _slot_stride(slot_bytes)
        size = n_slots * self._stride
        self.fd = os.memfd_create("edgefold-frames", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        """To be handed over, then closed."""
        try:
            os.ftruncate(self.fd, size)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)
            self._memory = mmap.mmap(self.fd, size)
        except BaseException:
            os.close(self.fd)
            raise
        # The lowest free slot is used first: memory that was never needed is never touched.
        self._free = set(range(n_slots))

    def acquire(self) -> int | None:
        """A slot to write to; ``None`` where all are in use."""
        if not self._free:
            return None
        slot = min(self._free)
        self._free.remove(slot)
        return slot

    def release(self, slot: int) -> None:
        """The slot may be written to again."""
        self._free.add(slot)

    def view(self, slot: int, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        """The slot as a uint8 array of `shape`, writable."""
        pixels: NDArray[np.uint8] = np.ndarray(shape, np.uint8, self._memory, offset=slot * self._stride)
        return pixels


class RingReader:
    """The other side's mapping, read-only; it lasts as long as any view of it.

    Args:
        fd: as it was handed over; the caller closes it.
        n_slots: as the writer says.
        slot_bytes: as the writer says.

    Raises:
        ValueError: the file is smaller than that, or can be made smaller.
    """

    def __init__(self, fd: int, n_slots: int, slot_bytes: int) -> None:
        stride = _slot_stride(slot_bytes)
        size = n_slots * stride
        if not 0 < size <= _MAX_RING_BYTES:
            raise ValueError(
                f"a ring of {n_slots} slots of {slot_bytes} bytes; at most {_MAX_RING_BYTES} in all"
            )
        if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
            raise ValueError("the ring is not sealed at its size")
        if os.fstat(fd).st_size < size:
            raise ValueError(f"the ring has {os.fstat(fd).st_size} bytes, {size} were announced")
        self._n_slots = n_slots
        self._slot_bytes = slot_bytes
        self._stride = stride
        self._memory = mmap.mmap(fd, size, prot=mmap.PROT_READ)

    def view(self, slot: int, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        """The slot as a uint8 array of `shape`, read-only.

        Raises:
            ValueError: there is no such slot, or a frame of `shape` does not fit into it.
        """
        n_bytes = math.prod(shape)
        if not 0 <= slot < self._n_slots or not 0 < n_bytes <= self._slot_bytes:
            raise ValueError(
                f"a frame of {n_bytes} bytes in slot {slot} of {self._n_slots} slots of {self._slot_bytes} bytes"
            )
        pixels: NDArray[np.uint8] = np.ndarray(shape, np.uint8, self._memory, offset=slot * self._stride)
        return pixels
