from __future__ import annotations

import asyncio
import http.client
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any
from urllib.parse import quote, urlsplit

import cv2
import numpy as np
import pytest
from fake_stream import FakeApp, picture
from numpy.typing import NDArray
from tolerances import JPEG_LEVELS
from waiting import PATIENCE_S, eventually

from apps.streaming.serve import PageServer
from apps.streaming.serve.pictures import LatestPictures, jpeg_encoder

Serve = Callable[..., PageServer]
Ask = Callable[..., Any]

ALWAYS_DUE_FPS = 120.0
RTSP = "rtsp://10.0.0.12:554/stream1"


@contextmanager
def running(page: PageServer, *names: str) -> Iterator[list[int]]:
    """A runtime that shows pictures of the sources, a few hundred a second, while someone watches."""
    ended = threading.Event()
    published = [0]

    def run() -> None:
        while not ended.is_set():
            for name in names:
                if page.hub.wanted(name):
                    published[0] += 1
                    page.hub.publish(name, picture(published[0]))
            time.sleep(0.002)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield published
    finally:
        ended.set()
        thread.join()


def connect(page: PageServer, path: str, receive_buffer: int | None = None) -> socket.socket:
    client = socket.socket()
    if receive_buffer is not None:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    client.settimeout(PATIENCE_S)
    client.connect(("127.0.0.1", urlsplit(page.url).port))
    client.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    return client


class Parts:
    """The parts of a multipart answer, one by one, as they come."""

    def __init__(self, page: PageServer, path: str, receive_buffer: int | None = None) -> None:
        self._connection = connect(page, path, receive_buffer)
        self.answer = http.client.HTTPResponse(self._connection)
        self.answer.begin()
        boundary = self.answer.headers.get_boundary()
        assert boundary is not None
        self._delimiter = f"--{boundary}".encode()
        assert self.answer.readline().strip() == self._delimiter

    def next(self) -> tuple[str, NDArray[np.uint8]]:
        headers = http.client.parse_headers(self.answer)
        jpeg = self.answer.read(int(headers["Content-Length"]))
        assert self.answer.readline() == b"\r\n"
        assert self.answer.readline().strip() == self._delimiter
        image = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR)
        assert image is not None
        return headers["X-Source"], image.astype(np.uint8)

    def close(self) -> None:
        self.answer.close()
        self._connection.close()


# --- over the network ---------------------------------------------------------------------------


def test_mjpeg_shows_what_was_published(serve: Serve) -> None:
    page = serve(video_fps=ALWAYS_DUE_FPS)
    with running(page, RTSP) as published:
        parts = Parts(page, f"/video/{quote(RTSP, safe='')}")
        assert parts.answer.headers.get_content_type() == "multipart/x-mixed-replace"
        shown = [parts.next()[1] for _ in range(5)]
        parts.close()
    candidates = [picture(value) for value in range(1, published[0] + 1)]
    places = []
    for image in shown:
        errors = [np.abs(image.astype(int) - candidate).mean() for candidate in candidates]
        assert min(errors) < JPEG_LEVELS
        places.append(int(np.argmin(errors)))
    assert places == sorted(set(places))  # each once, in order


def test_all_sources_over_one_connection(serve: Serve, app: FakeApp) -> None:
    page = serve(video_fps=ALWAYS_DUE_FPS)
    with running(page, *[source.name for source in app.sources]):
        parts = Parts(page, "/video")
        names = [parts.next()[0] for _ in range(12)]
        parts.close()
    assert {quote(source.name, safe="") for source in app.sources} == set(names)
    assert 4 <= names.count("gate") <= 8  # in turn, whatever comes faster


def test_only_the_sources_asked_for(serve: Serve, app: FakeApp) -> None:
    page = serve(video_fps=ALWAYS_DUE_FPS)
    with running(page, *[source.name for source in app.sources]):
        parts = Parts(page, "/video?source=gate&source=gate")
        assert {parts.next()[0] for _ in range(4)} == {"gate"}
        assert not page.hub.wanted(RTSP)
        parts.close()


def test_a_snapshot(serve: Serve, asking: Ask) -> None:
    page = serve()
    with running(page, RTSP):
        answer = asking(page, f"/snapshot/{quote(RTSP, safe='')}.jpg")
    assert answer.headers["Content-Type"] == "image/jpeg"
    assert cv2.imdecode(np.frombuffer(answer.body, np.uint8), cv2.IMREAD_COLOR).shape == (360, 640, 3)


def test_no_picture_is_503_and_no_source_404(
    serve: Serve, asking: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("apps.streaming.serve.application._SNAPSHOT_WAIT_S", 0.05)
    page = serve()
    assert asking(page, "/snapshot/gate.jpg").status == 503
    for path in ("/snapshot/other.jpg", "/video/other", "/video?source=other"):
        answer = asking(page, path)
        assert answer.status == 404
        assert "gate" in answer.text


def test_nothing_is_wanted_while_nobody_watches(serve: Serve) -> None:
    page = serve()
    page.hub.publish("gate", picture())
    assert page.hub.n_accepted == 0
    client = connect(page, "/video/gate")
    eventually(lambda: page.hub.wanted("gate"))
    client.close()
    eventually(lambda: not page.hub.wanted("gate"))  # noticed though no picture is sent


def test_one_encoding_for_all_clients(serve: Serve) -> None:
    page = serve(video_fps=5.0)
    with ExitStack() as stack:
        stack.enter_context(running(page, "gate"))
        clients = [Parts(page, "/video/gate") for _ in range(6)]
        for _ in range(3):
            for client in clients:
                client.next()
        accepted, encoded = page.hub.n_accepted, page.hub.n_encoded
        for client in clients:
            client.close()
    assert 3 <= encoded <= accepted <= 6  # 18 pictures were sent


def test_clients_above_the_cap_are_told_when_to_come_back(serve: Serve, asking: Ask) -> None:
    page = serve(max_clients=2)
    clients = [connect(page, "/video") for _ in range(2)]
    for client in clients:
        assert client.recv(100).startswith(b"HTTP/1.1 200")
    answer = asking(page, "/video")
    assert answer.status == 503
    assert int(answer.headers["Retry-After"]) > 0
    clients[0].close()
    with running(page, "gate"):
        eventually(lambda: _opens(page))
    clients[1].close()


def _opens(page: PageServer) -> bool:
    with connect(page, "/video") as client:
        return client.recv(12).endswith(b"200")


def test_a_hundred_dead_clients_are_capped_cut_and_cost_the_runtime_nothing(
    serve: Serve, asking: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sixteen are sent to until their buffers are full, then cut; the others are refused. Meanwhile the
    hub takes every picture that is due, and one that reads gets the newest."""
    monkeypatch.setattr("apps.streaming.serve.clients.SEND_LIMIT_S", 0.5)
    page = serve(video_fps=ALWAYS_DUE_FPS, max_clients=16)
    noise = np.random.default_rng(0).integers(0, 256, (720, 1280, 3), np.uint8)  # a megabyte as JPEG
    dead = [connect(page, "/video/gate", receive_buffer=4096) for _ in range(100)]
    n_due = 0

    def all_were_cut() -> bool:
        nonlocal n_due
        if page.hub.wanted("gate"):
            n_due += 1
            page.hub.publish("gate", noise)
        metrics = _figures(asking(page, "/metrics").text)
        return metrics.get("edgefold_page_clients_cut_total") == 16  # none while no connection is let in

    eventually(all_were_cut)
    assert page.hub.n_accepted == n_due > 5
    figures = _figures(asking(page, "/metrics").text)
    assert figures["edgefold_page_clients_refused_total"] >= 84
    assert figures['edgefold_page_clients{kind="video"}'] == 0
    with running(page, "gate"):
        reader = Parts(page, "/video/gate")
        assert reader.next()[1].shape == (360, 640, 3)
        reader.close()
    for client in dead:
        client.close()


def _figures(text: str) -> dict[str, float]:
    lines = (line for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def test_a_slow_client_skips_to_the_newest(serve: Serve) -> None:
    page = serve(video_fps=60.0)
    with running(page, "gate") as published:
        slow = Parts(page, "/video/gate", receive_buffer=4096)
        slow.next()
        before = published[0]
        eventually(lambda: published[0] >= before + 80)
        newest = published[0]
        n_buffered = 0
        while _number(slow.next()[1]) < newest - 5:
            n_buffered += 1
        slow.close()
    assert newest < 200, "the machine was too slow to tell the pictures apart"
    assert n_buffered < (newest - before) / 2  # what fitted the buffers, not all that was published


def _number(image: NDArray[np.uint8]) -> int:
    """Which `picture` it is, of the first 200, give or take what JPEG does to a gray."""
    return round(float(np.median(image))) - 20


# --- the hub ------------------------------------------------------------------------------------


@contextmanager
def hub_of(fps: float, encode: Callable[[NDArray[np.uint8]], bytes]) -> Iterator[LatestPictures]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        with ThreadPoolExecutor(1) as executor:
            yield LatestPictures(fps, loop, executor, encode)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def test_the_rate_is_kept_by_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    """15 a second of a camera of 30 that jitters by a fifth of its interval: every second picture."""
    now = [100.0]
    monkeypatch.setattr("apps.streaming.serve.pictures.time.monotonic", lambda: now[0])
    jitter = np.random.default_rng(0).uniform(-1, 1, 300) / 150
    with hub_of(15.0, lambda _: b"") as hub, hub.watch(["a"]):
        for index in range(300):
            now[0] = 100 + index / 30 + jitter[index]
            if hub.wanted("a"):
                hub.publish("a", picture())
        assert 145 <= hub.n_accepted <= 151
        before = hub.n_accepted
        now[0] += 60.0
        for _ in range(20):  # a pause is not made up for
            hub.publish("a", picture())
        assert hub.n_accepted == before + 1


def test_a_picture_that_cannot_be_encoded_is_skipped(caplog: pytest.LogCaptureFixture) -> None:
    def encode(image: NDArray[np.uint8]) -> bytes:
        if image[0, -1, 0] == 20:
            raise ValueError("no such colours")
        return bytes([image[0, -1, 0]])

    with hub_of(1000.0, encode) as hub:

        async def watch() -> bytes:
            with hub.watch(["a"]) as watching:
                hub.publish("a", picture(0))
                assert await watching.next(0.2) is None
                await asyncio.sleep(0.01)
                hub.publish("a", picture(40))
                shown = await watching.next(5.0)
                assert shown is not None
                return shown.jpeg

        assert asyncio.run_coroutine_threadsafe(watch(), hub._loop).result(PATIENCE_S) == bytes([60])
    assert "no such colours" in caplog.text


def test_publishing_after_the_server_is_gone_is_harmless(serve: Serve) -> None:
    page = serve()
    page.close()
    page.hub.publish("gate", picture())


def test_large_pictures_are_scaled_down() -> None:
    jpeg = jpeg_encoder()(np.zeros((2160, 3840, 3), np.uint8))
    assert cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR).shape == (720, 1280, 3)
