"""Images as data, in one fixed order, and as batches for the network.

What cannot be decoded is skipped and listed, never replaced: a calibration on other pixels than the
user's would be a guess that looks like a measurement. The kinds of data are in modules of their own:
`image_folders`, `npz`, `video` and `synthetic`.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Literal, Protocol, TypeVar, cast, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from pipeline.artifacts import PreprocessSpec, Sample
from pipeline.contracts import Batches, Dataset
from pipeline.errors import DataError
from pipeline.preprocess import to_network_pixels

__all__ = [
    "DEFAULT_CALIBRATION_IMAGES",
    "MIN_CALIBRATION_IMAGES",
    "Skippable",
    "batches",
    "labelled_batches",
    "one_ahead",
    "open_dataset",
    "read_labels",
    "require_minimum",
    "samples_after",
]

MIN_CALIBRATION_IMAGES = 8
"""Below this, a range is an accident of the few images."""

DEFAULT_CALIBRATION_IMAGES = 128

_DEFAULT_SYNTHETIC_COUNT = 2000
_DEFAULT_VIDEO_FRAMES = 512
_Item = TypeVar("_Item")


@runtime_checkable
class Skippable(Protocol):
    """Data that can go on in the middle without decoding what comes before."""

    def after(self, n_usable: int, unusable: Collection[str]) -> Iterator[Sample]:
        """As `samples_after`."""
        ...


def open_dataset(
    spec: str,
    *,
    labels: Sequence[str] | None = None,
    num_classes: int | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> Dataset:
    """Open images by what the user typed.

    Args:
        spec: ``synthetic:SEED[:COUNT]``; an ``.npz`` with ``images`` (uint8, NHWC, RGB) and perhaps
            ``labels``; a video (512 frames or `limit`, evenly spaced, no labels); or a folder: with ``labels.csv``
            (column ``file``, and ``class_index`` or ``label`` or ``name``), with one folder a class,
            or flat (no labels).
        labels: the class names by index. Without them, names are sorted.
        num_classes: how many classes the model has whose labels these are; ``None`` where labels do
            not matter, as in calibration.
        limit: at most this many images, chosen by `seed`: the same ones on every machine, and the
            classes as equally as they allow.
        seed: which subset.

    Raises:
        DataError: nothing there, no images, a class without an index, a class count that is not the
            model's, or a malformed file.
    """
    if limit is not None and limit < 1:
        raise DataError(f"a limit of {limit} images leaves none; give at least 1")
    if labels is not None and num_classes is not None and len(labels) != num_classes:
        raise DataError(
            f"{len(labels)} labels were given, but the model has {num_classes} classes; give one name a class"
        )
    dataset = _open(spec, labels, num_classes, limit, seed)
    names = dataset.class_names
    if num_classes is not None and names is not None and len(names) != num_classes:
        raise DataError(
            f"{spec!r} has {len(names)} classes, but the model has {num_classes}: "
            "give the model's class names, in its order, with --labels FILE"
        )
    return dataset


def read_labels(path: Path) -> tuple[str, ...]:
    """Class names by index: one a line, or a JSON list.

    Raises:
        DataError: unreadable, empty, not a list of names, or a name twice.
    """
    try:
        text = path.read_text(encoding="utf-8-sig").strip()
        names = json.loads(text) if text.startswith("[") else text.splitlines()
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"cannot read the labels file {str(path)!r}: {error}") from error
    if not names or not all(isinstance(name, str) and name.strip() for name in names):
        raise DataError(
            f"the labels file {str(path)!r} must be one class name a line, none empty, or a JSON list of them"
        )
    labels = tuple(name.strip() for name in names)
    if len(set(labels)) != len(labels):
        twice = next(name for name in labels if labels.count(name) > 1)
        raise DataError(f"the labels file {str(path)!r} has {twice!r} twice; names must be distinct")
    return labels


def require_minimum(dataset: Dataset, minimum: int, usable: int | None = None) -> None:
    """Refuse data too few to work with.

    Args:
        dataset: the images.
        minimum: how many it takes.
        usable: how many a pass could decode; ``None`` before any: all candidates.

    Raises:
        DataError: fewer than `minimum`; names the first ones skipped, and why.
    """
    count = len(dataset) if usable is None else usable
    if count >= minimum:
        return
    skipped = list(dataset.skipped)
    reasons = "".join(f"\n  {key}: {reason}" for key, reason in skipped[:5])
    raise DataError(
        f"{dataset.name} has {count} usable images, and at least {minimum} are needed: add images"
        + (f"; {len(skipped)} were skipped:{reasons}" if skipped else "")
    )


def batches(
    dataset: Dataset,
    spec: PreprocessSpec,
    color: Literal["RGB", "BGR"],
    batch_size: int,
    minimum: int = 0,
) -> Batches:
    """Fresh, identical passes over `dataset` as the network takes it.

    Args:
        dataset: the images.
        spec: their preprocessing.
        color: the channel order the graph expects.
        batch_size: images a batch; the last may be short.
        minimum: usable images below which a pass raises `DataError`: at its start if there are too
            few candidates, at its end if too many were skipped.

    Returns:
        A callable; each call starts a pass of uint8 NHWC batches. One batch is decoded ahead.
    """

    def start() -> Iterator[NDArray[np.uint8]]:
        require_minimum(dataset, minimum)
        usable = 0
        for _, pixels in labelled_batches(dataset, spec, color, batch_size):
            usable += len(pixels)
            yield pixels
        require_minimum(dataset, minimum, usable)

    return start


def labelled_batches(
    dataset: Dataset, spec: PreprocessSpec, color: Literal["RGB", "BGR"], batch_size: int
) -> Iterator[tuple[list[Sample], NDArray[np.uint8]]]:
    """One pass over `dataset`: the samples of a batch and their pixels, uint8 NHWC in order `color`.

    Decoding and resizing run one batch ahead in a thread of their own (Pillow releases the GIL).

    Raises:
        DataError: as `pipeline.preprocess.to_network_pixels`.
    """

    def made() -> Iterator[tuple[list[Sample], NDArray[np.uint8]]]:
        samples: list[Sample] = []
        pixels: list[NDArray[np.uint8]] = []
        for sample in dataset:
            samples.append(sample)
            pixels.append(to_network_pixels(sample.image, "RGB", spec, color))
            if len(samples) == batch_size:
                yield samples, np.stack(pixels)
                samples, pixels = [], []
        if samples:
            yield samples, np.stack(pixels)

    return one_ahead(made())


def samples_after(dataset: Dataset, n_usable: int, unusable: Collection[str]) -> Iterator[Sample]:
    """The rest of a pass that was broken off.

    Args:
        dataset: the images, in their fixed order.
        n_usable: how many samples the pass had given.
        unusable: keys that it had found unreadable.

    Returns:
        The samples that follow. Folders and arrays skip to there; other data is gone through again.
    """
    if isinstance(dataset, Skippable):
        return dataset.after(n_usable, unusable)
    return islice(dataset, n_usable, None)


def one_ahead(items: Iterator[_Item]) -> Iterator[_Item]:
    """The same items, each made in a thread of its own while the one before it is used."""
    end = object()
    with ThreadPoolExecutor(1, thread_name_prefix="edgefold-decode") as pool:
        pending = pool.submit(next, items, end)
        while (item := pending.result()) is not end:
            pending = pool.submit(next, items, end)
            yield cast(_Item, item)


def _open(
    spec: str, labels: Sequence[str] | None, num_classes: int | None, limit: int | None, seed: int
) -> Dataset:
    # Each kind is imported when it is asked for: a stream of a camera needs none of them.
    if spec.startswith("synthetic:"):
        return _open_synthetic(spec, limit)
    path = Path(spec).expanduser()
    if path.is_dir():
        from pipeline.image_folders import open_folder

        return open_folder(path, labels, num_classes, limit, seed)
    if not path.is_file():
        raise DataError(
            f"no data at {spec!r}: give an image folder, a folder with labels.csv, an .npz file, a video or "
            "synthetic:SEED[:COUNT]"
        )
    if path.suffix.lower() == ".npz":
        from pipeline.npz import open_npz

        return open_npz(path, labels, num_classes, limit, seed)
    from pipeline.video import VIDEO_SUFFIXES, VideoDataset

    if path.suffix.lower() not in VIDEO_SUFFIXES:
        raise DataError(
            f"{spec!r} is a file, but neither an .npz nor a video ({', '.join(sorted(VIDEO_SUFFIXES))})"
        )
    return VideoDataset(path, limit or _DEFAULT_VIDEO_FRAMES)


def _open_synthetic(spec: str, limit: int | None) -> Dataset:
    from pipeline.synthetic import SyntheticDataset

    seed_text, colon, count_text = spec.removeprefix("synthetic:").partition(":")
    if not colon:
        count_text = str(_DEFAULT_SYNTHETIC_COUNT)
    if not (seed_text.isdecimal() and count_text.isdecimal() and int(count_text) > 0):
        raise DataError(f"{spec!r} is not synthetic:SEED[:COUNT] with a seed from 0 and a count from 1")
    # Any prefix of the synthetic camera's frames has its classes in balance: it is the subset.
    return SyntheticDataset(int(seed_text), min(int(count_text), limit or int(count_text)))
