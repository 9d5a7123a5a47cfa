"""What the terminal shows while a stream runs: a live table, or a plain line a second."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

from rich.markup import escape

from apps.console import console
from apps.streaming.metrics import MetricsSnapshot, StreamMetrics
from apps.streaming.predictions import Prediction

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["LiveDisplay", "PlainDisplay", "ShownSource", "StreamDisplay", "choose_display"]

_LIVE_PERIOD_S = 0.25
_PLAIN_PERIOD_S = 1.0
_BAR_CELLS = 16


@dataclass(frozen=True, slots=True)
class ShownSource:
    """One source at the moment of drawing."""

    source_id: str
    state: str
    metrics: StreamMetrics
    latest: Prediction | None


class StreamDisplay:
    """Shows nothing, as when another program reads the result; the others derive from it."""

    def __enter__(self) -> StreamDisplay:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        pass

    def update(self, sources: Sequence[ShownSource]) -> None:
        """Called several times a second; draws when it is time to."""


class PlainDisplay(StreamDisplay):
    """A line a second, for logs and pipes."""

    def __init__(self) -> None:
        self._due_s = time.monotonic() + _PLAIN_PERIOD_S

    def update(self, sources: Sequence[ShownSource]) -> None:
        """Called several times a second; prints a line a source once a second."""
        now_s = time.monotonic()
        if now_s < self._due_s:
            return
        self._due_s = now_s + _PLAIN_PERIOD_S
        for source in sources:
            line = plain_line(source.metrics.snapshot(), source.latest)
            if len(sources) > 1:
                line = f"{source.source_id}  {source.state}  {line}"
            console.print(line, markup=False, soft_wrap=True)


class LiveDisplay(StreamDisplay):
    """A table on the terminal, redrawn four times a second."""

    def __init__(self, title: str) -> None:
        from rich.live import Live

        self._title = escape(title)
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._due_s = 0.0

    def __enter__(self) -> LiveDisplay:
        self._live.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._live.stop()

    def update(self, sources: Sequence[ShownSource]) -> None:
        """Called several times a second; redraws four times a second at most."""
        now_s = time.monotonic()
        if now_s < self._due_s:
            return
        self._due_s = now_s + _LIVE_PERIOD_S
        if len(sources) == 1:
            table = live_table(self._title, sources[0].metrics.snapshot(), sources[0].latest)
        else:
            table = sources_table(self._title, sources)
        self._live.update(table, refresh=True)


def choose_display(title: str, as_json: bool) -> StreamDisplay:
    """A live table on a terminal; elsewhere nothing beside JSON, and lines without it."""
    if console.is_terminal:
        return LiveDisplay(title)
    return StreamDisplay() if as_json else PlainDisplay()


def plain_line(metrics: MetricsSnapshot, prediction: Prediction | None) -> str:
    """The state of a stream in one line."""
    age, infer = metrics.latency["age"], metrics.latency["infer"]
    parts = [
        f"{metrics.frames_inferred} frames",
        f"{metrics.fps:.1f} FPS",
        f"infer p50 {infer.p50_ms:.1f} ms",
        f"age p50/p95/p99 {age.p50_ms:.0f}/{age.p95_ms:.0f}/{age.p99_ms:.0f} ms",
        f"{sum(metrics.dropped.values())} dropped",
    ]
    if metrics.top1 is not None:
        parts.append(f"top-1 {100 * metrics.top1:.2f}%")
    if prediction is not None:
        parts.append(f"now {prediction.top[0].label} {100 * prediction.top[0].confidence:.0f}%")
    return "  ".join(parts)


def live_table(title: str, metrics: MetricsSnapshot, prediction: Prediction | None) -> Table:
    """The state of a stream as a rich table: rate and drops, classes, latency by stage."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", min_width=62)
    table.add_column("latency, ms")
    for percentile in ("p50", "p95", "p99"):
        table.add_column(percentile, justify="right")
    table.add_column("now in view", min_width=34)
    classes = prediction.top if prediction is not None else ()
    for row, (stage, latency) in enumerate(metrics.latency.items()):
        shown = Text()
        if row < len(classes):
            ranked = classes[row]
            filled = round(_BAR_CELLS * ranked.confidence)
            shown.append("━" * filled, "green" if row == 0 else "cyan")
            shown.append("━" * (_BAR_CELLS - filled), "bright_black")
            shown.append(f" {100 * ranked.confidence:3.0f}% {ranked.label}", "bold" if row == 0 else "")
        figures = (latency.p50_ms, latency.p95_ms, latency.p99_ms)
        table.add_row(stage, *(f"{value:.1f}" if latency.count else "–" for value in figures), shown)
    facts = f"{metrics.fps:.1f} FPS · {metrics.frames_inferred} inferred of {metrics.frames_read} read"
    if metrics.dropped:
        facts += " · dropped " + ", ".join(f"{n} ({reason})" for reason, n in metrics.dropped.items())
    if metrics.top1 is not None:
        facts += f" · top-1 {100 * metrics.top1:.2f}%"
    table.caption = facts
    table.caption_justify = "left"
    return table


def sources_table(title: str, sources: Sequence[ShownSource]) -> Table:
    """Several sources as a rich table, one a row: state, rate, age, drops, and what is in view."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("source", overflow="fold")
    table.add_column("state")
    for heading in ("FPS", "infer p50", "age p50", "age p99", "dropped", "top-1 %"):
        table.add_column(heading, justify="right")
    table.add_column("now in view", min_width=20)
    for source in sources:
        state = source.metrics.snapshot()
        age, infer = state.latency["age"], state.latency["infer"]
        shown = ""
        if source.latest is not None:
            first = source.latest.top[0]
            shown = f"{100 * first.confidence:3.0f}% {first.label}"
        color = {"LIVE": "green", "DEGRADED": "yellow", "LOST": "red"}.get(source.state, "")
        table.add_row(
            escape(source.source_id),
            f"[{color}]{source.state}[/]" if color else source.state,
            f"{state.fps:.1f}",
            *(f"{value:.1f}" if age.count else "–" for value in (infer.p50_ms, age.p50_ms, age.p99_ms)),
            str(sum(state.dropped.values())),
            "–" if state.top1 is None else f"{100 * state.top1:.2f}",
            escape(shown),
        )
    table.caption = "latencies in ms"
    table.caption_justify = "left"
    return table
