"""Events as JSON lines, to a file that may be rotated and a disk that may be full."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import stat
import threading
from pathlib import Path

from apps.streaming.contracts import Event
from apps.streaming.outbox import Outbox
from pipeline.errors import UsageError

__all__ = ["EventLog", "event_line"]

_log = logging.getLogger(__name__)

_CAPACITY = 10_000
_STANDARD_OUTPUT = 1
_POLL_S = 0.2
_RETRY_S = (1.0, 30.0)
_CLOSE_S = 2.0


def event_line(event: Event) -> str:
    """An event as one line of JSON, without the line feed; the same in the log and to a broker."""
    values: dict[str, str | int | float] = {
        "event": event.kind,
        "source": event.source_id,
        "label": event.label,
        "class": event.class_index,
        "confidence": round(event.confidence, 6),
        "frame": event.frame_index,
        "timestamp_ns": event.timestamp_ns,
        "time": event.time_utc,
    }
    if event.seconds is not None:
        values["seconds"] = round(event.seconds, 3)
    return json.dumps(values)


class EventLog:
    """Appends events to a file, or to standard output; an `EventOutput`.

    Written in its own thread. A line is in the file whole or not at all: what was written of it when the
    disk became full is cut off again, and it is tried again, after 1 s at first and 30 s at most. A file
    that was moved away (logrotate) is opened again under its name before the next line.

    Args:
        target: path of the file, appended to; ``-`` is standard output.
        capacity: events kept while nothing can be written; the oldest are given up.

    Raises:
        UsageError: the file cannot be opened.
    """

    def __init__(self, target: str, capacity: int = _CAPACITY) -> None:
        self._target = target
        self._path = None if target == "-" else Path(target).expanduser()
        self._outbox = Outbox(capacity)
        self._closing = threading.Event()
        self._failing = False
        self._torn = False
        self._fd = _STANDARD_OUTPUT
        if self._path is not None:
            try:
                self._fd = _open(self._path)
            except OSError as error:
                raise UsageError(f"cannot write events to {target}: {error.strerror}") from error
        self._thread = threading.Thread(target=self._write_loop, name="event-log", daemon=True)
        self._thread.start()

    def publish(self, event: Event) -> None:
        """Queues the event."""
        self._outbox.put(event.source_id, event_line(event))

    def counters(self) -> dict[str, int]:
        """Of the queue; ``failures`` are attempts to write."""
        return self._outbox.counters()

    def close(self) -> None:
        """Writes what is queued, for two seconds at most; twice is harmless."""
        self._closing.set()
        self._thread.join(_CLOSE_S)

    def _write_loop(self) -> None:
        retry_s = _RETRY_S[0]
        while True:
            last_try = self._closing.is_set()
            entry = self._outbox.take(0.0 if last_try else _POLL_S)
            if entry is None:
                if last_try:
                    break
                continue
            number, _, line = entry
            try:
                self._append(line.encode() + b"\n")
            except OSError as error:
                self._outbox.restore()
                self._outbox.failed()
                self._report(error)
                if last_try:
                    break
                self._closing.wait(retry_s)
                retry_s = min(2 * retry_s, _RETRY_S[1])
                continue
            self._outbox.confirm(number)
            self._report(None)
            retry_s = _RETRY_S[0]
        if self._path is not None:
            with contextlib.suppress(OSError):
                os.close(self._fd)

    def _append(self, line: bytes) -> None:
        if self._path is not None and _moved(self._path, self._fd):
            fd = _open(self._path)
            os.close(self._fd)
            self._fd = fd
        if self._torn:
            line = b"\n" + line
        n_written = 0
        try:
            while n_written < len(line):
                n_written += os.write(self._fd, line[n_written:])
        except OSError:
            self._torn = self._torn or bool(n_written and not self._cut_off(n_written))
            raise
        self._torn = False

    def _cut_off(self, n_bytes: int) -> bool:
        """Removes the beginning of a line; not from standard output, which others write to as well."""
        if self._path is None:
            return False
        try:
            os.ftruncate(self._fd, os.fstat(self._fd).st_size - n_bytes)
        except OSError:
            return False
        return True

    def _report(self, error: OSError | None) -> None:
        """Says once that writing fails, and once that it works again."""
        if error is not None and not self._failing:
            _log.warning(
                "writing events to %s failed (%s); they are kept in memory, and it is tried again",
                self._target,
                error.strerror,
            )
        elif error is None and self._failing:
            _log.warning("writing events to %s works again: %s", self._target, self._outbox.counters())
        self._failing = error is not None


def _open(path: Path) -> int:
    """A descriptor that appends. A last line that a crash cut off is ended first.

    Raises:
        OSError: it cannot be opened, or is neither a file nor a device.
    """
    # Without O_NONBLOCK, opening a FIFO would wait for its reader.
    fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o644)
    try:
        found = os.fstat(fd)
        if not (stat.S_ISREG(found.st_mode) or stat.S_ISCHR(found.st_mode)):
            raise OSError(0, "neither a file nor a device; give a file, or - for standard output")
        if stat.S_ISREG(found.st_mode) and found.st_size and os.pread(fd, 1, found.st_size - 1) != b"\n":
            os.write(fd, b"\n")
    except OSError:
        os.close(fd)
        raise
    return fd


def _moved(path: Path, fd: int) -> bool:
    try:
        there = path.stat()
    except FileNotFoundError:
        return True
    here = os.fstat(fd)
    return (there.st_dev, there.st_ino) != (here.st_dev, here.st_ino)
