"""Training pixels: a dataset decoded once, kept as a memory-mapped array, augmented in batches.

The array lies on disk, so memory does not grow with the number of images, and later epochs and later
runs decode nothing.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.artifacts import PreprocessSpec
from pipeline.contracts import Dataset, Progress
from pipeline.errors import DataError
from pipeline.preprocess import preprocess_sha256, to_network_pixels

__all__ = [
    "Augmentation",
    "PixelTable",
    "augmented_batches",
    "class_count",
    "materialize",
    "mirrored_images",
    "split",
]


@dataclass(frozen=True, slots=True)
class PixelTable:
    """``pixels`` uint8 [n, H, W, 3] in the spec's channel order and ``labels`` int64 [n]."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]

    def subset(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """The pixels and labels at `indices`, copied into memory."""
        return self.pixels[indices], self.labels[indices]


@dataclass(frozen=True, slots=True)
class Augmentation:
    """What is varied from epoch to epoch.

    Attributes:
        flip: mirror half of the images in one epoch, the other half in the next (arXiv 2404.00498, section
            3.6); not for classes that a mirror turns into one another.
        shift_px: translate by up to this many pixels, the border reflected.
        cutout_px: side of a square set to the mean (arXiv 1708.04552); 0 for none.
    """

    flip: bool = True
    shift_px: int = 4
    cutout_px: int = 0


def class_count(dataset: Dataset) -> int:
    """How many classes `dataset` has.

    Raises:
        DataError: it has no labels.
    """
    return len(_class_names(dataset))


def _class_names(dataset: Dataset) -> tuple[str, ...]:
    if dataset.class_names is None:
        raise DataError(f"{dataset.name} has no labels; training needs a folder by class or labels.csv")
    return tuple(dataset.class_names)


def materialize(dataset: Dataset, spec: PreprocessSpec, cache_dir: Path, progress: Progress) -> PixelTable:
    """Decode `dataset` to the network's input size, once per content and preprocessing.

    Raises:
        DataError: the dataset has no labels, or none of its images could be read.
    """
    names = _class_names(dataset)
    digest = hashlib.sha256(f"{dataset.sha256}:{preprocess_sha256(spec)}".encode()).hexdigest()[:24]
    pixel_path, label_path = cache_dir / f"{digest}.npy", cache_dir / f"{digest}.labels.npy"
    if not label_path.exists():
        cache_dir.mkdir(parents=True, exist_ok=True)
        _decode(dataset, spec, pixel_path, label_path, progress)
    labels: NDArray[np.int64] = np.load(label_path)
    pixels = np.load(pixel_path, mmap_mode="r")[: len(labels)]
    return PixelTable(pixels, labels, names)


def _decode(
    dataset: Dataset, spec: PreprocessSpec, pixel_path: Path, label_path: Path, progress: Progress
) -> None:
    partial = pixel_path.with_suffix(f".{os.getpid()}.partial")
    total = len(dataset)
    shape = (total, *spec.input_hw, 3)
    table = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=shape)
    labels: list[int] = []
    try:
        for sample in dataset:
            if sample.label is None:
                continue
            table[len(labels)] = to_network_pixels(sample.image, "RGB", spec, spec.color)
            labels.append(sample.label)
            if len(labels) % 64 == 0:
                progress("decode", len(labels), total)
        if not labels:
            raise DataError(f"{dataset.name}: none of {total} images could be read")
        table.flush()
        partial.replace(pixel_path)
    finally:
        partial.unlink(missing_ok=True)
    # Written last: its presence says that the pixels are complete.
    np.save(label_path, np.array(labels, np.int64))
    progress("decode", len(labels), len(labels))


def split(labels: NDArray[np.int64], holdout: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices to train on and `holdout` indices to watch, the same share of every class.

    Raises:
        DataError: `holdout` leaves nothing to train on.
    """
    if holdout >= len(labels):
        raise DataError(f"--holdout {holdout} leaves nothing of {len(labels)} images to train on")
    order = np.random.default_rng(seed).permutation(len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    picks = (
        np.linspace(0, len(labels) - 1, holdout).round().astype(np.int64)
        if holdout
        else np.empty(0, np.int64)
    )
    held = np.unique(by_class[picks])
    return np.setdiff1d(np.arange(len(labels)), held), held


def augmented_batches(
    table: PixelTable,
    indices: NDArray[np.int64],
    batch_size: int,
    augmentation: Augmentation,
    rng: np.random.Generator,
    mirrored: NDArray[np.bool_],
) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64]]]:
    """One shuffled epoch over `indices` in full batches; a last short one is left out.

    Pixels, labels and indices of each batch.

    Args:
        mirrored: of every image of `table`, whether this epoch shows it mirrored.
    """
    order = rng.permutation(indices)
    for start in range(0, len(order) - batch_size + 1, batch_size):
        # Sorted: neighbouring reads of the memory map. The batch's own order does not matter.
        batch = np.sort(order[start : start + batch_size])
        pixels, labels = table.subset(batch)
        yield _augment(pixels, augmentation, rng, mirrored[batch]), labels, batch


def mirrored_images(count: int, augmentation: Augmentation, seed: int, epoch: int) -> NDArray[np.bool_]:
    """Which of `count` images `epoch` shows mirrored: a random half, the other half an epoch later."""
    if not augmentation.flip:
        return np.zeros(count, np.bool_)
    half: NDArray[np.bool_] = np.random.default_rng(seed).random(count) < 0.5
    return half ^ bool(epoch % 2)


def _augment(
    pixels: NDArray[np.uint8],
    augmentation: Augmentation,
    rng: np.random.Generator,
    mirrored: NDArray[np.bool_],
) -> NDArray[np.uint8]:
    n, height, width, _ = pixels.shape
    shift, hole = augmentation.shift_px, augmentation.cutout_px
    padded = (
        np.pad(pixels, ((0, 0), (shift, shift), (shift, shift), (0, 0)), mode="reflect") if shift else pixels
    )
    tops, lefts = rng.integers(0, 2 * shift + 1, (2, n))
    holes = rng.integers(0, (height, width), (n, 2)) - hole // 2
    out = np.empty_like(pixels)
    for i in range(n):
        image = padded[i, tops[i] : tops[i] + height, lefts[i] : lefts[i] + width]
        out[i] = image[:, ::-1] if mirrored[i] else image
        if hole:
            top, left = np.maximum(holes[i], 0)
            bottom, right = holes[i] + hole
            out[i, top:bottom, left:right] = 128
    return out
