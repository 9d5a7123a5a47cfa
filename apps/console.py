"""The terminal: one console for people (standard error), and progress bars.

Standard output is kept for what a program reads: ``--json``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from pipeline.contracts import Progress as ProgressCallback

__all__ = ["console", "print_json", "progress_display"]

console = Console(stderr=True, highlight=False)


def print_json(text: str) -> None:
    """JSON to standard output, alone."""
    sys.stdout.write(text.rstrip("\n") + "\n")
    sys.stdout.flush()


@contextmanager
def progress_display() -> Iterator[ProgressCallback]:
    """A callback that draws one bar for every kind of work reported through it.

    Where standard error is no terminal nothing is drawn: a log is not filled with bars.
    """
    with Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bars:
        tasks: dict[str, TaskID] = {}

        def report(what: str, done: int, total: int | None) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield report
