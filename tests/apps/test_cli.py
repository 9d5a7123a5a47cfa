"""The command as installed: its words, its entry points, its reference page."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from apps.cli import main

DOCS = Path(__file__).parents[2] / "docs" / "cli.md"


def test_both_entry_points_exist_and_build_engine_is_build() -> None:
    scripts = {script.name: script.value for script in entry_points(group="console_scripts")}
    assert scripts["edgefold"] == "apps.cli:main"
    assert scripts["build-engine"] == "apps.cli:build_engine"
    ask = [sys.executable, "-c", "from apps.cli import build_engine; build_engine(['--help'])"]
    done = subprocess.run(ask, capture_output=True, text=True, check=True)
    assert "--calib" in done.stdout
    assert "--max-drop" in done.stdout


def test_an_error_is_one_line_on_standard_error(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["validate", "no/such/bundle", "--data", "synthetic:0:10"])
    assert raised.value.code == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert "Traceback" not in captured.err


FAULT = """
import atexit, os
from apps import cli
from pipeline.errors import DeviceFaultError

def fail(**_):
    raise DeviceFaultError("CUDA error 700")

atexit.register(os.abort)  # as pycuda does when it is unloaded with a dead context
cli.app = fail
cli.main([])
"""


def test_a_device_fault_ends_the_process_with_its_own_exit_code() -> None:
    done = subprocess.run([sys.executable, "-c", FAULT], capture_output=True, text=True, check=False)
    assert done.returncode == 6
    assert "CUDA error 700" in done.stderr


def test_an_unknown_option_is_a_usage_error() -> None:
    with pytest.raises(SystemExit) as raised:
        main(["build", "inception_v3", "--no-such-option"])
    assert raised.value.code == 2


def test_the_reference_page_is_current(tmp_path: Path) -> None:
    page = tmp_path / "cli.md"
    command = [sys.executable, "-m", "typer", "apps.cli", "utils", "docs", "--name", "edgefold"]
    subprocess.run(
        [*command, "--title", "Command line", "--output", str(page)], check=True, capture_output=True
    )
    assert page.read_text() == DOCS.read_text(), "run `make docs`"
