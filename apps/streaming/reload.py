"""A new bundle into a running stream: loaded beside the old engine, and swapped in only when it is good.

::

    SIGHUP, POST /reload ─▶ open, verify ─▶ load, warm ─▶ golden frames ─▶ swap ─▶ close the old engine
                                 │               │              │
                                 └───────────────┴──────────────┴─▶ refused: logged, shown; the old one goes on

The stream runs meanwhile; until the old engine is closed, both are in memory. The usual way to deploy is
a link to the bundle that is set to another one, then SIGHUP: there is no watching of the folder, since a
program that replaces a bundle knows when it is done, and a watcher must guess.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

from apps.streaming.engine_slot import EngineSlot
from apps.streaming.loading import LoadedEngine
from apps.streaming.memory import give_back_freed
from pipeline.errors import EdgefoldError

__all__ = ["Reloader"]

_log = logging.getLogger("edgefold.reload")
_IDLE_LIMIT_S = 120.0


class Reloader:
    """Swaps engines, one at a time; every method may be called from any thread.

    Args:
        slot: what runs.
        bundle: what a reload without a path loads again.
        load: bundle to a warm, checked engine; raises `EdgefoldError`.
        on_swap: called after a swap with the old and the new engine.
    """

    def __init__(
        self,
        slot: EngineSlot,
        bundle: Path,
        load: Callable[[Path], LoadedEngine],
        on_swap: Callable[[LoadedEngine, LoadedEngine], None] = lambda old, new: None,
    ) -> None:
        self._slot = slot
        self._bundle = bundle
        self._load = load
        self._on_swap = on_swap
        self._one_at_a_time = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = False
        self.reloads = 0
        self.failures = 0
        self.last_error: str | None = None
        """Why the last reload was refused; ``None`` after one that was taken."""

    @property
    def busy(self) -> bool:
        """Whether a reload that `start` began is under way."""
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> bool:
        """Reloads in the background; ``False`` where a reload that was started so is still under way."""
        if self.busy:
            return False
        self._thread = threading.Thread(target=self._in_background, name="stream-reload", daemon=True)
        self._thread.start()
        return True

    def reload(self, bundle: Path | None = None) -> None:
        """Loads a bundle and swaps it in.

        Args:
            bundle: by default the configured one, which may be a link that was set to another bundle. One
                that is given is also what the next reload loads.

        Raises:
            EdgefoldError: it was refused; the old engine runs.
        """
        with self._one_at_a_time:
            try:
                self._replace(self._bundle if bundle is None else bundle)
            finally:
                give_back_freed()

    def close(self) -> None:
        """What is loading now is not swapped in any more."""
        self._closed = True

    def _replace(self, path: Path) -> None:
        try:
            new = self._load(path)
        except Exception as error:
            self.failures += 1
            self.last_error = str(error) or type(error).__name__
            _log.error("reload of %s refused, the old engine goes on: %s", path, self.last_error)
            if isinstance(error, EdgefoldError):
                raise
            raise EdgefoldError(
                f"the bundle {path} could not be loaded: {type(error).__name__}: {error}"
            ) from error
        if self._closed:
            new.runner.close()
            raise EdgefoldError(f"the bundle {path} was loaded after the stream had ended")
        old = self._slot.swap(new)
        self._bundle = path
        self.reloads += 1
        self.last_error = None
        self._on_swap(old, new)
        _log.info("%s (%s) infers now; %s", new.bundle.path, new.digest, new.golden)
        if not self._slot.close_when_idle(old, _IDLE_LIMIT_S):
            _log.error(
                "the engine of %s still owes an answer after %.0f s and was not closed",
                old.bundle.path,
                _IDLE_LIMIT_S,
            )

    def _in_background(self) -> None:
        try:
            self.reload()
        except EdgefoldError:
            return  # logged and counted by `reload`
