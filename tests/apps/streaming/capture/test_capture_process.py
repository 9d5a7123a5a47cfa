"""Capture on real processes, sockets and signals: what facts of a camera's life must do, and must not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from leaks import Held, n_descriptors
from waiting import PATIENCE_S, SLACK_S, eventually

from apps.streaming.contracts import SourceState
from pipeline.errors import DataError, DeviceFaultError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="capture processes need Linux")
FOREVER = ["forever frame"]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_frames_arrive_whole_and_in_order(scripted: Callable[..., Any]) -> None:
    source = scripted(["fast"] * 60, live=False).start()
    source.until(lambda: source.feed.exhausted)
    assert [(index, value) for index, _, value in source.taken] == [(i, i) for i in range(60)]
    status = source.feed.status()
    assert status.state is SourceState.ENDED
    assert status.size_wh == (32, 24)
    assert status.restarts == 0
    assert source.feed.failure() is None
    assert source.feed.labels == ("blue", "green", "red")
    source.close()
    source.books()


def test_a_frame_is_shared_memory_which_its_holder_can_only_read(scripted: Callable[..., Any]) -> None:
    source = scripted(["frame"] * 3, live=False).start()
    captured = source.next()
    assert not captured.frame.image.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        captured.frame.image[0, 0] = 1
    captured.release()


@pytest.mark.keeps_time
def test_every_waits_for_a_slot_and_is_not_taken_for_silent(scripted: Callable[..., Any]) -> None:
    source = scripted(["fast"] * 20, live=False, stall_s=0.3, degraded_s=0.1).start()
    held = [source.next() for _ in range(8)]
    time.sleep(0.7)  # twice the watchdog's patience
    assert source.feed.take() is None
    assert source.feed.status().stalls == 0
    assert [int(captured.frame.image[0, 0, 0]) for captured in held] == list(range(8))
    for captured in held:
        source.metrics.frame_inferred(None)
        captured.release()
    source.until(lambda: source.feed.exhausted)
    assert source.metrics.snapshot().frames_inferred == 20
    assert source.metrics.snapshot().dropped == {}


def test_newest_keeps_one_and_counts_the_others(scripted: Callable[..., Any]) -> None:
    source = scripted(FOREVER).start()
    eventually(lambda: source.metrics.snapshot().dropped.get("newer frame", 0) >= 20)
    captured = source.next()
    assert captured.frame.index >= 20
    assert time.monotonic_ns() - captured.frame.timestamp_ns < SLACK_S * 1e9
    captured.release()
    source.metrics.frame_inferred(None)
    source.close()
    source.books()
    assert "no free buffer" not in source.metrics.snapshot().dropped


@pytest.mark.keeps_time
def test_a_camera_is_read_on_while_all_buffers_are_held(scripted: Callable[..., Any]) -> None:
    source = scripted(FOREVER).start()
    held: list[Any] = []

    def hold() -> bool:
        captured = source.feed.take()
        if captured is not None:
            held.append(captured)
        return source.metrics.snapshot().dropped.get("no free buffer", 0) >= 10

    eventually(hold)
    values = [int(captured.frame.image[0, 0, 0]) for captured in held]
    time.sleep(1.0)  # longer than the watchdog's patience: dropping is a sign of life
    assert source.feed.status().restarts == 0
    assert [int(captured.frame.image[0, 0, 0]) for captured in held] == values
    for captured in held:
        source.metrics.frame_inferred(None)
        captured.release()
    source.until(lambda: len(source.taken) > 5)
    source.close()
    source.books()


@pytest.mark.keeps_time
def test_a_killed_capture_comes_back_and_its_neighbour_notices_nothing(scripted: Callable[..., Any]) -> None:
    victim, neighbour = scripted(FOREVER).start(), scripted(FOREVER).start()
    victim.until(lambda: victim.taken)
    neighbour.until(lambda: neighbour.taken)
    before = neighbour.feed.pid
    os.kill(victim.feed.pid, signal.SIGKILL)
    victim.until(
        lambda: victim.feed.status().restarts == 1 and victim.feed.status().state is SourceState.LIVE
    )
    indices = [index for index, _, _ in victim.taken]
    assert indices == sorted(set(indices))
    assert neighbour.feed.pid == before
    assert neighbour.feed.status().restarts == 0
    count = len(neighbour.taken)
    neighbour.until(lambda: len(neighbour.taken) > count)
    for source in (victim, neighbour):
        source.close()
        source.books()


def test_frames_of_a_dead_capture_can_still_be_read(scripted: Callable[..., Any]) -> None:
    source = scripted(["frame"] * 5 + ["die"], FOREVER).start()
    captured = source.next()
    value = int(captured.frame.image[0, 0, 0])
    source.until(lambda: source.feed.status().restarts == 1 and source.taken)
    assert (captured.frame.image == value).all()
    captured.release()  # to a process that is gone


def test_a_stopped_capture_is_degraded_then_killed_by_the_watchdog(scripted: Callable[..., Any]) -> None:
    source = scripted(FOREVER).start()
    source.until(lambda: source.taken)
    pid = source.feed.pid
    os.kill(pid, signal.SIGSTOP)
    source.until(lambda: source.feed.status().state is SourceState.DEGRADED)
    seconds = source.until(lambda: source.feed.status().stalls == 1)
    assert seconds < 0.8 + SLACK_S
    source.until(lambda: source.feed.status().state is SourceState.LIVE)
    assert not alive(pid)
    assert source.feed.status().restarts == 1


def test_a_read_that_never_returns_is_ended(scripted: Callable[..., Any]) -> None:
    source = scripted(["frame", "hang"], FOREVER).start()
    source.until(lambda: source.feed.status().restarts == 1 and len(source.taken) > 3)
    assert source.feed.status().stalls == 1


def test_a_source_that_never_opens_is_killed_after_its_time(scripted: Callable[..., Any]) -> None:
    source = scripted(FOREVER, name="never", open_s=1.0).start()
    source.until(lambda: source.feed.status().stalls >= 1)
    status = source.feed.status()
    assert status.state is SourceState.CONNECTING  # never was anything else
    source.until(lambda: "did not open" in (source.feed.status().reason or ""))


def test_close_ends_a_capture_that_does_not_listen(scripted: Callable[..., Any]) -> None:
    source = scripted(["frame", "hang"], stall_s=60.0).start()
    source.until(lambda: source.taken)
    pid = source.feed.pid
    start_s = time.monotonic()
    source.close()
    assert time.monotonic() - start_s < SLACK_S  # and not the minute of the watchdog
    assert not alive(pid)


def test_a_new_size_is_right_from_the_first_frame(scripted: Callable[..., Any]) -> None:
    steps = (
        ["frame 24x32"] * 3 + ["frame 48x64"] * 3 + ["frame 12x16"] * 3 + ["array 24x32"] + ["array 24x32x4"]
    )
    source = scripted(steps, live=False).start()
    source.until(lambda: source.feed.exhausted)
    shapes = [shape for _, shape, _ in source.taken]
    assert shapes == [(24, 32, 3)] * 3 + [(48, 64, 3)] * 3 + [(12, 16, 3)] * 3 + [(24, 32), (24, 32, 4)]
    assert source.feed.status().size_wh == (32, 24)


def test_what_is_no_frame_is_counted_and_never_delivered(scripted: Callable[..., Any]) -> None:
    steps = ["frame", "none", "array 0x0x3", "array 40x1", "array 4x4x2", "frame"]
    source = scripted(steps, live=False).start()
    source.until(lambda: source.feed.exhausted)
    assert [index for index, _, _ in source.taken] == [0, 5]
    assert source.metrics.snapshot().dropped == {"bad shape": 2, "empty image": 1, "no image": 1}
    source.close()
    source.books()


def test_a_camera_of_nothing_but_bad_frames_is_restarted(scripted: Callable[..., Any]) -> None:
    source = scripted(["forever none"], FOREVER).start()
    source.until(lambda: source.feed.status().state is SourceState.LIVE)
    assert source.feed.status().stalls == 1
    assert source.metrics.snapshot().dropped["no image"] > 5


def test_identical_frames_are_flagged_until_they_change(scripted: Callable[..., Any]) -> None:
    source = scripted(["frame"] * 3 + ["same"] * 120 + FOREVER).start()
    source.until(lambda: source.feed.status().frozen)
    status = source.feed.status()
    assert status.state is SourceState.DEGRADED
    assert status.reason is not None
    assert "identical frames" in status.reason
    source.until(lambda: source.feed.status().state is SourceState.LIVE)
    assert not source.feed.status().frozen
    assert source.feed.status().restarts == 0


def test_a_live_stream_that_ends_is_reconnected(scripted: Callable[..., Any]) -> None:
    source = scripted(["frame"] * 3).start()
    source.until(lambda: source.openings() >= 4)
    assert not source.feed.exhausted
    assert source.feed.status().restarts >= 3


def test_the_budget_ends_in_lost_and_seldom_tries(scripted: Callable[..., Any]) -> None:
    source = scripted(["die"], restart_budget=3, lost_retry_s=2.0).start()
    source.until(lambda: source.feed.status().state is SourceState.LOST)
    assert source.openings() == 4  # the first and the budget
    reason = source.feed.status().reason
    assert reason is not None
    assert "signal 9" in reason
    source.until(lambda: source.openings() == 5)
    assert source.feed.status().state is SourceState.LOST


def test_a_wrong_password_is_lost_at_once_and_live_when_it_is_right(scripted: Callable[..., Any]) -> None:
    source = scripted(["lost"], FOREVER).start()
    source.until(lambda: source.feed.status().state is SourceState.LOST)
    assert "401" in (source.feed.status().reason or "")
    source.until(lambda: source.feed.status().state is SourceState.LIVE)
    assert source.feed.status().reason is None


def test_a_file_that_is_no_video_fails_once(scripted: Callable[..., Any]) -> None:
    source = scripted(["bad"], live=False).start()
    source.until(lambda: source.feed.exhausted)
    assert isinstance(source.feed.failure(), DataError)
    assert source.openings() == 1


def test_a_recording_goes_on_where_its_capture_died(scripted: Callable[..., Any]) -> None:
    source = scripted(["fast"] * 10 + ["die"], ["fast"] * 30, live=False).start()
    source.until(lambda: source.feed.exhausted)
    assert [(index, value) for index, _, value in source.taken] == [(i, i) for i in range(30)]
    assert source.feed.status().restarts == 1
    source.close()
    source.books()


def test_a_recording_that_kills_its_decoder_is_given_up(scripted: Callable[..., Any]) -> None:
    source = scripted(["fast"] * 4 + ["die"], live=False).start()
    source.until(lambda: source.feed.exhausted)
    assert isinstance(source.feed.failure(), DeviceFaultError)
    assert source.openings() == 3
    assert len(source.taken) == 4


def test_the_reason_holds_the_librarys_last_words(scripted: Callable[..., Any]) -> None:
    flood = ["say " + "x" * 5000] * 50
    source = scripted([*flood, "say [h264] no frame!", "hang"], FOREVER, backoff_s=(30.0, 30.0)).start()
    source.until(lambda: "[h264] no frame!" in (source.feed.status().reason or ""))
    assert len(source.feed.status().reason or "") < 1500


def test_the_next_capture_inherits_nothing_of_the_first(scripted: Callable[..., Any]) -> None:
    first, second = scripted(FOREVER).start(), scripted(FOREVER).start()
    first.until(lambda: first.taken)
    second.until(lambda: second.taken)

    def held(pid: int) -> set[str]:
        return {str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir()}

    sockets = [
        {name for name in held(source.feed.pid) if name.startswith(("socket", "pipe"))}
        for source in (first, second)
    ]
    assert all(sockets)
    assert not sockets[0] & sockets[1]
    assert not any("edgefold-task" in name for name in held(second.feed.pid))
    assert str(first.script).encode() not in Path(f"/proc/{first.feed.pid}/cmdline").read_bytes()


def test_when_the_app_is_killed_its_captures_die(tmp_path: Path) -> None:
    """And with them their frames, which lie in anonymous files."""
    script = tmp_path / "script.json"
    script.write_text('[["frame", "hang"]]')
    program = f"""
import sys, time
sys.path[:] = {sys.path!r}
import capture_sources
from pathlib import Path
from apps.streaming.capture import open_feed
from apps.streaming.config import CaptureLimits, SourceConfig
from apps.streaming.metrics import StreamMetrics
from apps.streaming.sources import ModelClasses, SourceUri
path = Path({str(script)!r})
feed = open_feed(SourceConfig("x"), SourceUri("v4l2", str(path), str(path), path=path), ModelClasses((), 3), CaptureLimits(),
                 StreamMetrics(), opener=capture_sources.open_scripted)
feed.start(lambda: print(feed.pid, flush=True))
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as app:
        assert app.stdout is not None
        pid = int(app.stdout.readline())
        assert alive(pid)
        app.kill()
        app.wait()
        eventually(lambda: not alive(pid))


def _reconnects(scripted: Callable[..., Any], count: int) -> None:
    source = scripted(["fast", "fast"], restart_budget=10**6, backoff_s=(0.001, 0.001)).start()
    source.until(lambda: source.feed.status().restarts >= 5)
    held = Held()
    source.until(lambda: source.feed.status().restarts >= count, PATIENCE_S + count)
    # Between two captures up to seven fewer are open than while one is started, and either count may be of either.
    source.until(lambda: n_descriptors() <= held.descriptors + 8)
    source.close()
    held.has_not_grown()
    source.books()


def test_reconnects_leak_nothing(scripted: Callable[..., Any]) -> None:
    _reconnects(scripted, 20)


@pytest.mark.slow
def test_a_thousand_reconnects_leak_nothing(scripted: Callable[..., Any]) -> None:
    _reconnects(scripted, 1000)
