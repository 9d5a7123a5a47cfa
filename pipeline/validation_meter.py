"""Accuracy and calibration of confidence as sums that grow with the images: of a data set, or of a stream.

A classifier's confidence is *calibrated* where it is right on 80% of the images on which it is 80% sure.
Quantization can spoil that and leave top-1 as it was, and whoever thresholds the confidence then
finds out in the field.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from pipeline.metrics import probabilities, top_k_correct
from pipeline.statistics import Interval, wilson_interval

__all__ = ["N_CONFIDENCE_BINS", "AccuracyFigures", "AccuracyMeter", "Confidence", "ConfidenceBin"]

N_CONFIDENCE_BINS = 15
"""Equal-width bins of the confidence, as in Guo et al., arXiv 1706.04599, so that figures compare."""

_STRICT: dict[str, Any] = {"extra": "forbid", "allow_inf_nan": False}


@dataclass(frozen=True, slots=True)
class ConfidenceBin:
    """The images whose confidence lies in ``(low, high]``."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    low: float
    high: float
    n_images: int
    mean_confidence: float
    accuracy: float


@dataclass(frozen=True, slots=True)
class Confidence:
    """How far the confidence is from the accuracy."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    ece: float
    """Expected calibration error, in [0, 1]: ``sum(n_bin / n * |accuracy - mean confidence|)``, over
    `N_CONFIDENCE_BINS` bins. Equation 5 of arXiv 1706.04599."""
    mean: float
    """Mean confidence in the answer; above the top-1, the classifier is overconfident."""
    bins: tuple[ConfidenceBin, ...]
    """Those that hold an image."""


@dataclass(frozen=True, slots=True)
class AccuracyFigures:
    """What an `AccuracyMeter` has seen."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    n_images: int
    top_k: int
    """``min(5, classes)``."""
    top1_correct: int
    top_k_correct: int
    top1: float
    top1_interval: Interval
    """95%, Wilson."""
    top_k_accuracy: float
    confidence: Confidence


@dataclass(slots=True)
class AccuracyMeter:
    """Top-1, top-k and calibration of one classifier. Plain values: its state is JSON as it stands.

    Not locked: whoever calls it from several threads holds a lock.
    """

    n_classes: int
    n_images: int = 0
    top1_correct: int = 0
    top_k_correct: int = 0
    bin_images: list[int] = field(default_factory=lambda: [0] * N_CONFIDENCE_BINS)
    bin_correct: list[int] = field(default_factory=lambda: [0] * N_CONFIDENCE_BINS)
    bin_confidence: list[float] = field(default_factory=lambda: [0.0] * N_CONFIDENCE_BINS)
    """Sums of the confidence."""

    @property
    def top_k(self) -> int:
        """``min(5, classes)``."""
        return min(5, self.n_classes)

    def update(self, logits: NDArray[Any], labels: NDArray[Any] | int) -> None:
        """Add images.

        Args:
            logits: finite, ``[N, C]``, or ``[C]`` for one image; or probabilities.
            labels: the true classes, integers ``[N]`` in ``[0, C)``, or one of them.

        Raises:
            ValueError: a shape or a label is out of range.
        """
        rows, truth = np.atleast_2d(logits), np.atleast_1d(labels)
        if rows.ndim != 2 or rows.shape[1] != self.n_classes:
            raise ValueError(f"need logits [N, {self.n_classes}], got {np.shape(logits)}")
        self.top_k_correct += int(np.sum(top_k_correct(rows, truth, self.top_k)))
        right = rows.argmax(axis=1) == truth
        confidence = probabilities(rows).max(axis=1)
        self.n_images += len(rows)
        self.top1_correct += int(np.sum(right))
        # (m - 1) / M < confidence <= m / M
        bins = np.clip(np.ceil(confidence * N_CONFIDENCE_BINS).astype(int) - 1, 0, N_CONFIDENCE_BINS - 1)
        for index, sure, hit in zip(bins.tolist(), confidence.tolist(), right.tolist(), strict=True):
            self.bin_images[index] += 1
            self.bin_correct[index] += hit
            self.bin_confidence[index] += sure

    def figures(self) -> AccuracyFigures:
        """The accuracy so far.

        Raises:
            ValueError: nothing was added.
        """
        n = self.n_images
        if n == 0:
            raise ValueError("got no image; there is no accuracy of nothing")
        return AccuracyFigures(
            n_images=n,
            top_k=self.top_k,
            top1_correct=self.top1_correct,
            top_k_correct=self.top_k_correct,
            top1=self.top1_correct / n,
            top1_interval=wilson_interval(self.top1_correct, n),
            top_k_accuracy=self.top_k_correct / n,
            confidence=self._confidence(),
        )

    def _confidence(self) -> Confidence:
        gaps = (
            abs(correct - sure) for correct, sure in zip(self.bin_correct, self.bin_confidence, strict=True)
        )
        bins = tuple(
            ConfidenceBin(
                low=index / N_CONFIDENCE_BINS,
                high=(index + 1) / N_CONFIDENCE_BINS,
                n_images=images,
                mean_confidence=sure / images,
                accuracy=correct / images,
            )
            for index, (images, correct, sure) in enumerate(
                zip(self.bin_images, self.bin_correct, self.bin_confidence, strict=True)
            )
            if images
        )
        return Confidence(sum(gaps) / self.n_images, sum(self.bin_confidence) / self.n_images, bins)
