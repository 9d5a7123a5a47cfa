"""Ports that stay a test's own from the moment they are chosen."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

__all__ = ["reserved_port"]


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    """A port of loopback on which nobody listens, and which the kernel gives to nobody else meanwhile.

    A socket that is bound and never listens holds it: connections are refused, and a server that sets SO_REUSEADDR,
    as servers do, may listen there as often as it likes. A port that was free a moment ago, and no more than that, is
    sooner or later another process's.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield int(holder.getsockname()[1])
