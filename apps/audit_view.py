"""An audit of a TensorRT engine, and what a DLA would leave to the GPU, on the terminal."""

from __future__ import annotations

from collections.abc import Iterable

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from engines.tensorrt.audit import AuditReport, Finding, Tally
from engines.tensorrt.dla import MAX_LOADABLES, DlaReport

__all__ = ["print_audit", "print_dla"]

_MAX_OF_A_KIND = 5
_SOURCES = {"predicted": "predicted from the graph", "inspector": "as TensorRT's inspector tells it"}
_WORDS = {
    "unfused_add": "sum alone",
    "float_add": "sum in float",
    "concat_requantized": "requantized concat",
    "concat_float": "float concat",
    "concat_copied": "copied concat",
    "half_quantized": "half quantized",
    "float_layer": "float layer",
    "fp32_island": "fp32 island",
    "asymmetric": "zero point",
    "requantization": "requantization",
    "reformat": "reformat",
    "split_layer": "split layer",
    "not_int8": "not int8",
}


def print_audit(report: AuditReport, console: Console) -> None:
    """Kernels by precision, sums and concatenations, and the findings by kind, some of each."""
    console.print(Text(f"TensorRT's kernels, {_SOURCES[report.source]}", style="bold"))
    console.print(_line("computing", report.precisions.items()))
    console.print(_line("kernels", report.kinds.items()))
    console.print(
        _tally("residual adds", report.adds, "fused"), _tally("concatenations", report.concats, "free")
    )
    if not report.findings:
        console.print(Text("no findings", style="green"))
        return
    table = _table("Findings", "finding", "where and why", "what mends it")
    for kind, findings in _by_kind(report.findings).items():
        for finding in findings[:_MAX_OF_A_KIND]:
            mends = finding.remedy if finding.edit is None else f"{finding.remedy}\n→ {finding.edit}"
            table.add_row(_WORDS[kind], Text(finding.detail), Text(mends))
        if len(findings) > _MAX_OF_A_KIND:
            table.add_row(
                "", Text(f"{len(findings) - _MAX_OF_A_KIND} more: --json has them all", style="dim"), ""
            )
    console.print(table)


def print_dla(report: DlaReport, console: Console) -> None:
    """Nodes on either side, loadables, and each fallback with its reason."""
    console.print(Text(f"On a DLA, {report.precision}, batch {report.batch}", style="bold"))
    total = report.n_dla + len(report.fallbacks)
    style = "" if report.fits else "bold red"
    console.print(
        Text(
            f"  {report.n_dla} of {total} nodes, in {report.n_loadables} loadables (a core holds {MAX_LOADABLES})",
            style,
        )
    )
    if not report.fallbacks:
        return
    table = _table("On the GPU instead", "operator", "why", "what mends it")
    for operator in report.by_operator:
        of_operator = [fallback for fallback in report.fallbacks if fallback.op_type == operator]
        for fallback in of_operator[:_MAX_OF_A_KIND]:
            table.add_row(operator, Text(fallback.reason), Text(fallback.remedy))
        if len(of_operator) > _MAX_OF_A_KIND:
            table.add_row(
                "", Text(f"{len(of_operator) - _MAX_OF_A_KIND} more: --json has them all", style="dim"), ""
            )
    console.print(table)


def _line(label: str, counts: Iterable[tuple[str, int]]) -> Text:
    return Text(f"  {label}: " + ", ".join(f"{count} {what}" for what, count in counts))


def _tally(label: str, tally: Tally, state: str) -> Text:
    style = "green" if tally.clean == tally.total else "yellow"
    return Text.assemble(f"  {label}: ", (f"{tally.clean} of {tally.total} {state}", style))


def _by_kind(findings: Iterable[Finding]) -> dict[str, list[Finding]]:
    groups: dict[str, list[Finding]] = {}
    for finding in findings:
        groups.setdefault(finding.kind, []).append(finding)
    return groups


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(columns[0], no_wrap=True)
    for column in columns[1:]:
        table.add_column(column, overflow="fold")
    return table
