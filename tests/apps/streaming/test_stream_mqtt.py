"""`MqttPublisher` against a real broker (mosquitto) that is killed, frozen, locked and slow."""

from __future__ import annotations

import json
import logging
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from leaks import Held
from ports import reserved_port
from waiting import PATIENCE_S, SLACK_S, eventually

from apps.streaming import mqtt
from apps.streaming.config import MqttConfig
from apps.streaming.contracts import Event
from apps.streaming.mqtt import MqttPublisher
from pipeline.errors import UnsupportedError, UsageError

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


def until_it_says(publisher: MqttPublisher, reason: str) -> None:
    """The reason is there a moment after it was counted."""
    eventually(lambda: reason in str(publisher.last_error), shown=lambda: publisher.last_error)


def without_repetitions(frames: list[int]) -> list[int]:
    return list(dict.fromkeys(frames))


@needs_broker
def test_events_arrive_in_order_by_source(open_broker: Callable[..., Broker], closing: list) -> None:
    broker = open_broker()
    subscriber = Subscriber(broker.port, "order")
    closing.append(subscriber)
    publisher = MqttPublisher(MqttConfig(f"mqtt://127.0.0.1:{broker.port}"), ["cam", "rtsp://door/1"])
    closing.append(publisher)
    for index in range(200):
        publisher.publish(event(index, "cam" if index % 2 else "rtsp://door/1"))
    eventually(lambda: publisher.counters()["queued"] < 20)
    publisher.close()  # delivers the rest
    eventually(lambda: subscriber.status()[-1:] == ["offline"])
    assert subscriber.frames("edgefold/cam/events") == list(range(1, 200, 2))
    assert subscriber.frames("edgefold/rtsp_door_1/events") == list(range(0, 200, 2))
    assert subscriber.status() == ["online", "offline"]
    counters = publisher.counters()
    assert counters == {
        "published": 200,
        "delivered": 200,
        "dropped": 0,
        "queued": 0,
        "failures": 0,
        "refused": 0,
    }


@needs_broker
def test_an_event_is_sent_when_it_happens(
    open_broker: Callable[..., Broker], closing: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Woken by the event, not by a poll, which would not come round in this test's time."""
    monkeypatch.setattr("apps.streaming.mqtt_session._POLL_S", 10 * PATIENCE_S)
    broker = open_broker()
    publisher = MqttPublisher(MqttConfig(f"mqtt://127.0.0.1:{broker.port}"), ["cam"])
    closing.append(publisher)
    eventually(lambda: publisher.connected)
    for index in range(5):
        time.sleep(0.05)
        publisher.publish(event(index))
        eventually(lambda index=index: publisher.counters()["delivered"] == index + 1)


@needs_broker
def test_qos_0(open_broker: Callable[..., Broker], closing: list) -> None:
    broker = open_broker()
    subscriber = Subscriber(broker.port, "qos0")
    closing.append(subscriber)
    publisher = MqttPublisher(MqttConfig(f"mqtt://127.0.0.1:{broker.port}", topic="site/7", qos=0), ["cam"])
    closing.append(publisher)
    for index in range(100):
        publisher.publish(event(index))
    publisher.close()
    eventually(lambda: subscriber.status("site/7/status")[-1:] == ["offline"])
    assert subscriber.frames("site/7/cam/events") == list(range(100))
    assert publisher.counters()["delivered"] == 100


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


@needs_broker
def test_the_last_will_says_that_the_app_was_killed(
    open_broker: Callable[..., Broker], closing: list
) -> None:
    broker = open_broker()
    subscriber = Subscriber(broker.port, "will")
    closing.append(subscriber)
    script = f"""
import time
from apps.streaming.config import MqttConfig
from apps.streaming.mqtt import MqttPublisher
MqttPublisher(MqttConfig("mqtt://127.0.0.1:{broker.port}"), ["cam"])
time.sleep(60)
"""
    app = subprocess.Popen([sys.executable, "-c", script])
    try:
        eventually(lambda: subscriber.status() == ["online"])
    finally:
        app.kill()
        app.wait(PATIENCE_S)
    eventually(lambda: subscriber.status() == ["online", "offline"])
    late = Subscriber(broker.port, "late-will")
    closing.append(late)
    eventually(lambda: ("edgefold/status", "offline", True) in late.messages)  # retained


@needs_broker
def test_passwords(
    open_broker: Callable[..., Broker],
    closing: list,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    passwords = tmp_path / "passwords"
    subprocess.run(
        ["mosquitto_passwd", "-c", "-b", str(passwords), "pole", SECRET], check=True, capture_output=True
    )
    broker = open_broker(f"allow_anonymous false\npassword_file {passwords}\n")
    monkeypatch.setenv("BROKER_PASSWORD", SECRET)
    url = f"mqtt://pole:${{BROKER_PASSWORD}}@127.0.0.1:{broker.port}"
    right = MqttPublisher(MqttConfig(url), ["cam"])
    quoted = MqttPublisher(
        MqttConfig(f"mqtt://pole:p%40ss%2Fw%3Ard%25@127.0.0.1:{broker.port}", "other"), ["cam"]
    )
    closing += [right, quoted]
    eventually(lambda: right.connected and quoted.connected)

    monkeypatch.setenv("BROKER_PASSWORD", "wrong-" + SECRET)
    wrong = MqttPublisher(MqttConfig(url), ["cam"])
    nobody = MqttPublisher(MqttConfig(f"mqtt://127.0.0.1:{broker.port}"), ["cam"])
    closing += [wrong, nobody]
    until_it_says(wrong, "refused to let us in")
    until_it_says(wrong, "check user and password")
    until_it_says(nobody, "asks for user and password")
    assert wrong.counters()["refused"] == nobody.counters()["refused"] == 1
    time.sleep(0.6)
    assert wrong.counters()["failures"] == 1  # a lock does not open by knocking: not tried again at once
    shown = f"{caplog.text} {wrong._broker!r} {wrong.last_error}"
    assert SECRET not in shown
    assert "pole" not in shown


@needs_broker
@pytest.mark.filterwarnings(
    "ignore:unclosed <ssl:ResourceWarning"
)  # paho leaves what failed to the collector
def test_tls(
    open_broker: Callable[..., Broker], closing: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is missing: apt install openssl")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        f"openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=127.0.0.1 "
        f"-addext subjectAltName=IP:127.0.0.1 -keyout {key} -out {certificate}".split(),
        check=True,
        capture_output=True,
    )
    broker = open_broker(f"certfile {certificate}\nkeyfile {key}\n")
    url = f"mqtts://127.0.0.1:{broker.port}"
    stranger = MqttPublisher(MqttConfig(url), ["cam"])
    closing.append(stranger)
    until_it_says(stranger, "is not trusted")
    assert "SSL_CERT_FILE" in str(stranger.last_error)
    assert stranger.counters()["refused"] == 1
    assert not stranger.connected

    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    friend = MqttPublisher(MqttConfig(url), ["cam"])
    closing.append(friend)
    for index in range(100):
        friend.publish(event(index))
    eventually(lambda: friend.counters()["delivered"] == 100)


def test_a_full_queue_gives_up_the_oldest(closing: list, closed_port: int) -> None:
    publisher = MqttPublisher(MqttConfig(f"mqtt://127.0.0.1:{closed_port}", queue=10), ["cam"])
    closing.append(publisher)
    for index in range(35):
        publisher.publish(event(index))
    counters = publisher.counters()
    assert (counters["published"], counters["dropped"], counters["queued"]) == (35, 25, 10)


@needs_broker
def test_what_a_full_queue_kept_is_delivered(open_broker: Callable[..., Broker], closing: list) -> None:
    broker = open_broker()
    subscriber = Subscriber(broker.port, "full")
    closing.append(subscriber)
    broker.stop()
    second = MqttPublisher(MqttConfig(f"mqtt://127.0.0.1:{broker.port}", queue=10), ["cam"])
    closing.append(second)
    for index in range(35):
        second.publish(event(index))
    broker.start()
    eventually(lambda: subscriber.frames() == list(range(25, 35)))


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


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://host", "its scheme is 'http'"),
        ("host:1883", "scheme"),
        ("mqtt://", "it names no host"),
        ("mqtt://host:port", "host or port cannot be read"),
        ("mqtt://host:70000", "host or port cannot be read"),
        ("mqtt://host/topic", "something follows host and port"),
        (f"mqtt://pole:{SECRET}@host", "malformed"),
        (f"mqtt://:{SECRET.replace('/', '')}@host", "a password without a user"),
        ("mqtt://pole:${NO_SUCH_VARIABLE}@host", "'NO_SUCH_VARIABLE', which is not set"),
    ],
)
def test_urls_that_cannot_be_used(url: str, reason: str) -> None:
    with pytest.raises(UsageError, match=r"^mqtt: ") as caught:
        MqttPublisher(MqttConfig(url), ["cam"])
    assert reason in str(caught.value)
    for secret in (SECRET, "p@ss", "w:rd"):
        assert secret not in str(caught.value)
        assert secret not in repr(caught.value.__cause__)


def test_urls_that_can_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    from apps.streaming.broker_url import parse_broker_url

    monkeypatch.setenv("WORD", "a%40b")
    found = parse_broker_url("mqtts://p%40le:x${WORD}y@[::1]")
    assert (found.host, found.port, found.tls) == ("::1", 8883, True)
    assert (found.username, found.password) == ("p@le", "xa%40by")  # a variable is taken as it is
    assert found.shown == "mqtts://[::1]:8883"
    assert found.is_loopback
    assert not parse_broker_url("mqtt://broker.example").is_loopback
    assert "p@le" not in repr(found)
    assert "x" not in repr(found)


@pytest.mark.parametrize("topic", ["", "a/+/b", "a/#", "/a", "a/", "a//b", "$SYS/a", "a" * 2000])
def test_topics_that_cannot_be_used(topic: str) -> None:
    with pytest.raises(UsageError, match="is no topic to publish under"):
        MqttPublisher(MqttConfig("mqtt://127.0.0.1", topic=topic), ["cam"])


def test_two_sources_on_one_topic_are_refused() -> None:
    with pytest.raises(UsageError, match="'a/b' and 'a:b' would both be on edgefold/a_b/events"):
        MqttPublisher(MqttConfig("mqtt://127.0.0.1"), ["a/b", "c", "a:b"])
    with pytest.raises(UsageError, match="a queue of 0 keeps nothing"):
        MqttPublisher(MqttConfig("mqtt://127.0.0.1", queue=0), ["cam"])


def test_a_password_in_the_clear_is_warned_of(closing: list, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        closing.append(MqttPublisher(MqttConfig("mqtt://pole:hidden@broker.invalid"), ["cam"]))
        closing.append(MqttPublisher(MqttConfig("mqtt://pole:hidden@127.0.0.1:1"), ["cam"]))
    warned = [record.getMessage() for record in caplog.records if "unencrypted" in record.getMessage()]
    assert warned == ["mqtt: the password for mqtt://broker.invalid:1883 goes out unencrypted; use mqtts://"]
    assert "hidden" not in caplog.text


def test_without_paho(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "paho.mqtt", None)
    monkeypatch.setitem(sys.modules, "paho.mqtt.client", None)
    monkeypatch.delitem(sys.modules, "apps.streaming.mqtt_session", raising=False)
    monkeypatch.delattr("apps.streaming.mqtt_session", raising=False)
    with pytest.raises(UnsupportedError, match=r"need paho-mqtt 2 .*pip install 'edgefold\[mqtt\]'"):
        MqttPublisher(MqttConfig("mqtt://127.0.0.1"), ["cam"])


def test_importing_the_outputs_costs_nothing_that_is_not_used() -> None:
    script = """
import sys
import apps.streaming.events, apps.streaming.mqtt, apps.streaming.recording
print([name for name in ("paho", "cv2", "torch", "openvino") if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
