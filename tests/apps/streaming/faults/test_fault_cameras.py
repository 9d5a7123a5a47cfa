"""What cameras do to a running app, and that no other camera notices: real processes and sockets."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest


def test_a_stall_is_degraded_then_ended_by_the_watchdog(site: Any) -> None:
    app, before = site.app, site.app.source("gate")["status"]
    captures = set(app.children())
    site.gate.behaviour = "stalls"  # the connection stays open
    app.until_state("gate", "DEGRADED")
    assert app.source("gate")["status"]["stalls"] == before["stalls"]
    app.until(lambda: app.metric("edgefold_source_stalls_total", source="gate") > before["stalls"])
    app.until(lambda: len(captures - set(app.children())) == 1)
    app.until(lambda: app.source("gate")["status"]["restarts"] > before["restarts"])  # after the backoff
    site.untouched()
    site.recovers()


def test_a_killed_capture_comes_back(site: Any) -> None:
    app, before = site.app, site.app.source("gate")["status"]["restarts"]
    site.gate.behaviour = "404"
    app.until_state("gate", "LOST")
    alone: set[int] = set()

    def between_two_tries() -> bool:
        nonlocal alone
        alone = set(app.children())
        return len(alone) == 1

    app.until(between_two_tries)
    (of_yard,) = alone
    site.recovers()
    restarts = app.source("gate")["status"]["restarts"]
    assert restarts > before
    (of_gate,) = set(app.children()) - {of_yard}
    os.kill(of_gate, signal.SIGKILL)
    app.until(lambda: app.metric("edgefold_source_restarts_total", source="gate") > restarts)
    site.recovers()
    assert of_gate not in app.children()
    site.untouched()


@pytest.mark.parametrize(("behaviour", "reason"), [("401", "asks for a user"), ("503", "too busy")])
def test_a_camera_that_refuses_says_which_and_is_tried_again(site: Any, behaviour: str, reason: str) -> None:
    app, n_clients = site.app, site.gate.n_clients
    site.gate.behaviour = behaviour
    # What waiting may mend is DEGRADED, what it will not is LOST at once.
    app.until_state("gate", "DEGRADED" if behaviour == "503" else "LOST")
    app.until(lambda: reason in (app.source("gate")["status"]["reason"] or ""))
    app.until(lambda: site.gate.n_clients >= n_clients + 2)
    site.untouched()
    site.recovers()


def test_the_end_of_a_live_stream_is_not_the_end(site: Any) -> None:
    before, n_clients = site.app.source("gate")["status"]["restarts"], site.gate.n_clients
    site.gate.behaviour = "closes"
    site.app.until(lambda: site.gate.n_clients >= n_clients + 3)
    assert site.app.source("gate")["status"]["restarts"] >= before + 2
    site.untouched()
    site.recovers()


def test_frozen_pictures_are_flagged_and_not_restarted(site: Any) -> None:
    app, before = site.app, site.app.source("gate")["status"]["restarts"]
    site.gate.behaviour = "frozen"
    app.until(lambda: app.source("gate")["status"]["frozen"])
    app.until(lambda: app.metric("edgefold_source_frozen", source="gate") == 1)
    status = app.source("gate")["status"]
    assert (status["state"], status["restarts"]) == ("DEGRADED", before)
    assert "identical frames" in status["reason"]
    site.recovers()
    assert app.metric("edgefold_source_frozen", source="gate") == 0
    site.untouched()


def test_another_resolution_is_right_at_once(site: Any) -> None:
    """The size and what is shown change with one frame: a picture of the old size, or of half of the new one,
    would be of another colour."""
    app, before = site.app, site.app.source("gate")["status"]

    def seen() -> tuple[list[int], str]:
        source = app.source("gate")
        return source["status"]["size_wh"], source["latest"]["top"][0]["label"]

    app.until(lambda: seen() == ([320, 240], "red"))
    site.gate.behaviour = "other size"
    app.until(lambda: seen() == ([640, 480], "blue"))
    site.recovers()
    app.until(lambda: seen() == ([320, 240], "red"))
    assert app.source("gate")["status"]["restarts"] == before["restarts"]
    site.untouched()


@pytest.mark.parametrize(("behaviour", "reason"), [("corrupt", "no image"), ("one column", "bad shape")])
def test_what_is_no_picture_is_counted_and_never_classified(site: Any, behaviour: str, reason: str) -> None:
    app = site.app

    def dropped() -> float:
        return float(app.metric("edgefold_frames_dropped_total", source="gate", reason=reason))

    before = dropped()
    site.gate.behaviour = behaviour
    app.until(lambda: dropped() >= before + 5)
    n_inferred = app.frames("gate")
    app.until(lambda: dropped() >= before + 12)
    assert app.frames("gate") == n_inferred
    site.untouched()
    site.recovers()


def test_gray_pictures_are_classified(site: Any) -> None:
    site.gate.behaviour = "gray"
    site.app.until_more("gate", 5)
    site.recovers()


def test_a_bad_bundle_is_refused_and_a_good_one_taken(site: Any, bundle: Any, make_bundle: Any) -> None:
    app, folder = site.app, site.folder

    def point_at(target: Any) -> None:
        (folder / "next").symlink_to(target)
        (folder / "next").replace(folder / "current")

    damaged = make_bundle(folder / "damaged")
    flip_a_bit(damaged / "model.int8.onnx")
    point_at(damaged)
    app.process.send_signal(signal.SIGHUP)
    app.until(lambda: app.metric("edgefold_engine_reload_failures_total") == 1)
    status, body = app.get("/reload", "POST")
    assert (status, "IntegrityError" in body) == (422, True)
    assert "model.int8.onnx" in app.view()["engine"]["last_reload_error"]
    site.untouched()
    point_at(make_bundle(folder / "renamed", labels=("azul", "verde", "rojo")))
    app.process.send_signal(signal.SIGHUP)
    app.until(lambda: app.metric("edgefold_engine_reloads_total") == 1)
    app.until(lambda: app.source("yard")["latest"]["top"][0]["label"] == "rojo")
    point_at(bundle)
    assert app.get("/reload", "POST")[0] == 200
    app.until(lambda: app.source("yard")["latest"]["top"][0]["label"] == "red")
    assert app.view()["engine"]["last_reload_error"] is None
    site.untouched()


def flip_a_bit(path: Any) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_dead_clients_are_capped_and_cost_no_frame(site: Any) -> None:
    import socket

    app = site.app
    site.untouched()
    clients = []
    try:
        for _ in range(100):
            client = socket.create_connection(("127.0.0.1", app.port), timeout=10)
            client.sendall(b"GET /video/yard HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            clients.append(client)
        app.until(lambda: app.metric("edgefold_page_clients_refused_total") >= 1)
        assert app.metric("edgefold_page_clients", kind="video") <= 4
        n_sent, n_inferred = site.yard.n_sent, app.frames("yard")
        app.until(lambda: site.yard.n_sent >= n_sent + 30)
        assert app.frames("yard") - n_inferred >= 10  # all, on a machine that has time for them
        site.untouched()
    finally:
        for client in clients:
            client.close()


def test_the_books_are_right_after_all_that(site: Any) -> None:
    for name in ("gate", "yard"):
        metrics = site.app.source(name)["metrics"]
        in_flight = metrics["frames_read"] - metrics["frames_inferred"] - sum(metrics["dropped"].values())
        assert 0 <= in_flight <= 8, metrics
