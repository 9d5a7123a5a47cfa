"""What corrections come to at the logits: layers better at their own outputs can be worse together."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from calibration.collect import fixed_batch
from calibration.correction.rounded import RoundedWeights
from calibration.placement import Placement
from calibration.qdq import insert_qdq
from pipeline.artifacts import TensorRange
from pipeline.contracts import RunnerFactory
from pipeline.metrics import sqnr_db
from pipeline.onnx_files import save_for_runner

__all__ = ["Judgement", "LogitsJudge", "logits_of"]


_EXACT_DB = 150.0
"""In place of an infinite SQNR: beyond what float32 tells apart."""
_STANDARD_ERRORS = 2.0


@dataclass(frozen=True, slots=True)
class Judgement:
    """SQNR of an int8 form's logits, the images taken together and each by itself."""

    logits_db: float
    """Infinite where they are exact."""
    image_db: NDArray[np.float64]

    @property
    def mean_image_db(self) -> float:
        """Of the average image."""
        return float(self.image_db.mean())

    def is_better_than(self, other: Judgement) -> bool:
        """On the average image."""
        return self.mean_image_db > other.mean_image_db

    def is_clearly_better_than(self, other: Judgement) -> bool:
        """By more than two standard errors of the difference image by image.

        The SQNR of two dozen images together turns by a decibel with the one image that is worst.
        """
        gained = self.image_db - other.image_db
        error = gained.std(ddof=1) / np.sqrt(len(gained)) if len(gained) > 1 else np.inf
        return bool(gained.mean() > _STANDARD_ERRORS * error)


class LogitsJudge:
    """Judges int8 forms of a model by their logits on images that none of them was made from."""

    def __init__(
        self,
        model: ir.Model,
        placement: Placement,
        rounded: RoundedWeights,
        images: NDArray[np.uint8],
        runner_factory: RunnerFactory,
        folder: Path,
        exact: NDArray[np.float32] | None = None,
    ) -> None:
        """Run `model` on the images, unless what it makes of them is known.

        Args:
            model: fp32; what its logits say is right.
            placement: where Q/DQ will stand.
            rounded: the weights of `model`.
            images: uint8 NHWC; of a model with a fixed batch size, as many as fill whole batches are used.
            runner_factory: makes the fp32 runners.
            folder: for temporary files.
            exact: the logits of `model` on the images.
        """
        batch = fixed_batch(model)
        self._placement = placement
        self._rounded = rounded
        self._images = images[: len(images) // batch * batch]
        self._runner_factory = runner_factory
        self._folder = folder
        self._exact: NDArray[np.float32] | None = None
        if len(self._images):
            self._exact = self._logits(model) if exact is None else exact[: len(self._images)]

    @property
    def n_images(self) -> int:
        """Those that judge; with none, nothing can be said."""
        return len(self._images)

    def judge(self, model: ir.Model, ranges: Mapping[str, TensorRange]) -> Judgement | None:
        """What the logits of `model` in int8 are worth; ``None`` without images."""
        if self._exact is None:
            return None
        found = self._logits(self._on_grids(model, ranges))
        each = [sqnr_db(exact, of_it) for exact, of_it in zip(self._exact, found, strict=True)]
        return Judgement(sqnr_db(self._exact, found), np.minimum(each, _EXACT_DB))

    def _logits(self, model: ir.Model) -> NDArray[np.float32]:
        path = self._folder / "whole.onnx"
        save_for_runner(model, path)
        return logits_of(model, path, self._images, self._runner_factory)

    def _on_grids(self, model: ir.Model, ranges: Mapping[str, TensorRange]) -> ir.Model:
        """`model` as its int8 form computes, with float weights that lie on their grids."""
        on_grids = model.clone()
        self._rounded.put_into(on_grids)
        insert_qdq(on_grids, dataclasses.replace(self._placement, weights=()), ranges)
        return on_grids


def logits_of(
    model: ir.Model, path: Path, images: NDArray[np.uint8], runner_factory: RunnerFactory
) -> NDArray[np.float32]:
    """What `model`, written to `path`, makes of images, uint8 NHWC: whole batches where its batch size is fixed."""
    batch = fixed_batch(model)
    name, output = model.graph.inputs[0].name or "", model.graph.outputs[0].name or ""
    with runner_factory(path, ()) as runner:
        return np.concatenate(
            [
                np.array(runner.infer({name: images[start : start + batch]})[output])
                for start in range(0, len(images), batch)
            ]
        )
