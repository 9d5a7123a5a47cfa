"""Using a calibration table again: for the same model, images, preprocessing, method and tools, or not at all.

A table is a few numbers, and they fit any network with the same tensor names: nothing fails when they come from
other weights, other images or a decoder that decodes otherwise, the engine only answers worse. (TensorRT's
calibration cache is such a file, and stale ones are a known trap: TensorRT#3137, #1378.) So a table carries what
it was made from, and everything that can be compared is.

Corrections change weights and biases, which no table holds: a build that was corrected is not had again from its
table. Its ranges are, where that is asked for: all but equalization leave the model they were measured on as it was.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from calibration.quantizer import apply_table
from calibration.ranges import METHODS
from calibration.table import method_options, table_sha256
from pipeline.artifacts import CalibrationTable, ModelArtifact, StageRecord
from pipeline.contracts import Batches, Progress
from pipeline.errors import IntegrityError
from pipeline.preprocess import preprocess_sha256

__all__ = ["Reuse", "TableQuantizer", "check_reuse", "ranges_alone"]

_IN_THE_RANGES = frozenset({"ranges"})
"""Corrections that a table shows, since they chose its ranges."""
_IN_THE_MODEL = frozenset({"equalize"})
"""Corrections made before ranges are measured: the ranges are of the model they left."""


@dataclass(frozen=True, slots=True)
class Reuse:
    """What a build that uses a table again knows, to be compared with what the table was made from."""

    source: str
    """Where the table comes from, for messages."""
    tools: Mapping[str, str]
    """Name to version of what would take part in a calibration here."""
    method: str | None = None
    """The method asked for; ``None``: the table's."""
    dataset_sha256: str | None = None
    """Of the images given besides; ``None``: there are none to compare."""
    without_corrections: bool = False
    """Whether the ranges are wanted without the corrections that were made."""


def check_reuse(table: CalibrationTable, model: ModelArtifact, reuse: Reuse) -> None:
    """Refuse a table that a calibration here would not come to.

    Args:
        table: made earlier.
        model: the folded model it is to be used for.
        reuse: what else is known here.

    Raises:
        IntegrityError: names every field that differs, with the table's value and the one here.
    """
    method = reuse.method or table.method
    equalized = not _IN_THE_MODEL.isdisjoint(table.corrections)
    here: dict[str, object] = {
        "model": model.sha256,
        "preprocessing": preprocess_sha256(model.preprocess),
        "method": method,
    }
    there: dict[str, object] = {
        "model": table.model_sha256,
        "preprocessing": table.preprocess_sha256,
        "method": table.method,
    }
    if equalized or not reuse.without_corrections:
        here["corrections"], there["corrections"] = (), table.corrections
    if reuse.dataset_sha256 is not None:
        here["images"], there["images"] = reuse.dataset_sha256, table.dataset_sha256
    if method == table.method and method in METHODS:
        options = method_options(method)
        for name in sorted({*options, *table.method_options}):
            field = f"option {name} of {method}"
            here[field], there[field] = options.get(name), table.method_options.get(name)
    for name in sorted({*reuse.tools, *table.tools}):
        field = f"version of {name}"
        here[field], there[field] = reuse.tools.get(name), table.tools.get(name)
    differences = [
        f"{field}: {_words(there[field])} in the table, {_words(here[field])} here"
        for field in here
        if there[field] != here[field]
    ]
    if differences:
        raise IntegrityError(
            f"the calibration table of {reuse.source} is not for this build: {'; '.join(differences)}. "
            + _about_corrections(table, equalized, reuse.without_corrections)
            + "Calibrate anew with --calib DATA, or build with what the table was made with"
        )


def ranges_alone(table: CalibrationTable) -> CalibrationTable:
    """The table of a build that makes no corrections of its own: it names those its ranges come from."""
    return dataclasses.replace(
        table, corrections=tuple(name for name in table.corrections if name in _IN_THE_RANGES)
    )


def _about_corrections(table: CalibrationTable, equalized: bool, without: bool) -> str:
    if equalized:
        return "Equalization gave the model other weights, and the ranges are of those. "
    if table.corrections and not without:
        return (
            "Corrections change weights too, and no table holds those: --corrections none uses the ranges without "
            "them. "
        )
    return ""


class TableQuantizer:
    """`pipeline.contracts.Quantizer` that looks at no image: the ranges are those of an earlier calibration."""

    def __init__(self, table: CalibrationTable, placement: str, reuse: Reuse) -> None:
        """Keep what is to be used again; it is checked when the model is known.

        Args:
            table: made earlier.
            placement: the engine family, a key of `calibration.placement.PLACEMENTS`.
            reuse: what the table is compared with.
        """
        self._table = table
        self._placement = placement
        self._reuse = reuse

    def quantize(
        self,
        model: ModelArtifact,
        batches: Batches,
        dataset_sha256: str,
        out_path: Path,
        progress: Progress,
    ) -> tuple[ModelArtifact, CalibrationTable, StageRecord]:
        """Write the int8 form of `model` with the ranges of the table, its weights rounded to nearest.

        Args:
            model: folded fp32 ONNX.
            batches: not looked at.
            dataset_sha256: the table's own, where no images are given.
            out_path: where the Q/DQ ONNX goes, replaced atomically.
            progress: told when it is done.

        Raises:
            IntegrityError: the table is not for this model, or was made otherwise.
            CalibrationError: it lacks a tensor, or a range is none.
        """
        check_reuse(self._table, model, self._reuse)
        table = ranges_alone(self._table)
        quantized, record = apply_table(model, table, self._placement, out_path)
        progress("calibrate", table.n_samples, table.n_samples)
        record = dataclasses.replace(
            record,
            inputs=(model.sha256, dataset_sha256),
            checks={**record.checks, "reused_table_sha256": table_sha256(self._table)},
        )
        return dataclasses.replace(quantized, history=(*model.history, record)), table, record


def _words(value: object) -> str:
    if value is None:
        return "not recorded"
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none"
    return str(value)
