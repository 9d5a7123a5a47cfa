"""The report's plots, as inline SVG that follows the page's colours.

matplotlib writes fixed colours. It is given one stand-in for each role, which is then replaced by
the page's CSS variable, so that the plots turn dark with the page. Figures are narrow: a page
scales them up a little on a desktop, and down a little on a phone, and the text stays legible.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from apps.report.wording import percent, points
from pipeline.artifacts import TensorRange
from pipeline.errors import UnsupportedError
from pipeline.validation_result import ClassChange, ConfusionChange, Drop, StageAccuracy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from calibration.attribution import LayerShare

__all__ = [
    "accuracy_plot",
    "accuracy_plot_text",
    "attribution_plot",
    "attribution_plot_text",
    "class_plot",
    "class_plot_text",
    "confusion_plot",
    "confusion_plot_text",
    "drop_plot",
    "drop_plot_text",
    "range_plot",
    "reliability_plot",
    "reliability_plot_text",
    "sensitivity_plot",
    "sensitivity_plot_text",
]

_INK, _MUTED, _GRID, _CARD = "#010101", "#020202", "#030303", "#040404"
_ACCENT, _GOOD, _BAD = "#050505", "#060606", "#070707"
_CSS_VARIABLE = {
    _INK: "var(--ink)",
    _MUTED: "var(--muted)",
    _GRID: "var(--grid)",
    _CARD: "var(--card)",
    _ACCENT: "var(--accent)",
    _GOOD: "var(--good)",
    _BAD: "var(--bad)",
}
_WIDTH_IN = 4.2
_ROW_IN = 0.34
_FONT_PT = 9.0
_MAX_LABEL_CHARS = 22


def drop_plot(drops: Sequence[Drop], max_drop_points: float | None) -> str:
    """Forest plot: each drop with its 95% interval around the line of no change."""

    def draw(axes: Axes) -> None:
        for row, drop in enumerate(drops):
            low, high = drop.interval_points.low, drop.interval_points.high
            bold = drop.part == "total"
            color = _BAD if low > 0 else _GOOD if high < 0 else _ACCENT
            axes.plot(
                [low, high], [row, row], color=color, linewidth=4 if bold else 2, solid_capstyle="round"
            )
            axes.plot(drop.drop_points, row, "D" if bold else "o", color=color, markersize=7 if bold else 6)
            axes.annotate(
                points(drop.drop_points),
                (max(high, drop.drop_points), row),
                xytext=(7, 0),
                textcoords="offset points",
                va="center",
                color=_INK,
                weight="bold" if bold else "normal",
            )
        axes.axvline(0, color=_MUTED, linewidth=1)
        if max_drop_points is not None:
            axes.axvline(max_drop_points, color=_BAD, linewidth=1.2, linestyle=(0, (4, 3)))
            axes.annotate(
                f"budget {max_drop_points:g}",
                (max_drop_points, 1),
                xycoords=("data", "axes fraction"),
                xytext=(0, 2),
                textcoords="offset points",
                ha="center",
                color=_BAD,
            )
        axes.set_yticks(range(len(drops)), [drop.part for drop in drops])
        axes.set_ylim(len(drops) - 0.4, -0.6)
        axes.margins(x=0.14)
        axes.set_xlabel("points of top-1 lost (right: worse), with 95% interval")

    return _svg("drop", len(drops), draw)


def class_plot(classes: Sequence[ClassChange]) -> str:
    """Accuracy of each class before and after, joined by a line coloured by its direction."""

    def draw(axes: Axes) -> None:
        for row, item in enumerate(classes):
            before, after = 100 * item.before_accuracy, 100 * item.after_accuracy
            color = _BAD if after < before else _GOOD if after > before else _MUTED
            axes.plot([before, after], [row, row], color=color, linewidth=2.5, solid_capstyle="round")
            axes.plot(before, row, "o", markerfacecolor=_CARD, markeredgecolor=_INK, markersize=6.5)
            axes.plot(after, row, "o", color=color, markersize=5 if before != after else 3)
        axes.set_yticks(range(len(classes)), [_short(item.label) for item in classes])
        axes.set_ylim(len(classes) - 0.4, -0.6)
        axes.margins(x=0.06)
        axes.set_xlabel("accuracy, % (ring: before, dot: after)")

    return _svg("classes", len(classes), draw)


def accuracy_plot(rows: Sequence[tuple[str, StageAccuracy]]) -> str:
    """Top-1 of each row with its 95% interval; the last row is the one that the others are parts of."""

    def draw(axes: Axes) -> None:
        for row, (_, stage) in enumerate(rows):
            low, high = 100 * stage.top1_interval.low, 100 * stage.top1_interval.high
            bold = row == len(rows) - 1
            color = _ACCENT if bold else _MUTED
            axes.plot(
                [low, high], [row, row], color=color, linewidth=4 if bold else 2, solid_capstyle="round"
            )
            axes.plot(100 * stage.top1, row, "D" if bold else "o", color=color, markersize=7 if bold else 6)
            axes.annotate(
                percent(stage.top1),
                (high, row),
                xytext=(7, 0),
                textcoords="offset points",
                va="center",
                color=_INK,
                weight="bold" if bold else "normal",
            )
        axes.set_yticks(range(len(rows)), [_short(name) for name, _ in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.margins(x=0.16)
        axes.set_xlabel("top-1, %, with 95% interval")

    return _svg("accuracy", len(rows), draw)


def reliability_plot(before: StageAccuracy, after: StageAccuracy) -> str:
    """Accuracy against confidence, before and after: on the diagonal, a confidence says how often it is right."""

    def draw(axes: Axes) -> None:
        axes.plot([0, 100], [0, 100], color=_MUTED, linewidth=1, linestyle=(0, (4, 3)))
        for stage, color, style in ((before, _INK, "--"), (after, _ACCENT, "-")):
            bins = stage.confidence.bins
            largest = max(item.n_images for item in bins)
            x = [100 * item.mean_confidence for item in bins]
            y = [100 * item.accuracy for item in bins]
            axes.plot(x, y, style, color=color, linewidth=1.4, zorder=3)
            # A bin of three images says little, and looks it.
            sizes = [9 + 90 * item.n_images / largest for item in bins]
            hollow = color == _INK
            axes.scatter(
                x,
                y,
                sizes,
                facecolors=_CARD if hollow else color,
                edgecolors=color,
                linewidths=1.2,
                zorder=4 if hollow else 5,
                alpha=None if hollow else 0.75,
            )
        axes.grid(axis="y", color=_GRID, linewidth=0.6)
        axes.set_xlim(-3, 104)
        axes.set_ylim(-3, 104)
        axes.set_xlabel("confidence, % (ring: before, dot: after)")
        axes.set_ylabel("right, %")

    return _svg("reliability", 8, draw)


def confusion_plot(changes: Sequence[ConfusionChange]) -> str:
    """Truth against answer: red where an answer is wrong more often than before, green where less."""
    truths = list(dict.fromkeys(change.truth for change in changes))
    answers = list(dict.fromkeys(change.predicted for change in changes))

    def draw(axes: Axes) -> None:
        largest = max(abs(change.after - change.before) for change in changes)
        for change in changes:
            difference = change.after - change.before
            row, column = truths.index(change.truth), answers.index(change.predicted)
            color = _BAD if difference > 0 else _GOOD
            strength = 0.15 + 0.45 * abs(difference) / largest
            axes.fill_between(
                [column - 0.47, column + 0.47],
                row - 0.46,
                row + 0.46,
                color=color,
                alpha=strength,
                linewidth=0,
            )
            axes.annotate(
                f"{difference:+d}".replace("-", "−"), (column, row), ha="center", va="center", color=_INK
            )
        axes.set_yticks(range(len(truths)), [_short(label) for label in truths])
        axes.set_xticks(range(len(answers)), [_short(label) for label in answers], rotation=45, ha="right")
        axes.set_xlim(-0.6, len(answers) - 0.4)
        axes.set_ylim(len(truths) - 0.4, -0.6)
        axes.grid(False)
        axes.set_xlabel("answer")
        axes.set_ylabel("truth")

    return _svg("confusion", len(truths) + 3, draw)


def range_plot(ranges: Mapping[str, TensorRange]) -> str:
    """Calibrated range of every activation, in the table's order; logarithmic away from 0."""

    def draw(axes: Axes) -> None:
        lows, highs = [r.low for r in ranges.values()], [r.high for r in ranges.values()]
        axes.fill_between(range(len(ranges)), lows, highs, color=_ACCENT, alpha=0.45, linewidth=0, step="mid")
        axes.axhline(0, color=_MUTED, linewidth=0.8)
        axes.set_yscale("symlog", linthresh=1.0)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xlim(-0.5, max(0.5, len(ranges) - 0.5))
        axes.grid(axis="y", color=_GRID, linewidth=0.6)
        axes.set_xlabel("activation tensor, in graph order")
        axes.set_ylabel("value")

    return _svg("ranges", 5, draw)


def sensitivity_plot(layers: Sequence[Mapping[str, Any]], kept: Collection[str]) -> str:
    """What each layer's int8 does to the logits, and to its own output; the worst on top.

    Args:
        layers: `calibration.sensitivity.LayerSensitivity.to_json` of each; with a `logits_sqnr_db` all.
        kept: names of those that stay in float.
    """

    def draw(axes: Axes) -> None:
        for row, entry in enumerate(layers):
            color = _BAD if entry["layer"] in kept else _ACCENT
            if entry["sqnr_db"] is not None:
                axes.plot([entry["logits_sqnr_db"], entry["sqnr_db"]], [row, row], color=_GRID, linewidth=1.5)
                axes.plot(entry["sqnr_db"], row, "o", color=_MUTED, markersize=4)
            axes.plot(entry["logits_sqnr_db"], row, "D", color=color, markersize=6)
        names = [_short(entry["layer"]) for entry in layers]
        axes.set_yticks(range(len(layers)), names)
        axes.set_ylim(len(layers) - 0.5, -0.5)
        axes.set_xlabel("SQNR, dB: ◆ of the logits, ● of its own output")

    return _svg("sensitivity", len(layers), draw)


def attribution_plot(layers: Sequence[LayerShare]) -> str:
    """Each layer's share of the noise at the logits and of the flipped margins; the largest on top."""

    def draw(axes: Axes) -> None:
        for row, share in enumerate(layers):
            axes.barh(row - 0.18, 100 * share.logits_share, height=0.34, color=_ACCENT)
            if share.flip_share is not None:
                color = _BAD if share.flip_share > 0 else _GOOD
                axes.barh(row + 0.18, 100 * share.flip_share, height=0.34, color=color)
        axes.axvline(0, color=_MUTED, linewidth=1)
        axes.set_yticks(range(len(layers)), [_short(share.layer) for share in layers])
        axes.set_ylim(len(layers) - 0.5, -0.5)
        axes.set_xlabel("share, %")

    return _svg("attribution", len(layers), draw)


def attribution_plot_text(layers: Sequence[LayerShare]) -> str:
    """What `attribution_plot` shows, for those who do not see it."""
    return "; ".join(
        f"{share.layer} {percent(share.logits_share)} of the noise"
        + ("" if share.flip_share is None else f", {percent(share.flip_share)} of the flips")
        for share in layers
    )


def sensitivity_plot_text(layers: Sequence[Mapping[str, Any]]) -> str:
    """What `sensitivity_plot` shows, for those who do not see it."""
    return "; ".join(f"{entry['layer']} {entry['logits_sqnr_db']:.1f} dB at the logits" for entry in layers)


def drop_plot_text(drops: Sequence[Drop]) -> str:
    """What `drop_plot` shows, for those who do not see it."""
    return "; ".join(
        f"{d.part} {points(d.drop_points)} points "
        f"({points(d.interval_points.low)} to {points(d.interval_points.high)})"
        for d in drops
    )


def accuracy_plot_text(rows: Sequence[tuple[str, StageAccuracy]]) -> str:
    """What `accuracy_plot` shows, for those who do not see it."""
    return "; ".join(
        f"{name} {percent(stage.top1)} ({percent(stage.top1_interval.low)} to {percent(stage.top1_interval.high)})"
        for name, stage in rows
    )


def reliability_plot_text(before: StageAccuracy, after: StageAccuracy) -> str:
    """What `reliability_plot` shows, for those who do not see it."""
    return "; ".join(
        f"{stage.name}: mean confidence {percent(stage.confidence.mean)}, right {percent(stage.top1)}, expected "
        f"calibration error {percent(stage.confidence.ece)}"
        for stage in (before, after)
    )


def confusion_plot_text(changes: Sequence[ConfusionChange]) -> str:
    """What `confusion_plot` shows, for those who do not see it."""
    return "; ".join(
        f"{change.truth} taken for {change.predicted} {change.before} to {change.after}" for change in changes
    )


def class_plot_text(classes: Sequence[ClassChange]) -> str:
    """What `class_plot` shows, for those who do not see it."""
    return "; ".join(
        f"{c.label} {percent(c.before_accuracy)} to {percent(c.after_accuracy)}" for c in classes
    )


def _svg(name: str, rows: int, draw: Callable[[Axes], None]) -> str:
    """What `draw` draws, as an SVG element; `name` keeps its ids apart from those of other plots."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UnsupportedError(
            "the HTML report needs matplotlib for its plots: pip install 'edgefold[report]'"
        ) from error
    settings: dict[Any, Any] = {
        "font.size": _FONT_PT,
        "svg.fonttype": "none",  # text stays text: selectable, and in the page's font
        "svg.hashsalt": name,  # the same bytes for the same result
        "text.parse_math": False,  # class names may hold dollar signs
    }
    buffer = io.StringIO()
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # A glyph that matplotlib's font lacks is still drawn by the browser's.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=(_WIDTH_IN, 0.75 + _ROW_IN * max(rows, 2)), layout="constrained")
        axes = figure.add_subplot()
        axes.set_facecolor("none")
        axes.set_axisbelow(True)
        axes.grid(axis="x", color=_GRID, linewidth=0.6)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(_GRID)
        axes.tick_params(colors=_INK, length=0)
        axes.xaxis.label.set_color(_MUTED)
        axes.yaxis.label.set_color(_MUTED)
        draw(axes)
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)  # implied within HTML
    head, rest = svg.split(">", 1)
    head = re.sub(r'\s(width|height|version)="[^"]*"', "", head)  # viewBox alone: it scales with the page
    rest = re.sub(r'<g id="[^"]*"', "<g", rest)  # two plots would have the same ones
    rest = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--font)", rest)
    for stand_in, variable in _CSS_VARIABLE.items():
        rest = rest.replace(stand_in, variable)
    return f'{head} aria-hidden="true" focusable="false">{rest}'


def _short(label: str) -> str:
    printable = "".join(c if c.isprintable() else "?" for c in label)
    return printable if len(printable) <= _MAX_LABEL_CHARS else printable[: _MAX_LABEL_CHARS - 1] + "…"
