"""What reaches a real broker, in which order, and when."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from mqtt_broker import (
    SECRET,
    Broker,
    Subscriber,
    event,
    needs_broker,
    until_it_says,
)
from waiting import PATIENCE_S, eventually

from apps.streaming.config import MqttConfig
from apps.streaming.mqtt import MqttPublisher


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
