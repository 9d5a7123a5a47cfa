"""Network cameras, each a real server on loopback: RTSP by GStreamer, HTTP and silence by this file."""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import cv2
import numpy as np
import pytest
import rtsp_server
from gstreamer import needs_rtsp
from ports import reserved_port
from waiting import SLACK_S

from apps.streaming.sources import ModelClasses, Source, open_source, parse_source
from pipeline.errors import SourceLostError, UsageError

ANT = ModelClasses(("ant",), 1)


def refused(uri: str) -> SourceLostError:
    with pytest.raises(SourceLostError) as caught:
        open_source(parse_source(uri), ANT)
    return caught.value


@contextlib.contextmanager
def opened(uri: str) -> Iterator[Source]:
    source = open_source(parse_source(uri), ANT)
    try:
        yield source
    finally:
        source.close()


def read_to_the_end(source: Source) -> None:
    while source.read() is not None:
        pass


@needs_rtsp
@pytest.mark.parametrize("auth", ["basic", "digest"])
def test_rtsp_with_a_password_and_without(auth: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAMERA_PASSWORD", "s3cr:et/ #1")
    with rtsp_server.rtsp_server(password="s3cr:et/ #1", auth=auth) as server:  # type: ignore[arg-type]
        with opened(server.url(userinfo="camera:${CAMERA_PASSWORD}")) as source:
            assert (source.live, source.self_paced, source.color, source.fps) == (True, True, "BGR", 25.0)
            assert source.source_id == server.url(userinfo="***")
            slot = np.zeros((240, 320, 3), np.uint8)
            for _ in range(3):
                delivered = source.read(slot)
                assert delivered is not None
                assert delivered.pixels is slot
            # The bars of the test picture: the leftmost is white, the rightmost blue (BGR).
            assert slot[60, 10].min() > 150
            assert slot[60, -10, 0] > slot[60, -10, 2] + 100
        for error in (refused(server.url(userinfo="camera:hunter22")), refused(server.url())):
            assert error.retry == "seldom"
            assert "401" in str(error)
            assert "hunter22" not in str(error)
        absent = refused(server.url("/nope", userinfo="camera:${CAMERA_PASSWORD}"))
        assert (absent.retry, "404" in str(absent)) == ("seldom", True)
        sound = refused(server.url("/audio", userinfo="camera:${CAMERA_PASSWORD}"))
        assert (sound.retry, "audio only" in str(sound)) == ("never", True)


@needs_rtsp
def test_rtsp_over_udp_and_a_server_that_dies() -> None:
    with rtsp_server.rtsp_server() as server:
        source = open_source(parse_source(server.url() + "#transport=udp&timeout=1"), ANT)
        assert source.read() is not None
    # The server is gone, and UDP has nobody who would say so.
    started_s = time.monotonic()
    with pytest.raises(SourceLostError, match="sent no picture for 1 s") as caught:
        read_to_the_end(source)
    assert caught.value.retry == "soon"
    assert time.monotonic() - started_s < 1 + SLACK_S
    source.close()


@needs_rtsp
def test_an_rtsp_stream_that_stalls_with_its_connection_open() -> None:
    with rtsp_server.rtsp_server() as server, opened(server.url() + "#timeout=1") as source:
        assert source.read() is not None
        os.kill(server.pid, signal.SIGSTOP)
        started_s = time.monotonic()
        with pytest.raises(SourceLostError, match="sent no picture for 1 s"):
            read_to_the_end(source)
        assert time.monotonic() - started_s < 1 + SLACK_S


def test_the_error_keeps_its_advice_on_the_way_out_of_a_process() -> None:
    error = pickle.loads(pickle.dumps(SourceLostError("gone", "never")))
    assert (str(error), error.retry, error.exit_code) == ("gone", "never", 6)


@contextlib.contextmanager
def tcp_server(answer: Callable[[socket.socket], None]) -> Iterator[int]:
    """Calls `answer` with each connection, in a thread; gives the port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    kept.append(connection)
                    with contextlib.suppress(OSError):
                        answer(connection)

        kept: list[socket.socket] = []
        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1]
    for connection in kept:
        connection.close()


def test_a_server_that_accepts_and_says_nothing() -> None:
    with tcp_server(lambda connection: None) as port:
        for scheme in ("rtsp", "rtsps", "http", "https"):
            started_s = time.monotonic()
            error = refused(f"{scheme}://u:hunter22@127.0.0.1:{port}/s#timeout=0.5")
            assert time.monotonic() - started_s < 0.5 + SLACK_S
            assert error.retry == "soon"
            assert "did not answer within 0.5 s" in str(error)
            assert "hunter22" not in str(error)


def test_a_server_that_drips_is_cut_off_by_the_same_limit() -> None:
    def drip(connection: socket.socket) -> None:
        for _ in range(100):
            connection.sendall(b"R")
            time.sleep(0.05)

    with tcp_server(drip) as port:
        started_s = time.monotonic()
        assert "did not answer within 0.6 s" in str(refused(f"rtsp://127.0.0.1:{port}/s#timeout=0.6"))
        assert time.monotonic() - started_s < 0.6 + SLACK_S


@pytest.mark.parametrize(
    ("reply", "message", "retry"),
    [
        (b"SSH-2.0-OpenSSH\r\n\r\n", "does not speak RTSP", "seldom"),
        (b"RTSP/1.0 403 Forbidden\r\n\r\n", "forbids", "seldom"),
        (b"RTSP/1.0 453 Not Enough Bandwidth\r\n\r\n", "too busy", "soon"),
        (b"RTSP/1.0 500 Internal\r\n\r\n", r"answered \(500", "soon"),
        (
            b"RTSP/1.0 302 Found\r\nLocation: file:///etc/passwd\r\n\r\n",
            "redirects to what is not RTSP",
            "seldom",
        ),
        (b"RTSP/1.0 401 No\r\nWWW-Authenticate: Negotiate\r\n\r\n", "unknown way", "seldom"),
        (b"RTSP/1.0 200 OK\r\nContent-Length: 99999999\r\n\r\n", "announces a description", "seldom"),
        (b"RTSP/1.0 200 OK\r\nX: " + b"x" * 70_000, "headers of more than 65536", "seldom"),
        (b"RTSP/1.0 200 OK\r\n\r\n", "describes no video", "never"),
    ],
)
def test_rtsp_answers(reply: bytes, message: str, retry: str) -> None:
    with tcp_server(lambda connection: connection.sendall(reply)) as port:
        error = refused(f"rtsp://u:hunter22@127.0.0.1:{port}/s#timeout=2")
    assert error.retry == retry
    with pytest.raises(SourceLostError, match=message):
        raise error


def test_nobody_listens_and_nobody_knows_the_name() -> None:
    with reserved_port() as port:
        for scheme in ("rtsp", "http"):
            error = refused(f"{scheme}://127.0.0.1:{port}/s")
            assert (error.retry, "nothing listens there" in str(error)) == ("soon", True)
    assert "cannot be resolved" in str(refused("rtsp://camera.invalid/s"))


JPEGS = {
    size: cv2.imencode(".jpg", np.full((size[1], size[0], 3), (200, 80, 40), np.uint8))[1].tobytes()
    for size in ((64, 48), (96, 80))
}


class _Camera(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.0"

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/video" or path == "/changing":
            self.send_response(200)
            self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
            self.end_headers()
            with contextlib.suppress(OSError):
                for index in itertools.count():
                    if "ends" in self.path and index == 3:
                        return
                    jpeg = JPEGS[(96, 80) if path == "/changing" and index >= 30 else (64, 48)]
                    if "no-length" in self.path:
                        self.wfile.write(b"--frame\r\nContent-Type: image/jpeg\r\n\r\n" + jpeg + b"\r\n")
                        continue
                    if "broken" in self.path and index % 2:
                        jpeg = b"no picture"
                    head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(jpeg)}\r\n\r\n"
                    self.wfile.write(head.encode() + jpeg + b"\r\n")
                    time.sleep(0.02)
            return
        known = {"/page": (200, "text/html"), "/radio": (200, "audio/mpeg"), "/private": (403, "text/plain")}
        if path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/video")
        elif path == "/basic" and "Authorization" not in self.headers:
            self.send_response(401)
            self.send_header("WWW-Authenticate", 'Basic realm="camera"')
        else:
            status, content = known.get(path, (404, "text/plain"))
            self.send_response(status)
            self.send_header("Content-Type", content)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def http_port() -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Camera)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


def test_parts_that_are_no_pictures_and_an_end(http_port: int) -> None:
    with opened(f"http://127.0.0.1:{http_port}/video?broken&ends") as source:
        pictures = [source.read() for _ in range(3)]
        assert [picture.pixels is None for picture in pictures if picture] == [False, True, False]
        with pytest.raises(SourceLostError, match="ended") as caught:
            source.read()
        assert caught.value.retry == "soon"


def test_an_mjpeg_stream_that_goes_silent() -> None:
    def two_frames(connection: socket.socket) -> None:
        connection.recv(4096)
        jpeg = JPEGS[(64, 48)]
        connection.sendall(
            b"HTTP/1.0 200 OK\r\nContent-Type: multipart/x-mixed-replace;boundary=--x\r\n\r\n"
            + 2 * (b"--x\r\nContent-Length: %d\r\n\r\n" % len(jpeg) + jpeg + b"\r\n")
        )

    with tcp_server(two_frames) as port, opened(f"http://127.0.0.1:{port}/s#timeout=0.5") as source:
        assert all(source.read().pixels.shape == (48, 64, 3) for _ in range(2))  # type: ignore[union-attr]
        with pytest.raises(SourceLostError, match=r"did not answer within 0\.5 s"):
            source.read()


@pytest.mark.parametrize("path", ["/video", "/moved", "/video?no-length", "/video#backend=ffmpeg"])
def test_mjpeg_over_http(http_port: int, path: str) -> None:
    with opened(f"http://127.0.0.1:{http_port}{path}") as source:
        assert source.live
        slot = np.zeros((48, 64, 3), np.uint8)
        delivered = source.read(slot)
        assert delivered is not None
        assert delivered.pixels is slot
        assert np.abs(slot.astype(int) - (200, 80, 40)).max() <= 3  # blue first; JPEG is lossy


def test_a_change_of_resolution_gives_frames_of_the_new_size(http_port: int) -> None:
    with opened(f"http://127.0.0.1:{http_port}/changing") as source:
        slot = np.zeros((48, 64, 3), np.uint8)
        shapes = []
        for _ in range(50):
            delivered = source.read(slot)
            assert delivered is not None
            shapes.append(delivered.pixels.shape)
            assert (delivered.pixels is slot) == (shapes[-1] == slot.shape)
            assert np.abs(delivered.pixels.astype(int) - (200, 80, 40)).max() <= 3
    assert list(dict.fromkeys(shapes)) == [(48, 64, 3), (80, 96, 3)]


@pytest.mark.parametrize(
    ("path", "message", "retry"),
    [
        ("/nope", "404", "seldom"),
        ("/private", "403", "seldom"),
        ("/page", "is a page, no video", "seldom"),
        ("/radio", "audio only", "never"),
        ("/basic", "asks for a user", "seldom"),
    ],
)
def test_http_answers(http_port: int, path: str, message: str, retry: str) -> None:
    error = refused(f"http://127.0.0.1:{http_port}{path}?token=hunter22")
    assert (error.retry, message in str(error)) == (retry, True), str(error)
    assert "hunter22" not in str(error)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate that its owner made for 127.0.0.1, with its key in the same file."""
    folder = tmp_path_factory.mktemp("tls")
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=127.0.0.1 "
        "-addext subjectAltName=IP:127.0.0.1 -keyout key.pem -out cert.pem"
    )
    try:
        subprocess.run(command.split(), cwd=folder, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no openssl command that makes a certificate: {error}")
    both = folder / "both.pem"
    both.write_bytes((folder / "cert.pem").read_bytes() + (folder / "key.pem").read_bytes())
    return both


@needs_rtsp
def test_rtsp_over_tls(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with rtsp_server.rtsp_server(password="s3cret", certificate=certificate) as server:
        uri = server.url(userinfo="camera:s3cret")
        error = refused(uri)
        assert (error.retry, "certificate that is not trusted" in str(error)) == ("seldom", True)
        with opened(f"{uri}#tls=unverified") as source:
            assert source.read() is not None
        # An authority that this machine trusts: FFmpeg is made to check it too.
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate.parent / "cert.pem"))
        with opened(uri) as source:
            assert source.read() is not None


def test_a_certificate_that_nobody_vouches_for(certificate: Path) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Camera)
    server.daemon_threads = True
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        uri = f"https://127.0.0.1:{server.server_address[1]}/video"
        error = refused(uri)
        assert (error.retry, "certificate that is not trusted" in str(error)) == ("seldom", True)
        with opened(f"{uri}#tls=unverified") as source:
            assert source.read() is not None
    finally:
        server.shutdown()
        server.server_close()


def test_a_rate_is_not_for_a_camera() -> None:
    with pytest.raises(UsageError, match=r"rtsp://\*\*\*@h/s has its own"):
        open_source(parse_source("rtsp://u:hunter22@h/s"), ANT, fps=5)
