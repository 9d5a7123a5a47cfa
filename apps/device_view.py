"""A bundle for a device, for a person: its candidates, what each costs, and what was built of them."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from engines.tensorrt.dla import DlaReport
from pipeline.manifest import CandidateRecord, Deployment, Manifest, Measurement

__all__ = ["print_deployment", "print_dla"]

_SHOWN_FALLBACKS = 8


def print_deployment(manifest: Manifest, console: Console) -> None:
    """The candidates with their emulated accuracy and what the device measured; then what is still to do.

    Prints nothing for a bundle without a deployment.
    """
    deployment = manifest.deployment
    if deployment is None:
        return
    console.print(_candidates(manifest, deployment))
    for record in deployment.candidates:
        console.print(f"{record.name}: {record.reason}", style="dim", markup=False)
    if any(record.accuracy is not None for record in deployment.candidates):
        console.print(
            "Accuracy is emulated: drop of top-1 in points, of the same graph computed on the CPU as it is written. "
            "!: past the budget"
        )
    for note in deployment.notes:
        console.print(f"note: {note}", style="yellow", markup=False)
    if manifest.engine is None:
        console.print(
            f"The plan is still to come. On the {manifest.target}: [bold]edgefold finish BUNDLE[/]",
            soft_wrap=True,
        )


def print_dla(report: DlaReport, console: Console) -> None:
    """How much of the network a DLA runs, and the reasons for what it does not."""
    total = report.n_dla + len(report.fallbacks)
    console.print(
        f"DLA, {report.precision}: {report.n_dla} of {total} nodes run on it, in {report.n_loadables} loadables"
        + ("" if report.fits else "; more than one core can have loaded: expect the rest on the GPU")
    )
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("on the GPU")
    table.add_column("why")
    table.add_column("remedy")
    for fallback in report.fallbacks[:_SHOWN_FALLBACKS]:
        table.add_row(fallback.op_type, escape(fallback.reason), escape(fallback.remedy))
    if report.fallbacks:
        console.print(table)
    if len(report.fallbacks) > _SHOWN_FALLBACKS:
        console.print(f"… {len(report.fallbacks) - _SHOWN_FALLBACKS} more in dla.json")


def _candidates(manifest: Manifest, deployment: Deployment) -> Table:
    """One row a candidate; accuracy and latency only where there are any."""
    judged = any(record.accuracy is not None for record in deployment.candidates)
    measured = {measurement.candidate: measurement for measurement in deployment.measurements}
    table = Table(title=f"Candidates for {manifest.target}", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("candidate", no_wrap=True)
    columns = (
        "ONNX MB",
        *(("drop", "95% interval", "SQNR") if judged else ()),
        *(("plan MB", "p50") if measured else ()),
    )
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for record in deployment.candidates:
        chosen = record.name == deployment.chosen
        table.add_row(
            f"[bold green]{record.name}[/] ✓" if chosen else record.name,
            f"{manifest.files[record.file].size_bytes / 1e6:.1f}",
            *(_accuracy(record) if judged else ()),
            *(_plan(measured.get(record.name)) if measured else ()),
            style=None if record.within_budget else "red",
        )
    return table


def _accuracy(record: CandidateRecord) -> tuple[str, str, str]:
    found = record.accuracy
    if found is None:
        return ("–", "–", "–")
    past = "" if record.within_budget else " !"
    sqnr = "∞" if found.sqnr_db is None else f"{found.sqnr_db:.1f} dB"
    return (f"{found.drop_points:+.2f}{past}", f"{found.drop_low:+.2f} to {found.drop_high:+.2f}", sqnr)


def _plan(measurement: Measurement | None) -> tuple[str, str]:
    if measurement is None:
        return ("–", "–")
    latency = "not timed" if measurement.p50_ms is None else f"{measurement.p50_ms:.3f} ms"
    return (f"{measurement.plan_bytes / 1e6:.1f}", latency)
