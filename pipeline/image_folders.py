"""Folders of image files as data sets: by class, with a labels.csv, or flat."""

from __future__ import annotations

import csv
import hashlib
import os
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

from pipeline.artifacts import Sample
from pipeline.digest import file_sha256
from pipeline.errors import DataError
from pipeline.images import find_images, find_unsupported_images, read_image
from pipeline.subsets import stratified_subset

__all__ = ["ImageFolder", "open_folder"]

_LABELS_FILE = "labels.csv"
_SPLIT_NAMES = frozenset({"train", "training", "val", "valid", "validation", "test", "testing"})


@dataclass(frozen=True, slots=True)
class _Entry:
    path: Path
    key: str
    label: int | None = None


class ImageFolder:
    """Image files as a `pipeline.contracts.Dataset`; opened by `open_folder`."""

    def __init__(
        self,
        name: str,
        entries: Sequence[_Entry],
        class_names: tuple[str, ...] | None,
        skipped: Mapping[str, str],
    ) -> None:
        self.name = name
        self.class_names = class_names
        self._entries = tuple(entries)
        self._skipped = dict(skipped)

    @property
    def skipped(self) -> Sequence[tuple[str, str]]:
        """What the folder's listing left out, and what the passes so far could not decode."""
        return tuple(self._skipped.items())

    @cached_property
    def sha256(self) -> str:
        """Digest of the files' bytes and their labels, in order. Reads every file, once."""
        digest = hashlib.sha256()
        for entry in self._entries:
            try:
                content = file_sha256(entry.path)
            except OSError as error:
                content = f"unreadable: {error.strerror}"
            digest.update(f"{content} {entry.label}\n".encode())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Sample]:
        return self._read(self._entries)

    def after(self, n_usable: int, unusable: Collection[str]) -> Iterator[Sample]:
        """As `pipeline.datasets.samples_after`; nothing before it is decoded."""
        usable = (i for i, entry in enumerate(self._entries) if entry.key not in unusable)
        last = next(islice(usable, n_usable - 1, None), len(self._entries)) if n_usable else -1
        return self._read(self._entries[last + 1 :])

    def _read(self, entries: Sequence[_Entry]) -> Iterator[Sample]:
        for entry in entries:
            try:
                image = read_image(entry.path)
            except DataError as error:
                self._skipped[entry.key] = str(error)
                continue
            yield Sample(image, entry.label, entry.key)


def open_folder(
    folder: Path, labels: Sequence[str] | None, num_classes: int | None, limit: int | None, seed: int
) -> ImageFolder:
    """Open a folder; the arguments are those of `pipeline.datasets.open_dataset`."""
    if (folder / _LABELS_FILE).is_file():
        entries, names, skipped = _read_csv(folder, labels, num_classes)
    else:
        entries, names, skipped = _list_files(folder, labels)
    chosen = stratified_subset(
        [entry.key for entry in entries], [entry.label for entry in entries], limit, seed
    )
    return ImageFolder(folder.resolve().name, [entries[i] for i in chosen], names, skipped)


_Listing = tuple[list[_Entry], tuple[str, ...] | None, dict[str, str]]


def _list_files(folder: Path, labels: Sequence[str] | None) -> _Listing:
    skipped = {
        file.relative_to(folder).as_posix(): f"{file.suffix} is not supported; convert it to JPEG or PNG"
        for file in find_unsupported_images(folder)
    }
    images = find_images(folder)
    if not images:
        raise DataError(
            f"no images in {str(folder)!r}"
            + (f"; its {len(skipped)} images are of types not supported" if skipped else "")
        )
    by_class: dict[str, list[Path]] = defaultdict(list)
    for image in images:
        parts = image.relative_to(folder).parts
        by_class[parts[0] if len(parts) > 1 else ""].append(image)
    if set(by_class) == {""}:
        return [_Entry(image, image.name) for image in images], None, skipped
    for image in by_class.pop("", []):
        skipped[image.name] = "lies beside the class folders, so it has no class"
    if set(by_class) <= _SPLIT_NAMES:
        raise DataError(
            f"{str(folder)!r} holds {', '.join(sorted(by_class))}: the parts of a data set, not its classes; "
            f"give one of them, such as {str(folder / min(by_class))!r}"
        )
    names = _index_names(sorted(by_class), labels, f"class folders in {str(folder)!r}")
    entries = [
        _Entry(image, image.relative_to(folder).as_posix(), names.index(name))
        for name in sorted(by_class)
        for image in by_class[name]
    ]
    return entries, names, skipped


def _read_csv(folder: Path, labels: Sequence[str] | None, num_classes: int | None) -> _Listing:
    table = folder / _LABELS_FILE
    try:
        with table.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream, restval="")
            columns = list(reader.fieldnames or ())
            rows = list(reader)
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"cannot read {str(table)!r}: {error}") from error
    name_column = next((column for column in ("label", "name") if column in columns), None)
    if "file" not in columns or (name_column is None and "class_index" not in columns):
        raise DataError(
            f"{str(table)!r} has the columns {', '.join(columns) or 'none'}; it needs `file`, and "
            "`class_index`, `label` or `name`"
        )
    if not rows:
        raise DataError(f"{str(table)!r} lists no images")
    if "class_index" in columns:
        indices, names = _read_indices(rows, name_column, labels, num_classes, table)
    else:
        given = [row[name_column] for row in rows] if name_column else []
        names = _index_names(sorted(set(given)), labels, f"class names in {str(table)!r}")
        position = {name: index for index, name in enumerate(names)}
        indices = [position[name] for name in given]
    entries = []
    missing = {}
    for number, (row, index) in enumerate(zip(rows, indices, strict=True), start=2):
        key = os.path.normpath(row["file"])
        if not row["file"] or key.startswith("..") or Path(key).is_absolute():
            raise DataError(
                f"{str(table)!r} line {number}: {row['file']!r} is no file name below {str(folder)!r}"
            )
        if (folder / key).is_file():
            entries.append(_Entry(folder / key, key, index))
        else:
            missing[key] = "no such file"
    if not entries:
        raise DataError(f"none of the {len(rows)} files listed in {str(table)!r} is there")
    return entries, names, missing


def _read_indices(
    rows: Sequence[Mapping[str, str]],
    name_column: str | None,
    labels: Sequence[str] | None,
    num_classes: int | None,
    table: Path,
) -> tuple[list[int], tuple[str, ...]]:
    indices = []
    for number, row in enumerate(rows, start=2):
        if not row["class_index"].isdecimal():
            raise DataError(
                f"{str(table)!r} line {number}: class_index {row['class_index']!r} is no number from 0"
            )
        indices.append(int(row["class_index"]))
    highest = max(indices)
    n_classes = len(labels) if labels is not None else num_classes
    if n_classes is not None and highest >= n_classes:
        raise DataError(
            f"{str(table)!r} has class_index {highest}, but there are {n_classes} classes: "
            "it belongs to another model"
        )
    if labels is not None:
        return indices, tuple(labels)
    named = {index: row[name_column] for index, row in zip(indices, rows, strict=True)} if name_column else {}
    # A class without an image is called by its number.
    return indices, tuple(named.get(i, str(i)) for i in range(n_classes or highest + 1))


def _index_names(found: Sequence[str], labels: Sequence[str] | None, what: str) -> tuple[str, ...]:
    """The class names by index: `labels` if given, and then all that were found must be among them."""
    if labels is None:
        return tuple(found)
    known = set(labels)
    unknown = [name for name in found if name not in known]
    if unknown:
        raise DataError(
            f"{len(unknown)} of the {len(found)} {what} are not among the {len(labels)} labels, first "
            f"{unknown[0]!r}: name them as the labels are, or add a labels.csv with file,class_index"
        )
    return tuple(labels)
