"""Passwords are shown nowhere, whatever goes wrong: not in the log, on the page, in /metrics, files or command lines."""

from __future__ import annotations

import base64
import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import rtsp_server
from gstreamer import needs_rtsp
from live_app import LiveApp
from ports import reserved_port

from benchmarks.mjpeg_camera import MjpegCamera

PASSWORD = "hunter22/ s3cr:et#@"
TOKEN = "t0ken-of-the-camera"
FORMS = (PASSWORD, quote(PASSWORD, safe=""), quote(PASSWORD), "hunter22", TOKEN)
LIMITS = """
[limits]
degraded_s = 1
stall_s = 3
backoff_s = [0.1, 0.5]
restart_budget = 100000
lost_retry_s = 0.5
"""


@contextlib.contextmanager
def rtsp_that_answers(status: str) -> Iterator[int]:
    """A server that gives every RTSP request one answer; the port."""

    def serve(listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection, contextlib.suppress(OSError):
                    connection.settimeout(5)
                    while request := connection.recv(65536):
                        sequence = next(
                            (line for line in request.split(b"\r\n") if line.startswith(b"CSeq")), b"CSeq: 1"
                        )
                        challenge = b'WWW-Authenticate: Basic realm="camera"\r\n' if "401" in status else b""
                        connection.sendall(
                            f"RTSP/1.0 {status}\r\n".encode() + sequence + b"\r\n" + challenge + b"\r\n"
                        )

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        yield listener.getsockname()[1]
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)


def assert_nothing_shown(app: LiveApp, folder: Path, user: str = "viewer") -> None:
    """Looks at everything that the app says, while it runs."""
    forms = (*FORMS, base64.b64encode(f"{user}:{PASSWORD}".encode()).decode())
    said = {path: app.get(path)[1] for path in ("/", "/api/view", "/metrics", "/readyz", "/healthz")}
    assert all(said.values()), said
    assert "***@127.0.0.1" in said["/metrics"]  # the sources are in it, by what they are called
    said |= {f"process {pid}": line for pid, line in app.children().items()}
    said["process"] = Path(f"/proc/{app.process.pid}/cmdline").read_bytes().decode()
    for path in folder.rglob("*"):
        if path.is_file() and path.name != "cameras.toml" and "cache" not in path.parts:
            said[str(path)] = path.read_text(errors="replace")
    shown = [(name, form) for name, text in said.items() for form in forms if form in text]
    assert not shown


def test_refusals_are_told_apart_and_show_no_password(
    run_app: Callable[..., LiveApp], bundle: Path, tmp_path: Path
) -> None:
    camera, well = MjpegCamera(), MjpegCamera()
    camera.behaviour = "401"
    with contextlib.ExitStack() as stack:
        stack.callback(camera.close)
        stack.callback(well.close)
        refusing, absent = (
            stack.enter_context(rtsp_that_answers(status)) for status in ("401 Unauthorized", "404 Not Found")
        )
        broker_port = stack.enter_context(reserved_port())
        uris = {
            f"rtsp://127.0.0.1:{refusing}/stream": "401",
            f"rtsp://127.0.0.1:{absent}/stream": "404",
            f"{camera.url}": "401",
        }
        blocks = "".join(
            f'[[source]]\nuri = "{uri.replace("://", "://viewer:${CAMERA_PASSWORD}@")}?token={TOKEN}"\n'
            for uri in [*uris, well.url]
        )
        config = f"""
bundle = "{bundle}"
predictions = "{tmp_path / "predictions.jsonl"}"
log_json = true
[events]
log = "{tmp_path / "events.jsonl"}"
[mqtt]
url = "mqtt://edge:${{CAMERA_PASSWORD}}@127.0.0.1:{broker_port}"
{LIMITS}
{blocks}
"""
        app = run_app(config, variables={"CAMERA_PASSWORD": PASSWORD})

        def reasons() -> dict[str, str]:
            statuses = [one["status"] for one in app.view()["sources"]]
            return {one["source_id"]: f"{one['state']}: {one['reason']}" for one in statuses}

        def refused() -> bool:
            now = reasons()
            return all(
                any(
                    key in reason and reason.startswith("LOST")
                    for name, reason in now.items()
                    if place in name
                )
                for place, key in ((uri.split("://")[1], key) for uri, key in uris.items())
            )

        app.until(refused)
        name = next(name for name in reasons() if str(well.port) in name)
        assert name == f"http://***@127.0.0.1:{well.port}/video?token=***"
        app.until(lambda: app.frames(name) >= 5)
        app.until(lambda: app.metric("edgefold_source_restarts_total") >= 4)
        assert_nothing_shown(app, tmp_path)
        status, summary = app.stop()
        assert status == 0
        assert name in {one["source"] for one in summary["sources"]}
        assert not [form for form in FORMS if form in app.log.read_text() + app.out.read_text()]


@needs_rtsp
def test_a_real_rtsp_camera_stalls_and_goes_on(
    run_app: Callable[..., LiveApp], bundle: Path, tmp_path: Path
) -> None:
    """FFmpeg is patient here for a minute; the watchdog is not. What FFmpeg says of it holds no password."""
    with rtsp_server.rtsp_server(password=PASSWORD) as server:
        uri = server.url(userinfo="camera:${CAMERA_PASSWORD}") + "#timeout=60"
        config = f"""
bundle = "{bundle}"
{LIMITS}
open_s = 30
[[source]]
uri = "{uri}"
[[source]]
name = "self-test"
uri = "synthetic:1"
fps = 5
"""
        gate = server.url(userinfo="***") + "#timeout=60"
        app = run_app(config, variables={"CAMERA_PASSWORD": PASSWORD})
        app.until_state(gate, "LIVE")
        app.until(lambda: app.frames(gate) >= 3)
        (first,) = app.children()
        os.kill(server.pid, signal.SIGSTOP)  # the connection stays open
        try:
            app.until_state(gate, "DEGRADED")
            app.until(lambda: app.metric("edgefold_source_stalls_total", source=gate) >= 1)
            app.until(lambda: first not in app.children())
            app.until_more("self-test")
        finally:
            os.kill(server.pid, signal.SIGCONT)
        app.until_state(gate, "LIVE")
        app.until_more(gate)
        os.kill(server.pid, signal.SIGKILL)
        app.until(lambda: "nothing listens" in (app.source(gate)["status"]["reason"] or ""))
        assert app.source("self-test")["status"]["restarts"] == 0
        assert_nothing_shown(app, tmp_path, "camera")
        assert app.stop()[0] == 0
