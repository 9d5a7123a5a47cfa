"""``edgefold stream``: classify a camera, a video, a folder or the synthetic camera."""

from __future__ import annotations

import functools
import json
import os
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from apps.cache import cache_dir
from apps.console import console, print_json
from apps.streaming.display import choose_display
from apps.streaming.session import StreamSummary, run_stream
from pipeline.errors import DeviceFaultError

__all__ = ["StreamSummary", "print_summary", "run_stream", "stream_command"]


class _Policy(str, Enum):
    newest = "newest"
    every = "every"


class _Precision(str, Enum):
    int8 = "int8"
    fp16 = "fp16"
    bf16 = "bf16"
    fp32 = "fp32"


def stream_command(
    bundle: Annotated[Path, typer.Argument(help="The bundle that edgefold build wrote.")],
    source: Annotated[
        str,
        typer.Option(
            help="synthetic:SEED[:COUNT], a video file, an image folder, an .npz, or /dev/videoN.",
            show_default=False,
        ),
    ],
    record: Annotated[
        Path | None, typer.Option(help="Write the pictures with the overlay to this MP4.", show_default=False)
    ] = None,
    predictions: Annotated[
        Path | None, typer.Option(help="Write every prediction to this JSON-lines file.", show_default=False)
    ] = None,
    headless: Annotated[
        bool, typer.Option("--headless", help="Show no window. Without a display this is so anyway.")
    ] = False,
    policy: Annotated[
        _Policy | None,
        typer.Option(
            help="newest: classify the latest frame and drop those that came meanwhile; every: classify all. "
            "Live sources default to newest, files to every.",
            show_default=False,
        ),
    ] = None,
    max_seconds: Annotated[
        float | None, typer.Option(help="End after this many seconds.", show_default=False)
    ] = None,
    max_frames: Annotated[
        int | None, typer.Option(help="End after classifying this many frames.", show_default=False)
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            help="openvino or onnxruntime; the one the bundle was built for if not given.", show_default=False
        ),
    ] = None,
    precision: Annotated[
        _Precision | None,
        typer.Option(
            help="fp32 runs the folded model instead of the bundle's engine, to compare.", show_default=False
        ),
    ] = None,
    fps: Annotated[
        float | None,
        typer.Option(
            help="Rate of a synthetic camera or an image folder (30 if not given).", show_default=False
        ),
    ] = None,
    json_output: Annotated[
        bool, typer.Option("--json", help="Print the summary as JSON, and nothing else.")
    ] = False,
) -> None:
    """Classify a stream of frames until it ends, or until Ctrl-C or SIGTERM."""
    try:
        summary = run_stream(
            bundle,
            source,
            record=record,
            predictions=predictions,
            headless=headless,
            policy=None if policy is None else policy.value,
            max_seconds=max_seconds,
            max_frames=max_frames,
            engine=engine,
            precision=None if precision is None else precision.value,
            fps=fps,
            cache_dir=cache_dir("engines"),
            display=choose_display(f"{bundle.name} · {source}", json_output),
        )
    except DeviceFaultError as error:
        # A device that hangs holds threads that never end, and a normal exit would wait for them.
        console.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        sys.stdout.flush()
        os._exit(error.exit_code)
    if json_output:
        print_json(json.dumps(summary.to_json(), indent=2))
    else:
        print_summary(summary)


def print_summary(summary: StreamSummary) -> None:
    """The summary for a person: what was seen, how fast, how right, and what was lost."""
    table = Table(title="Latency by stage, ms", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("stage")
    for percentile in ("p50", "p95", "p99", "max"):
        table.add_column(percentile, justify="right")
    for stage, latency in summary.latency.items():
        figures = (latency.p50_ms, latency.p95_ms, latency.p99_ms, latency.max_ms)
        table.add_row(stage, *(f"{value:.2f}" if latency.count else "–" for value in figures))
    say = functools.partial(console.print, soft_wrap=True)
    say(table)
    say(
        f"{summary.frames_inferred} frames of {escape(summary.source)} in {summary.seconds:.1f} s: "
        f"[bold]{summary.fps:.1f} FPS[/bold] "
        f"({summary.precision} on {summary.engine}, policy {summary.policy}); ended by {summary.ended}"
    )
    dropped = ", ".join(f"{count} ({reason})" for reason, count in summary.dropped.items()) or "none"
    say(f"dropped: {dropped} of {summary.frames_read} read")
    if summary.accuracy is not None:
        accuracy = summary.accuracy
        low, high = 100 * accuracy.top1_interval.low, 100 * accuracy.top1_interval.high
        say(
            f"top-1 through the stream: [bold]{100 * accuracy.top1:.2f}%[/bold] "
            f"({summary.correct} of {summary.labelled} labelled frames; 95% interval {low:.2f} to {high:.2f}), "
            f"top-{accuracy.top_k} {100 * accuracy.top_k_accuracy:.2f}%, "
            f"ECE {100 * accuracy.confidence.ece:.2f}%"
        )
    if summary.recording is not None:
        say(f"recording: {summary.recording}", markup=False)
    if summary.predictions is not None:
        say(f"predictions: {summary.predictions}", markup=False)
    for note in summary.notes:
        say(f"note: {note}", markup=False, style="yellow")
