"""A validation result on the terminal."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from apps.report.wording import images, p_value, percent, points, sqnr, verdict
from pipeline.validation_result import Drop, ValidationResult

__all__ = ["print_validation"]

_WORST_CLASSES = 10
_STYLES = {"good": "bold green", "unsure": "bold yellow", "bad": "bold red"}


def print_validation(
    result: ValidationResult, console: Console, *, max_drop_points: float | None = None
) -> None:
    """Stages, the drop in its parts, the classes that lost most, and the verdict."""
    console.print(_stages(result))
    console.print(_drops(result))
    for part in result.assumed:
        console.print(Text(f"{part.part}: {part.reason}", style="dim"))
    if worst := _worst_classes(result):
        console.print(worst)
    for note in result.notes:
        console.print(Text(f"note: {note}", style="yellow"))
    if result.n_skipped:
        first = result.skipped[0]
        console.print(
            Text(f"{images(result.n_skipped)} skipped, first {first.key}: {first.reason}", style="yellow")
        )
    judgement = verdict(result, max_drop_points)
    console.print()
    console.print(Text(judgement.headline, style=_STYLES[judgement.level]))
    for sentence in judgement.sentences:
        console.print(Text(sentence))


def _stages(result: ValidationResult) -> Table:
    table = Table(
        title=f"Accuracy of each stage ({result.dataset_name}, {images(result.n_images)})",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("stage")
    for column in ("top-1", "95% interval", f"top-{result.top_k}", "SQNR to first"):
        table.add_column(column, justify="right", no_wrap=True)
    for i, stage in enumerate(result.stages):
        low, high = stage.top1_interval.low, stage.top1_interval.high
        table.add_row(
            Text(stage.name),
            percent(stage.top1),
            f"{100 * low:.2f} to {100 * high:.2f}",
            percent(stage.top_k),
            sqnr(stage.sqnr_from_first_db) if i else "",
        )
    return table


def _drops(result: ValidationResult) -> Table:
    table = Table(
        title="The drop of top-1 in its parts, in points (+ is worse)",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("part", no_wrap=True)
    for column in ("drop", "95% interval", "lost/\ngained", "p", "same\nanswer", "SQNR"):
        table.add_column(column, justify="right", no_wrap=True)
    for drop in result.drops:
        table.add_row(*_drop_row(drop))
    for part in result.assumed:
        table.add_row(Text(part.part), "—", *[""] * 5, style="dim")
    table.add_section()
    table.add_row(*_drop_row(result.total), style="bold")
    return table


def _drop_row(drop: Drop) -> tuple[Text | str, ...]:
    low, high = drop.interval_points.low, drop.interval_points.high
    return (
        Text(drop.part),
        points(drop.drop_points),
        f"{points(low)} to {points(high)}",
        f"{drop.lost}/{drop.gained}",
        p_value(drop.mcnemar_p).removeprefix("= "),
        percent(drop.agreement),
        sqnr(drop.sqnr_db),
    )


def _worst_classes(result: ValidationResult) -> Table | None:
    lost = [row for row in result.classes if row.after_correct < row.before_correct]
    if not lost:
        return None
    lost.sort(key=lambda row: row.after_accuracy - row.before_accuracy)
    shown = lost[:_WORST_CLASSES]
    table = Table(
        title=f"Classes that lost most ({len(shown)} of {len(lost)} that lost)",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("class", overflow="fold")
    for column in ("images", "right before", "right after", "accuracy before", "after"):
        table.add_column(column, justify="right")
    for row in shown:
        table.add_row(
            Text(row.label),
            str(row.n_images),
            str(row.before_correct),
            str(row.after_correct),
            percent(row.before_accuracy),
            percent(row.after_accuracy),
        )
    return table
