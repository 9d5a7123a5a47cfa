"""The corrections of a model artifact: equalized before its ranges are measured, reconstructed afterwards."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import ShapeInferencePass

from calibration.correction.bias import correct_biases
from calibration.correction.channels import trace_channels
from calibration.correction.choice import choose_corrections
from calibration.correction.equalization import channel_ranges, channel_scales, equalize, tensors_to_equalize
from calibration.correction.equalization_check import judge_scales
from calibration.correction.layerwise import bytes_per_image
from calibration.correction.reconstruction import reconstruct
from calibration.correction.records import (
    AUTO,
    CORRECTIONS,
    CorrectionRecord,
    gains,
    judging,
    rounded_db,
    summary,
)
from calibration.placement import PLACEMENTS, Placement, tensorrt
from calibration.qdq import insert_qdq, weight_params
from calibration.qparams import dequantize, quantize
from calibration.tensorrt_form import choose_remainder
from pipeline.artifacts import CalibrationTable, ModelArtifact, TensorRange
from pipeline.contracts import Batches, Progress, RunnerFactory
from pipeline.metrics import sqnr_db
from pipeline.onnx_files import load_model, save_model
from pipeline.passes.center_pixels import center_pixels

__all__ = ["Corrector", "images_that_fit", "placed_graph", "take_images"]

_HELD_BYTES = 2 * 2**30
"""What the images of a reconstruction may take at once, in both of its runs: with PyTorch in the same process, a build
stays within 4 GB."""
MAX_IMAGES = 1024
"""As many as the paper on adaptive rounding takes."""
_SAME_MODEL_DB = 60.0
"""An equalized model differs from the original by float32 rounding, 100 dB down, unless a clip was reached."""
_JUDGING_IMAGES = 4
_LOGITS_IMAGES = 8
"""For what the corrections come to at the logits: those that judged the layers, which none was made from."""
_FEWEST = 8
_EQUALIZATION_SHARE = 1 / 4
_BIAS_SHARE = 1 / 6
"""Of the images, so that both together cost at most one pass over all of them: a bias correction by itself runs every
layer twice, equalization once and on `_JUDGING_IMAGES` five times. More images do not make a better bias: with an
eighth of them or a third, EfficientNet-Lite1 comes to 23 dB and `inception_resnet_lite` to 38."""


def take_images(batches: Batches, share: float, at_most: int, multiple_of: int) -> NDArray[np.uint8]:
    """An even selection of the images of a pass, as one array.

    Args:
        batches: uint8 NHWC.
        share: of the images, at most 1; at least `_FEWEST` are taken.
        at_most: however many there are.
        multiple_of: the model's batch size, where that is fixed; else 1.
    """
    taken: list[NDArray[np.uint8]] = []
    n_seen = 0
    every = 1
    for image in (image for batch in batches() for image in batch):
        if n_seen % every == 0:
            taken.append(image.copy())
        n_seen += 1
        if len(taken) > 2 * at_most:  # every second of them, and from now on half as many
            taken, every = taken[::2], 2 * every
    wanted = min(at_most, len(taken), max(round(share * n_seen), _FEWEST))
    wanted = wanted // multiple_of * multiple_of
    chosen = np.linspace(0, len(taken), wanted, endpoint=False).astype(np.int64)
    return np.stack([taken[index] for index in chosen]) if wanted else np.empty((0, 1, 1, 3), np.uint8)


def images_that_fit(model: ir.Model) -> int:
    """How many images a reconstruction can hold between two layers."""
    # Two runs: float32 in the reference, a quarter of that where values are quantized.
    each = bytes_per_image(model) * 5 // 4
    return max(_FEWEST, min(MAX_IMAGES, _HELD_BYTES // max(each, 1)))


class Corrector:
    """What `calibration.quantizer.StaticQuantizer` does to a model besides choosing its ranges."""

    def __init__(
        self,
        placement: str,
        corrections: frozenset[str],
        batches: Batches,
        runner_factory: RunnerFactory,
        folder: Path,
        progress: Progress,
    ) -> None:
        """Nothing runs yet.

        Args:
            placement: a key of `calibration.placement.PLACEMENTS`.
            corrections: of `CORRECTIONS`, or `AUTO` alone.
            batches: the calibration images.
            runner_factory: makes the fp32 runners.
            folder: for the corrected models and for temporary files.
            progress: told of every layer.
        """
        self._placement = placement
        self._corrections = corrections
        self._batches = batches
        self._runner_factory = runner_factory
        self._folder = folder
        self._progress = progress
        self._records: tuple[CorrectionRecord, ...] = ()
        self._skipped: tuple[tuple[str, str], ...] = ()
        self._left_out: tuple[tuple[str, str], ...] = ()
        self._seconds: dict[str, float] = {}
        self._logits_db: list[float | None] | None = None
        self._n_images = 0

    @property
    def seconds(self) -> float:
        """Spent on corrections so far."""
        return sum(self._seconds.values())

    @property
    def corrections(self) -> tuple[str, ...]:
        """Those that were made; `AUTO` stands for what was chosen once `reconstruct` has run."""
        return tuple(name for name in CORRECTIONS if name in self._corrections)

    def checks(self) -> dict[str, Any]:
        """For the stage's record."""
        return {
            "corrections": list(self.corrections),
            "left_out": [list(item) for item in self._left_out],
            "seconds_of": {names: round(seconds, 3) for names, seconds in self._seconds.items()},
            "logits_db": self._logits_db,
            "gains": gains(self._records),
            "corrected_layers": summary(self._records),
            "not_corrected": [list(item) for item in self._skipped],
            "n_correction_images": self._n_images,
        }

    def equalize(self, model: ModelArtifact) -> ModelArtifact:
        """The equalized form of a folded fp32 model; `model` itself where nothing is gained or asked for.

        Raises:
            CalibrationError: a channel's extremum is NaN or Inf.
        """
        if "equalize" not in self._corrections:
            return model
        began = time.perf_counter()
        equalized = self._equalized(model)
        self._seconds["equalize"] = time.perf_counter() - began
        return equalized

    def _equalized(self, model: ModelArtifact) -> ModelArtifact:
        graph, placement = placed_graph(model, self._placement, {})
        atoms = trace_channels(graph.graph)
        quantized = [point.tensor for point in placement.activations]
        names = tensors_to_equalize(graph.graph, quantized)
        images = self._images(graph, _EQUALIZATION_SHARE, MAX_IMAGES)
        n_judging = min(_JUDGING_IMAGES, len(images) // 2)
        n_judging -= n_judging % _fixed_batch(graph)
        if not names or not n_judging:
            return model
        fit, judging = images[:-n_judging], images[-n_judging:]
        ranges = channel_ranges(graph, names, fit, self._runner_factory, self._folder)
        scales = channel_scales(atoms, ranges, [name for name in quantized if name in ranges])
        scales, self._records = judge_scales(
            graph,
            atoms,
            scales,
            ranges,
            placement,
            judging,
            "adaround" in self._corrections,
            self._runner_factory,
            self._folder,
        )
        if (scales == 1.0).all():
            return model
        original = self._logits(graph, judging)
        equalize(atoms, scales)
        if sqnr_db(original, self._logits(graph, judging)) < _SAME_MODEL_DB:  # a clip was reached after all
            self._records = tuple(dataclasses.replace(record, kept=False) for record in self._records)
            return model
        path = self._folder / "equalized.onnx"
        return dataclasses.replace(model, path=path, sha256=save_model(graph, path))

    def reconstruct(
        self, model: ModelArtifact, table: CalibrationTable
    ) -> tuple[ModelArtifact, CalibrationTable]:
        """Correct ranges, biases and rounding.

        Args:
            model: fp32, equalized or not.
            table: its ranges.

        Returns:
            An fp32 model whose weights lie on their int8 grids, and the table with the ranges found; `model` itself
            where there is nothing to correct. Of a placement with every layer in int8: a layer that then stays in
            float wants its own constants back (`calibration.float_layers`).

        Raises:
            CalibrationError: as `calibration.qdq.insert_qdq`.
        """
        wanted = self._corrections - {"equalize"}
        if not wanted:
            return model, table
        graph, placement = placed_graph(model, self._placement, table.ranges)
        before, ranges = graph.clone(), table.ranges
        images = np.empty((0, 1, 1, 3), np.uint8)
        unasked = AUTO in wanted
        if unasked:
            n_images = min(table.n_samples, images_that_fit(graph))
            choice = choose_corrections(graph, placement, n_images)
            self._corrections, self._left_out = choice.corrections, choice.left_out
            wanted = choice.corrections
        if wanted - {"bias"}:
            walked = wanted if "adaround" in wanted else wanted - {"bias"}
            began = time.perf_counter()
            images = self._images(graph, 1.0, images_that_fit(graph))
            found = reconstruct(
                graph,
                placement,
                table.ranges,
                images,
                walked,
                self._runner_factory,
                self._folder,
                self._progress,
            )
            self._seconds[_joined(walked)] = time.perf_counter() - began
            self._records += found.records
            self._skipped = found.skipped
            table = dataclasses.replace(table, ranges=found.ranges)
        if "bias" in wanted and "adaround" not in wanted:
            began = time.perf_counter()
            images = self._images(graph, _BIAS_SHARE, MAX_IMAGES)
            self._records += correct_biases(
                graph, placement, table.ranges, images, self._runner_factory, self._folder
            )
            self._seconds["bias"] = time.perf_counter() - began
        began = time.perf_counter()
        self._judge_logits(placement, (before, ranges), (graph, table.ranges), images)
        self._seconds["judging"] = time.perf_counter() - began
        if unasked and self._made_worse():
            self._take_back()
            return model, dataclasses.replace(table, ranges=ranges)
        path = self._folder / "corrected.onnx"
        return dataclasses.replace(model, path=path, sha256=save_model(graph, path)), table

    def _made_worse(self) -> bool:
        """Layers better at their own outputs can be worse together; nobody asked for that."""
        before, after = self._logits_db or (None, None)
        return after is not None and (before is None or after < before)

    def _take_back(self) -> None:
        before, after = ("exact" if db is None else f"{db:.1f} dB" for db in self._logits_db or ())
        reason = f"took the logits from {before} to {after} and was undone; try another --calibrator"
        self._left_out += tuple((name, reason) for name in CORRECTIONS if name in self._corrections)
        self._corrections = frozenset()
        self._records = tuple(dataclasses.replace(record, kept=False) for record in self._records)

    def _judge_logits(
        self,
        placement: Placement,
        before: tuple[ir.Model, Mapping[str, TensorRange]],
        after: tuple[ir.Model, Mapping[str, TensorRange]],
        images: NDArray[np.uint8],
    ) -> None:
        """SQNR of the logits with weights rounded to nearest, and with the corrected ones."""
        judges = images[judging(len(images))][:_LOGITS_IMAGES]
        judges = judges[: len(judges) // _fixed_batch(before[0]) * _fixed_batch(before[0])]
        if not len(judges):
            return
        exact = self._logits(before[0], judges)
        self._logits_db = [
            rounded_db(sqnr_db(exact, self._logits(_on_grids(graph, placement, ranges), judges)))
            for graph, ranges in (before, after)
        ]

    def _images(self, graph: ir.Model, share: float, at_most: int) -> NDArray[np.uint8]:
        images = take_images(self._batches, share, at_most, _fixed_batch(graph))
        self._n_images = max(self._n_images, len(images))
        return images

    def _logits(self, graph: ir.Model, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        path = self._folder / "whole.onnx"
        save_model(graph, path)
        batch = _fixed_batch(graph)
        name, output = graph.graph.inputs[0].name or "", graph.graph.outputs[0].name or ""
        with self._runner_factory(path, ()) as runner:
            return np.concatenate(
                [
                    np.array(runner.infer({name: images[start : start + batch]})[output])
                    for start in range(0, len(images), batch)
                ]
            )


def placed_graph(
    model: ModelArtifact, placement: str, ranges: Mapping[str, TensorRange]
) -> tuple[ir.Model, Placement]:
    """The fp32 graph a placement is made for, and where its Q/DQ stand.

    For TensorRT pixels are centred beforehand, and scales are values of the remainder's type.
    """
    graph = load_model(model.path)
    if placement != "tensorrt":
        return graph, PLACEMENTS[placement](graph)
    center_pixels(graph)
    ShapeInferencePass(data_prop=True)(graph)
    return graph, tensorrt.place(graph, remainder=choose_remainder(graph, ranges)[0])


def _on_grids(model: ir.Model, placement: Placement, ranges: Mapping[str, TensorRange]) -> ir.Model:
    """`model` as its int8 form computes, with float weights that lie on their grids: no engine then lowers it."""
    rounded = model.clone()
    for point in placement.weights:
        value = rounded.graph.initializers[point.weight]
        assert value.const_value is not None, "a weight point names a constant"
        array = value.const_value.numpy()
        params = weight_params(array, point, placement)
        value.const_value = ir.tensor(dequantize(quantize(array, params), params), name=value.name)
    insert_qdq(rounded, dataclasses.replace(placement, weights=()), ranges)
    return rounded


def _joined(names: frozenset[str]) -> str:
    return "+".join(name for name in CORRECTIONS if name in names)


def _fixed_batch(graph: ir.Model) -> int:
    shape = graph.graph.inputs[0].shape
    return shape[0] if shape is not None and isinstance(shape[0], int) else 1
