from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import PATIENCE_S, SLACK_S, eventually

from apps.streaming import event_log
from apps.streaming.contracts import Event
from apps.streaming.event_log import event_line
from apps.streaming.events import EventLog
from apps.streaming.outbox import Outbox
from pipeline.errors import UsageError


def event(index: int, source: str = "cam") -> Event:
    return Event("enter", source, "cat", 0, 0.75, index, 10**9 * index, "2026-11-25T12:00:00.000Z")


def frames_of(path: Path) -> list[int]:
    return [json.loads(line)["frame"] for line in path.read_text().splitlines()]


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_log, "_RETRY_S", (0.05, 0.1))
    monkeypatch.setattr(event_log, "_POLL_S", 0.02)


def test_a_line_is_one_json_object() -> None:
    assert json.loads(event_line(event(3))) == {
        "event": "enter",
        "source": "cam",
        "label": "cat",
        "class": 0,
        "confidence": 0.75,
        "frame": 3,
        "timestamp_ns": 3_000_000_000,
        "time": "2026-11-25T12:00:00.000Z",
    }
    left = Event("leave", "cam", "a\nb", 0, 0.75, 3, 0, "2026-11-25T12:00:00.000Z", 1.23456)
    assert json.loads(event_line(left))["seconds"] == 1.235
    assert "\n" not in event_line(left)


def test_lines_can_be_followed_and_are_appended(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = EventLog(str(path))
    log.publish(event(0))
    eventually(lambda: path.read_text().endswith("\n"))
    log.close()
    log.close()
    again = EventLog(str(path))
    for index in range(1, 50):
        again.publish(event(index))
    again.close()
    assert frames_of(path) == list(range(50))
    assert again.counters() == {"published": 49, "delivered": 49, "dropped": 0, "queued": 0, "failures": 0}


def test_a_moved_file_is_opened_again(tmp_path: Path) -> None:
    path, rotated = tmp_path / "events.jsonl", tmp_path / "events.jsonl.1"
    log = EventLog(str(path))
    log.publish(event(0))
    eventually(lambda: log.counters()["delivered"] == 1)
    path.rename(rotated)
    log.publish(event(1))
    eventually(lambda: log.counters()["delivered"] == 2)
    path.unlink()
    log.publish(event(2))
    log.close()
    assert frames_of(rotated) == [0]
    assert frames_of(path) == [2]


def test_a_full_disk_is_counted_and_waited_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "events.jsonl"
    path.symlink_to("/dev/full")
    log = EventLog(str(path), capacity=10)
    for index in range(30):
        log.publish(event(index))
    eventually(lambda: log.counters()["failures"] >= 3)
    counters = log.counters()
    assert (counters["delivered"], counters["dropped"], counters["queued"]) == (0, 20, 10)
    path.unlink()  # there is room again
    eventually(lambda: log.counters()["delivered"] == 10)
    log.close()
    assert frames_of(path) == list(range(20, 30))
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2, said  # not once for every attempt
    assert "failed (No space left on device)" in said[0]
    assert "works again" in said[1]


@pytest.mark.parametrize("to_file", [True, False])
def test_a_full_disk_spoils_no_line(tmp_path: Path, to_file: bool) -> None:
    """A limit on the size of files stands in for the disk; it is reached within the third event, and lifted.

    Of a file, the beginning of a line is cut off again; standard output keeps it, on a line of its own.
    """
    path = tmp_path / "events.jsonl"
    script = f"""
import resource, signal, sys, time
from apps.streaming import event_log
from apps.streaming.contracts import Event
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
event_log._RETRY_S = (0.05, 0.1)
def event(index):
    return Event("enter", "cam", "cat", 0, 0.75, index, 0, "2026-11-25T12:00:00.000Z")
size = len(event_log.event_line(event(0))) + 1
log = event_log.EventLog({str(path) if to_file else "-"!r})
resource.setrlimit(resource.RLIMIT_FSIZE, (2 * size + size // 2, resource.RLIM_INFINITY))
for index in range(5):
    log.publish(event(index))
while log.counters()["failures"] < 2:
    time.sleep(0.01)
assert open({str(path)!r}).read().count("\\n") == 2
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
log.close()
"""
    with path.open("w") as stdout:
        result = subprocess.run(
            [sys.executable, "-c", script],
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            timeout=PATIENCE_S,
        )
    assert result.returncode == 0, result.stderr
    lines = path.read_text().splitlines()
    if not to_file:
        assert event_line(event(2)).startswith(lines.pop(2)[:20])
    assert [json.loads(line)["frame"] for line in lines] == [0, 1, 2, 3, 4]


def test_a_line_that_a_crash_cut_off_does_not_spoil_the_next(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"event": "ent')
    log = EventLog(str(path))
    log.publish(event(1))
    log.close()
    lines = path.read_text().splitlines()
    assert lines[0] == '{"event": "ent'
    assert json.loads(lines[1])["frame"] == 1


def test_standard_output(capfd: pytest.CaptureFixture[str]) -> None:
    log = EventLog("-")
    log.publish(event(7))
    log.close()
    assert json.loads(capfd.readouterr().out)["frame"] == 7
    os.write(1, b"still open\n")
    assert capfd.readouterr().out == "still open\n"


def test_a_reader_that_never_reads_blocks_nothing() -> None:
    """Standard output is a pipe that is full: publishing goes on, closing gives up after two seconds."""
    script = """
import sys, time
from apps.streaming.contracts import Event
from apps.streaming.event_log import EventLog
log = EventLog("-", capacity=5000)
event = Event("enter", "cam", "cat", 0, 0.75, 1, 0, "2026-11-25T12:00:00.000Z")
started = time.monotonic()
for _ in range(10_000):
    log.publish(event)
published = time.monotonic() - started
log.close()
print(published, time.monotonic() - started - published, log.counters()["dropped"], file=sys.stderr)
"""
    reads, writes = os.pipe()
    try:
        result = subprocess.run(
            [sys.executable, "-c", script],
            stdout=writes,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            timeout=PATIENCE_S,
        )
    finally:
        os.close(reads)
        os.close(writes)
    published_s, closed_s, dropped = (float(word) for word in result.stderr.split())
    assert result.returncode == 0
    assert published_s < SLACK_S
    assert 1.9 < closed_s < 2.0 + SLACK_S
    assert dropped > 3000


@pytest.mark.parametrize("kind", ["folder", "no parent", "fifo"])
def test_what_is_no_log_file(tmp_path: Path, kind: str) -> None:
    target = {"folder": tmp_path, "no parent": tmp_path / "none" / "e.jsonl", "fifo": tmp_path / "fifo"}[kind]
    if kind == "fifo":
        os.mkfifo(target)
    with pytest.raises(UsageError, match="cannot write events to"):
        EventLog(str(target))


def test_the_outbox_gives_up_the_oldest_and_counts() -> None:
    outbox = Outbox(3)
    for index in range(5):
        outbox.put("cam", str(index))
    assert outbox.counters() == {"published": 5, "delivered": 0, "dropped": 2, "queued": 3, "failures": 0}
    first, second = outbox.take(), outbox.take()
    assert first is not None
    assert second is not None
    assert (first[2], second[2]) == ("2", "3")
    outbox.put("cam", "5")
    outbox.put("cam", "6")
    outbox.confirm(first[0])
    outbox.restore()  # 3 is back, before 4, 5 and 6, and one too many
    left = [entry[2] for _ in range(3) if (entry := outbox.take()) is not None]
    assert left == ["4", "5", "6"]
    assert outbox.counters() == {"published": 7, "delivered": 1, "dropped": 3, "queued": 3, "failures": 0}
