"""Images as data: folders, CSV, npz, video and the synthetic camera, in one fixed order.

What cannot be decoded is skipped and listed, never replaced: a calibration on other pixels than the
user's would be a guess that looks like a measurement.
"""

from __future__ import annotations

import csv
import hashlib
import json
import zipfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Literal, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from pipeline.artifacts import PreprocessSpec, Sample
from pipeline.contracts import Batches, Dataset
from pipeline.errors import DataError
from pipeline.images import find_images, read_image, unsupported_images
from pipeline.preprocess import to_network_pixels

__all__ = [
    "MIN_CALIBRATION_IMAGES",
    "batches",
    "labelled_batches",
    "open_dataset",
    "read_labels",
    "require_minimum",
]

MIN_CALIBRATION_IMAGES = 8
"""Below this a range is an accident of the few images; 128 and more are usual."""

_DEFAULT_SYNTHETIC_COUNT = 2000
_VIDEO_SUFFIXES = frozenset({".mp4", ".avi", ".mkv", ".mov", ".webm", ".m4v", ".mpg", ".mpeg", ".ts"})
_DEFAULT_VIDEO_FRAMES = 512
_SPLIT_NAMES = frozenset({"train", "training", "val", "valid", "validation", "test", "testing"})
_CHUNK_BYTES = 1 << 20
_Item = TypeVar("_Item")


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
            ``labels``; a video (frames evenly spaced, no labels); or a folder: with ``labels.csv``
            (column ``file``, and ``class_index`` or ``label`` or ``name``), with one folder a class,
            or flat (no labels).
        labels: index to class name. Without it, names are sorted.
        num_classes: outputs of the model the labels are for; ``None`` where labels do not matter.
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
        raise DataError(f"{len(labels)} labels were given, but the model has {num_classes} classes")
    if spec.startswith("synthetic:"):
        dataset = _open_synthetic(spec, limit)
    else:
        path = Path(spec).expanduser()
        if path.is_dir():
            dataset = _open_folder(path, labels, limit, seed)
        elif not path.is_file():
            raise DataError(
                f"no data at {spec!r}: give an image folder, a folder with labels.csv, an .npz file, a video "
                "or synthetic:SEED[:COUNT]"
            )
        elif path.suffix.lower() == ".npz":
            dataset = _open_npz(path, labels, limit, seed)
        elif path.suffix.lower() in _VIDEO_SUFFIXES:
            dataset = _Video(path, limit or _DEFAULT_VIDEO_FRAMES)
        else:
            raise DataError(f"{spec!r} is neither a folder, an .npz file nor a video")
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
        text = path.read_text(encoding="utf-8-sig")
        names = json.loads(text) if text.lstrip().startswith("[") else text.strip().splitlines()
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"cannot read the labels file {str(path)!r}: {error}") from error
    if not all(isinstance(name, str) and name.strip() for name in names):
        raise DataError(f"the labels file {str(path)!r} must hold one name a line or a JSON list of names")
    labels = tuple(name.strip() for name in names)
    if not labels:
        raise DataError(f"the labels file {str(path)!r} is empty")
    if len(set(labels)) != len(labels):
        twice = next(name for name in labels if labels.count(name) > 1)
        raise DataError(f"the labels file {str(path)!r} has {twice!r} twice; names must be distinct")
    return labels


def require_minimum(dataset: Dataset, minimum: int, usable: int | None = None) -> None:
    """Refuse data too few to work with.

    Args:
        dataset: what was read.
        minimum: how many images it takes.
        usable: how many were decoded; by default all candidates less those skipped so far.

    Raises:
        DataError: fewer than `minimum`; names the first ones skipped, and why.
    """
    skipped = list(dataset.skipped)
    count = len(dataset) - len(skipped) if usable is None else usable
    if count >= minimum:
        return
    reasons = "".join(f"\n  {key}: {reason}" for key, reason in skipped[:5])
    raise DataError(
        f"{dataset.name} has {count} usable images, at least {minimum} are needed"
        + (f"; {len(skipped)} were skipped:{reasons}" if skipped else "; add images")
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
        minimum: usable images below which the pass ends in a `DataError`.

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

    Decoding and resizing run one batch ahead in a thread of their own (both release the GIL).

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

    return _one_ahead(made())


def _one_ahead(items: Iterator[_Item]) -> Iterator[_Item]:
    end = object()
    with ThreadPoolExecutor(1, thread_name_prefix="edgefold-decode") as pool:
        pending = pool.submit(next, items, end)
        while (item := pending.result()) is not end:
            pending = pool.submit(next, items, end)
            yield cast(_Item, item)


class _Skipping:
    """Keeps the reason for every image left out, once."""

    def __init__(self, skipped: Mapping[str, str] | None = None) -> None:
        self._skipped = dict(skipped or {})

    @property
    def skipped(self) -> Sequence[tuple[str, str]]:
        return tuple(self._skipped.items())


@dataclass(frozen=True, slots=True)
class _Entry:
    key: str
    label: int | None
    path: Path


class _ImageFiles(_Skipping):
    """Image files with or without labels."""

    def __init__(
        self,
        name: str,
        entries: Sequence[_Entry],
        class_names: tuple[str, ...] | None,
        skipped: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(skipped)
        self._n_not_candidates = len(self._skipped)
        self._entries = tuple(entries)
        self.name = name
        self.class_names = class_names

    @cached_property
    def sha256(self) -> str:
        digest = hashlib.sha256()
        for entry in self._entries:
            digest.update(f"{_file_sha256(entry.path)} {entry.label}\n".encode())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self._entries) + self._n_not_candidates

    def __iter__(self) -> Iterator[Sample]:
        for entry in self._entries:
            try:
                image = read_image(entry.path)
            except DataError as error:
                self._skipped[entry.key] = str(error)
                continue
            yield Sample(image, entry.label, entry.key)


class _Npz(_Skipping):
    """The arrays of an ``.npz``, read as a stream: memory does not grow with the number of images."""

    def __init__(
        self,
        path: Path,
        indices: Sequence[int],
        labels: NDArray[np.int64] | None,
        class_names: tuple[str, ...] | None,
    ) -> None:
        super().__init__()
        self._path = path
        self._indices = tuple(indices)
        self._labels = labels
        self.name = path.name
        self.class_names = class_names

    @cached_property
    def sha256(self) -> str:
        digest = hashlib.sha256(_file_sha256(self._path).encode())
        digest.update(",".join(map(str, self._indices)).encode())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self._indices)

    def __iter__(self) -> Iterator[Sample]:
        with zipfile.ZipFile(self._path) as archive, archive.open("images.npy") as stream:
            _, height, width, channels = _npy_header(stream, self._path, "images").shape
            size = height * width * channels
            position = 0
            for index in self._indices:
                stream.seek((index - position) * size, 1)
                data = stream.read(size)
                position = index + 1
                if len(data) != size:
                    raise DataError(
                        f"{str(self._path)!r} ends in the middle of image {index}; write it again"
                    )
                image = np.frombuffer(data, np.uint8).reshape(height, width, channels).copy()
                yield Sample(image, None if self._labels is None else int(self._labels[index]), str(index))


class _Video(_Skipping):
    """Frames of a video, evenly spaced over its length."""

    def __init__(self, path: Path, count: int) -> None:
        super().__init__()
        self._path = path
        self.name = path.name
        self.class_names: tuple[str, ...] | None = None
        n_frames = self._count_frames()
        self._wanted = tuple(sorted({(2 * i + 1) * n_frames // (2 * count) for i in range(count)}))

    @cached_property
    def sha256(self) -> str:
        digest = hashlib.sha256(_file_sha256(self._path).encode())
        digest.update(",".join(map(str, self._wanted)).encode())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self._wanted)

    def __iter__(self) -> Iterator[Sample]:
        capture = self._open()
        try:
            wanted = set(self._wanted)
            for index in range(max(wanted) + 1):
                # Grabbing every frame in order: seeking lands on key frames, and not on the same ones
                # with every back-end.
                if not capture.grab():
                    break
                if index in wanted:
                    ok, image = capture.retrieve()
                    if not ok or image is None or image.ndim != 3:
                        self._skipped[f"frame {index}"] = "could not be decoded"
                        continue
                    wanted.discard(index)
                    yield Sample(np.ascontiguousarray(image[:, :, ::-1]), None, f"frame {index}")
            for index in sorted(wanted):
                self._skipped.setdefault(f"frame {index}", "the video ended before it")
        finally:
            capture.release()

    def _open(self) -> Any:
        try:
            import cv2
        except ImportError as error:
            raise DataError(
                f"reading the video {str(self._path)!r} needs OpenCV: pip install 'edgefold[opencv]', or the "
                "system's python3-opencv"
            ) from error
        capture = cv2.VideoCapture(str(self._path))
        if not capture.isOpened():
            raise DataError(
                f"OpenCV cannot open the video {str(self._path)!r}; is it complete, and its codec known?"
            )
        return capture

    def _count_frames(self) -> int:
        """By going through it: the container's own count is a guess for many formats."""
        capture = self._open()
        try:
            n_frames = 0
            while capture.grab():
                n_frames += 1
        finally:
            capture.release()
        if n_frames == 0:
            raise DataError(f"the video {str(self._path)!r} has no frame that can be decoded")
        return n_frames


def _open_synthetic(spec: str, limit: int | None) -> Dataset:
    from pipeline.synthetic import SyntheticDataset

    seed_text, _, count_text = spec.removeprefix("synthetic:").partition(":")
    if not seed_text.isdecimal() or not (count_text or "1").isdecimal() or count_text == "0":
        raise DataError(f"{spec!r} is not synthetic:SEED[:COUNT] with a seed from 0 and a count from 1")
    count = int(count_text) if count_text else _DEFAULT_SYNTHETIC_COUNT
    # Any prefix of the synthetic camera's frames has its classes in balance: it is the subset.
    return SyntheticDataset(int(seed_text), count if limit is None else min(count, limit))


def _open_folder(path: Path, labels: Sequence[str] | None, limit: int | None, seed: int) -> Dataset:
    table = path / "labels.csv"
    if table.is_file():
        return _open_csv(path, table, labels, limit, seed)
    images = find_images(path)
    skipped = {
        file.relative_to(path).as_posix(): f"{file.suffix} files are not supported; convert to JPEG or PNG"
        for file in unsupported_images(path)
    }
    if not images:
        raise DataError(
            f"no images in {str(path)!r}" + (f"; {len(skipped)} of unsupported types" if skipped else "")
        )
    by_class: dict[str, list[Path]] = defaultdict(list)
    for image in images:
        parts = image.relative_to(path).parts
        by_class[parts[0] if len(parts) > 1 else ""].append(image)
    if list(by_class) == [""]:
        entries = [_Entry(image.name, None, image) for image in images]
        return _ImageFiles(path.name, _subset(entries, limit, seed), None, skipped)
    for image in by_class.pop("", []):
        skipped[image.name] = "beside the class folders, so of no class"
    if set(by_class) <= _SPLIT_NAMES:
        raise DataError(
            f"{str(path)!r} holds the folders {', '.join(sorted(by_class))}, which look like parts of a data "
            f"set, not classes: give one of them, such as {str(path / min(by_class))!r}"
        )
    names = _index_names(sorted(by_class), labels, f"the class folders of {str(path)!r}")
    index = {name: position for position, name in enumerate(names)}
    entries = [
        _Entry(image.relative_to(path).as_posix(), index[name], image)
        for name in sorted(by_class)
        for image in by_class[name]
    ]
    return _ImageFiles(path.name, _subset(entries, limit, seed), names, skipped)


def _open_csv(
    folder: Path, table: Path, labels: Sequence[str] | None, limit: int | None, seed: int
) -> Dataset:
    try:
        with table.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            columns = reader.fieldnames or []
            rows = list(reader)
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"cannot read {str(table)!r}: {error}") from error
    name_column = next((column for column in ("label", "name") if column in columns), None)
    if "file" not in columns or (name_column is None and "class_index" not in columns):
        raise DataError(
            f"{str(table)!r} has the columns {', '.join(columns)}; it needs `file`, and `class_index`, `label` "
            "or `name`"
        )
    if not rows:
        raise DataError(f"{str(table)!r} lists no images")
    root = folder.resolve()
    for number, row in enumerate(rows, 2):
        if not row["file"] or not (folder / row["file"]).resolve().is_relative_to(root):
            raise DataError(
                f"{str(table)!r} line {number}: {row['file']!r} is not a file below {str(folder)!r}"
            )
    if "class_index" in columns:
        indices, names = _csv_indices(rows, name_column, labels, table)
    else:
        given = [row[cast(str, name_column)] or "" for row in rows]
        names = _index_names(sorted(set(given)), labels, f"the labels of {str(table)!r}")
        position = {name: index for index, name in enumerate(names)}
        indices = [position[name] for name in given]
    entries = [
        _Entry(row["file"], index, folder / row["file"]) for row, index in zip(rows, indices, strict=True)
    ]
    missing = {entry.key: "no such file" for entry in entries if not entry.path.is_file()}
    entries = [entry for entry in entries if entry.key not in missing]
    if not entries:
        raise DataError(f"none of the {len(rows)} files that {str(table)!r} lists is there")
    return _ImageFiles(folder.name, _subset(entries, limit, seed), names, missing)


def _csv_indices(
    rows: Sequence[Mapping[str, str]], name_column: str | None, labels: Sequence[str] | None, table: Path
) -> tuple[list[int], tuple[str, ...]]:
    indices = []
    for number, row in enumerate(rows, 2):
        if not (row["class_index"] or "").isdecimal():
            raise DataError(
                f"{str(table)!r} line {number}: class_index {row['class_index']!r} is not a number from 0"
            )
        indices.append(int(row["class_index"]))
    if labels is not None:
        if max(indices) >= len(labels):
            raise DataError(
                f"{str(table)!r} has class_index {max(indices)}, but there are {len(labels)} labels"
            )
        return indices, tuple(labels)
    # Indices without an image keep their place: the number is the name.
    names = {index: row[name_column] for index, row in zip(indices, rows, strict=True)} if name_column else {}
    return indices, tuple(names.get(index, str(index)) for index in range(max(indices) + 1))


def _open_npz(path: Path, labels: Sequence[str] | None, limit: int | None, seed: int) -> Dataset:
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: info for info in archive.infolist()}
            if "images.npy" not in members:
                raise DataError(
                    f"{str(path)!r} has no array `images`; it has {', '.join(sorted(members)) or 'none'}"
                )
            with archive.open("images.npy") as stream:
                images = _npy_header(stream, path, "images")
            n_bytes = int(np.prod(images.shape, dtype=np.int64)) * images.dtype.itemsize
            if (
                images.dtype != np.uint8
                or len(images.shape) != 4
                or images.shape[3] != 3
                or images.fortran_order
            ):
                raise DataError(
                    f"`images` in {str(path)!r} is {images.dtype} of shape {images.shape}; it must be uint8, "
                    "NHWC in C order, RGB"
                )
            if members["images.npy"].file_size < n_bytes or n_bytes == 0:
                raise DataError(f"`images` in {str(path)!r} is shorter than its header says, or empty")
        with np.load(path, allow_pickle=False) as arrays:
            truth = np.asarray(arrays["labels"]) if "labels.npy" in members else None
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"cannot read {str(path)!r}: {error}") from error
    n_images = images.shape[0]
    names: tuple[str, ...] | None = None
    if truth is not None:
        if truth.shape != (n_images,) or truth.dtype.kind not in "iu" or truth.min() < 0:
            raise DataError(
                f"`labels` in {str(path)!r} is {truth.dtype} of shape {truth.shape}; it must be {n_images} class "
                "indices from 0"
            )
        truth = truth.astype(np.int64)
        highest = int(truth.max())
        if labels is not None and highest >= len(labels):
            raise DataError(f"{str(path)!r} has label {highest}, but there are {len(labels)} labels")
        names = tuple(labels) if labels is not None else tuple(str(index) for index in range(highest + 1))
    entries = [_Entry(str(i), None if truth is None else int(truth[i]), path) for i in range(n_images)]
    chosen = [int(entry.key) for entry in _subset(entries, limit, seed)]
    return _Npz(path, chosen, truth, names)


@dataclass(frozen=True, slots=True)
class _ArrayHeader:
    shape: tuple[int, ...]
    fortran_order: bool
    dtype: np.dtype[Any]


def _npy_header(stream: IO[bytes], path: Path, name: str) -> _ArrayHeader:
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        return _ArrayHeader(*np.lib.format.read_array_header_1_0(stream))
    if version == (2, 0):
        return _ArrayHeader(*np.lib.format.read_array_header_2_0(stream))
    raise DataError(f"`{name}` in {str(path)!r} has the npy format {version}; save it with numpy.savez again")


def _index_names(found: Sequence[str], labels: Sequence[str] | None, what: str) -> tuple[str, ...]:
    """The class names by index: `labels` where given, and then every name found must be among them."""
    if labels is None:
        return tuple(found)
    unknown = [name for name in found if name not in set(labels)]
    if unknown:
        raise DataError(
            f"{what} are {len(found)}, the labels {len(labels)}; {len(unknown)} have no label of their name, first "
            f"{unknown[0]!r}: name the folders as the labels, or give labels.csv with file,class_index"
        )
    return tuple(labels)


def _subset(entries: list[_Entry], limit: int | None, seed: int) -> list[_Entry]:
    """At most `limit` entries, in their order: class by class in turn, each by a seeded rank.

    The rank is a hash of seed and key: no generator whose stream could change, and a file added moves
    at most one other.
    """
    if limit is None or limit >= len(entries):
        return entries
    ranked = sorted(entries, key=lambda entry: hashlib.sha256(f"{seed}:{entry.key}".encode()).digest())
    turns: dict[int | None, int] = defaultdict(int)
    order: list[tuple[int, int, _Entry]] = []
    for rank, entry in enumerate(ranked):
        order.append((turns[entry.label], rank, entry))
        turns[entry.label] += 1
    chosen = {entry.key for _, _, entry in sorted(order, key=lambda item: item[:2])[:limit]}
    return [entry for entry in entries if entry.key in chosen]


def _file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
