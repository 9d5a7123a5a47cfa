"""Where a build's ranges come from: a quantizer with images, or the table of an earlier build."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from apps.console import console
from apps.publishing import BuildRequest, calibration_tools
from pipeline.bundle import open_bundle
from pipeline.compile import Calibration
from pipeline.errors import DataError, UsageError

if TYPE_CHECKING:
    from calibration.modelopt import ModelOptQuantizer
    from calibration.reuse import Reuse
    from pipeline.artifacts import CalibrationTable
    from pipeline.contracts import Dataset

__all__ = ["ReusedTable", "check_calibration_options", "open_modelopt", "open_reused"]

_TABLE_NAME = "calibration.json"
_MAX_TABLE_BYTES = 64 << 20
"""A range takes some 80 bytes, and no network has a million tensors."""


@dataclass(frozen=True, slots=True)
class ReusedTable:
    """A table made earlier, and what it is to be compared with."""

    table: CalibrationTable
    reuse: Reuse
    dataset_name: str
    """Of the images it was made from, as far as is known."""

    def calibration(self, placement: str) -> Calibration:
        """As `pipeline.compile.compile_model` takes it: no image is looked at."""
        from calibration.reuse import TableQuantizer

        quantizer = TableQuantizer(self.table, placement, self.reuse)
        return Calibration(quantizer, _no_images, self.table.dataset_sha256)


def check_calibration_options(request: BuildRequest) -> None:
    """Refuse what contradicts itself around ``--calib`` and ``--calibration``.

    Raises:
        UsageError: names the option.
        UnsupportedError: Model Optimizer is asked for and not installed.
    """
    if request.calibrator == "modelopt":
        _check_modelopt(request)
    if request.calibration is None:
        if request.precision == "int8" and request.calib is None:
            raise UsageError(
                "int8 needs images to calibrate on: give --calib DATA (about 128 images like those of the camera), "
                "--calibration BUNDLE to use the ranges of an earlier build, or --precision fp32"
            )
        return
    if request.precision != "int8":
        raise UsageError(
            f"--calibration is for int8; --precision {request.precision} has no ranges: leave it out"
        )
    if request.meet_budget:
        raise UsageError(
            "--meet-budget measures what each layer costs on calibration images, and --calibration looks at none; "
            "give --calib DATA alone"
        )


def _check_modelopt(request: BuildRequest) -> None:
    from calibration.modelopt import modelopt_version

    for given, option, reason in (
        (_named_corrections(request), "--corrections", "change what its ranges were chosen for"),
        (request.meet_budget, "--meet-budget", "needs the histograms that Model Optimizer keeps to itself"),
        (request.calibration is not None, "--calibration", "has ranges already"),
    ):
        if given:
            raise UsageError(f"{option} {reason}; leave it or --calibrator modelopt out")
    modelopt_version()


def _named_corrections(request: BuildRequest) -> frozenset[str]:
    """The corrections that were asked for by name; where there are no images to correct by, ``auto`` is none."""
    from calibration.correction import AUTO, parse_corrections

    return frozenset(parse_corrections(request.corrections)) - {AUTO}


def open_modelopt(placement: str) -> ModelOptQuantizer:
    """NVIDIA Model Optimizer as the quantizer.

    Raises:
        UnsupportedError: it is not installed.
    """
    from calibration.modelopt import ModelOptQuantizer
    from engines.openvino import fp32_runner

    return ModelOptQuantizer(placement, runner_factory=fp32_runner, tools=calibration_tools())


def open_reused(request: BuildRequest, dataset: Dataset | None) -> ReusedTable | None:
    """The table that ``--calibration`` names, or ``None`` where there is no such option.

    Args:
        request: as given.
        dataset: the images of ``--calib``, where they are given besides: they must be the table's.

    Raises:
        UsageError: the bundle has no table, or the file is none.
        IntegrityError: the bundle or the file is damaged.
    """
    from calibration.correction import parse_corrections
    from calibration.reuse import Reuse
    from calibration.table import table_from_json

    path = request.calibration
    if path is None:
        return None
    if _named_corrections(request):
        raise UsageError(
            f"--corrections {request.corrections} looks at images, and --calibration at none; give --calib DATA alone"
        )
    if path.is_dir():
        bundle = open_bundle(path)
        if _TABLE_NAME not in bundle.manifest.files:
            raise UsageError(
                f"bundle {str(path)!r} is {bundle.manifest.precision} and was never calibrated; give one built with "
                "--precision int8, or --calib DATA"
            )
        data = bundle.read_bytes(_TABLE_NAME)
        summary = bundle.manifest.calibration
        name = "unknown images" if summary is None else summary.dataset_name
    else:
        data, name = _read_table(path), f"the images of {path.name}"
    reuse = Reuse(
        source=repr(str(path)),
        tools=calibration_tools(),
        method=request.calibrator,
        dataset_sha256=None if dataset is None else dataset.sha256,
        without_corrections=not parse_corrections(request.corrections),
    )
    table = table_from_json(data)
    if table.corrections and reuse.without_corrections:
        console.print(
            f"note: the build of {reuse.source} was corrected ({', '.join(table.corrections)}); no table holds the "
            "weights that this changed, and they are rounded to nearest here",
            style="yellow",
            markup=False,
        )
    return ReusedTable(table, reuse, name)


def _read_table(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > _MAX_TABLE_BYTES:
            raise DataError(
                f"--calibration {str(path)!r} has {size:,} bytes, more than the {_MAX_TABLE_BYTES:,} of any calibration "
                "table; give the calibration.json of a bundle, or the bundle"
            )
        return path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"--calibration {str(path)!r} cannot be read: {error.strerror or error}; give a bundle, or the "
            "calibration.json of one"
        ) from error


def _no_images() -> Iterator[NDArray[np.uint8]]:
    return iter(())
