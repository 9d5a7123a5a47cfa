"""What the server asks of the app: its view, a reload, a check; each in a thread, one at a time."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from aiohttp import web

from apps.streaming.contracts import StreamView
from apps.streaming.serve.recent import RecentEvents

__all__ = ["App", "Seen"]

_SHARED_FOR_S = 0.25
"""Whoever asks within this time gets the same view: twenty open pages cost what one does."""
_ANSWER_LIMIT_S = 5.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Seen:
    """A view, and what the page is sent of it."""

    view: StreamView
    taken_ns: int
    """Monotonic; the times in the view are told from it."""
    payload: str
    """JSON: the view without the buckets of ``/metrics``, `taken_ns` and the last events."""


class App:
    """The running app as the server asks it.

    Args:
        view: everything at one moment; may take the runtime's locks.
        reload: loads the bundle anew, or another one; may take minutes.
        check: runs the golden frames and says what they found.
        events: the last events.
        executor: where these run.
    """

    def __init__(
        self,
        view: Callable[[], StreamView],
        reload: Callable[[Path | None], None],
        check: Callable[[], str],
        events: RecentEvents,
        executor: Executor,
    ) -> None:
        self._view = view
        self._reload = reload
        self._check = check
        self._events = events
        self._executor = executor
        self._looking: asyncio.Future[Seen] | None = None
        self._seen: Seen | None = None
        self._busy: set[str] = set()

    async def seen(self) -> Seen:
        """The app now, or a quarter of a second ago.

        Raises:
            HTTPServiceUnavailable: it does not answer.
        """
        if self._seen is not None and time.monotonic_ns() - self._seen.taken_ns < _SHARED_FOR_S * 1e9:
            return self._seen
        if self._looking is None:
            self._looking = self._run(self._look)
            self._looking.add_done_callback(self._looked)
        # Shielded: one that is stuck stays the only one, however many ask.
        try:
            return await asyncio.wait_for(asyncio.shield(self._looking), _ANSWER_LIMIT_S)
        except asyncio.TimeoutError:
            raise web.HTTPServiceUnavailable(
                text=f"503: the stream has not answered for {_ANSWER_LIMIT_S:.0f} s\n"
            ) from None

    async def reload(self, bundle: Path | None) -> None:
        """Raises what the app's reload raises; `HTTPConflict` while one is under way."""
        await self._alone("reload", lambda: self._reload(bundle))

    async def check(self) -> str:
        """Raises what the app's check raises; `HTTPConflict` while one is under way."""
        return await self._alone("check", self._check)

    def _looked(self, future: asyncio.Future[Seen]) -> None:
        self._looking = None
        if not future.cancelled() and future.exception() is None:
            self._seen = future.result()

    def _look(self) -> Seen:
        view, taken_ns = self._view(), time.monotonic_ns()
        without_buckets = tuple(
            dataclasses.replace(source, metrics=dataclasses.replace(source.metrics, buckets={}))
            for source in view.sources
        )
        body: dict[str, Any] = dataclasses.replace(view, sources=without_buckets).to_json()
        body["now_ns"] = taken_ns
        body["recent_events"] = [dataclasses.asdict(event) for event in self._events.latest()]
        return Seen(view, taken_ns, json.dumps(body))

    async def _alone(self, command: str, run: Callable[[], T]) -> T:
        if command in self._busy:
            raise web.HTTPConflict(text=f"409: a {command} is under way; ask again when it is done\n")
        self._busy.add(command)
        future = self._run(run)
        # When it ends, not when the client that asked for it hangs up.
        future.add_done_callback(lambda _: self._busy.discard(command))
        return await asyncio.shield(future)

    def _run(self, run: Callable[[], T]) -> asyncio.Future[T]:
        return asyncio.get_running_loop().run_in_executor(self._executor, run)
