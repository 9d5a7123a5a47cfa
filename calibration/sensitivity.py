"""What each layer's quantization costs at the logits, from one pass over a few images.

Quantizing layer ``l`` adds a noise ``d_l`` to its output, which arrives at the logits as ``J_l d_l``. To first
order the noises of all layers add up there; so they can be injected all at once and told apart afterwards,
if each is switched by a pattern of its own. Each image is run in `N_PATTERNS` versions beside itself. In
version ``k`` every layer computes, in float32 ::

    y + s_kl d_l        y = W x + b,  d_l = W_int8 x_int8 - W x of the image itself,  s_kl = +1 or -1

and the patterns ``s`` are columns of a Hadamard matrix, of which any two are orthogonal. With ``z_k`` the
logits of version ``k``, the mean ``1/K sum_k s_kl z_k`` holds layer ``l``'s noise and, of the layers with
other patterns, nothing. The constant column is used by nobody: the mean of all versions is the fp32 logits, and
whatever does not change its sign with the noise (a Relu's rectification, say) falls out with it. Switching
one layer at a time would take as many runs as there are layers, and see their even-order terms as well.

Networks with more layers than patterns share them: a pattern then holds the energy of all its layers
(crossing terms have random signs, since every layer's pattern also gets one). The layers are dealt anew for
every image, and the energies of the layers are the least-squares solution of all these sums. Up to
``N_PATTERNS - 1`` layers nothing is shared. This is a supersaturated design with orthogonal columns (Lin,
Technometrics 35 (1993) 28-31); random signs with the same purpose make Hutchinson's estimate of a trace
(Communications in Statistics 18 (1989) 1059-1076).

The whole costs some 40 fp32 runs of each image, whatever the number of layers. What is left out: terms of
second order in the noises, which are as large as the noise of layers far better than the worst one (40 dB better
than one at 10 dB came out 3 dB off); the rounding of a residual's or a pool's input, which
belongs to no layer, and that of the bias to 32 bits. A layer's own noise, at its own output, needs no
pass: it is `calibration.stragglers`'s.
"""

from __future__ import annotations

import itertools
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from calibration.placement import PLACEMENTS
from calibration.placement.layers import name_of
from calibration.stragglers import layer_noise
from calibration.switches import ROWS_A_RUN, hadamard, layers_of_placement, switched_graph, versions_of
from calibration.table import check_table
from pipeline.artifacts import CalibrationTable, ModelArtifact, TensorStatistics
from pipeline.contracts import Batches, Progress, RunnerFactory
from pipeline.errors import CalibrationError
from pipeline.onnx_files import load_model, save_model

__all__ = ["N_IMAGES", "N_PATTERNS", "LayerSensitivity", "PatternFit", "Patterns", "measure_sensitivity"]

N_IMAGES = 16
"""Images of a pass: 16 x 31 sums for the energies of a few hundred layers."""
N_PATTERNS = 32
"""Versions of each image. A power of two."""


@dataclass(frozen=True, slots=True)
class LayerSensitivity:
    """What int8 does to one layer, and through it to the logits."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "allow_inf_nan": False}

    layer: str
    """The name of its output tensor."""
    op_type: str
    nsr: float
    """Noise-to-signal power ratio at its own output: `calibration.stragglers.LayerNoise`."""
    logits_nsr: float
    """The same at the logits, where the signal is theirs. 0 where the noise is below what the pass resolves."""
    macs: int
    """Multiplications for one image."""

    @property
    def sqnr_db(self) -> float | None:
        """Of its own output, in decibels; ``None`` where nothing is lost."""
        return -10.0 * math.log10(self.nsr) if self.nsr > 0.0 else None

    @property
    def logits_sqnr_db(self) -> float | None:
        """Of the logits with this layer alone in int8; ``None`` where nothing is lost, or too little to be seen."""
        return -10.0 * math.log10(self.logits_nsr) if self.logits_nsr > 0.0 else None

    def to_json(self) -> dict[str, Any]:
        """JSON-compatible values; ``null`` for an infinite ratio."""
        return {
            "layer": self.layer,
            "op_type": self.op_type,
            "sqnr_db": self.sqnr_db,
            "logits_sqnr_db": self.logits_sqnr_db,
            "macs": self.macs,
        }


def measure_sensitivity(
    model: ModelArtifact,
    table: CalibrationTable,
    statistics: TensorStatistics,
    batches: Batches,
    runner_factory: RunnerFactory,
    progress: Progress,
    *,
    placement: str = "cpu",
    n_images: int = N_IMAGES,
    corrected: ModelArtifact | None = None,
) -> tuple[LayerSensitivity, ...]:
    """One pass over some of the calibration images.

    Args:
        model: the folded fp32 model.
        table: what its grids are made of.
        statistics: what `table` was derived from.
        batches: uint8 NHWC batches; the first `n_images` images are used.
        runner_factory: makes the fp32 runner.
        progress: told of every image.
        placement: the engine family, a key of `calibration.placement.PLACEMENTS`.
        n_images: images to look at.
        corrected: `model` with the weights and biases that its layers have in int8
            (`calibration.quantizer.Corrected.model`); ``None``: they have its own.

    Returns:
        Every quantized layer, the most harmful to the logits first; equals by their own noise.

    Raises:
        IntegrityError: the table is another model's.
        CalibrationError: there is no image, nothing is quantized, or the logits are all zero.
    """
    check_table(table, model)
    graph = load_model(model.path)
    placed = PLACEMENTS[placement](graph)
    noise = layer_noise(graph.graph, placed, table.ranges, statistics)
    if not noise:
        raise CalibrationError(f"{model.path} has no quantized layer whose sensitivity could be measured")
    op_types = {name_of(node.outputs[0]): node.op_type for node in graph.graph}
    fixed = model.inputs[0].shape[0]
    rows = fixed if isinstance(fixed, int) else ROWS_A_RUN
    source = None if corrected is None or corrected.sha256 == model.sha256 else load_model(corrected.path)
    switched_graph(graph, layers_of_placement(graph, placed, table.ranges, source), rows)
    del source
    with tempfile.TemporaryDirectory(prefix="edgefold-sensitivity-") as folder:
        path = Path(folder) / "switched.onnx"
        save_model(graph, path)
        del graph
        fit = PatternFit(len(noise))
        images = itertools.islice((image for batch in batches() for image in batch), n_images)
        with runner_factory(path, ()) as runner:
            for index, image in enumerate(images):
                patterns = Patterns(len(noise), seed=index)
                fit.add(patterns, versions_of(runner, model, image, rows, patterns.switches)[0])
                progress("sensitivity", index + 1, n_images)
    energies = fit.energies()
    found = [
        LayerSensitivity(entry.layer, op_types[entry.layer], entry.nsr, float(energy), entry.macs)
        for entry, energy in zip(noise, energies, strict=True)
    ]
    return tuple(sorted(found, key=lambda entry: (-entry.logits_nsr, -entry.nsr)))


class Patterns:
    """Which layer is switched by which pattern in the versions of one image."""

    def __init__(self, n_layers: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        columns = hadamard(N_PATTERNS)[:, 1:]
        self.columns = columns
        self.of_layer = rng.permutation(np.arange(n_layers) % columns.shape[1])
        signs = rng.choice(np.array([-1.0, 1.0]), n_layers)
        self.switches = (columns[:, self.of_layer] * signs).astype(np.float32)


class PatternFit:
    """Sums over the images: the normal equations of the layers' energies, and the energy of the logits."""

    def __init__(self, n_layers: int) -> None:
        self._gram = np.zeros((n_layers, n_layers))
        self._moments = np.zeros(n_layers)
        self._signal = 0.0
        self._n_images = 0

    def add(self, patterns: Patterns, logits: NDArray[np.float64]) -> None:
        """Take in one image: float64 ``[N_PATTERNS, C]``."""
        parts = patterns.columns.T @ logits / N_PATTERNS
        energies = np.einsum("pc,pc->p", parts, parts)
        self._gram += patterns.of_layer[:, None] == patterns.of_layer[None, :]
        self._moments += energies[patterns.of_layer]
        mean = logits.mean(axis=0)
        self._signal += float(mean @ mean)
        self._n_images += 1

    def energies(self) -> NDArray[np.float64]:
        """The noise-to-signal ratio of each layer at the logits; what comes out negative is 0."""
        if self._n_images == 0:
            raise CalibrationError("no image was given to measure sensitivity on: pass real images")
        if not self._signal > 0.0 or not np.isfinite(self._moments).all():
            raise CalibrationError(
                f"the logits of {self._n_images} images have energy {self._signal}, and noise is measured against "
                "it; check the model's weights and its preprocessing"
            )
        solution, *_ = np.linalg.lstsq(self._gram, self._moments, rcond=None)
        # Both sums run over the same images: their quotient is a ratio of energies.
        ratio: NDArray[np.float64] = np.maximum(solution * self._n_images / self._signal, 0.0)
        return ratio
