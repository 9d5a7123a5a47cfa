"""A page server on a free port of this machine, over an app that a test controls."""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import pytest
from fake_stream import FakeApp
from waiting import PATIENCE_S

from apps.streaming.config import ServeConfig
from apps.streaming.serve import PageServer

pytest.importorskip("aiohttp")
pytest.importorskip("prometheus_client")


@dataclass
class Answer:
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()

    def json(self) -> Any:
        return json.loads(self.body)


def ask(
    server: PageServer, path: str, method: str = "GET", body: str | None = None, **headers: str
) -> Answer:
    """One request; an underscore in a header's name stands for a dash."""
    address = urlsplit(server.url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=PATIENCE_S)
    try:
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body, names)
        answer = connection.getresponse()
        return Answer(answer.status, answer.headers, answer.read())
    finally:
        connection.close()


@pytest.fixture
def app() -> Iterator[FakeApp]:
    fake = FakeApp(["gate", "rtsp://10.0.0.12:554/stream1"])
    yield fake
    fake.hold.set()  # whoever still waits goes home


@pytest.fixture
def serve(app: FakeApp) -> Iterator[Callable[..., PageServer]]:
    servers: list[PageServer] = []

    def start(**options: Any) -> PageServer:
        config = ServeConfig(**{"port": 0, **options})
        servers.append(PageServer(config, app.view, app.reload, app.check))
        return servers[-1]

    yield start
    app.hold.set()
    for server in servers:
        server.close()


@pytest.fixture(scope="session")
def asking() -> Callable[..., Answer]:
    return ask
