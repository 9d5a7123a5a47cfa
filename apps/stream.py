"""``edgefold stream``: classify cameras, videos, folders or the synthetic camera."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from apps.cache import cache_dir
from apps.console import console, print_json
from apps.streaming.config import (
    EventConfig,
    MqttConfig,
    RecordConfig,
    ServeConfig,
    SourceConfig,
    StreamConfig,
)
from apps.streaming.display import choose_display
from apps.streaming.memory import keep_one_arena, set_start_up_aside
from apps.streaming.session import StreamSummary, run_stream
from pipeline.errors import DeviceFaultError, UsageError

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
    bundle: Annotated[
        Path | None,
        typer.Argument(help="The bundle that edgefold build wrote; with --config, instead of the file's."),
    ] = None,
    source: Annotated[
        list[str] | None,
        typer.Option(
            help="synthetic:SEED[:COUNT], a video file, an image folder, an .npz, a camera or a stream; "
            "docs/sources.md has the forms. Give it again for each further source.",
            show_default=False,
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="A TOML file with all of this and more, for many cameras; options given here go before it.",
            show_default=False,
        ),
    ] = None,
    record: Annotated[
        Path | None,
        typer.Option(
            help="Record the pictures with the overlay: to an MP4, or to a folder in segments that are "
            "rotated. One source.",
            show_default=False,
        ),
    ] = None,
    predictions: Annotated[
        Path | None, typer.Option(help="Write every prediction to this JSON-lines file.", show_default=False)
    ] = None,
    events: Annotated[
        str | None,
        typer.Option(
            help="Write when a label enters and leaves the view to this JSON-lines file; - is standard "
            "output.",
            show_default=False,
        ),
    ] = None,
    mqtt: Annotated[
        str | None,
        typer.Option(
            help="Publish those events to this broker: mqtt://[user:password@]host[:port], or mqtts://…",
            show_default=False,
        ),
    ] = None,
    serve: Annotated[
        str | None,
        typer.Option(
            metavar="[HOST:]PORT",
            help="Serve the page with live video, /metrics, /healthz and /readyz; on 127.0.0.1 unless told "
            "otherwise.",
            show_default=False,
        ),
    ] = None,
    token: Annotated[
        str | None,
        typer.Option(
            envvar="EDGEFOLD_TOKEN",
            help="Ask every client of the page for this token. Made up and printed where other machines can "
            "reach the page and none is given.",
            show_default=False,
        ),
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
    max_age: Annotated[
        float | None,
        typer.Option(
            metavar="MS",
            help="Latency budget, capture to answer: frames that would be answered later are dropped and "
            "counted. 1000 if not given, and none where every source is of policy every.",
            show_default=False,
        ),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(
            help="Images a request at most, gathered across the sources. If not given 1, or 4 to 8 on a CPU where every "
            "source is of policy every and nobody looks at the pictures (headless, no page, no recording) or gave --max-age.",
            show_default=False,
        ),
    ] = None,
    streams: Annotated[
        int | None,
        typer.Option(
            help="Requests that the engine works on at the same time; the engine's choice if not given.",
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
    log_json: Annotated[
        bool, typer.Option("--log-json", help="Log a JSON object a line on standard error.")
    ] = False,
    json_output: Annotated[
        bool, typer.Option("--json", help="Print the summary as JSON, and nothing else.")
    ] = False,
) -> None:
    """Classify streams of frames until they end, or until Ctrl-C or SIGTERM; SIGHUP loads the bundle anew."""
    keep_one_arena()
    asked = _config(
        config,
        bundle=bundle,
        sources=source,
        record=record,
        predictions=predictions,
        events=events,
        mqtt=mqtt,
        serve=serve,
        token=token,
        headless=headless or None,
        policy=None if policy is None else policy.value,
        max_age_ms=max_age,
        max_batch=batch,
        streams=streams,
        max_seconds=max_seconds,
        max_frames=max_frames,
        engine=engine,
        precision=None if precision is None else precision.value,
        fps=fps,
        log_json=log_json or None,
    )
    asked = _with_token(asked)
    _configure_logging(asked)
    title = f"{asked.bundle.name} · {_named_in_title(asked)}"
    try:
        summary = run_stream(
            asked,
            cache_dir=cache_dir("engines"),
            display=choose_display(title, json_output or asked.log_json),
            on_running=set_start_up_aside,
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


def _config(path: Path | None, **options: Any) -> StreamConfig:
    """The file, if there is one, with the options over it."""
    given = {name: value for name, value in options.items() if value is not None}
    uris: list[str] = given.pop("sources", [])
    of_sources: dict[str, Any] = {name: given.pop(name) for name in ("policy", "fps") if name in given}
    if "record" in given:
        of_sources["record"] = RecordConfig(given.pop("record"))
    events, mqtt, serve = given.pop("events", None), given.pop("mqtt", None), given.pop("serve", None)
    token: str | None = given.pop("token", None)
    if path is None:
        if "bundle" not in given:
            raise UsageError("no bundle to stream with; give BUNDLE, or --config FILE")
        if not uris:
            raise UsageError("no source to stream; give --source, or --config FILE")
        base = StreamConfig(bundle=given["bundle"], sources=())
    else:
        from apps.streaming.config_file import read_config

        base = read_config(path)
    sources = tuple(SourceConfig(uri) for uri in uris) or base.sources
    if "record" in of_sources and len(sources) > 1:
        raise UsageError(
            f"--record is for one source, there are {len(sources)}; give each its recording in the --config file"
        )
    given["sources"] = tuple(dataclasses.replace(source, **of_sources) for source in sources)
    if events is not None:
        given["events"] = dataclasses.replace(base.events or EventConfig(), log=events)
    if mqtt is not None:
        given["mqtt"] = MqttConfig(mqtt) if base.mqtt is None else dataclasses.replace(base.mqtt, url=mqtt)
    if serve is not None:
        host, port = _address(serve)
        given["serve"] = dataclasses.replace(base.serve or ServeConfig(), host=host, port=port)
    page: ServeConfig | None = given.get("serve", base.serve)
    if token is not None and page is not None:
        given["serve"] = dataclasses.replace(page, token=token)
    return dataclasses.replace(base, **given)


def _address(text: str) -> tuple[str, int]:
    """``[HOST:]PORT``; an IPv6 address stands in brackets."""
    host, _, port = text.rpartition(":")
    if not port.isdecimal() or int(port) > 65535:
        raise UsageError(f"--serve {text!r} is not [HOST:]PORT with a port up to 65535, such as 8080")
    return host.strip("[]") or ServeConfig().host, int(port)


def _with_token(config: StreamConfig) -> StreamConfig:
    """Makes a token up, and prints it, where other machines can reach the page and none was given."""
    serve = config.serve
    if serve is None or serve.token is not None or serve.host in ("127.0.0.1", "::1", "localhost"):
        return config
    from apps.streaming.serve import make_token

    token = make_token()
    console.print(f"token of the page: {token}", markup=False, soft_wrap=True)
    return dataclasses.replace(config, serve=dataclasses.replace(serve, token=token))


def _configure_logging(config: StreamConfig) -> None:
    from apps.streaming.logs import configure_logging

    token = None if config.serve is None else config.serve.token
    configure_logging(config.log_json, secrets=() if token is None else (token,))


def _named_in_title(config: StreamConfig) -> str:
    """A URI may hold a password, so it is not put on the screen as it was written."""
    if len(config.sources) > 1:
        return f"{len(config.sources)} sources"
    from apps.streaming.logs import redact

    return config.sources[0].name or redact(config.sources[0].uri)


def print_summary(summary: StreamSummary) -> None:
    """The summary for a person: what was seen, how fast, how right, and what was lost."""
    say = functools.partial(console.print, soft_wrap=True)
    if len(summary.sources) > 1:
        say(_sources_table(summary))
    table = Table(title="Latency by stage, ms", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("stage")
    for percentile in ("p50", "p95", "p99", "max"):
        table.add_column(percentile, justify="right")
    for stage, latency in summary.latency.items():
        figures = (latency.p50_ms, latency.p95_ms, latency.p99_ms, latency.max_ms)
        table.add_row(stage, *(f"{value:.2f}" if latency.count else "–" for value in figures))
    say(table)
    say(
        f"{summary.frames_inferred} frames of {escape(summary.source)} in {summary.seconds:.1f} s: "
        f"[bold]{summary.fps:.1f} FPS[/bold] "
        f"({summary.precision} on {summary.engine}, policy {summary.policy}); ended by {summary.ended}"
    )
    dropped = ", ".join(f"{count} ({reason})" for reason, count in summary.dropped.items()) or "none"
    say(f"dropped: {dropped} of {summary.frames_read} read")
    if summary.mean_batch > 1:
        say(f"mean batch: {summary.mean_batch:.2f} images a request")
    say(f"preprocessing: {summary.preprocessing}", markup=False)
    if summary.reloads or summary.reload_failures:
        say(f"reloads: {summary.reloads} taken, {summary.reload_failures} refused")
    if summary.accuracy is not None:
        accuracy = summary.accuracy
        low, high = 100 * accuracy.top1_interval.low, 100 * accuracy.top1_interval.high
        say(
            f"top-1 through the stream: [bold]{100 * accuracy.top1:.2f}%[/bold] "
            f"({summary.correct} of {summary.labelled} labelled frames; 95% interval {low:.2f} to {high:.2f}), "
            f"top-{accuracy.top_k} {100 * accuracy.top_k_accuracy:.2f}%, "
            f"ECE {100 * accuracy.confidence.ece:.2f}%"
        )
    for source in summary.sources:
        if source.recording is not None:
            say(f"recording: {source.recording}", markup=False)
    if summary.predictions is not None:
        say(f"predictions: {summary.predictions}", markup=False)
    for note in summary.notes:
        say(f"note: {note}", markup=False, style="yellow")


def _sources_table(summary: StreamSummary) -> Table:
    table = Table(title="Sources", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("source", overflow="ellipsis", min_width=14, no_wrap=True)
    table.add_column("state", no_wrap=True)
    for heading in ("FPS", "inferred", "dropped", "age p50", "p99 ms", "restarts", "top-1 %"):
        table.add_column(heading, justify="right", min_width=4)
    for one in summary.sources:
        age = one.latency["age"]
        table.add_row(
            escape(one.source),
            one.state,
            f"{one.fps:.1f}",
            str(one.frames_inferred),
            str(sum(one.dropped.values())),
            *(f"{value:.1f}" if age.count else "–" for value in (age.p50_ms, age.p99_ms)),
            str(one.restarts),
            "–" if one.top1 is None else f"{100 * one.top1:.2f}",
        )
    return table
