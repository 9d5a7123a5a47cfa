"""A real broker (mosquitto) on loopback that can be stopped, and a client that hears everything."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
from waiting import PATIENCE_S, eventually

from apps.streaming.contracts import Event
from apps.streaming.mqtt import MqttPublisher

paho = pytest.importorskip(
    "paho.mqtt.client", reason="paho-mqtt is not installed: pip install edgefold[mqtt]"
)


MOSQUITTO = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin")
needs_broker = pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is missing: apt install mosquitto")
SECRET = "p@ss/w:rd%"
SAVES_AT_ONCE = "autosave_on_changes true\nautosave_interval 1\n"


def event(index: int, source: str = "cam") -> Event:
    return Event("enter", source, "cat", 0, 0.75, index, 10**9 * index, "2026-11-25T12:00:00.000Z")


class Broker:
    """A mosquitto on loopback, which keeps what it acknowledged over an orderly restart.

    With `SAVES_AT_ONCE` over a kill as well, and is slow, since it writes its file at every change.
    """

    def __init__(self, folder: Path, port: int, extra: str = "") -> None:
        self.port = port
        self._process: subprocess.Popen[bytes] | None = None
        self._config = folder / "mosquitto.conf"
        anonymous = "" if "allow_anonymous" in extra else "allow_anonymous true\n"
        self._config.write_text(
            f"listener {self.port} 127.0.0.1\n{extra}{anonymous}user root\n"
            f"persistence true\npersistence_location {folder}/\n"
        )
        self.start()

    def start(self) -> None:
        assert MOSQUITTO is not None
        self._process = subprocess.Popen(
            [MOSQUITTO, "-c", str(self._config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        eventually(self._answers)

    def send(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        assert self._process is not None
        self.send(number)
        self._process.wait(PATIENCE_S)

    def _answers(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def close(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait(PATIENCE_S)


class Subscriber:
    """Hears everything, with a session that outlives the connection.

    `n_by_broker` of the messages were sent by the broker a second time, which does so for its own reasons.
    """

    def __init__(self, port: int, name: str) -> None:
        self.messages: list[tuple[str, str, bool]] = []
        self.n_by_broker = 0
        self.subscribed = threading.Event()
        self._client = paho.Client(
            paho.CallbackAPIVersion.VERSION2, client_id=f"subscriber-{name}", clean_session=False
        )
        self._client.reconnect_delay_set(1, 1)
        self._client.on_connect = lambda client, *_: client.subscribe("#", qos=1)
        self._client.on_subscribe = lambda *_: self.subscribed.set()
        self._client.on_message = self._hear
        self._client.connect("127.0.0.1", port)
        self._client.loop_start()
        assert self.subscribed.wait(PATIENCE_S)

    def _hear(self, client: object, data: object, message: Any) -> None:
        self.messages.append((message.topic, message.payload.decode(), message.retain))
        self.n_by_broker += message.dup

    def frames(self, topic: str = "edgefold/cam/events") -> list[int]:
        return [json.loads(text)["frame"] for found, text, _ in self.messages if found == topic]

    def status(self, topic: str = "edgefold/status") -> list[str]:
        return [text for found, text, _ in self.messages if found == topic]

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


def until_it_says(publisher: MqttPublisher, reason: str) -> None:
    """The reason is there a moment after it was counted."""
    eventually(lambda: reason in str(publisher.last_error), shown=lambda: publisher.last_error)


def without_repetitions(frames: list[int]) -> list[int]:
    return list(dict.fromkeys(frames))
