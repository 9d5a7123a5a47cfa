"""What is done to the app of the soak, and the reading of its own that must rise by it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soak_app import SoakApp

__all__ = ["Fault", "faults"]

_N_CLIENTS = 30


@dataclass(frozen=True, slots=True)
class Fault:
    """What is done, and a reading of the app that rises because of it, and only because of it."""

    name: str
    inject: Callable[[], object]
    reading: Callable[[], float]
    undo: Callable[[], object] = lambda: None


def faults(app: SoakApp) -> tuple[Fault, ...]:
    """Each of the kinds, in the order of their turns."""
    two, clients = app.cameras[1], _DeafClients(app.port)

    def behave(how: Any) -> Callable[[], None]:
        return lambda: setattr(two, "behaviour", how)

    def metric(name: str, **labels: str) -> Callable[[], float]:
        return lambda: app.metric(name, **labels)

    well = behave("well")
    restarts = metric("edgefold_source_restarts_total", source="two")
    stalls = metric("edgefold_source_stalls_total", source="two")
    any_restart = metric("edgefold_source_restarts_total")
    any_stall = metric("edgefold_source_stalls_total")
    corrupt = metric("edgefold_frames_dropped_total", source="two", reason="no image")
    frozen = metric("edgefold_source_frozen", source="two")
    refused = metric("edgefold_page_clients_refused_total")
    failed = metric("edgefold_engine_reload_failures_total")
    return (
        Fault("capture process killed", lambda: _signal_child(app, signal.SIGKILL), any_restart),
        Fault("camera stalls", behave("stalls"), stalls, well),
        Fault("camera closes", behave("closes"), restarts, well),
        Fault("camera answers 404", behave("404"), restarts, well),
        Fault("corrupt pictures", behave("corrupt"), corrupt, well),
        Fault("frozen pictures", behave("frozen"), frozen, well),
        Fault("another size", behave("other size"), lambda: app.width("two"), well),
        Fault("capture process stopped", lambda: _signal_child(app, signal.SIGSTOP), any_stall),
        Fault(
            "bundle loaded anew",
            lambda: app.process.send_signal(signal.SIGHUP),
            metric("edgefold_engine_reloads_total"),
        ),
        Fault(
            "damaged bundle loaded", lambda: _load_damaged(app), failed, lambda: _point_at(app, app.bundle)
        ),
        Fault("clients that never read", clients.open, refused, clients.close),
    )


def _signal_child(app: SoakApp, number: int) -> None:
    children = sorted(app.children())
    os.kill(children[len(app.samples) % len(children)], number)


def _point_at(app: SoakApp, bundle: Path) -> None:
    """The app's bundle is a link, as a deployment swaps it."""
    temporary = app.folder / "next"
    temporary.symlink_to(bundle)
    temporary.replace(app.folder / "current")


def _load_damaged(app: SoakApp) -> None:
    _point_at(app, app.folder / "damaged")
    app.process.send_signal(signal.SIGHUP)


class _DeafClients:
    """Browsers that ask for the picture and never read it."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._open: list[socket.socket] = []

    def open(self) -> None:
        for _ in range(_N_CLIENTS):
            with contextlib.suppress(OSError):
                client = socket.create_connection(("127.0.0.1", self._port), timeout=5)
                client.sendall(b"GET /video/one HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
                self._open.append(client)

    def close(self) -> None:
        for client in self._open:
            client.close()
        self._open.clear()
