"""``edgefold estimate``: how fast a model would be on a device that is not here."""

from __future__ import annotations

import json
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import onnx_ir as ir

    from engines.tensorrt.estimate import Estimate

__all__ = ["as_json", "estimate_command"]

_SHOWN_LAYERS = 10


class _Precision(str, Enum):
    int8 = "int8"
    fp16 = "fp16"
    bf16 = "bf16"
    fp32 = "fp32"


def estimate_command(
    model: Annotated[
        Path,
        typer.Argument(help="The bundle that edgefold build wrote, or an .onnx file.", show_default=False),
    ],
    target: Annotated[str, typer.Option(help="The device; see edgefold targets.", show_default=False)],
    precision: Annotated[
        _Precision | None,
        typer.Option(
            help="Take every layer for one of this precision; by default as the graph says, int8 for a CPU bundle "
            "and for --dla.",
            show_default=False,
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images a request.")] = 1,
    dla: Annotated[bool, typer.Option("--dla", help="On one DLA core instead of the GPU.")] = False,
    super_mode: Annotated[bool, typer.Option("--super", help="Clocks of JetPack 6.2's Super mode.")] = False,
    as_json_text: Annotated[bool, typer.Option("--json", help="Print JSON to standard output.")] = False,
) -> None:
    """Estimate latency and throughput on a device that is not here: a range, by layer, with its assumptions."""
    from apps.console import print_json
    from engines.tensorrt.estimate import estimate
    from pipeline.targets import find_target

    device = find_target(target)
    wanted = "int8" if dla and precision is None else precision.value if precision else None
    graph, assumed = _graph(model, wanted, as_built=not dla)
    result = estimate(
        graph,
        device,
        precision=assumed,  # type: ignore[arg-type]
        batch=batch,
        engine="dla" if dla else "gpu",
        super_mode=super_mode,
    )
    if as_json_text:
        print_json(json.dumps({"model": str(model), "precision": assumed, **as_json(result)}, indent=2))
    else:
        _print(model, assumed, result)


def as_json(result: Estimate) -> dict[str, Any]:
    """JSON-compatible values, with the totals."""
    slowest, fastest = result.images_per_s
    return {
        **asdict(result),
        "low_ms": result.low_ms,
        "high_ms": result.high_ms,
        "images_per_s_low": slowest,
        "images_per_s_high": fastest,
    }


def _graph(path: Path, precision: str | None, *, as_built: bool) -> tuple[ir.Model, str | None]:
    """The graph to look at, and the precision to take every layer for (``None``: each its own).

    A bundle's int8 graph is taken as it is where it was made for TensorRT's GPU side (`as_built`). That of a CPU
    bundle has its Q/DQ where CPUs want them, and a DLA has none, so the folded graph stands in for it.
    """
    from pipeline.bundle import open_bundle
    from pipeline.compile import FOLDED_NAME, QUANTIZED_NAME
    from pipeline.onnx_files import load_model

    if path.suffix == ".onnx":
        return load_model(path), precision
    bundle = open_bundle(path)
    quantized = QUANTIZED_NAME in bundle.manifest.files
    if quantized and as_built and bundle.manifest.target != "cpu" and precision in (None, "int8"):
        return load_model(bundle.file(QUANTIZED_NAME)), None
    return load_model(bundle.file(FOLDED_NAME)), precision or ("int8" if quantized else None)


def _print(model: Path, precision: str | None, result: Estimate) -> None:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from apps.console import console

    taken = f"every layer taken for {precision}" if precision else "precisions as in the graph"
    slowest, fastest = result.images_per_s
    console.print(
        f"[bold]{escape(model.name)}[/] on {result.target} ({result.engine}), batch {result.batch}, {taken}"
    )
    console.print(
        f"[bold]{result.low_ms:.3g} to {result.high_ms:.3g} ms[/], {slowest:,.0f} to {fastest:,.0f} images a second"
    )
    middles = {layer: (layer.low_us * layer.high_us) ** 0.5 for layer in result.layers}
    total = sum(middles.values())
    shares = {
        bound: sum(middle for layer, middle in middles.items() if layer.bound == bound) / total
        for bound in ("compute", "memory", "overhead")
    }
    limits = ", ".join(f"{bound} {share:.0%}" for bound, share in shares.items())
    count = len(result.layers)
    console.print(f"{count} kernel{'' if count == 1 else 's'}; time in layers limited by {limits}")
    table = Table(title="The slowest", title_justify="left", box=box.SIMPLE, padding=0, pad_edge=False)
    table.add_column("kernel", no_wrap=True, overflow="ellipsis")
    table.add_column("precision", no_wrap=True)
    table.add_column("limited by", no_wrap=True)
    for heading in ("µs, from", "to", "of peak", "MMAC"):
        table.add_column(heading, justify="right", no_wrap=True)
    for layer in sorted(result.layers, key=middles.__getitem__, reverse=True)[:_SHOWN_LAYERS]:
        first, *fused = layer.name.split(" + ")
        table.add_row(
            escape(first) + (f" +{len(fused)}" if fused else ""),
            layer.precision,
            layer.bound,
            f"{layer.low_us:.1f}",
            f"{layer.high_us:.1f}",
            f"{layer.tensor_utilization:.0%}" if layer.macs else "",
            f"{layer.macs / 1e6:,.0f}" if layer.macs else "",
        )
    console.print(table)
    console.print("of peak: what channel padding and waves that are not full leave of it")
    console.print("[bold]Assumed[/]")
    for assumption in result.assumptions:
        console.print(f"- {escape(assumption)}")
