"""Which connections are let in, and for how long without a request.

aiohttp has no cap and, in 3.14.0 and before, no end for a connection that never asks for anything, and
descriptors are the cameras' as well.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from aiohttp import web

from apps.streaming.serve.clients import Clients

__all__ = ["Connections"]

SILENCE_LIMIT_S = 20.0
"""From a connection's beginning to its first request."""
_SPARE = 32

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Connections:
    """Admits connections to a server.

    Args:
        max_clients: video clients at the same time; four times as many connections and 32 more may be open.
        clients: counts those refused.
    """

    def __init__(self, max_clients: int, clients: Clients) -> None:
        self._limit = 4 * max_clients + _SPARE
        self._clients = clients
        self._silent: dict[asyncio.BaseTransport, asyncio.TimerHandle] = {}

    def protocol(self, server: web.Server) -> asyncio.Protocol:
        """What `loop.create_server` makes for every connection."""
        return _Gate(self, server)

    def admit(self, server: web.Server, transport: asyncio.Transport) -> bool:
        """Whether the connection may stay; if so, it has `SILENCE_LIMIT_S` for a request."""
        if len(server.connections) >= self._limit:
            self._clients.n_refused += 1
            return False
        loop = asyncio.get_running_loop()
        self._silent[transport] = loop.call_later(SILENCE_LIMIT_S, self._hang_up, transport)
        return True

    @web.middleware
    async def middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Notes that the connection has asked for something."""
        timer = self._silent.pop(request.transport, None) if request.transport is not None else None
        if timer is not None:
            timer.cancel()
        return await handler(request)

    def _hang_up(self, transport: asyncio.Transport) -> None:
        del self._silent[transport]
        transport.abort()


class _Gate(asyncio.Protocol):
    """Decides when the connection is made, not when it is accepted: a burst of them has been accepted
    before the first is counted."""

    def __init__(self, connections: Connections, server: web.Server) -> None:
        self._connections = connections
        self._server = server

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        if self._connections.admit(self._server, transport):
            handler = self._server()
            transport.set_protocol(handler)
            handler.connection_made(transport)
            return
        transport.write(
            b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 10\r\nContent-Length: 0\r\n"
            b"Connection: close\r\n\r\n"
        )
        transport.close()
