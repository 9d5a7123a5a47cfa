"""``edgefold train --teacher BUNDLE``: what engines say of every training image, asked once and kept."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from apps.validating import display_labels, load_judge
from apps.validating_device import Judged, judged_here
from pipeline.bundle import open_bundle
from pipeline.contracts import Dataset, Progress
from pipeline.datasets import labelled_batches
from pipeline.metrics import probabilities
from pipeline.training.distillation import Teacher
from pipeline.validation import match_labels
from pipeline.whole_files import whole_file

__all__ = ["ask_teachers"]

_BATCH = 64

_FLOOR = 1e-12
"""Below this a probability is rounding, and its logarithm may be infinite."""


def ask_teachers(
    bundles: Sequence[Path], dataset: Dataset, cache_dir: Path, progress: Progress, *, mirror: bool
) -> Teacher:
    """The mean of what the engines of `bundles` say of the labelled images of `dataset`, in its order.

    The mean is of log-probabilities, over the engines and over an image and its mirror: more often right than
    any of them. Answers are kept in `cache_dir`: a second call with the same bundle and images asks nothing.

    Args:
        bundles: one at least.
        dataset: the images.
        cache_dir: made if it is not there.
        progress: called while an engine is asked.
        mirror: whether a mirrored image shows the same class.

    Raises:
        DataError: an engine lacks classes of `dataset`.
        UsageError, IntegrityError, EngineError, UnsupportedError: there is no such bundle, it is damaged, or
            its engine does not run here.
    """
    engines: list[tuple[str, str]] = []
    said: list[NDArray[np.float32]] = []
    for bundle in bundles:
        sha256, answers = _answers(bundle, dataset, cache_dir, progress)
        engines.append((bundle.name, sha256))
        said.append((answers if mirror else answers[:1]).mean(axis=0))
    return Teacher(tuple(engines), np.mean(said, axis=0))


def _answers(
    bundle: Path, dataset: Dataset, cache_dir: Path, progress: Progress
) -> tuple[str, NDArray[np.float32]]:
    """The digest of the bundle's engine, and `_ask`."""
    with TemporaryDirectory(prefix="edgefold-teacher-") as work_dir:
        judged = judged_here(open_bundle(bundle), None, Path(work_dir))
        subject = judged.subject
        columns, _ = match_labels(dataset.class_names, display_labels(subject, dataset), dataset.name)
        sha256 = (subject.final or subject.fp32).sha256
        identity = f"{sha256}:{dataset.sha256}:{columns.tolist()}"
        kept = cache_dir / f"{hashlib.sha256(identity.encode()).hexdigest()[:24]}.teacher.npy"
        if not kept.exists():
            cache_dir.mkdir(parents=True, exist_ok=True)
            with whole_file(kept) as file:
                np.save(file, _ask(judged, dataset, columns, progress))
    return sha256, np.load(kept)


def _ask(
    judged: Judged, dataset: Dataset, columns: NDArray[np.int64], progress: Progress
) -> NDArray[np.float32]:
    """Log-probabilities float32 [2, n, classes]: of every labelled image as it is, and mirrored.

    Among the outputs `columns` alone; their logits but for a constant, also of a graph that ends in a softmax.
    """
    subject = judged.subject
    engine, backend = subject.final or subject.fp32, subject.final_backend or judged.backend
    rows: list[NDArray[np.float32]] = []
    done = 0
    with ExitStack() as stack:
        judge = load_judge(stack, subject, engine, backend, subject.precision, "teacher", _BATCH)
        for samples, pixels in labelled_batches(dataset, subject.preprocess, subject.input_color, _BATCH):
            labelled = [i for i, sample in enumerate(samples) if sample.label is not None]
            views = (pixels, np.ascontiguousarray(pixels[:, :, ::-1]))
            answers = np.stack([probabilities(judge.logits(samples, view)) for view in views])
            rows.append(np.log(np.maximum(answers[:, labelled][..., columns], _FLOOR)).astype(np.float32))
            done += len(samples)
            progress("ask the teacher", done, len(dataset))
    return np.concatenate(rows, axis=1)
