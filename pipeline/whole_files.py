"""Files that are there complete, or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

__all__ = ["whole_file"]


@contextlib.contextmanager
def whole_file(path: Path, *, suffix: str = ".tmp", durable: bool = False) -> Iterator[BinaryIO]:
    """A file to write, which takes the name `path` at the end of the block, in one step.

    Until then, and where the block fails, what stood there stays. The file lies beside `path`, since a name can only be
    given within a file system; it is hidden, and deleted on a failure.

    Args:
        path: in a folder that is there.
        suffix: of the name it has meanwhile, for who clears up what a killed process has left.
        durable: on the disk before it is named: after a power cut it is whole too.

    Raises:
        OSError: it cannot be written.
    """
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}{suffix}")
    try:
        with beside.open("xb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise
