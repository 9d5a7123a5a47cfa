"""URLs, topics and passwords that can and cannot be used."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
from mqtt_broker import (
    SECRET,
)

from apps.streaming.config import MqttConfig
from apps.streaming.mqtt import MqttPublisher
from pipeline.errors import UnsupportedError, UsageError


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
