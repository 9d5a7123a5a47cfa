"""TensorRT's nested build phases as one number that only grows."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["BuildProgress"]

TOTAL = 1000
"""Builds are reported in thousandths: phases open as they go, so there is no number of steps to count."""


class BuildProgress:
    """Turns phases into a fraction.

    TensorRT opens a phase with a number of steps; while one step is under way it may open phases
    within it. The fraction of a phase is thus (steps done + fraction of the phase inside) / steps. Several
    phases may follow each other within one step: the number reported never falls.
    """

    def __init__(self, report: Callable[[int, int], None]) -> None:
        """Call ``report(done, total)`` whenever the number grows."""
        self._report = report
        self._steps: dict[str, int] = {}
        self._done: dict[str, int] = {}
        self._parents: dict[str, str | None] = {}
        self._reported = -1

    def start(self, phase: str, parent: str | None, n_steps: int) -> None:
        """A phase opens, within a step of `parent` if that is given."""
        self._steps[phase] = max(1, n_steps)
        self._done[phase] = 0
        self._parents[phase] = parent if parent in self._steps else None
        self._update()

    def step(self, phase: str, index: int) -> None:
        """Step `index` of `phase` is done."""
        if phase in self._done:
            self._done[phase] = min(self._steps[phase], index + 1)
            self._update()

    def finish(self, phase: str) -> None:
        """A phase closes, whether all of its steps were taken or not."""
        if phase in self._done:
            self._done[phase] = self._steps[phase]
            self._update()
            del self._done[phase], self._steps[phase], self._parents[phase]

    def _update(self) -> None:
        roots = [phase for phase, parent in self._parents.items() if parent is None]
        done = int(TOTAL * self._fraction(roots[0])) if roots else TOTAL
        if done > self._reported:
            self._reported = done
            self._report(done, TOTAL)

    def _fraction(self, phase: str) -> float:
        children = [child for child, parent in self._parents.items() if parent == phase]
        inside = max((self._fraction(child) for child in children), default=0.0)
        return min(1.0, (self._done[phase] + inside) / self._steps[phase])
