"""The log: lines for people, JSON for programs, once for each change, and never a password."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from apps.streaming.contracts import SourceState, SourceStatus
from apps.streaming.logs import StateLog, configure_logging, log_event, redact


@pytest.fixture(autouse=True)
def _quiet_afterwards() -> Iterator[None]:
    yield
    logger = logging.getLogger("edgefold")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    logger.propagate = True
    logger.setLevel(logging.NOTSET)


def status(state: SourceState, reason: str | None = None, source_id: str = "gate") -> SourceStatus:
    return SourceStatus(source_id, state, 0, reason, 25.0, (640, 480), None, 1, 0, False)


def lines_of(stream: io.StringIO) -> list[str]:
    return stream.getvalue().splitlines()


def test_a_line_for_a_person() -> None:
    stream = io.StringIO()
    configure_logging(False, stream=stream)
    log_event("engine_swapped", "net-2 runs", source=None, digest="0123abcd", reloads=1)
    (line,) = lines_of(stream)
    time, _, rest = line.partition(" ")
    assert rest == "INFO engine_swapped: net-2 runs (digest=0123abcd reloads=1)"
    assert len(time) == len("2026-11-25T12:40:03.120Z")
    assert time.endswith("Z")


def test_a_line_for_a_program() -> None:
    stream = io.StringIO()
    configure_logging(True, stream=stream)
    log_event(
        "source_lost", "no “answer”", level=logging.ERROR, source="gate", size_wh=(640, 480), path=Path("/x")
    )
    told = json.loads(stream.getvalue())
    assert told.pop("time").endswith("Z")
    assert told == {
        "level": "error",
        "event": "source_lost",
        "source": "gate",
        "message": "no “answer”",
        "size_wh": [640, 480],
        "path": "/x",
    }


def test_other_loggers_below_come_out_in_the_same_form() -> None:
    stream = io.StringIO()
    configure_logging(True, stream=stream)
    try:
        raise ValueError("at rtsp://me:hunter2@camera/1")
    except ValueError:
        logging.getLogger("edgefold.capture").exception("could not open %s", "rtsp://me:hunter2@camera/1")
    told = json.loads(stream.getvalue())
    assert told["event"] == "message"
    assert told["message"] == "could not open rtsp://***@camera/1"
    assert "ValueError: at rtsp://***@camera/1" in told["exception"]
    assert "hunter2" not in stream.getvalue()


def test_a_second_configuration_replaces_the_first() -> None:
    first, second = io.StringIO(), io.StringIO()
    configure_logging(False, stream=first)
    configure_logging(False, stream=second)
    log_event("once")
    assert first.getvalue() == ""
    assert len(lines_of(second)) == 1


def test_a_change_of_state_is_told_once_with_its_reason() -> None:
    stream = io.StringIO()
    configure_logging(True, stream=stream)
    log = StateLog()
    for _ in range(3):
        log.update([status(SourceState.CONNECTING), status(SourceState.LIVE, source_id="yard")])
    for _ in range(3):
        log.update(
            [status(SourceState.DEGRADED, "no frame for 2.1 s"), status(SourceState.LIVE, None, "yard")]
        )
    log.update([status(SourceState.LOST, "401 from rtsp://me:hunter2@camera/1")])
    told = [json.loads(line) for line in lines_of(stream)]
    assert [(line["source"], line["state"], line["level"], line.get("was")) for line in told] == [
        ("gate", "CONNECTING", "info", None),
        ("yard", "LIVE", "info", None),
        ("gate", "DEGRADED", "warning", "CONNECTING"),
        ("gate", "LOST", "error", "DEGRADED"),
    ]
    assert told[2]["reason"] == "no frame for 2.1 s"
    assert told[3]["reason"] == "401 from rtsp://***@camera/1"


def test_what_repeats_is_counted_and_one_kind_does_not_hide_another(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("apps.streaming.logs.time.monotonic", lambda: now[0])
    stream = io.StringIO()
    configure_logging(True, stream=stream)
    for n in range(100):
        now[0] += 0.1
        log_event("frame_dropped", str(n), source="gate")
    log_event("frame_dropped", "other source", source="yard")
    assert [json.loads(line)["message"] for line in lines_of(stream)] == [
        "0",
        "1",
        "2",
        "3",
        "4",
        "other source",
    ]
    now[0] += 60.0
    log_event("frame_dropped", "again", source="gate")
    log_event("frame_dropped", "and again", source="gate")
    *_, again, last = (json.loads(line) for line in lines_of(stream))
    assert again["left_out"] == 95
    assert "left_out" not in last


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("rtsp://me:secret@host:554/a?b=1", "rtsp://***@host:554/a?b=1"),
        ("mqtt://token@broker", "mqtt://***@broker"),
        ("rtsp://me:p@ss@host/1", "rtsp://***@host/1"),
        ("rtsp://h/u?user=me&password=pw&channel=1", "rtsp://h/u?user=***&password=***&channel=1"),
        ("GET /?token=abc HTTP/1.1", "GET /?token=*** HTTP/1.1"),
        ("Authorization: Bearer abcdefghijkl", "Authorization: Bearer ***"),
        ("two rtsp://a:b@c/ and http://d:e@f/", "two rtsp://***@c/ and http://***@f/"),
        (
            "no secret: a@b.example, keyboard=us, 3 basic steps",
            "no secret: a@b.example, keyboard=us, 3 basic steps",
        ),
    ],
)
def test_credentials_are_taken_out_of_free_text(text: str, shown: str) -> None:
    assert redact(text) == shown


def test_a_secret_is_hidden_wherever_it_stands() -> None:
    stream = io.StringIO()
    configure_logging(True, stream=stream, secrets=("open-sesame", "a"))
    log_event("serving", "at http://host/#open-sesame", nested={"tokens": ["open-sesame"]})
    told = json.loads(stream.getvalue())
    assert told["message"] == "at http://host/#***"
    assert told["nested"] == {"tokens": ["***"]}, "and what is too short to be a secret blanks out nothing"


def test_the_journal_is_told_the_priority(tmp_path: Path) -> None:
    """JOURNAL_STREAM names the file that standard error is: only then the prefix is understood."""
    code = (
        "import logging; from apps.streaming.logs import *; configure_logging(False); "
        "log_event('a'); log_event('b', level=logging.ERROR)"
    )
    for connected in (True, False):
        with (tmp_path / "log").open("w+") as file:
            info = os.fstat(file.fileno())
            inode = info.st_ino if connected else info.st_ino + 1
            environ = {**os.environ, "JOURNAL_STREAM": f"{info.st_dev}:{inode}"}
            subprocess.run([sys.executable, "-c", code], stderr=file, env=environ, check=True)
            file.seek(0)
            first, second = file.read().splitlines()
        assert first.startswith("<6>2") is connected
        assert second.startswith("<3>2") is connected
