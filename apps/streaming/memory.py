"""The memory of a process that runs for months: what allocator and collector keep beside what is in use.

What the app has in use is constant (45 MB as glibc counts it, over 150 reloads), and yet the process grew for an hour.
Two keepers of what was freed are the reason, and both are told here to keep less:

*glibc's arenas.* A thread that begins is given one of ``8 × cores`` arenas in turn, and a freed block goes back to its
arena and no other. Every reload runs in a thread of its own, reads files and compiles in another arena, and leaves a
megabyte or two behind there: 18 MB on two cores until all sixteen had had their turn, four times that on eight. With one
arena the next reload uses what the last one freed. The threads of the app hold the interpreter's lock when they allocate,
and the engine has its buffers from the start, so that there is nothing to gain from more.

*Python's collector.* It looks at everything only when a quarter as much has come to be as there was, and the app starts with 90,000
objects: so the remains of some thousand connections (asyncio leaves a cycle of each) wait together, and looking takes
40 ms, in which no thread of Python runs. Objects of the start-up that are set aside are never looked at again, and what is
left is looked at often and in microseconds.
"""

from __future__ import annotations

import ctypes
import functools
import gc

__all__ = ["give_back_freed", "keep_one_arena", "set_start_up_aside"]

_M_ARENA_MAX = -8  # malloc.h


def keep_one_arena() -> None:
    """Has all threads allocate from one arena. To be called before any are started; where libc is not glibc, nothing
    happens."""
    libc = _glibc()
    if libc is not None:
        libc.mallopt(_M_ARENA_MAX, 1)


def give_back_freed() -> None:
    """Gives the pages of what was freed back to the system.

    What a reload or a burst of clients leaves would otherwise be kept for the next one, and the process be as large as
    the sum of all that ever happened in it. Takes a millisecond, in which other threads that allocate wait. Of
    arenas other than the first, glibc 2.36 does not give back the end.
    """
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def set_start_up_aside() -> None:
    """Collects what is garbage, and has the collector pass over everything else that is there now, for good."""
    gc.collect()
    gc.freeze()
    gc.collect()  # of nothing: the collector takes a full collection's number as that of all objects


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    """The C library that is loaded, where it is glibc."""
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") else None
