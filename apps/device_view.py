"""A bundle for a device, for a person: its candidates, what each costs, and what was built of them."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from pipeline.manifest import CandidateRecord, Deployment, Manifest, Measurement

__all__ = ["print_deployment"]


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
    modes = [stage.checks.get("power_mode") for stage in manifest.stages if stage.stage == "plan"]
    if deployment.measurements and modes and modes[-1] is not None:
        console.print(f"timed in power mode {modes[-1]}", style="dim", markup=False)
    for note in deployment.notes:
        console.print(f"note: {note}", style="yellow", markup=False)
    if manifest.engine is None:
        console.print(
            f"The plan is still to come. On the {manifest.target}: [bold]edgefold finish BUNDLE[/]",
            soft_wrap=True,
        )


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
