from __future__ import annotations

import builtins
import contextlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import pytest
from fake_stream import FakeApp, entered
from ports import reserved_port
from waiting import PATIENCE_S, eventually

from apps.streaming.config import ServeConfig
from apps.streaming.serve import PageServer
from pipeline.errors import UnsupportedError, UsageError

Serve = Callable[..., PageServer]
Ask = Callable[..., Any]


def test_a_port_in_use_is_named_at_the_start(app: FakeApp) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=rf"127\.0\.0\.1:{port}.*in use.*port 0"):
            PageServer(ServeConfig(port=port), app.view, app.reload, app.check)


def test_two_servers_do_not_share_a_port(serve: Serve) -> None:
    port = urlsplit(serve().url).port
    with pytest.raises(UsageError, match="in use"):
        serve(port=port)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"host": "no.such.host.invalid", "token": "a" * 20}, "cannot listen on no.such.host.invalid"),
        ({"host": "192.0.2.7", "token": "a" * 20}, "no interface"),
        ({"port": 70000}, "70000"),
        ({"max_clients": 0}, "max_clients is 0"),
        ({"video_fps": 0.0}, "video_fps is 0"),
        ({"video_fps": float("nan")}, "video_fps is nan"),
    ],
)
def test_what_cannot_be_served(app: FakeApp, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        PageServer(ServeConfig(**{"port": 0, **options}), app.view, app.reload, app.check)


def test_without_aiohttp_it_says_what_to_install(app: FakeApp, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("apps.streaming.serve.")]:
        if name.rpartition(".")[2] in ("access", "application", "asking", "clients", "connections"):
            monkeypatch.delitem(sys.modules, name)
            monkeypatch.delattr(f"apps.streaming.serve.{name.rpartition('.')[2]}", raising=False)
    real_import = builtins.__import__

    def without_aiohttp(name: str, *arguments: Any) -> Any:
        if name.partition(".")[0] == "aiohttp":
            raise ImportError("No module named 'aiohttp'", name="aiohttp")
        return real_import(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without_aiohttp)
    with pytest.raises(UnsupportedError, match=r"edgefold\[serve\]"):
        PageServer(ServeConfig(port=0), app.view, app.reload, app.check)


def test_the_import_brings_nothing_heavy() -> None:
    program = (
        "import sys, apps.streaming.serve\n"
        "print([m for m in ('aiohttp', 'prometheus_client', 'cv2', 'torch') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_the_address_is_one_to_open(serve: Serve) -> None:
    assert serve().url.startswith("http://127.0.0.1:")
    everywhere = serve(host="0.0.0.0", token="a" * 20).url
    assert socket.gethostname() in everywhere
    assert "a" * 20 not in everywhere


def test_closing_ends_the_thread_and_frees_the_port(serve: Serve) -> None:
    with reserved_port() as port:
        _closes(serve(port=port), port)


def _closes(page: PageServer, port: int) -> None:
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(b"GET /api/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 200")
        page.close()
        page.close()
        client.settimeout(PATIENCE_S)
        while client.recv(65536):
            pass  # until the server has hung up
    assert "page-server" not in [thread.name for thread in threading.enumerate()]
    with socket.create_server(("127.0.0.1", port)):
        pass


def test_the_view_is_json_and_shared(serve: Serve, asking: Ask, app: FakeApp) -> None:
    page = serve()
    page.events.publish(entered("gate", "ship"))
    app.sources[0].run(5)
    body = asking(page, "/api/view").json()
    assert [source["status"]["source_id"] for source in body["sources"]] == [s.name for s in app.sources]
    assert body["sources"][0]["status"]["state"] == "LIVE"
    assert body["sources"][0]["metrics"]["frames_inferred"] == 5
    assert body["sources"][0]["latest"]["top"][0]["label"] == "ship"
    assert body["now_ns"] > body["sources"][0]["status"]["last_frame_ns"]
    assert [event["label"] for event in body["recent_events"]] == ["ship"]
    n_views = app.n_views
    with ThreadPoolExecutor(10) as pool:  # at once, so that some share a view however slow the machine
        assert {answer.status for answer in pool.map(lambda _: asking(page, "/metrics"), range(10))} == {200}
    assert app.n_views - n_views < 10


def test_events_come_twice_a_second(serve: Serve, app: FakeApp) -> None:
    port = urlsplit(serve().url).port
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as client:
        client.sendall(b"GET /api/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        text = b""
        while text.count(b"\n\ndata: ") + text.count(b"\r\ndata: ") < 3:
            text += client.recv(65536)
    assert b"text/event-stream" in text
    assert app.n_views >= 3


def test_a_stream_has_no_head(serve: Serve, asking: Ask) -> None:
    page = serve()
    assert asking(page, "/api/view", "HEAD").status == 200
    for path in ("/video", "/video/gate", "/api/events"):
        assert asking(page, path, "HEAD").status == 405


def test_a_stream_that_does_not_answer_is_503_and_is_asked_once(
    serve: Serve, asking: Ask, app: FakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = serve()
    monkeypatch.setattr("apps.streaming.serve.asking._ANSWER_LIMIT_S", 0.1)
    app.hold.clear()
    for path in ("/readyz", "/metrics", "/api/view", "/video"):
        assert asking(page, path).status == 503
    assert app.n_views == 1
    assert asking(page, "/healthz").status == 200  # the process is, whatever the view is
    app.hold.set()
    assert asking(page, "/api/view").status == 200


def test_one_reload_at_a_time(serve: Serve, asking: Ask, app: FakeApp) -> None:
    page = serve()
    app.hold.clear()
    answers: list[int] = []
    first = threading.Thread(
        target=lambda: answers.append(asking(page, "/reload", "POST", X_Edgefold="1").status)
    )
    first.start()
    statuses: list[int] = []

    def refused() -> bool:
        statuses.append(asking(page, "/check", "POST", X_Edgefold="1").status)
        return asking(page, "/reload", "POST", X_Edgefold="1").status == 409

    eventually(refused)
    assert set(statuses) == {200}  # a check does not wait for a reload
    app.hold.set()
    first.join()
    assert answers == [200]
    assert len(app.reloaded) == 1


def test_connections_are_capped(serve: Serve, asking: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apps.streaming.serve.connections._SPARE", 4)
    page = serve(max_clients=1)
    port = urlsplit(page.url).port
    silent = [socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) for _ in range(8)]
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as surplus:
            answer = surplus.recv(200)
        assert answer.startswith(b"HTTP/1.1 503")
        assert b"Retry-After" in answer
    finally:
        for client in silent:
            client.close()


def test_a_connection_that_never_asks_is_closed(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apps.streaming.serve.connections.SILENCE_LIMIT_S", 0.3)
    port = urlsplit(serve().url).port
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as client:
        client.sendall(b"GET / HT")
        with contextlib.suppress(ConnectionResetError):
            assert client.recv(100) == b""


def test_a_connection_that_asks_stays(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apps.streaming.serve.connections.SILENCE_LIMIT_S", 0.3)
    port = urlsplit(serve().url).port
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as client:
        for _ in range(2):
            client.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert client.recv(15) == b"HTTP/1.1 200 OK"
            time.sleep(0.5)
            client.recv(65536)


def test_the_heartbeat_decides_health(serve: Serve, asking: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    page = serve()
    page.beat()
    assert asking(page, "/healthz").json() == {"ok": True, "reasons": []}
    monkeypatch.setattr("apps.streaming.serve.health.HEARTBEAT_LIMIT_S", 0.05)
    eventually(lambda: asking(page, "/healthz").status == 503)
    assert "no sign of life" in asking(page, "/healthz").json()["reasons"][0]
