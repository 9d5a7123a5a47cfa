"""Sources that are this product's own code: the synthetic camera, and images in a folder or an ``.npz``."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from apps.streaming.sources.source import Delivered, ModelClasses
from apps.streaming.uris import SourceUri
from pipeline.artifacts import Sample
from pipeline.datasets import open_dataset
from pipeline.errors import DataError, UsageError
from pipeline.synthetic import CLASS_NAMES, SyntheticCamera
from pipeline.validation import match_labels

__all__ = ["ImageSource", "SyntheticSource"]

_MAX_SKIPS_LISTED = 5
_MAX_RENDERED_BYTES = 1 << 30


class _TruthMap:
    """The source's classes in the bundle's indices, matched as validation matches them."""

    def __init__(
        self, names: Sequence[str] | None, labels: tuple[str, ...], source: str, notes: list[str]
    ) -> None:
        self._indices: list[int] | None = None
        if names is None:
            return
        try:
            indices, note = match_labels(names, labels, source)
        except DataError:
            notes.append(
                f"accuracy is not measured: the {len(names)} classes of {source} ({names[0]!r}, …) are not "
                f"the bundle's {len(labels)} ({labels[0]!r}, …)"
            )
            return
        self._indices = [int(index) for index in indices]
        if note is not None:
            notes.append(note)

    def label(self, source_label: int | None) -> int | None:
        """The bundle's index of a class of the source; ``None`` where it has none."""
        return None if self._indices is None or source_label is None else self._indices[source_label]


class SyntheticSource:
    """The synthetic camera; with ``loop`` its frames are rendered at opening and replayed from memory.

    Raises:
        UsageError: the frames to be replayed do not fit into 1 GiB.
    """

    color: Literal["RGB", "BGR"] = "RGB"
    self_paced = False

    def __init__(self, uri: SourceUri, classes: ModelClasses, fps: float) -> None:
        self.source_id = uri.shown
        self.live = uri.live
        self.fps = fps
        self.notes: list[str] = []
        self._camera = SyntheticCamera(uri.seed)
        self._count = uri.count
        self._index = 0
        self.labels = classes.named(CLASS_NAMES, self.notes)
        self._truth = _TruthMap(CLASS_NAMES, self.labels, uri.shown, self.notes)
        self._rendered: list[Delivered] = []
        if uri.options.loop and uri.count is not None:
            height, width = self._camera.frame_hw
            n_bytes = uri.count * height * width * 3
            if n_bytes > _MAX_RENDERED_BYTES:
                raise UsageError(
                    f"{uri.shown}: {uri.count} frames of {width}×{height} to replay take {n_bytes >> 20} MiB "
                    f"(limit {_MAX_RENDERED_BYTES >> 20}); give a smaller COUNT"
                )
            self._rendered = [self._render(index) for index in range(uri.count)]
            for delivered in self._rendered:
                delivered.pixels.flags.writeable = False  # they come again

    def read(self, into: NDArray[np.uint8] | None = None) -> Delivered | None:
        """The next frame; the renderer makes its own array, so `into` is not used."""
        if self._rendered:
            delivered = self._rendered[self._index % len(self._rendered)]
        elif self._index == self._count:
            return None
        else:
            delivered = self._render(self._index)
        self._index += 1
        return delivered

    def close(self) -> None:
        """Nothing is held."""

    def _render(self, index: int) -> Delivered:
        image, label = self._camera.frame(index)
        return Delivered(image, self._truth.label(label))


class ImageSource:
    """The images of a data set, in its order."""

    color: Literal["RGB", "BGR"] = "RGB"
    live = False
    self_paced = False

    def __init__(self, uri: SourceUri, classes: ModelClasses, fps: float) -> None:
        self.source_id = uri.shown
        self.fps = fps
        self.notes: list[str] = []
        # As validation opens and matches it, so that both judge by the same indices.
        try:
            self._dataset = open_dataset(str(uri.path), labels=classes.labels or None)
        except DataError:
            self._dataset = open_dataset(str(uri.path))
        names = self._dataset.class_names
        self.labels = classes.named(names, self.notes)
        self._truth = _TruthMap(names, self.labels, uri.shown, self.notes)
        self._loop = uri.options.loop
        self._samples: Iterator[Sample] = iter(self._dataset)
        self._skips_seen = len(self._dataset.skipped)
        self._usable_in_pass = 0

    def read(self, into: NDArray[np.uint8] | None = None) -> Delivered | None:
        """The next image, decoded into an array of its own: `into` is not used."""
        sample = next(self._samples, None)
        if self._skips_seen < len(self._dataset.skipped):
            # Every image that could not be decoded is a frame this source failed to deliver.
            self._skips_seen += 1
            if sample is not None:
                self._samples = itertools.chain([sample], self._samples)
            return Delivered(None)
        if sample is None:
            # A folder in which nothing can be decoded would go round without end.
            if not self._loop or not self._usable_in_pass:
                return None
            self._usable_in_pass = 0
            self._samples = iter(self._dataset)
            return self.read(into)
        self._usable_in_pass += 1
        return Delivered(sample.image, self._truth.label(sample.label))

    def close(self) -> None:
        """Lists what could not be decoded."""
        skipped = self._dataset.skipped
        self.notes += [f"skipped {key}: {reason}" for key, reason in skipped[:_MAX_SKIPS_LISTED]]
        if len(skipped) > _MAX_SKIPS_LISTED:
            self.notes.append(f"skipped {len(skipped) - _MAX_SKIPS_LISTED} more images")
