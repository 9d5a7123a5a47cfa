"""Images past a row of stages: what each says, in batches, whatever is then made of it.

A stage is one network, or several whose softmax is averaged; an image is one crop, or several whose softmax
is averaged. Every stage sees the same images in one pass. Memory does not grow with their number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline.artifacts import Sample
from pipeline.contracts import Dataset, Progress
from pipeline.datasets import samples_after
from pipeline.errors import DataError, EngineError
from pipeline.metrics import log_probabilities, probabilities
from pipeline.validation_crops import Crops, View, check_crops, seen_batches
from pipeline.validation_state import ResumeFile
from pipeline.validation_tally import Answers

__all__ = ["Judge", "Passed", "Stage", "pass_images"]


@dataclass(frozen=True, slots=True)
class Judge:
    """A candidate of the chain.

    ``logits(samples, pixels)`` gets a batch both ways: the images as they are (for a judge with a
    transform of its own) and as uint8 NHWC pixels that went through the preprocessing once for all
    judges that share it. It returns float ``[N, C]``. With several crops an image there are more pixels than
    samples, and a judge answers the pixels.
    """

    name: str
    part: str
    """What it changes in the judge before it: ``preprocessing``, ``export``, ``INT8``; of the first
    judge, ``reference``."""
    logits: Callable[[Sequence[Sample], NDArray[np.uint8]], NDArray[np.float32]]
    view: View | None = None
    """The pixels it takes, where not the chain's."""
    identity: str = ""
    """What it is, by content: digests of graph and weights, and the engine. Needed to resume."""


@dataclass(frozen=True, slots=True)
class Stage:
    """What is judged: one network, or several that answer together."""

    name: str
    part: str
    members: tuple[Judge, ...]


class _Tally(Protocol):
    @property
    def n_images(self) -> int: ...


_AnyTally = TypeVar("_AnyTally", bound=_Tally)


@dataclass(frozen=True, slots=True)
class Passed:
    """How a pass went."""

    skipped: tuple[tuple[str, str], ...]
    """``(key, reason)`` of the images that could not be used."""
    n_resumed: int
    """Images of an earlier pass that was broken off."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the figures must know of it."""
        if not self.n_resumed:
            return ()
        return (f"{self.n_resumed:,} of the images were judged before, and their sums taken up again",)


def pass_images(
    stages: Sequence[Stage],
    dataset: Dataset,
    tally: _AnyTally,
    take: Callable[[_AnyTally, Sequence[Sample], list[Answers], list[Answers]], None],
    *,
    view: View,
    crops: Crops,
    n_classes: int,
    batch_size: int,
    progress: Progress | None,
    resume: ResumeFile | None,
) -> tuple[_AnyTally, Passed]:
    """One pass over the images.

    Args:
        stages: at least two.
        dataset: the images.
        tally: empty; what is kept.
        take: adds a batch to a tally: the samples, what each stage says, and what each different judge
            says, in the order in which they appear in the stages.
        view: of the judges that name none.
        crops: of each image.
        n_classes: logits of every judge.
        batch_size: pixels a call of a judge.
        progress: called after every batch.
        resume: where the tally is kept meanwhile.

    Returns:
        The tally of all images, those of an earlier pass included.

    Raises:
        DataError: no usable image, or one that cannot be preprocessed.
        EngineError: a judge's logits are not finite, or not ``[N, n_classes]``.
        IntegrityError: `resume` holds another judgement.
        UsageError: as `pipeline.validation_crops.check_crops`.
        ValueError: fewer than two stages, a batch size below 1, or a judge without identity to resume.
    """
    if len(stages) < 2 or batch_size < 1:
        raise ValueError(f"need two judges and a batch size of 1, got {len(stages)} and {batch_size}")
    judges = list(dict.fromkeys(judge for stage in stages for judge in stage.members))
    views = list(dict.fromkeys(judge.view or view for judge in judges))
    for each in views:
        check_crops(crops, each.spec)
    skipped: dict[str, str] = {}
    if resume is not None:
        resume = resume.with_key(_key(judges, views, dataset, crops))
        if (kept := resume.load(type(tally))) is not None:
            tally, skipped = kept.tally, dict(kept.skipped)
    n_resumed = tally.n_images
    samples = samples_after(dataset, n_resumed, skipped) if n_resumed else iter(dataset)
    for batch, pixels in seen_batches(samples, views, crops, max(1, batch_size // crops)):
        by_judge = {
            judge: _answers(judge, batch, pixels[judge.view or view], crops, n_classes, batch_size)
            for judge in judges
        }
        together = [_together([by_judge[judge] for judge in stage.members]) for stage in stages]
        take(tally, batch, together, [by_judge[judge] for judge in judges])
        if progress is not None:
            progress("judging", tally.n_images, len(dataset))
        if resume is not None:
            resume.save_if_due(tally, tuple({**skipped, **dict(dataset.skipped)}.items()))
    passed = Passed(tuple({**skipped, **dict(dataset.skipped)}.items()), n_resumed)
    if resume is not None:
        resume.save(tally, passed.skipped)
    if tally.n_images == 0:
        reasons = "; ".join(f"{key}: {reason}" for key, reason in passed.skipped[:3])
        raise DataError(f"{dataset.name} has no usable image" + (f" ({reasons})" if reasons else ""))
    return tally, passed


def _key(judges: Sequence[Judge], views: Sequence[View], dataset: Dataset, crops: Crops) -> dict[str, str]:
    from pipeline.preprocess import preprocess_sha256

    nameless = [judge.name for judge in judges if not judge.identity]
    if nameless:
        raise ValueError(f"need an identity of every judge to resume, got none of {', '.join(nameless)}")
    seen = (f"{preprocess_sha256(view.spec)} in {view.color}" for view in views)
    return {
        "images": dataset.sha256,
        "preprocessing": ", ".join(seen),
        "crops": str(crops),
        **{f"graph or engine of {judge.name}": judge.identity for judge in judges},
    }


def _answers(
    judge: Judge,
    samples: Sequence[Sample],
    pixels: NDArray[np.uint8],
    crops: Crops,
    n_classes: int,
    batch_size: int,
) -> Answers:
    if crops == 1:
        logits = _checked(judge.logits(samples, pixels), judge.name, samples, crops, n_classes)
        return Answers(logits, logits)
    starts = range(0, len(pixels), batch_size)
    rows = [judge.logits(samples, pixels[start : start + batch_size]) for start in starts]
    logits = _checked(np.concatenate(rows), judge.name, samples, crops, n_classes)
    return Answers(_log_mean(probabilities(logits).reshape(len(samples), crops, n_classes), axis=1), logits)


def _together(answers: Sequence[Answers]) -> Answers:
    if len(answers) == 1:
        return answers[0]
    softmax = np.stack([probabilities(answer.scores) for answer in answers])
    return Answers(_log_mean(softmax, axis=0), np.concatenate([answer.logits for answer in answers]))


def _log_mean(softmax: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    return log_probabilities(softmax.mean(axis=axis))


def _checked(
    raw: NDArray[np.float32], name: str, samples: Sequence[Sample], crops: Crops, n_classes: int
) -> NDArray[np.float64]:
    expected = len(samples) * crops
    if raw.shape != (expected, n_classes):
        raise EngineError(
            f"{name} gives outputs of shape {list(raw.shape)} for {len(samples)} images, where {n_classes} labels "
            f"make [{expected}, {n_classes}]: the labels are not this model's"
        )
    logits = raw.astype(np.float64)
    broken = np.unique(np.flatnonzero(~np.isfinite(logits).all(axis=1)) // crops)
    if broken.size:
        raise EngineError(
            f"{name} gives NaN or infinite logits for {broken.size} of {len(samples)} images, first "
            f"{samples[int(broken[0])].key}: look for such values in the weights, or for empty ranges"
        )
    return logits
