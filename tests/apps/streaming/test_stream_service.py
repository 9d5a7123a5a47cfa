"""sd_notify on real sockets: what a service manager hears, and when the watchdog goes hungry."""

from __future__ import annotations

import os
import socket
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from waiting import PATIENCE_S, SLACK_S, eventually

from apps.streaming.service import Notifier


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest) -> Iterator[tuple[str, socket.socket]]:
    """A service manager's end: the address as it stands in NOTIFY_SOCKET, and the socket."""
    name = f"edgefold-{uuid.uuid4().hex}"
    # Not under tmp_path: a socket's path has 107 bytes at most.
    with (
        tempfile.TemporaryDirectory() as folder,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening,
    ):
        told = f"{folder}/{name}" if request.param == "path" else f"@{name}"
        listening.bind(told if request.param == "path" else f"\0{name}")
        listening.settimeout(PATIENCE_S)
        yield told, listening


def heard(listening: socket.socket) -> str:
    return listening.recv(4096).decode()


def now_ns(age_s: float = 0.0) -> int:
    return time.monotonic_ns() - int(age_s * 1e9)


def test_the_manager_hears_what_happens(manager: tuple[str, socket.socket]) -> None:
    address, listening = manager
    with Notifier({"NOTIFY_SOCKET": address}) as notifier:
        assert notifier.enabled
        assert notifier.ready("2 sources\nof 3")
        assert heard(listening) == "READY=1\nSTATUS=2 sources of 3"
        assert notifier.status("3 sources")
        assert heard(listening) == "STATUS=3 sources"
        before_us = time.monotonic_ns() // 1000
        assert notifier.reloading()
        state, moment = heard(listening).splitlines()
        assert state == "RELOADING=1"
        assert before_us <= int(moment.removeprefix("MONOTONIC_USEC=")) <= time.monotonic_ns() // 1000
        assert notifier.stopping()
        assert heard(listening) == "STOPPING=1"
    assert not notifier.ready(), "a closed notifier tells nothing"


def test_the_watchdog_is_fed_only_while_the_runtime_is_alive(manager: tuple[str, socket.socket]) -> None:
    address, listening = manager
    environ = {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "4000000", "WATCHDOG_PID": str(os.getpid())}
    with Notifier(environ) as notifier:
        assert notifier.watchdog_s == 4.0
        assert not notifier.alive(now_ns(age_s=2.5)), "a beat older than half the interval is no life"
        assert notifier.alive(now_ns(age_s=0.1))
        assert heard(listening) == "WATCHDOG=1"
        assert not notifier.alive(now_ns()), "not due yet"
        eventually(lambda: notifier.alive(now_ns()))
        assert heard(listening) == "WATCHDOG=1"


@pytest.mark.parametrize("interval", ["", "0", "-5", "soon", None])
def test_without_a_watchdog_no_sign_of_life_is_sent(interval: str | None, tmp_path: Path) -> None:
    environ = {"NOTIFY_SOCKET": str(tmp_path / "nobody")}
    if interval is not None:
        environ["WATCHDOG_USEC"] = interval
    with Notifier(environ) as notifier:
        assert notifier.watchdog_s is None
        assert not notifier.alive(now_ns())


def test_the_watchdog_of_another_process_is_not_ours(tmp_path: Path) -> None:
    environ = {"NOTIFY_SOCKET": str(tmp_path / "s"), "WATCHDOG_USEC": "1000000", "WATCHDOG_PID": "1"}
    with Notifier(environ) as notifier:
        assert notifier.watchdog_s is None


@pytest.mark.parametrize("address", ["", "vsock:2:1234", "relative"])
def test_without_a_manager_nothing_happens(address: str) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "1000000"})
    assert not notifier.enabled
    assert not notifier.ready()
    assert not notifier.alive(now_ns())
    notifier.close()


def test_a_manager_that_is_gone_or_never_reads_does_not_block(tmp_path: Path) -> None:
    with Notifier({"NOTIFY_SOCKET": str(tmp_path / "gone")}) as notifier:
        assert notifier.enabled
        assert not notifier.ready()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as deaf:
        deaf.bind(str(tmp_path / "deaf"))
        with Notifier({"NOTIFY_SOCKET": str(tmp_path / "deaf")}) as notifier:
            began_s = time.monotonic()
            sent = [notifier.status(f"{n} " + "x" * 1000) for n in range(2000)]
            assert time.monotonic() - began_s < SLACK_S
            assert sent[0]
            assert not sent[-1], "the socket's buffer is bounded, so that this proves nothing blocks"
