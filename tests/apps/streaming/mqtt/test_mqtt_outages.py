"""A broker that is late, dies, hangs, or is none."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Callable

import pytest
from leaks import Held
from mqtt_broker import (
    SAVES_AT_ONCE,
    Broker,
    Subscriber,
    event,
    needs_broker,
    until_it_says,
    without_repetitions,
)
from waiting import SLACK_S, eventually

from apps.streaming import mqtt
from apps.streaming.config import MqttConfig
from apps.streaming.mqtt import MqttPublisher


@needs_broker
def test_a_broker_that_comes_late_gets_everything(open_broker: Callable[..., Broker], closing: list) -> None:
    broker = open_broker()
    subscriber = Subscriber(broker.port, "late")
    closing.append(subscriber)
    broker.stop()
    publisher = MqttPublisher(MqttConfig(f"mqtt://127.0.0.1:{broker.port}"), ["cam"])
    closing.append(publisher)
    for index in range(50):
        publisher.publish(event(index))
    eventually(lambda: publisher.counters()["failures"] >= 2)
    until_it_says(publisher, "cannot be reached (Connection refused)")
    assert publisher.counters()["queued"] == 50
    broker.start()
    eventually(lambda: publisher.counters()["delivered"] == 50)
    eventually(lambda: publisher.last_error is None)
    eventually(lambda: len(subscriber.frames()) >= 50)
    assert without_repetitions(subscriber.frames()) == list(range(50))


@needs_broker
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_broker_that_dies_and_comes_back_loses_nothing(
    open_broker: Callable[..., Broker], closing: list, number: signal.Signals
) -> None:
    """Killed twice while events are on their way. Sent again is at most what was unconfirmed each time.

    What a killed broker acknowledged and did not save is its own loss: it gets a second to save.
    """
    broker = open_broker(SAVES_AT_ONCE if number == signal.SIGKILL else "")
    subscriber = Subscriber(broker.port, "dies")
    closing.append(subscriber)
    publisher = MqttPublisher(MqttConfig(f"mqtt://127.0.0.1:{broker.port}"), ["cam"])
    closing.append(publisher)
    next_frame = 0

    def publish(count: int) -> None:
        nonlocal next_frame
        for _ in range(count):
            publisher.publish(event(next_frame))
            next_frame += 1

    for _ in range(2):
        publish(100)
        if number == signal.SIGKILL:
            eventually(lambda: len(without_repetitions(subscriber.frames())) == next_frame)
            time.sleep(1.2)
        broker.stop(number)
        publish(100)
        eventually(lambda: publisher.last_error is not None)
        broker.start()
        eventually(lambda: publisher.counters()["queued"] == 0)
    eventually(lambda: len(without_repetitions(subscriber.frames())) == next_frame)
    frames = subscriber.frames()
    assert sorted(set(frames)) == list(range(400))
    assert without_repetitions(frames) == list(range(400))
    assert len(frames) - subscriber.n_by_broker - 400 <= 2 * publisher._session._WINDOW
    counters = publisher.counters()
    assert (counters["published"], counters["delivered"], counters["dropped"]) == (400, 400, 0)


def test_close_does_not_wait_for_a_broker_that_is_gone(closed_port: int) -> None:
    publisher = MqttPublisher(MqttConfig(f"mqtt://127.0.0.1:{closed_port}"), ["cam"])
    publisher.publish(event(0))
    eventually(lambda: publisher.counters()["failures"] >= 1)
    started_s = time.monotonic()
    publisher.close()
    assert time.monotonic() - started_s < 2.0 + SLACK_S
    publisher.close()
    publisher.publish(event(1))
    assert publisher.counters()["queued"] == 2


@needs_broker
def test_close_does_not_wait_for_a_broker_that_hangs(
    open_broker: Callable[..., Broker], closing: list
) -> None:
    broker = open_broker()
    publisher = MqttPublisher(MqttConfig(f"mqtt://127.0.0.1:{broker.port}"), ["cam"])
    eventually(lambda: publisher.connected)
    broker.send(signal.SIGSTOP)
    publisher.publish(event(0))
    started_s = time.monotonic()
    publisher.close()
    assert time.monotonic() - started_s < 2.0 + SLACK_S
    assert publisher.counters()["queued"] == 1
    broker.send(signal.SIGCONT)


@pytest.mark.parametrize(
    "talk", [None, b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x20\x02\x00", b"\xf0\xff\xff\xff\xff\xff"]
)
def test_what_is_no_broker_is_tried_again(
    closing: list, monkeypatch: pytest.MonkeyPatch, talk: bytes | None
) -> None:
    """Something that says nothing, and things that say what is no MQTT: counted, and never the end."""
    monkeypatch.setattr("apps.streaming.mqtt_session._ANSWER_TIMEOUT_S", 0.2)
    monkeypatch.setattr("apps.streaming.mqtt_session._POLL_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as server:
        accepted: list[socket.socket] = []

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                accepted.append(connection)
                if talk is not None:
                    connection.sendall(talk)

        threading.Thread(target=serve, daemon=True).start()
        publisher = MqttPublisher(MqttConfig(f"mqtt://127.0.0.1:{server.getsockname()[1]}"), ["cam"])
        closing.append(publisher)
        publisher.publish(event(0))
        eventually(lambda: publisher.counters()["failures"] >= 3)
        assert publisher.counters()["queued"] == 1
        until_it_says(publisher, "127.0.0.1")
        server.shutdown(socket.SHUT_RDWR)
        for connection in accepted:
            connection.close()


def test_a_hundred_reconnects_leave_nothing_open(
    closing: list, closed_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mqtt, "_RETRY_S", (0.002, 0.002))
    publisher = MqttPublisher(MqttConfig(f"mqtt://127.0.0.1:{closed_port}"), ["cam"])
    closing.append(publisher)
    eventually(lambda: publisher.counters()["failures"] >= 10)
    held = Held()
    eventually(lambda: publisher.counters()["failures"] >= 110)
    held.has_not_grown(descriptors=3)  # a connection that is just being tried
