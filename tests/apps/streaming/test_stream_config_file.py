"""The TOML configuration: what it becomes, and what is said of everything that is wrong in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from apps.streaming.config import (
    EventConfig,
    MqttConfig,
    RecordConfig,
    ServeConfig,
    SourceConfig,
    StreamConfig,
)
from apps.streaming.config_check import check_config
from apps.streaming.config_file import config_json_schema, read_config
from apps.streaming.config_lines import line_of
from pipeline.errors import UsageError

DOCS = Path(__file__).parents[3] / "docs" / "examples"
SECRETS = {
    "GATE_USER": "viewer",
    "GATE_PASSWORD": "p@ss/w:rd",
    "MQTT_PASSWORD": "m",
    "PAGE_TOKEN": "t0ken",
}
MINIMAL = 'bundle = "b"\n[[source]]\nuri = "synthetic:1"\n'


def write(folder: Path, text: str) -> Path:
    path = folder / "cameras.toml"
    path.write_text(text, encoding="utf-8")
    path.chmod(0o600)
    return path


def refused(folder: Path, text: str) -> str:
    path = write(folder, text)
    with pytest.raises(UsageError) as error:
        read_config(path, environ={})
    assert str(error.value).startswith(str(path))
    return str(error.value).removeprefix(str(path))


def test_the_example_of_the_docs() -> None:
    config = read_config(DOCS / "cameras.toml", environ=SECRETS)
    gate, yard, synthetic = config.sources
    assert config.bundle == DOCS / "signs.bundle"
    assert config.log_json
    # In a URI a password may hold what would end it.
    assert gate.uri == "rtsp://viewer:p%40ss%2Fw%3Ard@gate.example/stream1"
    assert gate.record == RecordConfig(Path("/var/lib/edgefold/gate"), 300.0, 4096.0)
    assert {source.policy for source in config.sources} == {"newest"}
    assert yard.record is None, "a default of recordings records nothing by itself"
    assert synthetic.fps == 5.0
    assert config.limits.backoff_s == (1.0, 30.0)
    assert config.limits.stall_s == 5.0
    assert config.events == EventConfig(ignore=("background",), log="/var/lib/edgefold/events.jsonl")
    assert config.mqtt == MqttConfig("mqtts://edgefold:m@broker.example", "site-1/cameras")
    assert config.serve == ServeConfig("0.0.0.0", 8080, "t0ken")


def shape(schema: dict[str, Any]) -> dict[str, Any]:
    """What of a schema does not depend on pydantic's version: keys, defaults, and what is required or forbidden."""
    objects = {"": schema, "defaults": schema["properties"]["defaults"], **schema["$defs"]}
    return {
        name: (
            {key: value.get("default") for key, value in found["properties"].items()},
            sorted(found.get("required", ())),
            found["additionalProperties"],
        )
        for name, found in objects.items()
    }


def test_the_published_schema_is_the_one_of_the_code() -> None:
    published = json.loads((DOCS / "cameras.schema.json").read_text(encoding="utf-8"))
    assert shape(published) == shape(config_json_schema()), (
        "write docs/examples/cameras.schema.json again from config_json_schema()"
    )
    keys, required, others_allowed = shape(published)[""]
    assert required == ["bundle", "source"]
    assert not others_allowed
    assert {"defaults", "limits", "events", "mqtt", "serve"} <= set(keys)


def test_relative_paths_are_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = """
bundle = "b"
predictions = "out/p.jsonl"
[events]
log = "e.jsonl"
[[source]]
uri = "clips/a.mp4"
record.path = "rec"
[[source]]
uri = "/dev/video0"
[[source]]
uri = "rtsp://camera/1"
[[source]]
uri = "~/film.mp4"
"""
    monkeypatch.setenv("HOME", "/home/me")
    config = read_config(write(tmp_path, text))
    assert config.bundle == tmp_path / "b"
    assert config.predictions == tmp_path / "out/p.jsonl"
    assert config.events is not None
    assert config.events.log == str(tmp_path / "e.jsonl")
    assert [source.uri for source in config.sources] == [
        str(tmp_path / "clips/a.mp4"),
        "/dev/video0",
        "rtsp://camera/1",
        "/home/me/film.mp4",
    ]
    assert config.sources[0].record == RecordConfig(tmp_path / "rec")


def test_standard_output_is_no_path(tmp_path: Path) -> None:
    config = read_config(write(tmp_path, MINIMAL + '[events]\nlog = "-"\n'))
    assert config.events is not None
    assert config.events.log == "-"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("bundel = 'b'\n" + MINIMAL, ", line 1: bundel: unknown key; did you mean 'bundle'?"),
        (
            MINIMAL + "plicy = 'every'\n",
            ", line 4: source.0.plicy: unknown key; did you mean 'policy'?",
        ),
        (
            MINIMAL + "[[source]]\nuri = 'synthetic:2'\nrecord = { path = 'r', segmnt_s = 3 }\n",
            ", line 6: source.1.record.segmnt_s: unknown key; did you mean 'segment_s'?",
        ),
        (MINIMAL + "[limits]\nxyzzy = 1\n", ", line 5: limits.xyzzy: unknown key; known are degraded_s, "),
        ("sources = []\n" + MINIMAL, ", line 1: sources: unknown key; write a [[source]] block for each"),
        ("[defaults]\npolcy = 'every'\n" + MINIMAL, ", line 2: defaults.polcy: unknown key; did you mean"),
        ("[defaults]\nname = 'x'\n" + MINIMAL, ", line 2: defaults.name: belongs to one source"),
        (
            "bundle = 'b'\n[defaults]\nrecord = { path = 'x' }\n[[source]]\nuri = 'synthetic:1'\n",
            ", line 3: defaults.record: holds segment_s and quota_mb only",
        ),
        (
            "bundle = 'b'\n[defaults]\npolicy = 'latest'\n" + MINIMAL.partition("\n")[2],
            ", line 3: defaults.policy: Input should be 'newest' or 'every'",
        ),
        (
            "bundle = 'b'\n[defaults]\nrecord.quota_mb = 0\n[[source]]\nuri = 'synthetic:1'\nrecord.path = 'r'\n",
            ", line 3: defaults.record.quota_mb: 0 is out of range",
        ),
        ("bundle = 'b'\n[source]\nuri = 'synthetic:1'\n", ", line 2: source: must be blocks"),
        ("bundle = 'b'\n", ": source: there is no source to stream"),
        ("[[source]]\nuri = 'synthetic:1'\n", ": bundle: this key is required"),
        ("bundle = 'b'\n[[source]]\nname = 'x'\n", ", line 2: source.0.uri: this key is required"),
        ("max_batch = '4'\n" + MINIMAL, ", line 1: max_batch: Input should be a valid integer"),
        ("max_batch = true\n" + MINIMAL, ", line 1: max_batch: Input should be a valid integer"),
        ("max_age_ms = nan\n" + MINIMAL, ", line 1: max_age_ms: Input should be a finite number"),
        ("max_age_ms = 2026-11-25\n" + MINIMAL, "no key takes a date or time"),
        (MINIMAL + "policy = 'latest'\n", ", line 4: source.0.policy: Input should be 'newest' or 'every'"),
        (
            "bundle = 'b'\nbundle = 'c'\n",
            " is not TOML: Cannot overwrite a value (at line 2, column 13)",
        ),
        (
            MINIMAL + "name = '${WHO}'\n",
            ", line 4: source.0.name: the environment has no variable WHO; set it",
        ),
        # Values that are no use, or contradict one another.
        (MINIMAL + "fps = 0\n", ", line 4: source.0.fps: 0 is out of range"),
        (
            MINIMAL + "[[source]]\nuri = 'synthetic:1'\n",
            ", line 4: source.1.name: source 0 has the same URI already",
        ),
        (
            MINIMAL.replace("[[", "batch_wait_ms = 50\nmax_age_ms = 40\n[["),
            ", line 2: batch_wait_ms: 50 ms of waiting leaves nothing of max_age_ms = 40",
        ),
        (MINIMAL + "record.path = 'a.avi'\n", ", line 4: source.0.record.path: "),
        (MINIMAL + "[limits]\nstall_s = 1\n", ", line 5: limits.stall_s: 1 s is less than degraded_s = 2"),
        (MINIMAL + "[limits]\nbackoff_s = [9, 3]\n", ", line 5: limits.backoff_s: [9, 3] must be"),
        (MINIMAL + "[events]\nleave = 0.9\n", ", line 5: events.leave: 0.9 must be lower than enter = 0.7"),
        (MINIMAL + "[events]\nenter = 70\n", ", line 5: events.enter: 70 is no confidence"),
        (MINIMAL + "[events]\n[mqtt]\nurl = 'http://x'\n", ", line 6: mqtt.url: it must begin with mqtt://"),
        (MINIMAL + "[mqtt]\nurl = 'mqtt://x'\n", ", line 4: mqtt: events go to the broker, and none"),
        (
            MINIMAL + "[events]\n[mqtt]\nurl = 'mqtt://x'\ntopic = 'a/#'\n",
            ", line 7: mqtt.topic: 'a/#' is no",
        ),
        (MINIMAL + "[serve]\nport = 70000\n", ", line 5: serve.port: 70000 is no port"),
        (MINIMAL + "[serve]\ntoken = ''\n", ", line 5: serve.token: an empty token protects nothing"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(tmp_path: Path, text: str, said: str) -> None:
    assert said in refused(tmp_path, text)


def test_two_sources_cannot_write_one_recording(tmp_path: Path) -> None:
    text = "bundle = 'b'\n" + "".join(
        f"[[source]]\nuri = 'synthetic:{n}'\nrecord.path = 'rec'\n" for n in (1, 2)
    )
    assert ", line 7: source.1.record.path: source 0 records to " in refused(tmp_path, text)


@pytest.mark.parametrize("content", [None, b"\xff\xfe", b"#" * (1 << 20) + b"\n"])
def test_what_is_no_configuration_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "c.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=r"cannot be read: No such file|not UTF-8|no configuration"):
        read_config(path)


@pytest.mark.parametrize(
    ("mode", "uri", "warned"),
    [
        (0o644, "rtsp://me:secret@camera/1", True),
        (0o600, "rtsp://me:secret@camera/1", False),
        (0o644, "rtsp://me:${PASSWORD}@camera/1", False),
        (0o644, "rtsp://me@camera/1", False),
        (0o644, "rtsp://camera/1", False),
    ],
)
def test_a_password_that_everyone_can_read_is_warned_of(
    tmp_path: Path, mode: int, uri: str, warned: bool
) -> None:
    path = write(tmp_path, f"bundle = 'b'\n[[source]]\nuri = '{uri}'\n")
    path.chmod(mode)
    warnings: list[str] = []
    read_config(path, environ={"PASSWORD": "secret"}, on_warning=warnings.append)
    assert bool(warnings) is warned
    assert all("mode 644" in text and "source 0" in text and "secret" not in text for text in warnings)


def test_a_token_and_a_broker_s_password_are_warned_of_too(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + "[events]\n[mqtt]\nurl='mqtt://a:b@c'\n[serve]\ntoken = 'open sesame'\n")
    path.chmod(0o644)
    warnings: list[str] = []
    read_config(path, on_warning=warnings.append)
    assert "mqtt.url, serve.token" in warnings[0]


def test_no_message_holds_a_password(tmp_path: Path) -> None:
    text = "bundle = 'b'\n[[source]]\nuri = ['rtsp://me:hunter2@camera/1']\n"
    assert "hunter2" not in refused(tmp_path, text)
    twice = "bundle = 'b'\n" + "[[source]]\nuri = 'rtsp://me:hunter2@camera/1'\n" * 2
    assert "hunter2" not in refused(tmp_path, twice)


def test_the_command_line_s_configuration_is_checked_alike() -> None:
    check_config(StreamConfig(Path("b"), (SourceConfig("synthetic:1"),)))
    with pytest.raises(UsageError, match="max_frames: 0 is out of range; give more than 0"):
        check_config(StreamConfig(Path("b"), (SourceConfig("synthetic:1"),), max_frames=0))


def test_lines_are_found_behind_strings_of_many_lines_and_in_nested_tables() -> None:
    text = 'a = """\n[[source]]\nb = 1\n"""\n[[source]]\n"b" = 1\n[source.c]\nd.e = 2\n[[source]]\nb = 3\n'
    assert line_of(text, ("source", 0, "b")) == 6
    assert line_of(text, ("source", 0, "c", "d", "e")) == 8
    assert line_of(text, ("source", 1, "b")) == 10
    assert line_of(text, ("source", 1, "missing")) == 9
    assert line_of(text, ("elsewhere",)) is None
