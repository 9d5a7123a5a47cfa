"""`StreamConfig` from a TOML file: ``edgefold stream --config cameras.toml``.

The tables and keys are the fields of `apps.streaming.config`, but that the sources are ``[[source]]`` blocks, and that
``[defaults]`` holds what all of them share. pydantic validates the same dataclasses, strictly; a message names the key, its
line, and, for a key that does not exist, the one that was probably meant.

``${NAME}`` in a string is the environment's variable of that name, so that the file need not hold a password. In the user
and password of a URI it is percent-encoded, so that any password can be one.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import logging
import os
import re
import sys
import typing
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pydantic import TypeAdapter, ValidationError

from apps.streaming.config import SourceConfig, StreamConfig
from apps.streaming.config_check import find_problem
from apps.streaming.config_lines import line_of
from pipeline.errors import UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["config_json_schema", "read_config"]

_log = logging.getLogger("edgefold.config")

_MAX_BYTES = 1 << 20
_SOURCE, _SOURCES, _DEFAULTS = "source", "sources", "defaults"
_OF_ONE_SOURCE = ("uri", "name")
"""What no two sources share, so that it cannot be a default."""
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_USERINFO = re.compile(r"(?<=://)[^/?#\s]*(?=@)")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")
_READABLE_BY_OTHERS = 0o004

Tree = dict[str, Any]
Loc = tuple[str | int, ...]


def read_config(
    path: Path | str,
    *,
    environ: Mapping[str, str] | None = None,
    on_warning: Callable[[str], None] = _log.warning,
) -> StreamConfig:
    """Reads and checks a configuration; nothing in it is opened.

    Relative paths are relative to the file's folder.

    Args:
        path: the TOML file.
        environ: for ``${NAME}``; by default the process's.
        on_warning: told of a password or token that others can read.

    Raises:
        UsageError: no such file, not TOML, an unknown key, a wrong type or value, a variable that is not set.
    """
    path = Path(path)
    text = _read_text(path)
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path} is not TOML: {error}") from error
    file = _File(path, text, raw)
    tree = _with_defaults(raw, file)
    _warn_of_secrets(tree, path, on_warning)
    expanded = _expanded(tree, os.environ if environ is None else environ, (), file)
    try:
        config = _adapter().validate_json(json.dumps(expanded), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise file.error(first["loc"], _meant(first)) from error
    except TypeError as error:  # TOML has dates and times, which no key takes
        raise UsageError(f"{path}: {error}; no key takes a date or time, write text in quotes") from error
    config = _resolved(config, path.absolute().parent)
    problem = find_problem(config)
    if problem is not None:
        raise file.error(*problem)
    return config


def config_json_schema() -> dict[str, Any]:
    """The JSON schema of the file, for editors (``#:schema`` of Taplo and others)."""
    schema = _adapter().json_schema()
    properties = schema["properties"]
    properties[_SOURCE] = {**properties.pop(_SOURCES), "title": "Source"}
    source = schema["$defs"]["SourceConfig"]
    defaults = {key: value for key, value in source["properties"].items() if key not in _OF_ONE_SOURCE}
    properties[_DEFAULTS] = {
        "additionalProperties": False,
        "properties": defaults,
        "title": "Defaults",
        "type": "object",
    }
    schema["required"] = ["bundle", _SOURCE]
    return schema


@cache
def _adapter() -> TypeAdapter[StreamConfig]:
    return TypeAdapter(StreamConfig)


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(f"the configuration {path} cannot be read: {error.strerror or error}") from error
    if len(data) > _MAX_BYTES:
        raise UsageError(f"{path} has more than {_MAX_BYTES} bytes; it is no configuration")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text (byte {error.start}), as TOML has to be") from error


@dataclasses.dataclass(frozen=True, slots=True)
class _File:
    """The file, to say where in it something is wrong."""

    path: Path
    text: str
    raw: Tree

    def error(self, loc: Loc, what: str) -> UsageError:
        """`what` is wrong at a place of `StreamConfig`, told as the file has it: key and line."""
        loc = self._as_written(loc)
        line = line_of(self.text, loc)
        at = "" if line is None else f", line {line}"
        return UsageError(f"{self.path}{at}: {'.'.join(map(str, loc))}: {what}")

    def _as_written(self, loc: Loc) -> Loc:
        if loc[:1] != (_SOURCES,) or _SOURCES in self.raw:
            return loc
        loc = (_SOURCE, *loc[1:])
        if len(loc) < 3:
            return loc
        own, defaults = self.raw[_SOURCE][loc[1]], self.raw.get(_DEFAULTS, {})
        for key in loc[2:]:
            if isinstance(own, dict) and key in own:
                own, defaults = own[key], defaults.get(key, {}) if isinstance(defaults, dict) else {}
            else:
                inherited = isinstance(defaults, dict) and key in defaults
                return (_DEFAULTS, *loc[2:]) if inherited else loc
        return loc


def _with_defaults(raw: Tree, file: _File) -> Tree:
    """The tree of `StreamConfig`: sources under its name for them, each with the defaults."""
    tree = dict(raw)
    if _SOURCES in tree:
        raise file.error((_SOURCES,), "unknown key; write a [[source]] block for each")
    defaults = tree.pop(_DEFAULTS, {})
    if not isinstance(defaults, dict):
        raise file.error((_DEFAULTS,), "must be a table: [defaults]")
    for key in defaults:
        if key in _OF_ONE_SOURCE:
            raise file.error((_DEFAULTS, key), "belongs to one source; give it there")
        if key not in _fields(SourceConfig):
            raise file.error((_DEFAULTS, key), _unknown(key, _fields(SourceConfig)))
    shared_record = defaults.get("record", {})
    if not isinstance(shared_record, dict) or "path" in shared_record:
        raise file.error(
            (_DEFAULTS, "record"), "holds segment_s and quota_mb only: every source has its own path"
        )
    of_all = {key: value for key, value in defaults.items() if key != "record"}
    sources = tree.pop(_SOURCE, [])
    if not isinstance(sources, list) or not all(isinstance(source, dict) for source in sources):
        raise file.error((_SOURCE,), "must be blocks with two brackets: [[source]]")
    tree[_SOURCES] = [_with_default(source, of_all, shared_record) for source in sources]
    return tree


def _with_default(source: Tree, defaults: Tree, shared_record: Tree) -> Tree:
    merged = {**defaults, **source}
    if isinstance(merged.get("record"), dict):
        merged["record"] = {**shared_record, **merged["record"]}
    return merged


def _expanded(value: Any, environ: Mapping[str, str], loc: Loc, file: _File) -> Any:
    """`value` with every ``${NAME}`` replaced."""
    if isinstance(value, dict):
        return {key: _expanded(item, environ, (*loc, key), file) for key, item in value.items()}
    if isinstance(value, list):
        return [_expanded(item, environ, (*loc, index), file) for index, item in enumerate(value)]
    if not isinstance(value, str):
        return value

    def look_up(match: re.Match[str]) -> str:
        found = environ.get(match[1])
        if found is None:
            what = f"the environment has no variable {match[1]}; set it, in a service by EnvironmentFile="
            raise file.error(loc, what)
        return found

    userinfo = _USERINFO.search(value)
    if userinfo is None:
        return _VARIABLE.sub(look_up, value)
    encoded = _VARIABLE.sub(lambda match: quote(look_up(match), safe=""), userinfo[0])
    before, after = value[: userinfo.start()], value[userinfo.end() :]
    return _VARIABLE.sub(look_up, before) + encoded + _VARIABLE.sub(look_up, after)


def _warn_of_secrets(tree: Tree, path: Path, on_warning: Callable[[str], None]) -> None:
    """Warns of what stands in the file itself, where others on the machine can read it."""
    mode = path.stat().st_mode
    if not mode & _READABLE_BY_OTHERS:
        return
    held = [
        f"source {index}" for index, source in enumerate(tree[_SOURCES]) if _holds_password(source.get("uri"))
    ]
    mqtt, serve = tree.get("mqtt"), tree.get("serve")
    if isinstance(mqtt, dict) and _holds_password(mqtt.get("url")):
        held.append("mqtt.url")
    token = serve.get("token") if isinstance(serve, dict) else None
    if isinstance(token, str) and not _VARIABLE.search(token):
        held.append("serve.token")
    if held:
        on_warning(
            f"{path} can be read by every user (mode {mode & 0o777:o}) and holds the password or token of "
            f"{', '.join(held)}: write ${{NAME}} in its place and set NAME in the environment, or chmod 600 the file"
        )


def _holds_password(uri: object) -> bool:
    userinfo = _USERINFO.search(uri) if isinstance(uri, str) else None
    if userinfo is None:
        return False
    password = userinfo[0].partition(":")[2]
    return bool(password) and _VARIABLE.fullmatch(password) is None


def _resolved(config: StreamConfig, folder: Path) -> StreamConfig:
    """`config` with paths relative to `folder` made absolute."""

    def absolute(path: Path) -> Path:
        return folder / path.expanduser()

    events = config.events
    if events is not None and events.log not in (None, "-"):
        events = dataclasses.replace(events, log=str(absolute(Path(str(events.log)))))
    return dataclasses.replace(
        config,
        bundle=absolute(config.bundle),
        predictions=None if config.predictions is None else absolute(config.predictions),
        events=events,
        sources=tuple(
            dataclasses.replace(
                source,
                uri=source.uri if _SCHEME.match(source.uri) else str(absolute(Path(source.uri))),
                record=None
                if source.record is None
                else dataclasses.replace(source.record, path=absolute(source.record.path)),
            )
            for source in config.sources
        ),
    )


def _meant(error: Mapping[str, Any]) -> str:
    """pydantic's finding in words; an unknown key with those that exist."""
    if error["type"] == "unexpected_keyword_argument":
        *parents, key = error["loc"]
        return _unknown(str(key), _fields(_class_at(tuple(parents))))
    if error["type"] in ("missing", "missing_argument"):
        return "this key is required"
    return str(error["msg"])


def _unknown(key: str, known: typing.Sequence[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    if near:
        return f"unknown key; did you mean {near[0]!r}?"
    return f"unknown key; known are {', '.join(known)}"


def _fields(cls: type) -> list[str]:
    names = [item.name for item in dataclasses.fields(cls)]
    return [_SOURCE if name == _SOURCES else name for name in names] + (
        [_DEFAULTS] if cls is StreamConfig else []
    )


def _class_at(loc: Loc) -> type:
    """The dataclass that stands at a place of the tree."""
    found: type = StreamConfig
    for step in loc:
        if isinstance(step, str) and step in (hints := typing.get_type_hints(found)):
            found = next((cls for cls in _classes_in(hints[step])), found)
    return found


def _classes_in(hint: Any) -> list[type]:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return [hint]
    return [cls for argument in typing.get_args(hint) for cls in _classes_in(argument)]
