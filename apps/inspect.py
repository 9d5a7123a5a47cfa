"""``edgefold inspect``: what folding made of a model, pass by pass, and what TensorRT makes of a graph for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import onnx_ir as ir
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
    dla: Annotated[
        bool,
        typer.Option(
            "--dla",
            help="Tell what a Jetson's DLA would leave to the GPU, of a bundle or a folded file.onnx.",
        ),
    ] = False,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Instead, take a bundle's golden frames through preprocessing and engine here, and say what differs "
            "from the build (exit 5).",
        ),
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Show a model before and after folding: operators, parameters, MACs, what each pass did and why not.

    Of a graph for TensorRT, and of a bundle that holds one: what TensorRT fuses, in which precision, and what
    is left to mend.
    """
    if check:
        _check(Path(model), json_output)
        return
    from apps.console import print_json, progress_display
    from pipeline.inspection import inspect_bundle, inspect_onnx, inspect_resolved

    folded, bound = (None, {}) if preprocess is not None else _graphs(Path(model))
    if dla:
        _show_dla(model, folded, json_output)
        return
    if bound and not Path(model).is_dir():
        _show_audits(bound, json_output)
        return
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
        told = inspection.as_json()
        if bound:
            told["tensorrt"] = _audits_as_json(bound)
        print_json(json.dumps(told, indent=2))
    else:
        _print(inspection)
        _show_audits(bound, json_output=False)


def _check(path: Path, json_output: bool) -> None:
    from apps.cache import cache_dir
    from apps.console import console, print_json
    from apps.golden import check_bundle
    from pipeline.bundle import open_bundle

    report = check_bundle(open_bundle(path), cache_dir("engines"))
    if json_output:
        print_json(json.dumps(report.to_json(), indent=2))
    else:
        console.print(report.summary(), markup=False, soft_wrap=True)


def _graphs(path: Path) -> tuple[ir.Model | None, dict[str, ir.Model]]:
    """What there is to audit in a bundle or a file: the folded graph, and those for TensorRT by file name."""
    from engines.tensorrt.predict import is_tensorrt_bound
    from pipeline.compile import FOLDED_NAME
    from pipeline.onnx_files import load_model

    if path.is_dir():
        from pipeline.bundle import open_bundle

        bundle = open_bundle(path)
        models = {
            name: load_model(bundle.file(name))
            for name in sorted(bundle.manifest.files)
            if name.endswith(".onnx")
        }
        folded = models.get(FOLDED_NAME)
    elif path.suffix == ".onnx":
        models = {path.name: load_model(path)}
        folded = models[path.name]
    else:
        return None, {}
    if folded is not None and any(node.op_type == "QuantizeLinear" for node in folded.graph):
        folded = None
    return folded, {name: model for name, model in models.items() if is_tensorrt_bound(model)}


def _audits_as_json(models: dict[str, ir.Model]) -> dict[str, Any]:
    from engines.tensorrt.audit import report_to_json
    from engines.tensorrt.predict import predict_audit

    return {name: json.loads(report_to_json(predict_audit(model))) for name, model in models.items()}


def _show_audits(models: dict[str, ir.Model], json_output: bool) -> None:
    from rich.markup import escape

    from apps.audit_view import print_audit
    from apps.console import console, print_json
    from engines.tensorrt.predict import predict_audit

    if json_output:
        print_json(json.dumps({"tensorrt": _audits_as_json(models)}, indent=2))
        return
    for name, model in models.items():
        console.print(f"[bold]{escape(name)}[/bold]", highlight=False)
        print_audit(predict_audit(model), console)


def _show_dla(name: str, folded: ir.Model | None, json_output: bool) -> None:
    from apps.audit_view import print_dla
    from apps.console import console, print_json
    from engines.tensorrt.dla import report_dla
    from pipeline.errors import UsageError

    if folded is None:
        raise UsageError(
            f"{name!r} holds no folded graph without Q/DQ, which is what a DLA takes; give a bundle, or its model.onnx"
        )
    report = report_dla(folded)
    if json_output:
        print_json(json.dumps({"dla": report.as_json()}, indent=2))
    else:
        print_dla(report, console)


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
