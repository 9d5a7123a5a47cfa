"""The images of an accuracy budget, decoded and resized once, and what the reference says of each.

They lie in a file that is read by position: every judgement then is inference alone, in a random order that is
the same in each (an image folder lists class after class, of which the first eighth would be a sample of
nothing).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from apps.validating import Reference, Subject, build_judges, load_judge
from calibration.budget import Budget
from pipeline.contracts import Dataset, EngineBackend, Progress
from pipeline.datasets import labelled_batches
from pipeline.errors import AccuracyGateError, DataError
from pipeline.validation import match_labels

__all__ = ["BATCH", "BudgetImages"]

BATCH = 16
"""Images a call."""
_ORDER_SEED = 0


class BudgetImages:
    """The pixels of the budget's images on disk, and what the reference says of each."""

    def __init__(self, folder: Path, dataset: Dataset, subject: Subject, budget: Budget) -> None:
        self._dataset, self._subject, self._budget = dataset, subject, budget
        self._path = folder / "budget-images.u8"
        self.n = 0
        self._shape: tuple[int, ...] = ()
        self._answers: NDArray[np.int64] = np.zeros(0, np.int64)
        self._truth: NDArray[np.int64] = np.zeros(0, np.int64)

    def ask_reference(
        self, stack: ExitStack, backend: EngineBackend, reference: Reference, progress: Progress
    ) -> None:
        """One pass: pixels to disk, answers of the reference and of the folded fp32 graph.

        Raises:
            AccuracyGateError: the folded fp32 graph is itself past the budget.
            DataError: no usable image, no labels where the budget needs them, or one class only.
        """
        subject, kind = self._subject, self._budget.kind
        if reference.model is not None and reference.model.module is not None:
            judges, _ = build_judges(stack, subject, backend, reference, BATCH)
        else:
            judges = [load_judge(stack, subject, subject.fp32, backend, "fp32, folded", "reference", BATCH)]
        labels = subject.labels or tuple(map(str, range(subject.num_classes)))
        index_of = None
        if kind == "drop":
            index_of, _ = match_labels(self._dataset.class_names, labels, self._dataset.name)
        first: list[NDArray[np.int64]] = []
        last: list[NDArray[np.int64]] = []
        truth: list[int] = []
        try:
            with self._path.open("wb") as file:
                for samples, pixels in labelled_batches(
                    self._dataset, subject.preprocess, subject.input_color, BATCH
                ):
                    file.write(pixels.tobytes())
                    self._shape = pixels.shape[1:]
                    first.append(judges[0].logits(samples, pixels).argmax(axis=1))
                    last.append(
                        judges[-1].logits(samples, pixels).argmax(axis=1) if judges[1:] else first[-1]
                    )
                    if index_of is not None:
                        truth.extend(
                            int(index_of[sample.label]) for sample in samples if sample.label is not None
                        )
                    self.n += len(samples)
                    progress("fp32 answers", self.n, len(self._dataset))
        except OSError as error:
            raise DataError(
                f"the pixels of {self._dataset.name} do not fit into {str(self._path.parent)!r} "
                f"({error.strerror or error}); judge the budget on fewer with --eval-limit, or set TMPDIR"
            ) from error
        if self.n == 0:
            raise DataError(f"{self._dataset.name} has no usable image to judge a budget on")
        self._answers = np.concatenate(first)
        if kind == "drop":
            self._truth = np.array(truth, np.int64)
            if len(np.unique(self._truth)) < 2:
                raise DataError(
                    f"all {self.n:,} images of {self._dataset.name} are of one class ({labels[self._truth[0]]!r}): "
                    "an engine that always answers it would lose nothing; give images of the classes it is to tell apart"
                )
        self._check_fp32(np.concatenate(last))

    def changes(self, rows: NDArray[np.int64], answers: NDArray[np.int64]) -> NDArray[np.int8]:
        """1 for an answer lost, -1 for one gained, of the images in `rows`."""
        reference = self._answers[rows]
        if self._budget.kind == "agreement":
            changed: NDArray[np.int8] = (answers != reference).astype(np.int8)
            return changed
        right = self._truth[rows]
        lost: NDArray[np.int8] = (reference == right).astype(np.int8) - (answers == right).astype(np.int8)
        return lost

    def batches(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint8]]]:
        """Positions and pixels of every image, in the random order."""
        pixels = np.memmap(self._path, np.uint8, "r", shape=(self.n, *self._shape))
        order = np.random.default_rng(_ORDER_SEED).permutation(self.n)
        for start in range(0, self.n, BATCH):
            rows = order[start : start + BATCH]
            yield rows, pixels[rows]

    def _check_fp32(self, answers: NDArray[np.int64]) -> None:
        changes = self.changes(np.arange(self.n), answers)
        lost, gained = int(np.sum(changes > 0)), int(np.sum(changes < 0))
        if not self._budget.is_met(lost, gained, self.n):
            raise AccuracyGateError(
                f"in fp32 already the folded graph loses {lost:,} and gains {gained:,} of the {self.n:,} answers of "
                f"PyTorch, past {self._budget.describe()}: no precision of its layers can meet it. The cause is "
                "preprocessing or export; `edgefold validate` shows which. Correct it (--preprocess) or allow more"
            )
