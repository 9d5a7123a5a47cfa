"""``edgefold targets``: what a person reads, and what a program reads."""

from __future__ import annotations

import json

import pytest
import typer
from typer.testing import CliRunner

from apps.console import console
from apps.targets import targets_command
from pipeline.errors import UnsupportedError
from pipeline.targets import TARGETS

_APP = typer.Typer()
_APP.command()(targets_command)


def _run(*arguments: str) -> str:
    result = CliRunner().invoke(_APP, [*arguments, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_json_has_every_target_with_its_releases() -> None:
    told = {entry["name"]: entry for entry in json.loads(_run())}
    assert list(told) == [target.name for target in TARGETS]
    orin = told["jetson-agx-orin-64gb"]
    assert [release["version"] for release in orin["jetpacks"]] == ["6.1", "6.2", "7.2", "7.2.2"]
    assert orin["peaks"]["dla_int8_tops"] == 52.5
    assert not told["jetson-nano"]["buildable"]
    assert told["l4"]["tensorrt_rtx"]
    assert not told["h100-sxm"]["tensorrt_rtx"]


def test_json_of_one() -> None:
    assert json.loads(_run("jetson-orin-nx"))["name"] == "jetson-orin-nx-16gb"


def test_the_table_fits_a_terminal_and_names_every_target(monkeypatch) -> None:
    monkeypatch.setattr(console, "width", 80)
    with console.capture() as captured:
        CliRunner().invoke(_APP, [], catch_exceptions=False)
    rows = {line.split()[0]: line for line in captured.get().splitlines() if line.strip()}
    for target in TARGETS:
        assert target.name in rows
    assert " 87 6.1 6.2 7.2 7.2.2 " in " ".join(rows["jetson-agx-orin-64gb"].split())
    assert "estimate only" in rows["jetson-xavier-nx"]
    assert rows["jetson-agx-orin-64gb"].rstrip().endswith("52.5")
    assert "–" in rows["dgx-spark"], "a figure that is not known is a dash, not a number"


def test_one_entry_shows_sources_and_the_refusal(monkeypatch) -> None:
    monkeypatch.setattr(console, "width", 200)
    with console.capture() as captured:
        CliRunner().invoke(_APP, ["jetson-xavier-nx"], catch_exceptions=False)
    text = captured.get()
    for words in ("7.2", "DS-10184-001", "not at hand", "its last release is JetPack 5.1", "DLA 9 TOPS"):
        assert words in text


def test_one_entry_shows_releases(monkeypatch) -> None:
    monkeypatch.setattr(console, "width", 200)
    with console.capture() as captured:
        CliRunner().invoke(_APP, ["jetson-orin-nx"], catch_exceptions=False)
    text = captured.get()
    assert "JetPack 7.2: TensorRT 10.16.2, Python 3.12" in text
    assert "peaks, Super mode" in text
    assert "also called" in text


def test_an_unknown_name() -> None:
    with pytest.raises(UnsupportedError, match="did you mean"):
        CliRunner().invoke(_APP, ["jetson-orn-nx"], catch_exceptions=False)
