"""What happens in the camera app, one line an event, on standard error: for a person, or as JSON.

Standard `logging` underneath, under the logger ``edgefold``. An event has a name, perhaps a source, and fields:

    2026-11-25T12:40:03.120Z WARNING gate: source_state: DEGRADED, no frame for 2.1 s (was=LIVE restarts=1)
    {"time": "2026-11-25T12:40:03.120Z", "level": "warning", "event": "source_state", "source": "gate", …}

What repeats is told a few times a minute and then counted; credentials are taken out of every line, whoever wrote it.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from typing import IO, Any

from apps.streaming.contracts import SourceState, SourceStatus

__all__ = ["StateLog", "configure_logging", "log_event", "redact"]

_LOGGER = "edgefold"
_REPEATS = 5
_REPEAT_WINDOW_S = 60.0
_MIN_SECRET = 4
"""Shorter ones would blank out words."""
_HIDDEN = "***"
_USERINFO = re.compile(r"(?<=://)[^/?#\s\"']+(?=@)")  # to the last @: a password may hold one
_QUERY_SECRET = re.compile(
    r"(?i)\b(password|passwd|pwd|pass|token|secret|key|auth|user|username)=([^&\s\"']+)"
)
_BEARER = re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9+/=._~-]{8,}")
_LEVELS = {
    SourceState.CONNECTING: logging.INFO,
    SourceState.LIVE: logging.INFO,
    SourceState.ENDED: logging.INFO,
    SourceState.DEGRADED: logging.WARNING,
    SourceState.LOST: logging.ERROR,
}
# sd-daemon(3): what systemd's journal reads as the priority of a line.
_PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}


def configure_logging(
    as_json: bool,
    *,
    stream: IO[str] | None = None,
    secrets: Iterable[str] = (),
    environ: Mapping[str, str] | None = None,
) -> None:
    """Sends the app's log to `stream`; a second call replaces the first.

    Args:
        as_json: a JSON object a line instead of text.
        stream: standard error by default.
        secrets: texts that must never be written, such as a token; besides what `redact` finds by its form.
        environ: where JOURNAL_STREAM stands: lines that go to systemd's journal begin with their priority.
    """
    stream = sys.stderr if stream is None else stream
    to_journal = _is_journal(stream, os.environ if environ is None else environ)
    handler = logging.StreamHandler(stream)
    handler.addFilter(_Repeats())
    handler.setFormatter(_Formatter(as_json, to_journal, tuple(s for s in secrets if len(s) >= _MIN_SECRET)))
    logger = logging.getLogger(_LOGGER)
    for previous in list(logger.handlers):
        logger.removeHandler(previous)
        previous.close()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def log_event(
    event: str,
    message: str = "",
    *,
    level: int = logging.INFO,
    source: str | None = None,
    **fields: Any,
) -> None:
    """Logs one event.

    Args:
        event: its name, ``snake_case``: what a program filters by.
        message: for a person.
        level: of `logging`.
        source: the source it is about.
        **fields: JSON-compatible values.
    """
    extra = {"edgefold_event": event, "edgefold_source": source, "edgefold_fields": fields}
    logging.getLogger(_LOGGER).log(level, "%s", message, extra=extra)


def redact(text: str) -> str:
    """`text` without what looks like credentials: user and password of a URI, ``token=…``, ``Bearer …``."""
    text = _USERINFO.sub(_HIDDEN, text)
    text = _QUERY_SECRET.sub(lambda match: f"{match[1]}={_HIDDEN}", text)
    return _BEARER.sub(lambda match: f"{match[1]} {_HIDDEN}", text)


class StateLog:
    """Logs every change of a source's state once, with its reason. Called from one thread."""

    def __init__(self) -> None:
        self._states: dict[str, SourceState] = {}

    def update(self, statuses: Iterable[SourceStatus]) -> None:
        """Compares with what was seen last; call it as often as is convenient."""
        for status in statuses:
            before = self._states.get(status.source_id)
            if status.state is before:
                continue
            self._states[status.source_id] = status.state
            reason = f", {status.reason}" if status.reason else ""
            log_event(
                "source_state",
                f"{status.state.value}{reason}",
                level=_LEVELS[status.state],
                source=status.source_id,
                state=status.state.value,
                was=None if before is None else before.value,
                reason=status.reason,
                restarts=status.restarts,
                stalls=status.stalls,
            )


class _Repeats(logging.Filter):
    """Lets an event of one kind through five times a minute; the next one says how many were left out.

    A kind is an event's name, source, level and state. It stands at the handler, where lines of every logger come by.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._kinds: dict[tuple[Any, ...], tuple[float, int, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        fields = getattr(record, "edgefold_fields", {})
        kind = (
            getattr(record, "edgefold_event", record.msg),
            getattr(record, "edgefold_source", None),
            record.levelno,
            fields.get("state"),
        )
        now_s = time.monotonic()
        with self._lock:
            since_s, told, left_out = self._kinds.get(kind, (now_s, 0, 0))
            if now_s - since_s >= _REPEAT_WINDOW_S:
                since_s, told = now_s, 0
            if told >= _REPEATS:
                self._kinds[kind] = (since_s, told, left_out + 1)
                return False
            self._kinds[kind] = (since_s, told + 1, 0)
        record.edgefold_left_out = left_out
        return True


class _Formatter(logging.Formatter):
    def __init__(self, as_json: bool, to_journal: bool, secrets: tuple[str, ...]) -> None:
        super().__init__()
        self._as_json = as_json
        self._to_journal = to_journal
        self._secrets = secrets

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.datetime.fromtimestamp(record.created, datetime.timezone.utc)
        values = {
            "time": moment.strftime("%Y-%m-%dT%H:%M:%S.") + f"{moment.microsecond // 1000:03d}Z",
            "level": record.levelname.lower(),
            "event": getattr(record, "edgefold_event", "message"),
            "source": getattr(record, "edgefold_source", None),
            "message": record.getMessage(),
            **getattr(record, "edgefold_fields", {}),
        }
        left_out = getattr(record, "edgefold_left_out", 0)
        if left_out:
            values["left_out"] = left_out
        if record.exc_info:
            values["exception"] = self.formatException(record.exc_info)
        line = _json_line(self._clean(values)) if self._as_json else _text_line(self._clean(values))
        prefix = f"<{_PRIORITIES.get(record.levelno, 6)}>" if self._to_journal else ""
        return prefix + line

    def _clean(self, value: Any) -> Any:
        """`value` with no credentials in any text of it."""
        if isinstance(value, str):
            for secret in self._secrets:
                value = value.replace(secret, _HIDDEN)
            return redact(value)
        if isinstance(value, Mapping):
            return {key: self._clean(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._clean(item) for item in value]
        return value if value is None or isinstance(value, bool | int | float) else self._clean(str(value))


def _json_line(values: dict[str, Any]) -> str:
    told = {key: value for key, value in values.items() if value not in (None, "")}
    return json.dumps(told, ensure_ascii=False)


def _text_line(values: dict[str, Any]) -> str:
    source = f"{values.pop('source')}: " if values["source"] else ""
    head = f"{values.pop('time')} {values.pop('level').upper()} {source}{values.pop('event')}"
    message, exception = values.pop("message"), values.pop("exception", None)
    told = " ".join(
        f"{key}={value}"
        for key, value in values.items()
        if value is not None and key not in ("source", "state", "reason")
    )
    parts = f"{head}: {message}" if message else head
    # A message of several lines would be several lines of a log.
    line = " ".join(parts.split()) + (f" ({told})" if told else "")
    return f"{line}\n{exception}" if exception else line


def _is_journal(stream: IO[str], environ: Mapping[str, str]) -> bool:
    """Whether systemd connected `stream` to its journal: JOURNAL_STREAM is its device and inode [systemd.exec(5)]."""
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"
