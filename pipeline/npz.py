"""An ``.npz`` of images as a data set, streamed: memory does not grow with their number."""

from __future__ import annotations

import hashlib
import math
import zipfile
import zlib
from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.artifacts import Sample
from pipeline.digest import file_sha256
from pipeline.errors import DataError
from pipeline.subsets import stratified_subset

__all__ = ["NpzDataset", "open_npz"]

# What zipfile and NumPy raise on a damaged, encrypted or foreign archive.
_READ_FAULTS = (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)
_MAX_HEADER_BYTES = 1 << 16
_MAX_DEFLATE_RATIO = 1032  # zlib's technical notes


class NpzDataset:
    """``images`` (uint8, NHWC, RGB) and perhaps ``labels`` as a `pipeline.contracts.Dataset`."""

    skipped: Sequence[tuple[str, str]] = ()
    """Always empty: an array has no image that cannot be decoded."""

    def __init__(
        self,
        path: Path,
        image_shape: tuple[int, ...],
        indices: Sequence[int],
        labels: NDArray[np.int64] | None,
        class_names: tuple[str, ...] | None,
    ) -> None:
        self.name = path.name
        self.class_names = class_names
        self._path = path
        self._image_shape = image_shape
        self._indices = tuple(indices)
        self._labels = labels

    @cached_property
    def sha256(self) -> str:
        """Digest of the file and of which images were chosen from it."""
        chosen = ",".join(map(str, self._indices))
        return hashlib.sha256(f"{file_sha256(self._path)} {chosen}".encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._indices)

    def __iter__(self) -> Iterator[Sample]:
        return self.after(0, ())

    def after(self, n_usable: int, unusable: Collection[str]) -> Iterator[Sample]:
        """As `pipeline.datasets.samples_after`; an array has no unusable images."""
        for index, data in self._read(self._indices[n_usable:]):
            image = np.frombuffer(data, np.uint8).reshape(self._image_shape)
            label = None if self._labels is None else int(self._labels[index])
            yield Sample(image, label, str(index))

    def _read(self, indices: Sequence[int]) -> Iterator[tuple[int, bytes]]:
        size_bytes = math.prod(self._image_shape)
        try:
            with zipfile.ZipFile(self._path) as archive, archive.open("images.npy") as stream:
                _read_header(stream)
                position = 0
                for index in indices:
                    stream.seek((index - position) * size_bytes, 1)
                    data = stream.read(size_bytes)
                    position = index + 1
                    if len(data) != size_bytes:
                        raise EOFError(f"image {index} is cut off")
                    yield index, data
        except _READ_FAULTS as error:
            raise DataError(f"cannot read {str(self._path)!r}: {error}; write it again") from error


def open_npz(
    path: Path, labels: Sequence[str] | None, num_classes: int | None, limit: int | None, seed: int
) -> NpzDataset:
    """Open an archive; the arguments are those of `pipeline.datasets.open_dataset`."""
    try:
        with zipfile.ZipFile(path) as archive:
            shape = _image_array_shape(archive, path)
            truth = _read_truth(archive, path, shape[0])
    except _READ_FAULTS as error:
        raise DataError(f"cannot read {str(path)!r}: {error}; write it with numpy.savez") from error
    names: tuple[str, ...] | None = None
    per_image: list[int | None] = [None] * shape[0]
    if truth is not None:
        highest = int(truth.max())
        n_classes = len(labels) if labels is not None else num_classes
        if n_classes is not None and highest >= n_classes:
            raise DataError(f"{str(path)!r} has label {highest}, but there are {n_classes} classes")
        numbers = (str(i) for i in range(n_classes or highest + 1))
        names = tuple(labels if labels is not None else numbers)
        per_image = [int(label) for label in truth]
    chosen = stratified_subset([str(i) for i in range(shape[0])], per_image, limit, seed)
    return NpzDataset(path, shape[1:], chosen, truth, names)


def _image_array_shape(archive: zipfile.ZipFile, path: Path) -> tuple[int, ...]:
    if "images.npy" not in archive.namelist():
        held = ", ".join(sorted(name.removesuffix(".npy") for name in archive.namelist())) or "nothing"
        raise DataError(f"{str(path)!r} has no array `images`; it holds {held}")
    with archive.open("images.npy") as stream:
        shape, fortran_order, dtype = _read_header(stream)
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran_order or min(shape) < 1:
        order = " in Fortran order" if fortran_order else ""
        raise DataError(
            f"`images` in {str(path)!r} is {dtype} of shape {shape}{order}; it must be uint8, N×H×W×3, "
            "in C order"
        )
    # The header and the directory may both lie, but deflate shrinks nothing further than this.
    held_bytes = min(archive.getinfo("images.npy").file_size, path.stat().st_size * _MAX_DEFLATE_RATIO)
    if held_bytes < math.prod(shape):
        raise DataError(f"`images` in {str(path)!r} is shorter than its header says: {shape}; write it again")
    return shape


def _read_truth(archive: zipfile.ZipFile, path: Path, n_images: int) -> NDArray[np.int64] | None:
    if "labels.npy" not in archive.namelist():
        return None
    # As long as one wide integer an image: what claims more is not read into memory.
    if archive.getinfo("labels.npy").file_size > n_images * 8 + _MAX_HEADER_BYTES:
        raise DataError(f"`labels` in {str(path)!r} is larger than {n_images} class indices can be")
    with archive.open("labels.npy") as stream:
        truth = np.lib.format.read_array(stream, allow_pickle=False)
    if truth.shape != (n_images,) or truth.dtype.kind not in "iu" or truth.min() < 0:
        raise DataError(
            f"`labels` in {str(path)!r} is {truth.dtype} of shape {truth.shape}; it must be {n_images} class "
            "indices from 0"
        )
    return np.asarray(truth, np.int64)


def _read_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, Fortran order and dtype; the stream is left at the first element."""
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(stream)
    raise ValueError(f"npy format {version} is not one of (1, 0) and (2, 0)")
