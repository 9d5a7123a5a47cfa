"""A validation result on the terminal."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from apps.report.wording import (
    Verdict,
    agreement_verdict,
    images,
    p_value,
    percent,
    points,
    protocol,
    sqnr,
    verdict,
)
from pipeline.validation_agreement import Agreement, AgreementResult
from pipeline.validation_result import ConfusionChange, Drop, ValidationResult

__all__ = ["print_agreement", "print_validation"]

_WORST_CLASSES = 10
_MOST_CONFUSED = 4
_HOLM_LEVEL = 0.05
_STYLES = {"good": "bold green", "unsure": "bold yellow", "bad": "bold red"}


def print_validation(
    result: ValidationResult, console: Console, *, max_drop_points: float | None = None
) -> None:
    """Stages, the drop in its parts, the classes that lost most, and the verdict."""
    console.print(_stages(result))
    if result.members:
        console.print(_members(result))
    console.print(_drops(result))
    for part in result.assumed:
        console.print(Text(f"{part.part}: {part.reason}", style="dim"))
    if worst := _worst_classes(result):
        console.print(worst)
    if result.confusion:
        changes = "; ".join(map(_confused, result.confusion[:_MOST_CONFUSED]))
        console.print(Text(f"Confusions that changed most: {changes}"))
    _print_rest(result, verdict(result, max_drop_points), console)


def print_agreement(
    result: AgreementResult, console: Console, *, min_agreement_percent: float | None = None
) -> None:
    """How far each stage says the same as the one before it, and the verdict."""
    table = _table(
        f"Agreement ({result.dataset_name}, {images(result.n_images)}{protocol(result)}, no labels)"
    )
    table.add_column("part", no_wrap=True)
    table.add_column("from")
    table.add_column("to")
    for column in ("same answer", "95% interval", "SQNR"):
        table.add_column(column, justify="right", no_wrap=True)
    for step in result.steps:
        table.add_row(*_agreement_row(step))
    if len(result.steps) > 1:
        table.add_section()
        table.add_row(*_agreement_row(result.total), style="bold")
    console.print(table)
    for part in result.assumed:
        console.print(Text(f"{part.part}: {part.reason}", style="dim"))
    _print_rest(result, agreement_verdict(result, min_agreement_percent), console)


def _print_rest(result: ValidationResult | AgreementResult, judgement: Verdict, console: Console) -> None:
    for note in result.notes:
        console.print(Text(f"note: {note}", style="yellow"))
    if result.n_skipped:
        first = result.skipped[0]
        console.print(
            Text(f"{images(result.n_skipped)} skipped, first {first.key}: {first.reason}", style="yellow")
        )
    console.print()
    console.print(Text(judgement.headline, style=_STYLES[judgement.level]))
    for sentence in judgement.sentences:
        console.print(Text(sentence))


def _table(title: str) -> Table:
    return Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True
    )


def _agreement_row(step: Agreement) -> tuple[Text | str, ...]:
    low, high = 100 * step.interval.low, 100 * step.interval.high
    return (
        Text(step.part),
        Text(step.before),
        Text(step.after),
        percent(step.agreement),
        f"{low:.2f} to {high:.2f}",
        sqnr(step.sqnr_db),
    )


def _confused(change: ConfusionChange) -> str:
    return f"{change.truth} taken for {change.predicted}, {change.before} to {change.after}"


def _members(result: ValidationResult) -> Table:
    table = _table("Each network by itself, and what the ensemble gains on it")
    table.add_column("network", overflow="fold")
    for column in ("fp32", "ships", "95% interval", "drop", "ensemble\nbetter by", "p"):
        table.add_column(column, justify="right", no_wrap=True)
    for member in result.members:
        low, high = member.after.top1_interval.low, member.after.top1_interval.high
        table.add_row(
            Text(member.name),
            percent(member.before.top1),
            percent(member.after.top1),
            f"{100 * low:.2f} to {100 * high:.2f}",
            points(member.drop.drop_points),
            points(-member.to_ensemble.drop_points),
            p_value(member.to_ensemble.mcnemar_p).removeprefix("= "),
        )
    return table


def _stages(result: ValidationResult) -> Table:
    table = _table(
        f"Accuracy of each stage ({result.dataset_name}, {images(result.n_images)}{protocol(result)})"
    )
    table.add_column("stage")
    for column in ("top-1", "95% interval", f"top-{result.top_k}", "ECE", "SQNR to\nfirst"):
        table.add_column(column, justify="right", no_wrap=True)
    for i, stage in enumerate(result.stages):
        low, high = stage.top1_interval.low, stage.top1_interval.high
        table.add_row(
            Text(stage.name),
            percent(stage.top1),
            f"{100 * low:.2f} to {100 * high:.2f}",
            percent(stage.top_k),
            percent(stage.confidence.ece),
            sqnr(stage.sqnr_from_first_db) if i else "",
        )
    return table


def _drops(result: ValidationResult) -> Table:
    table = _table("The drop of top-1 in its parts, in points (+ is worse)")
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
    certain = sum(row.adjusted_p < _HOLM_LEVEL for row in result.classes)
    table = _table(
        f"Classes that lost most ({len(shown)} of {len(lost)} that lost; "
        f"{certain or 'none'} of {len(result.classes)} changed by more than chance)"
    )
    table.add_column("class", overflow="fold")
    for column in ("images", "before", "after", "lost/\ngained", "drop", "95% interval"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in shown:
        low, high = row.interval_points.low, row.interval_points.high
        table.add_row(
            Text(row.label),
            str(row.n_images),
            percent(row.before_accuracy),
            percent(row.after_accuracy),
            f"{row.lost}/{row.gained}",
            points(100 * (row.before_accuracy - row.after_accuracy)),
            f"{points(low)} to {points(high)}",
        )
    return table
