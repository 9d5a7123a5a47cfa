"""``edgefold inspect``: what folding made of a model, pass by pass."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from pipeline.inspection import GraphSummary, Inspection
    from pipeline.passes import PassRecord

__all__ = ["inspect_command"]

_MAX_REASONS = 20
_QUANTITIES = {
    "n_nodes": "nodes",
    "n_parameters": "parameters",
    "parameter_bytes": "parameter bytes",
    "macs": "MACs at batch 1",
}


def inspect_command(
    model: Annotated[
        str,
        typer.Argument(
            help="A bundle's folder, a file.onnx, or a model as `edgefold build` takes it.",
            show_default=False,
        ),
    ],
    weights: Annotated[
        str | None,
        typer.Option(
            help="FILE (safetensors or checkpoint), pretrained, or random:SEED.", show_default=False
        ),
    ] = None,
    input_size: Annotated[
        int | None, typer.Option(min=8, help="Side of the input, instead of the model's.", show_default=False)
    ] = None,
    num_classes: Annotated[
        int | None, typer.Option(min=1, help="Where the weights do not tell.", show_default=False)
    ] = None,
    preprocess: Annotated[
        Path | None,
        typer.Option(help="PreprocessSpec as JSON. Folds the input of a file.onnx too.", show_default=False),
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Show a model before and after folding: operators, parameters, MACs, what each pass did and why not."""
    from apps.console import print_json, progress_display
    from pipeline.inspection import inspect_bundle, inspect_onnx, inspect_resolved

    with progress_display() as progress:
        if Path(model).is_dir():
            inspection = inspect_bundle(Path(model))
        elif model.endswith(".onnx") and preprocess is None:
            inspection = inspect_onnx(Path(model), progress)
        else:
            from pipeline.models.resolve import resolve_model

            resolved = resolve_model(
                model,
                weights=weights,
                num_classes=num_classes,
                input_size=input_size,
                preprocess_file=preprocess,
            )
            inspection = inspect_resolved(resolved, progress)
    if json_output:
        print_json(json.dumps(inspection.as_json(), indent=2))
    else:
        _print(inspection)


def _print(inspection: Inspection) -> None:
    from rich.markup import escape
    from rich.table import Table

    from apps.console import console

    console.print(f"[bold]{escape(inspection.model)}[/bold]", highlight=False)
    for summary in list(inspection.graphs.values())[1:2]:
        for direction, specs in (("input", summary.inputs), ("output", summary.outputs)):
            for spec in specs:
                shape = ", ".join(map(str, spec.shape))
                console.print(f"  {direction}  {spec.name}: {spec.dtype} [{shape}]", markup=False)
    console.print(_counts(inspection.graphs))
    console.print(_passes(inspection.passes))
    reasons = [(record.name, *entry) for record in inspection.passes for entry in record.skipped]
    if not reasons:
        return
    table = Table(title="What stayed, and why", title_justify="left")
    table.add_column("left alone by pass")
    table.add_column("because")
    for name, node, reason in reasons[:_MAX_REASONS]:
        table.add_row(f"{name}\n[bold]{escape(node)}[/bold]", escape(reason))
    console.print(table)
    if len(reasons) > _MAX_REASONS:
        console.print(f"{len(reasons) - _MAX_REASONS} more: --json has them all")


def _counts(graphs: dict[str, GraphSummary]) -> Table:
    from rich.table import Table

    table = Table("", *graphs, title="Graph", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for attribute, label in _QUANTITIES.items():
        table.add_row(label, *(f"{getattr(summary, attribute):,}" for summary in graphs.values()))
    table.add_section()
    for op in dict.fromkeys(op for summary in graphs.values() for op in summary.op_counts):
        counts = [summary.op_counts.get(op, 0) for summary in graphs.values()]
        style = None if len(set(counts)) == 1 else "bold"
        table.add_row(op, *map(str, counts), style=style)
    return table


def _passes(passes: tuple[PassRecord, ...]) -> Table:
    from rich.table import Table

    table = Table(title="Passes", title_justify="left")
    table.add_column("pass", no_wrap=True)
    for heading in ("done", "left alone", "seconds", "max error", "SQNR dB"):
        table.add_column(heading, justify="right")
    for record in passes:
        error = "" if record.max_abs_error is None else f"{record.max_abs_error:.1e}"
        sqnr = "" if record.sqnr_db is None else f"{record.sqnr_db:.1f}"
        table.add_row(
            record.name,
            str(record.n_rewrites),
            str(len(record.skipped)),
            f"{record.seconds:.2f}",
            error,
            sqnr,
        )
    return table
