"""Whether images are in two data sets at once, by what they show.

Judged on the images it was calibrated on, an engine looks better than it is: its ranges fit them. Copies are
found by the digest of their decoded pixels, so that another name, another folder or another lossless format
does not hide them. A copy that was scaled or compressed again is another image to a digest, and is missed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.artifacts import Sample
from pipeline.contracts import Dataset

__all__ = ["OverlapWatch", "image_digests", "image_sha256"]

_MAX_NAMED = 3


def image_sha256(image: NDArray[np.uint8]) -> bytes:
    """Digest of decoded pixels (uint8 HWC) and their shape."""
    digest = hashlib.sha256(f"{image.shape} {image.dtype}\n".encode())
    digest.update(np.ascontiguousarray(image).data)
    return digest.digest()


def image_digests(dataset: Dataset) -> frozenset[bytes]:
    """`image_sha256` of every usable image; reads them all, and keeps 32 bytes of each."""
    return frozenset(image_sha256(sample.image) for sample in dataset)


class OverlapWatch:
    """A data set that notices, while it is gone through, which of its images are in another one.

    No pass of its own, and no memory that grows with the images.

    Args:
        dataset: what is judged.
        known: `image_digests` of the images not to be met, such as those of the calibration.
    """

    def __init__(self, dataset: Dataset, known: Collection[bytes]) -> None:
        self._dataset = dataset
        self._known = known
        self._n_met = 0
        self._first_met: list[str] = []

    @property
    def name(self) -> str:
        """Of the data set."""
        return self._dataset.name

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Of the data set."""
        return self._dataset.class_names

    @property
    def sha256(self) -> str:
        """Of the data set."""
        return self._dataset.sha256

    @property
    def skipped(self) -> Sequence[tuple[str, str]]:
        """Of the data set."""
        return self._dataset.skipped

    def __len__(self) -> int:
        return len(self._dataset)

    def __iter__(self) -> Iterator[Sample]:
        self._n_met, self._first_met = 0, []
        for sample in self._dataset:
            if image_sha256(sample.image) in self._known:
                self._n_met += 1
                self._first_met += [sample.key][: _MAX_NAMED - len(self._first_met)]
            yield sample

    def warning(self) -> str | None:
        """What the last pass met, ``None`` where that is nothing."""
        if not self._n_met:
            return None
        named = ", ".join(self._first_met) + (", …" if self._n_met > len(self._first_met) else "")
        return (
            f"{self._n_met:,} of the images judged are also among the {len(self._known):,} that the engine was "
            f"calibrated on ({named}): on those it looks better than it is; judge it on other images"
        )
