"""Arrays with a guard page behind them: whoever touches a byte too many dies of SIGSEGV, in a process of its own."""

from __future__ import annotations

import subprocess
import sys

__all__ = ["run_beside_guard_pages"]

_AT_THE_END = """
import ctypes, mmap
import numpy as np

PAGE = mmap.PAGESIZE
libc = ctypes.CDLL(None, use_errno=True)

def at_the_end(shape):  # an array whose last byte is the last before memory that must not be touched
    size = int(np.prod(shape))
    pages = -(-size // PAGE)
    memory = mmap.mmap(-1, (pages + 1) * PAGE)
    array = np.frombuffer(memory, np.uint8, size, pages * PAGE - size).reshape(shape)
    address = array.ctypes.data + size
    assert libc.mprotect(ctypes.c_void_p(address), PAGE, 0) == 0
    return memory, array
"""


def run_beside_guard_pages(script: str) -> None:
    """Runs `script`, which has ``at_the_end(shape) -> (what keeps it alive, uint8 array)``, to its last line."""
    program = f"{_AT_THE_END}\n{script}\nprint('unharmed')"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (0, "unharmed\n"), run.stderr
