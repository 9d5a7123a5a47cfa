"""The tables in docs/targets.md and docs/estimate.md are what the code and the results say."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import typer
from typer.testing import CliRunner

from apps.console import console
from apps.targets import targets_command
from benchmarks.published import PUBLISHED
from engines.tensorrt import estimate
from pipeline.target_entry import version_key
from pipeline.targets import JETPACKS, OLDEST_TENSORRT, find_target, jetpacks_of

DOCS = Path(__file__).parent.parent / "docs"
RESULTS = Path(__file__).parent.parent / "benchmarks" / "results" / "estimate_vs_published.json"


def targets_table() -> str:
    """The printed table, as the page holds it."""
    app = typer.Typer()
    app.command()(targets_command)
    with console.capture() as captured:
        CliRunner().invoke(app, [], catch_exceptions=False)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def test_the_targets_page_shows_the_table(monkeypatch) -> None:
    monkeypatch.setattr(console, "width", 80)
    page = (DOCS / "targets.md").read_text(encoding="utf-8")
    shown = page.split("<!-- targets: begin -->\n```text\n")[1].split("\n```\n<!-- targets: end -->")[0]
    assert shown == targets_table(), "copy what edgefold targets prints at 80 columns into docs/targets.md"


def test_the_targets_page_has_every_usable_jetpack() -> None:
    page = (DOCS / "targets.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1:4] for line in page.splitlines() if (line.startswith("|") and "10." in line) or ("11.4" in line and line.startswith("|"))]  # fmt: skip
    shown = {
        version.strip(): (tensorrt.strip(), python.strip())
        for versions, tensorrt, python in rows
        for version in versions.split(",")
    }
    usable = [r for r in JETPACKS if version_key(r.tensorrt) >= version_key(OLDEST_TENSORRT)]
    assert shown == {release.version: (release.tensorrt, release.python) for release in usable}
    assert {r.version for r in jetpacks_of(find_target("jetson-thor"))} == {"7.0", "7.1", "7.2", "7.2.2"}


def test_the_estimate_page_shows_the_recorded_comparison(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(RESULTS.parent.parent))
    script = importlib.import_module("estimate_vs_published")
    page = (DOCS / "estimate.md").read_text(encoding="utf-8")
    recorded = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert script.with_table(page, recorded["figures"]) == page, "run benchmarks/estimate_vs_published.py"


def test_every_published_figure_was_compared_and_lies_inside() -> None:
    recorded = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert recorded["max_ratio"] == estimate.MAX_RATIO
    assert [
        (row["target"], row["network"], row["source"], row["published"]) for row in recorded["figures"]
    ] == [(f.target, f.network, f.source, f.latency_ms or f.images_per_s) for f in PUBLISHED]
    for row in recorded["figures"]:
        assert row["low"] <= row["published"] <= row["high"] <= estimate.MAX_RATIO * row["low"], row


def test_the_estimate_page_names_the_constants() -> None:
    page = (DOCS / "estimate.md").read_text(encoding="utf-8")
    for label, (better, worse), unit in (
        ("share of the dense peak", estimate.COMPUTE_EFFICIENCY, ""),
        ("share of the bandwidth", estimate.MEMORY_EFFICIENCY, ""),
        ("overhead a kernel", tuple(f"{value:g}" for value in estimate.OVERHEAD_US), " µs"),
    ):
        assert f"| {label} | {better}{unit} | {worse}{unit} |" in page
