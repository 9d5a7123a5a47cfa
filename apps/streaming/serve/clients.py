"""Clients that stay: how many there may be, and what becomes of one that does not read.

A browser that is asleep, a phone out of reach or a program that never reads must cost nothing but its
place, and that not for long: what is sent to it is bounded by a small send buffer, and a send that takes
longer than `SEND_LIMIT_S` cuts the connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import Counter
from collections.abc import AsyncIterator
from typing import Literal

from aiohttp import web

__all__ = ["SEND_LIMIT_S", "Client", "Clients", "tune_socket"]

SEND_LIMIT_S = 10.0
_SEND_BUFFER_BYTES = 128 * 1024
_UNSENT_BYTES = 16 * 1024
"""The kernel grows a buffer to megabytes by itself: a slow client would see pictures many seconds old. Of a
small buffer, what is on its way may fill all, what waits to be sent hardly any."""
_EVENT_CLIENTS_A_VIDEO = 2
_RETRY_S = 10

Kind = Literal["video", "events"]


class Client:
    """One that is being sent a stream."""

    def __init__(self, request: web.Request, response: web.StreamResponse) -> None:
        self._request = request
        self._response = response

    @property
    def connected(self) -> bool:
        """Whether it has not hung up, as far as is known."""
        transport = self._request.transport
        return transport is not None and not transport.is_closing()

    async def send(self, data: bytes) -> None:
        """Sends, waiting for room.

        Raises:
            asyncio.TimeoutError: there was none within `SEND_LIMIT_S`.
            ConnectionError: it hung up.
        """
        await asyncio.wait_for(self._response.write(data), SEND_LIMIT_S)

    async def pause(self, seconds: float) -> None:
        """Sends nothing for a while."""
        await asyncio.sleep(seconds)

    def cut(self) -> None:
        """Ends the connection now; what is buffered is thrown away."""
        if self._request.transport is not None:
            self._request.transport.abort()


class Clients:
    """Counts and caps them.

    Args:
        max_video: video clients at the same time. There may be twice as many event streams, since a page
            that reconnects is there twice for a moment.
    """

    def __init__(self, max_video: int) -> None:
        self._limits: dict[Kind, int] = {"video": max_video, "events": _EVENT_CLIENTS_A_VIDEO * max_video}
        self._counts: Counter[Kind] = Counter()
        self.n_refused = 0
        """Above a cap, since the start."""
        self.n_cut = 0
        """For not reading, since the start."""

    def count(self, kind: Kind) -> int:
        """Connected now."""
        return self._counts[kind]

    @contextlib.asynccontextmanager
    async def stream(
        self, kind: Kind, request: web.Request, response: web.StreamResponse
    ) -> AsyncIterator[Client]:
        """Prepares the response and counts the client until the context is left; one that hangs up or
        does not read ends the context quietly.

        Raises:
            HTTPServiceUnavailable: there are as many as there may be.
        """
        if self._counts[kind] >= self._limits[kind]:
            self.n_refused += 1
            refusal = web.HTTPServiceUnavailable(
                text=f"503: {self._counts[kind]} {kind} clients are connected, the most there may be; close "
                "one of them and try again\n",
                headers={"Retry-After": str(_RETRY_S)},
            )
            # Kept open, a hundred refused clients would take the places of those who ask for /healthz.
            refusal.force_close()
            raise refusal
        client = Client(request, response)
        self._counts[kind] += 1
        try:
            await response.prepare(request)
            yield client
        except asyncio.TimeoutError:
            self.n_cut += 1
            client.cut()
        except ConnectionError:
            pass
        finally:
            self._counts[kind] -= 1


def tune_socket(listening: socket.socket) -> None:
    """Sets what every accepted connection inherits: little is buffered, and the end of a peer that is gone
    without a word (a phone out of reach) is noticed within half a minute."""
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {"TCP_NOTSENT_LOWAT": _UNSENT_BYTES, "TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}
    for name, value in options.items():
        if hasattr(socket, name):  # not on every system
            listening.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
