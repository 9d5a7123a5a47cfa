"""From a folded fp32 model and images to an int8 model: static post-training quantization."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from calibration.collect import SAMPLES_PER_IMAGE, collect
from calibration.correction import Corrector, checked_corrections, placed_graph
from calibration.float_layers import restore_float_layers
from calibration.placement import PLACEMENTS, observed_by_all
from calibration.qdq import insert_qdq
from calibration.ranges import METHODS
from calibration.table import StatisticsCache, check_table, derive_table
from calibration.tensorrt_form import TensorRTForms
from pipeline.artifacts import CalibrationTable, ModelArtifact, StageRecord, TensorStatistics
from pipeline.contracts import Batches, Progress, RunnerFactory
from pipeline.errors import CalibrationError, UsageError
from pipeline.onnx_files import interface, load_model, save_model
from pipeline.preprocess import preprocess_sha256

__all__ = ["Corrected", "StaticQuantizer", "apply_table"]


@dataclass(frozen=True, slots=True)
class Corrected:
    """A model calibrated and corrected once, for however many int8 forms are made of it.

    Attributes:
        original: the fp32 model that was calibrated: the folded one, or that equalized. What stays in float has its
            weights. Its history tells of the corrections.
        model: the same with corrected weights and biases; `original` where nothing was corrected.
        table: the ranges, of `original`.
        statistics: what `table` was derived from.
        checks: what calibrating took, for a stage's record.
    """

    original: ModelArtifact
    model: ModelArtifact
    table: CalibrationTable
    statistics: TensorStatistics
    checks: dict[str, Any]


class StaticQuantizer:
    """`pipeline.contracts.Quantizer`: ranges from images, one Q/DQ placement, no training.

    Changing `method` or `placement` on the same model and images costs no new pass where there is a cache.
    """

    def __init__(
        self,
        method: str = "minmax",
        placement: str = "cpu",
        *,
        runner_factory: RunnerFactory,
        cache_dir: Path | None = None,
        corrections: Collection[str] = (),
        tools: Mapping[str, str] | None = None,
        work_dir: Path | None = None,
    ) -> None:
        """Choose how ranges are found and where Q/DQ stand.

        Args:
            method: ``minmax``, ``percentile``, ``entropy`` or ``mse``.
            placement: the engine family, a key of `calibration.placement.PLACEMENTS`.
            runner_factory: makes the fp32 runner the images go through.
            cache_dir: where statistics are kept; ``None``: they are not.
            corrections: of `calibration.correction.CORRECTIONS`, or `calibration.correction.AUTO` alone; none:
                weights are rounded to nearest.
            tools: name to version of what the ranges come from; kept in the table, and part of the cache's key.
            work_dir: where the corrected model stays, so that `correct` makes it once; ``None``: it is dropped.

        Raises:
            UsageError: no such method, placement or correction.
        """
        if method not in METHODS:
            raise UsageError(f"no calibration method {method!r}; choose one of {', '.join(METHODS)}")
        if placement not in PLACEMENTS:
            raise UsageError(f"no placement {placement!r}; choose one of {', '.join(PLACEMENTS)}")
        self._method = method
        self._placement = placement
        self.runner_factory = runner_factory
        self._cache_dir = cache_dir
        self._corrections = checked_corrections(corrections)
        self._tools = dict(tools or {})
        self._work_dir = work_dir
        self._kept: dict[tuple[str, str], Corrected] = {}

    def quantize(
        self,
        model: ModelArtifact,
        batches: Batches,
        dataset_sha256: str,
        out_path: Path,
        progress: Progress,
    ) -> tuple[ModelArtifact, CalibrationTable, StageRecord]:
        """Calibrate `model` and write its int8 form to `out_path`.

        Args:
            model: folded fp32 ONNX; its uint8 NHWC input stays as it is.
            batches: uint8 NHWC images at the input's size.
            dataset_sha256: digest of the images.
            out_path: where the Q/DQ ONNX goes, replaced atomically.
            progress: told of every batch.

        Raises:
            CalibrationError: no images, NaN or Inf in activations or weights, nothing to quantize.
        """
        with ExitStack() as stack:
            folder = self._work_dir
            if folder is None:
                folder = Path(stack.enter_context(TemporaryDirectory(prefix="edgefold-corrections-")))
            found = self._correct(model, batches, dataset_sha256, folder, progress)
            quantized, record = apply_table(
                found.original, found.table, self._placement, out_path, corrected=found.model
            )
        calibrating_s = found.checks["statistics_seconds"] + found.checks["ranges_seconds"]
        record = dataclasses.replace(
            record, seconds=record.seconds + calibrating_s, checks={**record.checks, **found.checks}
        )
        return dataclasses.replace(quantized, history=(*found.original.history, record)), found.table, record

    def correct(
        self, model: ModelArtifact, batches: Batches, dataset_sha256: str, progress: Progress
    ) -> Corrected:
        """What every int8 form of `model` is made from; the same again where `quantize` has made it.

        Args:
            model: folded fp32 ONNX; its uint8 NHWC input stays as it is.
            batches: uint8 NHWC images at the input's size.
            dataset_sha256: digest of the images.
            progress: told of every batch.

        Raises:
            UsageError: there is no ``work_dir`` to keep it in.
            CalibrationError: as `quantize`.
        """
        if self._work_dir is None:
            raise UsageError("a corrected model needs a folder to stay in: give StaticQuantizer a work_dir")
        return self._correct(model, batches, dataset_sha256, self._work_dir, progress)

    def _correct(
        self, model: ModelArtifact, batches: Batches, dataset_sha256: str, folder: Path, progress: Progress
    ) -> Corrected:
        key = (model.sha256, dataset_sha256)
        if key in self._kept:
            return self._kept[key]
        self._require_layers(model)
        corrector = Corrector(
            self._placement, self._corrections, batches, self.runner_factory, folder, progress
        )
        equalized = corrector.equalize(model)
        began = time.perf_counter()
        statistics, from_cache = self.statistics(equalized, batches, dataset_sha256, progress)
        collected = time.perf_counter()
        table = derive_table(statistics, self._method, self._tools)
        checks = {
            "statistics_from_cache": from_cache,
            "statistics_seconds": collected - began,
            "ranges_seconds": time.perf_counter() - collected,
        }
        corrected, table = corrector.reconstruct(equalized, table)
        table = dataclasses.replace(table, corrections=corrector.corrections)
        if self._corrections:
            record = StageRecord(
                stage="correct",
                inputs=(model.sha256, dataset_sha256),
                outputs=(corrected.sha256,),
                seconds=corrector.seconds,
                checks=corrector.checks(),
            )
            equalized = dataclasses.replace(equalized, history=(*model.history, record))
        found = Corrected(equalized, corrected, table, statistics, checks)
        if self._work_dir is not None:
            self._kept[key] = found
        return found

    def _require_layers(self, model: ModelArtifact) -> None:
        _, placement = placed_graph(model, self._placement, {})
        if not placement.weights:
            raise CalibrationError(
                f"{model.path} has no layer that can be quantized: "
                + (
                    "; ".join(f"{node}: {reason}" for node, reason in placement.skipped)
                    or "no Conv, Gemm or MatMul"
                )
            )

    def statistics(
        self, model: ModelArtifact, batches: Batches, dataset_sha256: str, progress: Progress
    ) -> tuple[TensorStatistics, bool]:
        """What every placement needs to know of the activations, from one pass over the images.

        Args:
            model: folded fp32 ONNX.
            batches: uint8 NHWC images at the input's size.
            dataset_sha256: digest of the images.
            progress: told of every batch.

        Returns:
            The statistics, and whether they came from the cache.

        Raises:
            CalibrationError: no images, or NaN or Inf in an activation.
        """
        observed = observed_by_all(load_model(model.path))

        def gather() -> TensorStatistics:
            return collect(model, observed, batches, dataset_sha256, self.runner_factory, progress)

        if self._cache_dir is None:
            return gather(), False
        return StatisticsCache(self._cache_dir).get_or_collect(
            model.sha256, dataset_sha256, preprocess_sha256(model.preprocess), observed, gather, self._tools
        )


def apply_table(
    model: ModelArtifact,
    table: CalibrationTable,
    placement: str,
    out_path: Path,
    float_layers: frozenset[str] = frozenset(),
    corrected: ModelArtifact | None = None,
) -> tuple[ModelArtifact, StageRecord]:
    """Write the int8 form of `model` with the ranges of a table made earlier.

    One table serves every placement. ``tensorrt`` gives the strongly typed form of
    `calibration.tensorrt_form`.

    Args:
        model: folded fp32 ONNX.
        table: its calibration table.
        placement: the engine family.
        out_path: where the Q/DQ ONNX goes, replaced atomically.
        float_layers: layers that stay in floating point, by the name of their output tensor.
        corrected: `model` with the weights and biases that its quantized layers get (`Corrected.model`); ``None``:
            they get its own.

    Raises:
        UsageError: a name of `float_layers` is no layer of the model.
        IntegrityError: the table is another model's.
        CalibrationError: the table lacks a tensor this placement needs, or a weight is not finite.
        PassError: a step to TensorRT's form changed what the model computes.
    """
    if placement == "tensorrt":
        forms = TensorRTForms(model, table, corrected=corrected)
        return forms.int8(forms.placement(float_layers=float_layers), out_path)
    start = time.perf_counter()
    check_table(table, model)
    source = corrected or model
    graph = load_model(source.path)
    placed = PLACEMENTS[placement](graph, float_layers=float_layers)
    if source is not model and float_layers:
        restore_float_layers(graph, load_model(model.path), placed)
    insert_qdq(graph, placed, table.ranges)
    sha256 = save_model(graph, out_path)
    inputs, outputs = interface(graph)
    record = StageRecord(
        stage="quantize",
        inputs=(source.sha256, table.dataset_sha256),
        outputs=(sha256,),
        seconds=time.perf_counter() - start,
        checks={
            "method": table.method,
            "placement": placed.family,
            "n_images": table.n_samples,
            "samples_per_image": SAMPLES_PER_IMAGE,
            "n_quantized_layers": len(placed.weights),
            "n_quantized_activations": len(placed.activations),
            "left_in_float": [list(item) for item in placed.skipped],
        },
    )
    quantized = dataclasses.replace(
        model,
        path=out_path,
        sha256=sha256,
        inputs=inputs,
        outputs=outputs,
        history=(*model.history, record),
    )
    return quantized, record
