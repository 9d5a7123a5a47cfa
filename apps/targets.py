"""``edgefold targets``: the devices there are, and everything the table says of one."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from pipeline.targets import Peaks, Target

__all__ = ["as_json", "targets_command"]


def targets_command(
    name: Annotated[
        str | None,
        typer.Argument(help="One target, for its whole entry with sources.", show_default=False),
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON to standard output.")] = False,
) -> None:
    """List the targets: compute capability, TensorRT and JetPack, precisions, DLA, memory, dense peaks."""
    from apps.console import print_json
    from pipeline.targets import TARGETS, find_target

    if name is not None:
        target = find_target(name)
        if json_output:
            print_json(json.dumps(as_json(target), indent=2))
        else:
            _print_one(target)
    elif json_output:
        print_json(json.dumps([as_json(target) for target in TARGETS], indent=2))
    else:
        _print_all()


def as_json(target: Target) -> dict[str, Any]:
    """The entry as the table holds it, with what follows from it: JetPacks, and whether it can be built for."""
    from pipeline.targets import jetpacks_of

    return {
        **asdict(target),
        "buildable": target.buildable,
        "tensorrt_rtx": target.tensorrt_rtx,
        "jetpacks": [asdict(release) for release in jetpacks_of(target)],
    }


def _print_all() -> None:
    from rich import box
    from rich.table import Table

    from apps.console import console
    from pipeline.targets import TARGETS

    table = Table(
        title="Targets, with dense peak rates",
        title_justify="left",
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column("target", no_wrap=True)
    table.add_column("sm")
    table.add_column("builds with", no_wrap=True)
    for heading in ("GiB", "GB/s", "int8\nTOPS", "fp16\nTFLOPS", "DLA\nTOPS"):
        table.add_column(heading, justify="right", no_wrap=True)
    for target in TARGETS:
        peaks = target.peaks
        figures = (target.memory_gib, peaks.bandwidth_gb_s, peaks.int8_tops, peaks.fp16_tflops)
        table.add_row(
            target.name,
            "" if target.sm is None else str(target.sm),
            _versions(target),
            *map(_figure, figures),
            _figure(peaks.dla_int8_tops) if target.dla_cores else "",
            style=None if target.buildable else "dim",
        )
    console.print(table)
    console.print("builds with: JetPack on a Jetson, else TRT (TensorRT), RTX (TensorRT-RTX)")
    console.print("–: no source gives it. edgefold targets NAME shows one with its sources")


def _versions(target: Target) -> str:
    """The releases it can be built with, in a few words."""
    from pipeline.targets import jetpacks_of

    if target.family == "cpu":
        return "the CPU's engines"
    if not target.buildable:
        return "estimate only"
    if target.kind == "jetson":
        return " ".join(release.version for release in jetpacks_of(target))
    first = target.tensorrt.first if target.tensorrt else None
    versions = f"TRT {first}+" if first else "TRT"
    return f"{versions}, RTX" if target.tensorrt_rtx else versions


def _print_one(target: Target) -> None:
    from rich.markup import escape
    from rich.table import Table

    from apps.console import console

    rows: list[tuple[str, str]] = [
        ("kind", target.kind),
        ("compute capability", "none" if target.sm is None else f"{target.sm // 10}.{target.sm % 10}"),
        ("builds with", _builds_with(target)),
        ("precisions", ", ".join(target.precisions)),
        ("memory", f"{_figure(target.memory_gib)} GiB" if target.memory_gib else "this machine's"),
        ("peaks", _peaks(target.peaks)),
    ]
    if target.super_peaks is not None:
        rows.append(("peaks, Super mode", _peaks(target.super_peaks)))
    if target.sm is not None:
        rows.append(("SMs, L2", f"{_figure(target.sm_count)}, {_figure(target.l2_mib)} MiB"))
        rows.append(("DLA cores", str(target.dla_cores)))
        rows.append(("TensorRT-RTX", "compiles for it" if target.tensorrt_rtx else "does not compile for it"))
    for label, text in (("also called", ", ".join(target.aliases)), ("note", target.note or "")):
        if text:
            rows.append((label, text))
    if target.refusal is not None:
        rows.append(("not built for", target.refusal))
    for source in target.sources:
        unread = "" if source.read else " (not at hand when the table was made: check there)"
        rows.append(("source", f"{source.figures}: {source.title}{unread}\n{source.url}"))
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold")
    grid.add_column(overflow="fold")
    for label, text in rows:
        grid.add_row(label, escape(text))
    console.print(f"[bold]{escape(target.name)}[/]  {escape(target.title)}")
    console.print(grid)


def _builds_with(target: Target) -> str:
    """As `_versions`, with the TensorRT and the Python of each JetPack."""
    from pipeline.targets import jetpacks_of

    releases = jetpacks_of(target)
    if not target.buildable or not releases:
        return _versions(target)
    return "\n".join(
        f"JetPack {release.version}: TensorRT {release.tensorrt}, Python {release.python}"
        for release in releases
    )


def _peaks(peaks: Peaks) -> str:
    parts = [
        f"int8 {_figure(peaks.int8_tops)} TOPS",
        f"fp16 {_figure(peaks.fp16_tflops)} TFLOPS",
        f"memory {_figure(peaks.bandwidth_gb_s)} GB/s",
    ]
    if peaks.dla_int8_tops is not None:
        parts.append(f"DLA {_figure(peaks.dla_int8_tops)} TOPS")
    return ", ".join(parts)


def _figure(value: float | None) -> str:
    """A dash where the table has no figure."""
    return "–" if value is None else f"{value:g}"
