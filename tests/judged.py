"""Judgements of made logits: images that are numbers, and judges that give the rows they are handed."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from pipeline.artifacts import PreprocessSpec, Sample
from pipeline.validation import Judge, judge_chain
from pipeline.validation_result import ValidationResult

__all__ = ["LABELS", "SPEC", "Images", "judged", "one_hot_logits", "replay"]

SPEC = PreprocessSpec(input_hw=(4, 4), resize="none", mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
LABELS = ("ant", "bee", "cat")


@dataclass
class Images:
    """A dataset in memory; image `i` has the pixel value `i % 256` everywhere."""

    labels: list[int | None]
    class_names: tuple[str, ...] | None = LABELS
    name: str = "made"
    sha256: str = "0" * 64
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self):
        for i, label in enumerate(self.labels):
            yield Sample(np.full((4, 4, 3), i % 256, np.uint8), label, str(i))


def replay(name: str, part: str, logits) -> Judge:
    """A judge that gives the row of `logits` with the sample's key."""
    return Judge(name, part, lambda samples, pixels: logits[[int(s.key) for s in samples]])


def judged(chain, labels=None, **options) -> ValidationResult:
    labels = labels if labels is not None else [i % 3 for i in range(len(chain[0]))]
    parts = ["reference", "preprocessing", "export", "INT8"]
    judges = [replay(f"stage {i}", parts[i], rows) for i, rows in enumerate(chain)]
    options = {"batch_size": 4, **options}
    return judge_chain(judges, Images(labels), spec=SPEC, color="BGR", labels=LABELS, **options)


def one_hot_logits(answers, sure=5.0):
    return (np.eye(3, dtype=np.float32)[answers] * sure).astype(np.float32)
