"""The memory of a process that runs for months: what allocator and collector keep beside what is in use.

What the app has in use is constant (47.0 MB as glibc counts it, and 47.1 MB 110 faults later), and yet the process grew
for an hour.
What was freed is kept in three places, and each is told here to keep less:

*Many arenas.* A thread that begins is given one of glibc's ``8 × cores`` arenas in turn, and a freed block goes back to its
arena and no other. Every reload runs in a thread of its own, reads files and compiles in another arena, and leaves a
megabyte or more behind there: 18 MB on two cores until all sixteen had had their turn. With one arena the next reload uses
what the last one freed. The threads of the app hold the interpreter's lock when they allocate, and the engine has its
buffers from the start: with a film of 1080p, frames a second and CPU time were the same.

*The arena itself* keeps what lies below anything in use: 17 MB, since a reload has two engines for a moment. It does not
grow beyond that (64 MB with what is in use, the same after 200 faults); what a reload leaves is given back after each, and is
touched again bit by bit by what comes after. That is the plateau that a process under faults comes to in twenty minutes.

*Python's collector* looks at everything only when a quarter as much has come to be as there was, and the app starts with
90,000 objects. The remains of some thousand connections (asyncio leaves a cycle of each) wait together until then, and
looking takes 30 to 50 ms, in which no thread of Python runs: longer than a frame of 30 FPS. Objects of the start-up that are
set aside are never looked at again; the 4,000 others take less than a millisecond.
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
    """Gives the pages of what was freed back to the system: after something large that is rare, such as a reload.

    Takes a millisecond, in which other threads that allocate wait. Of arenas other than the first, glibc 2.36 does
    not give back the end.
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
