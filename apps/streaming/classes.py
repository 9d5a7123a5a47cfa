"""The classes of the engine that answered, beside the truth of a source that was opened for another one."""

from __future__ import annotations

from dataclasses import replace

from apps.streaming.contracts import Feed
from apps.streaming.sources import ModelClasses
from pipeline.artifacts import Frame

__all__ = ["ClassMap"]


class ClassMap:
    """Names the classes of an answer, and moves a frame's truth to their indices.

    A feed was opened with the classes of the first engine and gives the truth in their indices. After a
    reload the classes may be others; the truth follows by its name, and is unknown where no class of the
    new engine has that name.
    """

    def __init__(self) -> None:
        self._indices: dict[tuple[tuple[str, ...], tuple[str, ...]], dict[int, int]] = {}

    def of(self, classes: ModelClasses, feed: Feed, frame: Frame) -> tuple[tuple[str, ...], Frame]:
        """The class names of the engine's scores, and the frame with its truth among them."""
        given = feed.labels
        labels = classes.labels or given
        if len(labels) != classes.count:
            labels = tuple(str(index) for index in range(classes.count))
        if frame.label is None or labels == given:
            return labels, frame
        known = self._indices.get((given, labels))
        if known is None:
            places = {name: index for index, name in enumerate(labels)}
            known = {old: places[name] for old, name in enumerate(given) if name in places}
            self._indices[given, labels] = known
        return labels, replace(frame, label=known.get(frame.label))
