"""``edgefold finish``: on the device, the one step a host cannot do for it."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from apps.finishing import Finished

__all__ = ["finish_command", "print_finished"]


class _Flavour(str, Enum):
    tensorrt = "tensorrt"
    tensorrt_rtx = "tensorrt_rtx"


class _OnFallback(str, Enum):
    fail = "fail"
    warn = "warn"


def finish_command(
    bundle: Annotated[
        Path, typer.Argument(help="A bundle that edgefold build made for this device.", show_default=False)
    ],
    engine: Annotated[
        _Flavour | None,
        typer.Option(
            help="What compiles the plan; by default TensorRT, else TensorRT-RTX where it has the target's SM.",
            show_default=False,
        ),
    ] = None,
    candidate: Annotated[
        list[str] | None,
        typer.Option(
            help="Only this candidate (may be repeated), instead of all within the budget.",
            show_default=False,
        ),
    ] = None,
    on_fallback: Annotated[
        _OnFallback,
        typer.Option(help="Where the engine is not the int8 engine asked for, or is slower than fp16."),
    ] = _OnFallback.fail,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long each process measures.")] = 3.0,
    rounds: Annotated[int, typer.Option(min=1, help="How many processes a candidate, in turns.")] = 3,
    workspace_mib: Annotated[
        int | None,
        typer.Option(
            min=1, help="Scratch memory for a layer; halved where memory runs out.", show_default=False
        ),
    ] = None,
    optimization_level: Annotated[
        int | None, typer.Option(min=0, max=5, help="Of TensorRT's builder.", show_default=False)
    ] = None,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="A plan that later TensorRT versions load, too.")
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Compile, time and audit the plan of a bundle on the device it is for. Needs no PyTorch."""
    import json

    from apps.cache import cache_dir
    from apps.console import print_json, progress_display
    from apps.finishing import FinishOptions, finish
    from apps.plans import TimingOptions
    from engines.tensorrt.options import TensorRtOptions

    options = FinishOptions(
        flavour=None if engine is None else engine.value,
        candidates=tuple(candidate or ()),
        on_fallback=on_fallback.value,
        timing=TimingOptions(seconds, rounds),
        plan=TensorRtOptions(
            workspace_bytes=None if workspace_mib is None else workspace_mib << 20,
            optimization_level=optimization_level,
            version_compatible=version_compatible,
            timing_cache_dir=cache_dir("tensorrt"),
        ),
    )
    with progress_display() as progress:
        finished = finish(bundle, options, progress)
    if json_output:
        print_json(json.dumps(_tree(finished), indent=2))
    else:
        print_finished(finished)


def _tree(finished: Finished) -> dict[str, object]:
    import dataclasses
    import json

    from engines.tensorrt.audit import report_to_json

    manifest, plans = finished.bundle.manifest, finished.plans
    return {
        "bundle": str(finished.bundle.path),
        "engine": dataclasses.asdict(manifest.ready_engine()),
        "chosen": plans.chosen.name,
        "measurements": [dataclasses.asdict(m) for m in plans.measurements],
        "problems": list(plans.problems),
        "notes": list(plans.notes),
        "audit": json.loads(report_to_json(plans.audit)),
    }


def print_finished(finished: Finished) -> None:
    """The candidates as they were built and timed, the one kept, and its audit."""
    from apps.audit_view import print_audit
    from apps.console import console
    from apps.device_view import print_deployment

    manifest, plans = finished.bundle.manifest, finished.plans
    print_deployment(manifest, console)
    print_audit(plans.audit, console)
    for problem in plans.problems:
        console.print(f"warning: {problem}", style="yellow", markup=False)
    engine = manifest.ready_engine()
    console.print(
        f"[bold green]finished[/] {manifest.name} for {manifest.target}: {engine.file} by {engine.fingerprint.engine} "
        f"{engine.fingerprint.version}"
    )
    console.print(f"bundle: {finished.bundle.path}", markup=False, soft_wrap=True)
