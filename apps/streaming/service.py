"""The camera app under systemd: telling it how the app is, and the unit that runs it.

`Notifier` speaks the protocol of sd_notify(3), which is one datagram to a socket, so no library is needed. The watchdog is
fed only while the runtime's own heart beats: a process whose threads hang is restarted, although it still runs.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from types import TracebackType

__all__ = ["Notifier"]

_FRESH_SHARE = 0.5
"""Of the watchdog's interval: a beat older than this is no sign of life. sd_watchdog_enabled(3) asks for a sign every
half interval."""
_PERIOD_SHARE = 0.25


class Notifier:
    """Tells the service manager that the app is ready, alive, or ending; nothing where there is none.

    No method raises or blocks: a manager that does not listen must not end a stream.

    Args:
        environ: where NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID stand.
    """

    def __init__(self, environ: Mapping[str, str] | None = None) -> None:
        environ = os.environ if environ is None else environ
        address = environ.get("NOTIFY_SOCKET", "")
        self._socket: socket.socket | None = None
        self._address = "\0" + address[1:] if address.startswith("@") else address
        if address.startswith(("/", "@")):  # other families (vsock) are for whole machines
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            self._socket.setblocking(False)
        self.watchdog_s = _watchdog_s(environ) if self._socket is not None else None
        """Without a sign of life for so long the manager ends the process; ``None``: it does not."""
        self._last_alive_s = -float("inf")

    @property
    def enabled(self) -> bool:
        """Whether somebody asked to be told."""
        return self._socket is not None

    def ready(self, status: str = "") -> bool:
        """The app works: the engine is loaded, and its sources are being opened. Ends a `reloading`, too."""
        return self._send("READY=1", *([f"STATUS={_line(status)}"] if status else []))

    def reloading(self) -> bool:
        """A new bundle is being loaded; `ready` follows, whether it was taken or refused."""
        return self._send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def status(self, text: str) -> bool:
        """One line for ``systemctl status``, redacted by the caller."""
        return self._send(f"STATUS={_line(text)}")

    def alive(self, last_beat_ns: int) -> bool:
        """Feeds the watchdog if the runtime's last heartbeat is young; call it several times a second.

        Args:
            last_beat_ns: monotonic, when the runtime's loop last went round.

        Returns:
            Whether a sign was sent: the manager wants one, one is due, and there is life.
        """
        if self.watchdog_s is None:
            return False
        now_s = time.monotonic()
        if now_s - last_beat_ns / 1e9 > _FRESH_SHARE * self.watchdog_s:
            return False
        if now_s - self._last_alive_s < _PERIOD_SHARE * self.watchdog_s:
            return False
        self._last_alive_s = now_s
        return self._send("WATCHDOG=1")

    def stopping(self, status: str = "") -> bool:
        """The app ends by itself or was told to."""
        return self._send("STOPPING=1", *([f"STATUS={_line(status)}"] if status else []))

    def close(self) -> None:
        """Nothing is told after this."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def __enter__(self) -> Notifier:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _send(self, *assignments: str) -> bool:
        if self._socket is None:
            return False
        try:
            self._socket.sendto("\n".join(assignments).encode(), self._address)
        except OSError:
            return False
        return True


def _watchdog_s(environ: Mapping[str, str]) -> float | None:
    """The interval that is meant for this process [sd_watchdog_enabled(3)]."""
    pid, interval_us = environ.get("WATCHDOG_PID"), environ.get("WATCHDOG_USEC", "")
    if pid is not None and pid != str(os.getpid()):
        return None
    return int(interval_us) / 1e6 if interval_us.isdecimal() and int(interval_us) > 0 else None


def _line(text: str) -> str:
    """An assignment ends at a line feed; a status is one line."""
    return " ".join(text.split())
