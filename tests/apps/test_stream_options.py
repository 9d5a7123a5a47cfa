"""The command line of `edgefold stream` as a `StreamConfig`."""

from __future__ import annotations

from pathlib import Path

import pytest

from apps.stream import _config
from apps.streaming.config import EventConfig, MqttConfig, RecordConfig, ServeConfig, SourceConfig
from pipeline.errors import UsageError


def test_options_become_the_configuration() -> None:
    config = _config(
        None,
        bundle=Path("b"),
        sources=["synthetic:1", "synthetic:2"],
        policy="every",
        fps=12.0,
        events="-",
        mqtt="mqtt://host",
        serve="0.0.0.0:9000",
        token="secret",
        max_age_ms=250.0,
        max_batch=2,
        streams=None,
    )
    assert config.sources == tuple(
        SourceConfig(uri, policy="every", fps=12.0) for uri in ("synthetic:1", "synthetic:2")
    )
    assert config.events == EventConfig(log="-")
    assert config.mqtt == MqttConfig("mqtt://host")
    assert config.serve == ServeConfig(host="0.0.0.0", port=9000, token="secret")
    assert (config.max_age_ms, config.max_batch, config.streams) == (250.0, 2, None)


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [("8080", "127.0.0.1", 8080), ("[::1]:80", "::1", 80), ("pole-3:0", "pole-3", 0)],
)
def test_serve_takes_a_port_or_an_address(text: str, host: str, port: int) -> None:
    config = _config(None, bundle=Path("b"), sources=["synthetic:1"], serve=text)
    assert config.serve == ServeConfig(host=host, port=port)


@pytest.mark.parametrize("text", ["host", "host:", "host:99999", ":x"])
def test_serve_refuses_what_is_no_address(text: str) -> None:
    with pytest.raises(UsageError, match=r"is not \[HOST:\]PORT"):
        _config(None, bundle=Path("b"), sources=["synthetic:1"], serve=text)


def test_what_is_missing_is_named() -> None:
    with pytest.raises(UsageError, match="give BUNDLE"):
        _config(None, sources=["synthetic:1"])
    with pytest.raises(UsageError, match="give --source"):
        _config(None, bundle=Path("b"))


def test_one_recording_is_for_one_source() -> None:
    config = _config(None, bundle=Path("b"), sources=["synthetic:1"], record=Path("out.mp4"))
    assert config.sources[0].record == RecordConfig(Path("out.mp4"))
    with pytest.raises(UsageError, match="--record is for one source, there are 2"):
        _config(None, bundle=Path("b"), sources=["synthetic:1", "synthetic:2"], record=Path("out.mp4"))
