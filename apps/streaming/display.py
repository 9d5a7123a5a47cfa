"""What the terminal shows while a stream runs: a live table, or a plain line a second."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING

from rich.markup import escape

from apps.console import console
from apps.streaming.metrics import MetricsSnapshot, StreamMetrics
from apps.streaming.predictions import Prediction

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["LiveDisplay", "PlainDisplay", "StreamDisplay", "choose_display"]

_LIVE_PERIOD_S = 0.25
_PLAIN_PERIOD_S = 1.0
_BAR_CELLS = 16


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

    def update(self, metrics: StreamMetrics, prediction: Prediction | None) -> None:
        """Called many times a second; draws when it is time to."""


class PlainDisplay(StreamDisplay):
    """A line a second, for logs and pipes."""

    def __init__(self) -> None:
        self._due_s = time.monotonic() + _PLAIN_PERIOD_S

    def update(self, metrics: StreamMetrics, prediction: Prediction | None) -> None:
        """Called many times a second; prints once a second."""
        now_s = time.monotonic()
        if now_s < self._due_s:
            return
        self._due_s = now_s + _PLAIN_PERIOD_S
        console.print(plain_line(metrics.snapshot(), prediction), markup=False, soft_wrap=True)


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

    def update(self, metrics: StreamMetrics, prediction: Prediction | None) -> None:
        """Called many times a second; redraws four times a second."""
        now_s = time.monotonic()
        if now_s < self._due_s:
            return
        self._due_s = now_s + _LIVE_PERIOD_S
        self._live.update(live_table(self._title, metrics.snapshot(), prediction), refresh=True)


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
