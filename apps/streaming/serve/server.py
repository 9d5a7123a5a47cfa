"""The server: a thread with an event loop, from the moment it is made until it is closed."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from apps.streaming.config import ServeConfig
from apps.streaming.contracts import StreamView
from apps.streaming.serve.credentials import check_token
from apps.streaming.serve.recent import RecentEvents
from pipeline.errors import EdgefoldError, UnsupportedError, UsageError

if TYPE_CHECKING:
    from apps.streaming.serve.pictures import LatestPictures

__all__ = ["PageServer"]

_ANY_ADDRESS = ("0.0.0.0", "::", "")
_PACKAGES = ("aiohttp", "prometheus_client")
_BACKLOG = 64
_IDLE_LIMIT_S = 20.0
"""A connection is closed so long after its last answer."""
_START_LIMIT_S = 10.0
_CLOSE_LIMIT_S = 2.0
_N_ASKING = 3
"""Threads for the view, a reload and a check, which do not wait for one another."""
_NICENESS = 5
"""Of the server's threads: where the engine takes every core, a picture waits and not a frame."""


class PageServer:
    """Serves the page; it listens when the constructor returns.

    Args:
        config: where to listen and whom to let in.
        view: everything at one moment; called in a thread of the server, at most four times a second
            and never twice at the same time.
        reload: loads the configured bundle anew, or the one given; returns when it has been swapped in,
            raises `EdgefoldError` when it was refused.
        check: runs the golden frames and says what they found, or raises `EdgefoldError`.

    Raises:
        UsageError: the address or the port cannot be used, the host can be reached from other machines
            and there is no token, or a limit makes no sense.
        UnsupportedError: aiohttp, prometheus-client or OpenCV is missing.
    """

    def __init__(
        self,
        config: ServeConfig,
        view: Callable[[], StreamView],
        reload: Callable[[Path | None], None],
        check: Callable[[], str],
    ) -> None:
        check_token(config)
        _check_limits(config)
        try:
            from apps.streaming.serve import access, application, asking, clients, connections, pictures
        except ImportError as error:
            if (error.name or "").partition(".")[0] not in _PACKAGES:
                raise
            raise UnsupportedError(
                f"the page needs aiohttp and prometheus-client, which cannot be imported here ({error}): "
                "pip install 'edgefold[serve]'"
            ) from error
        encode = pictures.jpeg_encoder()
        self._socket = _listen(config)
        clients.tune_socket(self._socket)
        self._host = config.host
        self._beat_s = time.monotonic()
        self._encoders = ThreadPoolExecutor(1, "page-encode", initializer=_yield_to_the_runtime)
        self._askers = ThreadPoolExecutor(_N_ASKING, "page-ask", initializer=_yield_to_the_runtime)
        self._loop = asyncio.new_event_loop()
        self.events = RecentEvents()
        """An `EventOutput`: what the page shows as the last events."""
        self.hub: LatestPictures = pictures.LatestPictures(
            config.video_fps, self._loop, self._encoders, encode
        )
        """The `PictureHub` for the runtime."""
        of_clients = clients.Clients(config.max_clients)
        self._connections = connections.Connections(config.max_clients, of_clients)
        self._application = application.make_application(
            asking.App(view, reload, check, self.events, self._askers),
            self.hub,
            of_clients,
            access.Access(config.token, config.port),
            self._connections,
            lambda: time.monotonic() - self._beat_s,
        )
        self._stopping = asyncio.Event()
        self._started = threading.Event()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._serve, name="page-server", daemon=True)
        self._thread.start()
        if not self._started.wait(_START_LIMIT_S) or self._failure is not None:
            self.close()
            raise EdgefoldError(f"the page's server did not start: {self._failure or 'no answer'}")

    @property
    def url(self) -> str:
        """The address to open, without the token; fit for a log."""
        host = socket.gethostname() if self._host in _ANY_ADDRESS else self._host
        port = self._socket.getsockname()[1]
        return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"

    def beat(self) -> None:
        """A sign of life of the runtime's loop; without one for ten seconds ``/healthz`` answers 503."""
        self._beat_s = time.monotonic()

    def close(self) -> None:
        """Hangs up on everyone and ends the thread, within two seconds; twice is harmless."""
        if self._thread.is_alive():
            with contextlib.suppress(RuntimeError):  # the loop ended by itself in this moment
                self._loop.call_soon_threadsafe(self._stopping.set)
            self._thread.join(_CLOSE_LIMIT_S)
        self._socket.close()
        # A reload under way is not waited for here; the interpreter waits for it at its end.
        for pool in (self._encoders, self._askers):
            pool.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> PageServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _serve(self) -> None:
        _yield_to_the_runtime()
        try:
            self._loop.run_until_complete(self._run())
        except Exception as error:
            self._failure = error
        finally:
            self._loop.close()
            self._started.set()

    async def _run(self) -> None:
        from aiohttp import web

        runner = web.AppRunner(
            self._application,
            access_log=None,
            handler_cancellation=True,  # a client that hangs up is not waited for
            keepalive_timeout=_IDLE_LIMIT_S,
            shutdown_timeout=0.5,
        )
        await runner.setup()
        assert runner.server is not None
        gate = functools.partial(self._connections.protocol, runner.server)
        server = await self._loop.create_server(gate, sock=self._socket, backlog=_BACKLOG)
        self._started.set()
        await self._stopping.wait()
        server.close()
        # Streams have no end of their own: without this, cleaning up would wait for each of them.
        for connection in runner.server.connections:
            connection.force_close()
        await runner.cleanup()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)


def _check_limits(config: ServeConfig) -> None:
    if not 0 <= config.port <= 65535:
        raise UsageError(f"the page's port is {config.port}; ports are 0 (a free one) to 65535")
    if config.max_clients < 1:
        raise UsageError(f"max_clients is {config.max_clients}; at least 1 client must be let in")
    if not 0 < config.video_fps <= 120:
        raise UsageError(f"video_fps is {config.video_fps:g}; it must be above 0 and at most 120")


def _listen(config: ServeConfig) -> socket.socket:
    where = f"{config.host}:{config.port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            config.host or None, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        raise UsageError(
            f"the page cannot listen on {where}: {error}; give this machine's address"
        ) from error
    listening = socket.socket(family, kind, protocol)
    try:
        # Not SO_REUSEPORT: a second app on the port must fail, not share it.
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(_BACKLOG)
    except OSError as error:
        listening.close()
        raise UsageError(f"the page cannot listen on {where}: {_remedy(error)}") from error
    listening.setblocking(False)
    return listening


def _remedy(error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return "the port is in use; choose another (port 0 takes a free one), or end what uses it"
    if error.errno == errno.EACCES:
        return "ports below 1024 are for the superuser; choose another"
    if error.errno == errno.EADDRNOTAVAIL:
        return "no interface of this machine has that address; 0.0.0.0 is all of them"
    return error.strerror or str(error)


def _yield_to_the_runtime() -> None:
    """Lowers this thread's priority; on Linux it is a thread's, elsewhere it would be the process's."""
    if hasattr(os, "sched_setaffinity"):  # Linux
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
