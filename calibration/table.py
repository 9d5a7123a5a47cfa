"""Statistics on disk, calibration tables, and the refusal of either where it does not belong."""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
from pydantic import TypeAdapter, ValidationError

from calibration.collect import SAMPLES_PER_IMAGE
from calibration.observers import N_BINS, distribution
from calibration.ranges import METHOD_OPTIONS, METHODS
from pipeline.artifacts import CalibrationTable, ModelArtifact, TensorStatistics
from pipeline.errors import CalibrationError, IntegrityError
from pipeline.whole_files import whole_file

__all__ = [
    "StatisticsCache",
    "check_table",
    "derive_table",
    "method_options",
    "statistics_sha256",
    "table_from_json",
    "table_sha256",
    "table_to_json",
]

_FORMAT = 2
"""Of the cache file. Part of the key: older files are simply not found."""
_LOCK_TIMEOUT_S = 3600.0


_NO_TOOLS: Mapping[str, str] = MappingProxyType({})


def method_options(method: str) -> dict[str, float]:
    """Every constant that ranges by `method` depend on, those of the statistics included."""
    return {
        **METHOD_OPTIONS[method],
        "histogram_bins": N_BINS,
        "samples_per_image": SAMPLES_PER_IMAGE,
    }


def derive_table(
    statistics: TensorStatistics, method: str, tools: Mapping[str, str] = _NO_TOOLS
) -> CalibrationTable:
    """The range of every observed tensor by `method`; needs no further pass over the images.

    Args:
        statistics: of one pass.
        method: a key of `calibration.ranges.METHODS`.
        tools: name to version of what made the statistics.

    Raises:
        CalibrationError: a tensor has no usable statistics.
    """
    ranges = {}
    for name, histogram in statistics.histogram.items():
        try:
            seen = distribution(histogram, statistics.min[name], statistics.max[name])
            ranges[name] = METHODS[method](seen)
        except CalibrationError as error:
            raise CalibrationError(f"tensor {name!r}: {error}") from error
    return CalibrationTable(
        ranges=ranges,
        method=method,
        n_samples=statistics.n_samples,
        statistics_sha256=statistics_sha256(statistics),
        model_sha256=statistics.model_sha256,
        dataset_sha256=statistics.dataset_sha256,
        preprocess_sha256=statistics.preprocess_sha256,
        method_options=method_options(method),
        tools=dict(tools),
    )


def check_table(table: CalibrationTable, model: ModelArtifact) -> None:
    """Refuse a table that was made for another model.

    Raises:
        IntegrityError: names both digests.
    """
    if table.model_sha256 != model.sha256:
        raise IntegrityError(
            f"the calibration table is of model {table.model_sha256}, but {model.path} is {model.sha256}; "
            "calibrate this model"
        )


_TABLE = TypeAdapter(CalibrationTable)


def table_to_json(table: CalibrationTable) -> bytes:
    """``calibration.json`` of a bundle; the same table gives the same bytes."""
    return _TABLE.dump_json(table, indent=2) + b"\n"


def table_sha256(table: CalibrationTable) -> str:
    """SHA-256 (hex) of ``calibration.json``."""
    return hashlib.sha256(table_to_json(table)).hexdigest()


def table_from_json(data: bytes) -> CalibrationTable:
    """Read ``calibration.json``.

    Raises:
        IntegrityError: it is no calibration table; says where it deviates.
    """
    try:
        return _TABLE.validate_json(data)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, problem["loc"])) or "the document"
        raise IntegrityError(f"not a calibration table: {place}: {problem['msg']}") from error


def statistics_sha256(statistics: TensorStatistics) -> str:
    """Digest of everything that was seen and of what it was seen on."""
    digest = hashlib.sha256()
    for part in (statistics.model_sha256, statistics.dataset_sha256, statistics.preprocess_sha256):
        digest.update(part.encode() + b"\0")
    digest.update(str(statistics.n_samples).encode())
    for name in sorted(statistics.histogram):
        digest.update(name.encode() + b"\0")
        digest.update(np.array([statistics.min[name], statistics.max[name]], "<f8").tobytes())
        digest.update(np.ascontiguousarray(statistics.histogram[name], "<i8").tobytes())
    return digest.hexdigest()


class StatisticsCache:
    """Statistics kept by the content of model, data and preprocessing, the tools, and the tensors observed.

    A file that is damaged in any way, or that holds other digests than its name promises, counts as
    absent. Processes that want the same statistics wait for the first to gather them.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get_or_collect(
        self,
        model_sha256: str,
        dataset_sha256: str,
        preprocess_sha256: str,
        tensors: Sequence[str],
        collect: Callable[[], TensorStatistics],
        tools: Mapping[str, str] = _NO_TOOLS,
    ) -> tuple[TensorStatistics, bool]:
        """The cached statistics, or those `collect` gathers, which are then kept.

        Returns:
            The statistics, and whether they came from the cache.

        Raises:
            CalibrationError: the cache folder cannot be written.
        """
        from filelock import FileLock, Timeout

        digests = (model_sha256, dataset_sha256, preprocess_sha256, json.dumps(dict(tools), sort_keys=True))
        path = self._path(digests, tensors)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(path.with_suffix(".lock"), timeout=_LOCK_TIMEOUT_S)
            with lock:
                cached = _load(path, digests, tensors)
                if cached is not None:
                    return cached, True
                statistics = collect()
                _store(path, statistics, digests)
                return statistics, False
        except Timeout as error:
            raise CalibrationError(
                f"another process has held {error.lock_file} for {_LOCK_TIMEOUT_S:.0f} s; stop it or remove the lock"
            ) from error
        except OSError as error:
            raise CalibrationError(
                f"the calibration cache {self._folder} cannot be used: {error.strerror or error}; "
                "choose another folder or calibrate without a cache"
            ) from error

    def _path(self, digests: tuple[str, ...], tensors: Sequence[str]) -> Path:
        key = hashlib.sha256("\0".join((str(_FORMAT), *digests, *tensors)).encode()).hexdigest()
        return self._folder / f"statistics-{key[:32]}.npz"


def _store(path: Path, statistics: TensorStatistics, digests: tuple[str, ...]) -> None:
    names = list(statistics.histogram)
    # Histograms are mostly empty: position and count of what is not take a hundredth of the room.
    occupied = [np.flatnonzero(statistics.histogram[name]) for name in names]
    with whole_file(path) as file:
        np.savez(
            file,
            digests=np.array(digests),
            sha256=np.array(statistics_sha256(statistics)),
            n_samples=np.array(statistics.n_samples),
            names=np.array(names),
            min=np.array([statistics.min[name] for name in names], np.float64),
            max=np.array([statistics.max[name] for name in names], np.float64),
            sizes=np.array([len(bins) for bins in occupied]),
            bins=np.concatenate(occupied),
            counts=np.concatenate(
                [statistics.histogram[name][bins] for name, bins in zip(names, occupied, strict=True)]
            ),
        )


def _load(path: Path, digests: tuple[str, ...], tensors: Sequence[str]) -> TensorStatistics | None:
    """What `_store` wrote, or ``None`` if it is not exactly that."""
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            names = [str(name) for name in file["names"]]
            ends = np.cumsum(file["sizes"])
            bins, counts = file["bins"], file["counts"].astype(np.int64)
            histograms = {}
            for name, start, end in zip(names, ends - file["sizes"], ends, strict=True):
                histogram = np.zeros(N_BINS, np.int64)
                histogram[bins[start:end]] = counts[start:end]
                histograms[name] = histogram
            found = tuple(str(d) for d in file["digests"])
            model_sha256, dataset_sha256, preprocess_sha256, _ = found
            statistics = TensorStatistics(
                min=dict(zip(names, map(float, file["min"]), strict=True)),
                max=dict(zip(names, map(float, file["max"]), strict=True)),
                histogram=histograms,
                n_samples=int(file["n_samples"]),
                dataset_sha256=dataset_sha256,
                model_sha256=model_sha256,
                preprocess_sha256=preprocess_sha256,
            )
            promised = str(file["sha256"])
    except (OSError, ValueError, KeyError, IndexError, EOFError, zipfile.BadZipFile, zlib.error):
        return None
    if found != digests or names != list(tensors):
        return None
    return statistics if statistics_sha256(statistics) == promised else None
