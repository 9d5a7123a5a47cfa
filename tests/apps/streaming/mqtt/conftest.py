"""Brokers, and publishers that do not wait long, all closed after the test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from mqtt_broker import (
    Broker,
    Subscriber,
)
from ports import reserved_port

from apps.streaming import mqtt
from apps.streaming.mqtt import MqttPublisher


@pytest.fixture
def open_broker(tmp_path: Path) -> Iterator[Callable[..., Broker]]:
    with ExitStack() as stack:

        def start(extra: str = "") -> Broker:
            broker = Broker(tmp_path, stack.enter_context(reserved_port()), extra)
            stack.callback(broker.close)
            return broker

        yield start


@pytest.fixture
def closed_port() -> Iterator[int]:
    """Where nobody listens."""
    with reserved_port() as port:
        yield port


@pytest.fixture
def closing() -> Iterator[list[MqttPublisher | Subscriber]]:
    """Closed after the test, whatever happens in it."""
    opened: list[MqttPublisher | Subscriber] = []
    yield opened
    for one in reversed(opened):
        one.close()


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mqtt, "_RETRY_S", (0.1, 0.4))
