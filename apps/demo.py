"""``edgefold demo``: the whole path on the bundled road-sign network, in under two minutes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from apps.publishing import BuildOutcome
    from apps.streaming.session import StreamSummary

__all__ = ["demo_command"]

_MODEL = "inception_resnet_lite.signs"
# Three cameras: the one of calibration and the two that judge never saw the training camera's frames.
_CALIBRATION = "synthetic:1:128"
_EVALUATION = "synthetic:2"
_STREAM = "synthetic:3"
_MAX_DROP_POINTS = 1.0


def demo_command(
    out: Annotated[Path, typer.Option(help="Where the bundle and the report go.")] = Path("out/demo"),
    frames: Annotated[int, typer.Option(min=100, help="Labelled frames to judge the engine on.")] = 2000,
    seconds: Annotated[float, typer.Option(min=1, help="How long to stream.")] = 10.0,
) -> None:
    """PyTorch model → INT8 engine → what that cost → ten seconds of camera → report.html."""
    from apps.building import build
    from apps.cache import cache_dir
    from apps.console import console, progress_display
    from apps.publishing import BuildRequest, print_build
    from apps.stream import print_summary
    from apps.streaming.config import SourceConfig, StreamConfig
    from apps.streaming.display import choose_display
    from apps.streaming.session import run_stream

    console.rule("[bold]1 of 3: from PyTorch to an INT8 engine, and what it cost", align="left")
    request = BuildRequest(
        model=_MODEL,
        out=out / "bundle",
        calib=_CALIBRATION,
        eval_data=f"{_EVALUATION}:{frames}",
        max_drop_points=_MAX_DROP_POINTS,
    )
    with progress_display() as progress:
        outcome = build(request, progress)
    print_build(outcome)
    console.rule(f"[bold]2 of 3: {seconds:g} seconds of a camera", align="left")
    summary = run_stream(
        StreamConfig(
            bundle=outcome.bundle.path,
            sources=(SourceConfig(_STREAM),),
            headless=True,
            max_seconds=seconds,
        ),
        cache_dir=cache_dir("engines"),
        display=choose_display("demo", as_json=False),
    )
    print_summary(summary)
    report = out / "report.html"
    shutil.copyfile(outcome.bundle.file("report.html"), report)
    console.rule("[bold]3 of 3: in short", align="left")
    for line in _in_short(outcome, summary, report):
        console.print(line, soft_wrap=True)


def _in_short(outcome: BuildOutcome, summary: StreamSummary, report: Path) -> list[str]:
    manifest = outcome.bundle.manifest
    assert manifest.accuracy is not None, "the demo always judges"
    accuracy = manifest.accuracy
    fp32, int8 = (
        manifest.files[name].size_bytes / 1e6 for name in ("model.onnx", manifest.ready_engine().file)
    )
    latency = summary.latency["infer"]
    lines = [
        f"A PyTorch network that reads {len(manifest.labels)} road signs was turned into an INT8 engine for this "
        f"CPU: {fp32:.1f} MB became {int8:.1f} MB.",
        f"On {accuracy.n_images} frames it had not seen, FP32 PyTorch is right {100 * accuracy.fp32_top1:.2f}% of "
        f"the time and the INT8 engine {100 * accuracy.int8_top1:.2f}%: "
        f"[bold]{_change(accuracy.drop_points)}[/] (95% interval of the drop {accuracy.drop_low:+.2f} to "
        f"{accuracy.drop_high:+.2f}).",
        f"Streaming, it classified {summary.frames_inferred} frames at {summary.fps:.0f} a second, "
        f"{latency.p50_ms:.1f} ms each in the engine"
        + (f", {100 * summary.top1:.1f}% of them right." if summary.top1 is not None else "."),
        f"The report: [bold]{report}[/]",
        "Next, a model of your own: [bold]edgefold build path/to/model.py:factory --calib FOLDER --out BUNDLE[/]",
    ]
    return lines


def _change(drop_points: float) -> str:
    if drop_points == 0:
        return "no difference"
    return f"{abs(drop_points):.2f} points {'lost' if drop_points > 0 else 'gained'}"
