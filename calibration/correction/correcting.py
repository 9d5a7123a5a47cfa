"""The corrections of a model artifact: equalized before its ranges are measured, reconstructed afterwards."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import ShapeInferencePass

from calibration.collect import fixed_batch
from calibration.correction.bias import correct_biases
from calibration.correction.channels import trace_channels
from calibration.correction.choice import choose_corrections
from calibration.correction.equalization import channel_ranges, channel_scales, equalize, tensors_to_equalize
from calibration.correction.equalization_check import judge_scales
from calibration.correction.images import FEWEST, images_that_fit, spread, take_images
from calibration.correction.judge import Judgement, LogitsJudge, logits_of
from calibration.correction.reconstruction import carry_over, reconstruct
from calibration.correction.records import (
    AUTO,
    CORRECTIONS,
    CorrectionRecord,
    gains,
    judging,
    rounded_db,
    summary,
)
from calibration.correction.rounded import RoundedWeights
from calibration.placement import PLACEMENTS, Placement, tensorrt
from calibration.tensorrt_form import choose_remainder
from pipeline.artifacts import CalibrationTable, ModelArtifact, TensorRange
from pipeline.contracts import Batches, Progress, RunnerFactory
from pipeline.metrics import sqnr_db
from pipeline.onnx_files import load_model, save_model, unload_weights
from pipeline.passes.center_pixels import center_pixels

__all__ = ["Corrector", "placed_graph"]

_SAME_MODEL_DB = 60.0
"""An equalized model differs from the original by float32 rounding, 100 dB down, unless a clip was reached."""
_JUDGING_IMAGES = 4
_SHOWING_IMAGES = 4
_DECIDING_IMAGES = 24
"""For the SQNR of the logits, which one image in eight can turn by a decibel: more of them where it decides."""
_TRIED_LAYERS = 8
_EQUALIZATION_SHARE, _EQUALIZING_IMAGES = 1 / 4, 24
_BIAS_SHARE, _CORRECTING_IMAGES = 1 / 8, 12
"""Of the images, and at most: so that both together cost no more than a pass over the 128 of a build
(benchmarks/calibration_cost.py). More images do not make a better bias: with an eighth of 64 or three quarters
`inception_resnet_lite` comes to 45 dB. They do make better extrema of channels, up to a dozen: from 8, three in four
layers of Inception-v3 lose by equalization on others."""
_BIAS_IMAGES = 144
"""Read where nothing but biases is corrected: `_CORRECTING_IMAGES` of them correct, `_DECIDING_IMAGES` judge."""


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
        unload_weights(graph, self._folder / "folded.weights")
        atoms = trace_channels(graph.graph)
        quantized = [point.tensor for point in placement.activations]
        names = tensors_to_equalize(graph.graph, quantized)
        images = self._images(graph, _EQUALIZATION_SHARE, _EQUALIZING_IMAGES)
        n_judging = min(_JUDGING_IMAGES, len(images) // 2)
        n_judging -= n_judging % fixed_batch(graph)
        if not names or not n_judging:
            return model
        fit, judging = images[:-n_judging], images[-n_judging:]
        ranges = channel_ranges(graph, names, fit, self._runner_factory, self._folder)
        scales = channel_scales(atoms, ranges, [name for name in quantized if name in ranges])
        scales, self._records, original = judge_scales(
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
        equalize(atoms, scales)
        path = self._folder / "equalized.onnx"
        sha256 = save_model(graph, path)
        # Without clips, scaling is exact whatever the image.
        if (
            atoms.clips
            and sqnr_db(original, logits_of(graph, path, judging, self._runner_factory)) < _SAME_MODEL_DB
        ):  # one was reached after all
            self._records = tuple(dataclasses.replace(record, kept=False) for record in self._records)
            path.unlink()
            return model
        return dataclasses.replace(model, path=path, sha256=sha256)

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
        unload_weights(graph, self._folder / "calibrated.weights")
        if AUTO in wanted:
            made = self._automatic(graph, placement, table)
        else:
            made = self._asked_for(graph, placement, table.ranges, wanted)
        self._corrections = made.corrections | (self._corrections & {"equalize"})
        self._records += made.records
        self._skipped = made.skipped
        if made.graph is graph:
            return model, table
        path = self._folder / "corrected.onnx"
        sha256 = save_model(made.graph, path)
        return dataclasses.replace(model, path=path, sha256=sha256), dataclasses.replace(
            table, ranges=made.ranges
        )

    def _asked_for(
        self,
        graph: ir.Model,
        placement: Placement,
        ranges: Mapping[str, TensorRange],
        wanted: frozenset[str],
    ) -> _Attempt:
        """What a person named; what it comes to at the logits is shown, and decides nothing."""
        alone = wanted == {"bias"}
        rounded = RoundedWeights(graph, placement, self._folder)
        images = self._images(graph, 1.0, _BIAS_IMAGES if alone else images_that_fit(graph))
        made = _Attempt(wanted, graph.clone(), dict(ranges))
        exact = None
        if alone:
            exact = self._correct_biases(made, placement, rounded, images)
        else:
            self._walk(made, placement, images, wanted if "adaround" in wanted else wanted - {"bias"})
            if "adaround" not in wanted and "bias" in wanted:
                self._correct_biases(made, placement, rounded, images)
        judge = self._judge(graph, placement, rounded, images, _SHOWING_IMAGES, exact)
        before = _Attempt(frozenset(), graph, dict(ranges))
        self._show(self._judged(before, judge), self._judged(made, judge))
        return made

    def _automatic(self, graph: ir.Model, placement: Placement, table: CalibrationTable) -> _Attempt:
        """Biases, unless the logits clearly are worse for them; rounding, where it is cheap and they clearly are better.

        Rounding is given up after `_TRIED_LAYERS` layers where the logits are no better for those.
        """
        n_images = min(table.n_samples, images_that_fit(graph))
        choice = choose_corrections(graph, placement, n_images)
        self._left_out = choice.left_out
        rounds = "adaround" in choice.corrections
        images = self._images(graph, 1.0, images_that_fit(graph) if rounds else _BIAS_IMAGES)
        rounded = RoundedWeights(graph, placement, self._folder)
        judge = self._judge(graph, placement, rounded, images, _DECIDING_IMAGES)
        plain = self._judged(_Attempt(frozenset(), graph, dict(table.ranges)), judge)
        best = _Attempt(frozenset({"bias"}), graph.clone(), dict(table.ranges))
        self._correct_biases(best, placement, rounded, images)
        self._judged(best, judge)
        undone: tuple[tuple[str, str], ...] = ()
        if plain.beats(best, Judgement.is_clearly_better_than):
            undone, best = (("bias", f"{_from_to(plain, best)} and was undone"),), plain
        if rounds:
            walked = _Attempt(choice.corrections, graph.clone(), dict(table.ranges))
            if self._rounds_better(walked, best, placement, images, judge):
                undone, best = (), walked
        self._left_out += undone
        self._show(plain, best)
        return best

    def _rounds_better(
        self,
        rounded: _Attempt,
        best: _Attempt,
        placement: Placement,
        images: NDArray[np.uint8],
        judge: LogitsJudge,
    ) -> bool:
        tried = placement.weights[:_TRIED_LAYERS]

        def goes_on(n_done: int) -> bool:
            if n_done != len(tried) or n_done == len(placement.weights):
                return True
            mixed = _Attempt(rounded.corrections, best.graph.clone(), best.ranges)
            carry_over(rounded.graph, mixed.graph, tried)
            if not best.beats(self._judged(mixed, judge), Judgement.is_better_than):
                return True
            layers = f"the first {n_done} of {len(placement.weights)} layers"
            self._left_out += (
                ("adaround", f"{_from_to(best, mixed)} with {layers}, and was given up there"),
            )
            return False

        if not self._walk(rounded, placement, images, rounded.corrections, goes_on):
            return False
        self._judged(rounded, judge)
        if rounded.judgement is None or rounded.beats(best, Judgement.is_clearly_better_than):
            return True
        reason = f"{_from_to(best, rounded)}, no clear gain on {judge.n_images} images, and was undone"
        self._left_out += (("adaround", reason),)
        return False

    def _walk(
        self,
        attempt: _Attempt,
        placement: Placement,
        images: NDArray[np.uint8],
        corrections: frozenset[str],
        goes_on: Callable[[int], bool] = lambda _: True,
    ) -> bool:
        """Reconstruct layer by layer; whether it went to the end."""
        with self._timed(_joined(corrections)):
            found = reconstruct(
                attempt.graph,
                placement,
                attempt.ranges,
                images,
                corrections,
                self._runner_factory,
                self._folder,
                self._progress,
                goes_on,
            )
        attempt.ranges = found.ranges
        attempt.records += found.records
        attempt.skipped = found.skipped
        return found.is_whole

    def _correct_biases(
        self, attempt: _Attempt, placement: Placement, rounded: RoundedWeights, images: NDArray[np.uint8]
    ) -> NDArray[np.float32] | None:
        """What the graph made of the first `_SHOWING_IMAGES` that judge, before; ``None`` where it did not run."""
        batch = fixed_batch(attempt.graph)
        judges = spread(images[judging(len(images))], _SHOWING_IMAGES)
        fit = images[~judging(len(images))]
        wanted = min(len(fit), _CORRECTING_IMAGES, max(round(_BIAS_SHARE * len(images)), FEWEST))
        n_images = (wanted + len(judges)) // batch * batch
        if n_images <= len(judges):
            return None
        fit = spread(fit, n_images - len(judges))
        with self._timed("bias"):
            records, outputs = correct_biases(
                attempt.graph,
                placement,
                attempt.ranges,
                rounded,
                np.concatenate([fit, judges]),
                len(judges),
                self._runner_factory,
                self._folder,
            )
        attempt.records += records
        return outputs[len(fit) :] if len(outputs) else None

    def _judge(
        self,
        graph: ir.Model,
        placement: Placement,
        rounded: RoundedWeights,
        images: NDArray[np.uint8],
        at_most: int,
        exact: NDArray[np.float32] | None = None,
    ) -> LogitsJudge:
        judges = spread(images[judging(len(images))], at_most)
        with self._timed("judging"):
            return LogitsJudge(graph, placement, rounded, judges, self._runner_factory, self._folder, exact)

    def _judged(self, attempt: _Attempt, judge: LogitsJudge) -> _Attempt:
        with self._timed("judging"):
            attempt.judgement = judge.judge(attempt.graph, attempt.ranges)
        return attempt

    def _show(self, before: _Attempt, after: _Attempt) -> None:
        if before.judgement is not None and after.judgement is not None:
            self._logits_db = [
                rounded_db(made.judgement.logits_db) for made in (before, after) if made.judgement
            ]

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - began

    def _images(self, graph: ir.Model, share: float, at_most: int) -> NDArray[np.uint8]:
        images = take_images(self._batches, share, at_most, fixed_batch(graph))
        self._n_images = max(self._n_images, len(images))
        return images


@dataclass(slots=True)
class _Attempt:
    """A model with some corrections, and what it is worth."""

    corrections: frozenset[str]
    graph: ir.Model
    ranges: dict[str, TensorRange]
    records: tuple[CorrectionRecord, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()
    judgement: Judgement | None = None
    """``None``: there was no image to judge by."""

    def beats(self, other: _Attempt, criterion: Callable[[Judgement, Judgement], bool]) -> bool:
        """Whether it is better by one of the criteria of `Judgement`; nothing beats anything without images."""
        if self.judgement is None or other.judgement is None:
            return False
        return criterion(self.judgement, other.judgement)


def _from_to(before: _Attempt, after: _Attempt) -> str:
    shown = [f"{made.judgement.mean_image_db:.1f}" for made in (before, after) if made.judgement is not None]
    return f"took the logits of the average image from {' to '.join(shown)} dB"


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


def _joined(names: frozenset[str]) -> str:
    return "+".join(name for name in CORRECTIONS if name in names)
