"""Which layers the loss of an int8 graph comes from: of the graph that ships, on the images it was judged on.

Two questions, both by `calibration.switches`, from the folded fp32 graph and its Q/DQ form alone:

* *What does each layer do to the logits?* The energy of its noise there, over the energy of the logits, on an
  even selection of the images: `calibration.sensitivity`'s measure, on the weights, biases and grids that ship.
* *Which layers turned an image?* Between the answers ``a`` in fp32 and ``b`` in int8 lies the margin
  ``z_a - z_b``; the noises of all layers move it until it is negative. With more patterns than layers nobody
  shares one, and the signed part of every layer can be read off: to first order their sum is the whole movement,
  and noises that cancel show opposite signs.

What the sum leaves unexplained (terms of second order, and what belongs to no layer: the rounding at a residual's
or a pool's input) is reported beside it, measured against the margins of the real int8 engine.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from calibration.placement.layers import name_of
from calibration.sensitivity import PatternFit, Patterns
from calibration.switches import (
    ROWS_A_RUN,
    SwitchedLayer,
    hadamard,
    layers_of_graph,
    switched_graph,
    versions_of,
)
from pipeline.artifacts import ModelArtifact
from pipeline.contracts import Progress, Runner, RunnerFactory
from pipeline.errors import CalibrationError
from pipeline.onnx_files import load_model, save_model

__all__ = ["MAX_FLIPS", "Attribution", "FlippedMargin", "JudgedImage", "LayerShare", "attribute"]

MAX_FLIPS = 8
"""Images looked into: each takes a run for every layer and more, 256 for Inception-ResNet-v2."""


@dataclass(frozen=True, slots=True)
class JudgedImage:
    """One image as the graph takes it, with the answers of both graphs where they differ."""

    key: str
    pixels: NDArray[np.uint8]
    """``[H, W, 3]``, in the graph's channel order."""
    int8_logits: NDArray[np.float64] | None = None
    """Of the real engine; where it is one to explain."""


@dataclass(frozen=True, slots=True)
class LayerShare:
    """One layer's part in what int8 does."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "allow_inf_nan": False}

    layer: str
    """The name of its output tensor."""
    op_type: str
    sqnr_db: float | None
    """Of its own output, fed with what fp32 feeds it; ``None``: nothing is lost."""
    logits_sqnr_db: float | None
    """Of the logits with this layer alone in int8; ``None``: too little to be seen."""
    logits_share: float
    """Of the sum of all layers' noise energies at the logits, in [0, 1]."""
    flip_share: float | None
    """Of the way that the margins of the flipped images moved, added up over them. The shares sum to 1; negative: it
    pulled them back. ``None`` where no image is looked into."""


@dataclass(frozen=True, slots=True)
class FlippedMargin:
    """An image whose answer int8 changed, and what moved its margin."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "allow_inf_nan": False}

    key: str
    before: int
    """The answer of fp32, by index."""
    after: int
    """That of int8."""
    margin_fp32: float
    """``z_before - z_after``, in units of the logits; positive."""
    margin_int8: float
    """The same of the real engine; negative."""
    explained: float
    """What the layers' parts add up to, to be compared with ``margin_int8 - margin_fp32``."""
    layers: tuple[tuple[str, float], ...]
    """Layer and its part, what moves it most towards the flip first: the `_LISTED` largest."""


_LISTED = 5


@dataclass(frozen=True, slots=True)
class Attribution:
    """What each int8 layer does to the answers."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "allow_inf_nan": False}

    layers: tuple[LayerShare, ...]
    """The most harmful to the logits first."""
    flips: tuple[FlippedMargin, ...]
    n_images: int
    """That the energies were measured on."""
    n_float_layers: int
    """Convolutions and matrix products that are not int8 in this graph."""

    @property
    def explained(self) -> float | None:
        """The layers' parts over how far the margins really moved, added up; near 1: little is left unexplained."""
        moved = sum(flip.margin_int8 - flip.margin_fp32 for flip in self.flips)
        return sum(flip.explained for flip in self.flips) / moved if moved else None

    def to_json(self) -> dict[str, Any]:
        """JSON-compatible values."""
        return {**asdict(self), "explained": self.explained}


def attribute(
    model: ModelArtifact,
    quantized_path: Path,
    sample: Sequence[NDArray[np.uint8]],
    flipped: Sequence[JudgedImage],
    runner_factory: RunnerFactory,
    progress: Progress,
) -> Attribution:
    """Measure what every int8 layer does.

    Args:
        model: the folded fp32 model.
        quantized_path: the int8 graph that was made of it, not equalized: its channels have the scales of fp32.
        sample: uint8 ``[H, W, 3]`` images for the energies at the logits.
        flipped: images whose answers differ, with `JudgedImage.int8_logits`; those that fp32 here answers as int8
            does are passed over (another stage of the chain turned them).
        runner_factory: makes the fp32 runner.
        progress: told of every image.

    Raises:
        CalibrationError: no layer is int8, there is no image, or the logits are all zero.
    """
    graph, quantized = load_model(model.path), load_model(quantized_path)
    layers = layers_of_graph(graph, quantized)
    op_types = {name_of(node.outputs[0]): node.op_type for node in graph.graph}
    if not layers:
        raise CalibrationError(f"{quantized_path} has no int8 layer of {model.path} to attribute a loss to")
    n_layers = sum(kind in ("Conv", "Gemm", "MatMul") for kind in op_types.values())
    fixed = model.inputs[0].shape[0]
    rows = fixed if isinstance(fixed, int) else ROWS_A_RUN
    switched_graph(graph, layers, rows)
    with tempfile.TemporaryDirectory(prefix="edgefold-attribution-") as folder:
        path = Path(folder) / "switched.onnx"
        save_model(graph, path)
        del graph, quantized
        with runner_factory(path, ()) as runner:
            logits_nsr, own_nsr = _energies(runner, model, layers, sample, rows, progress)
            flips, parts = _margins(runner, model, layers, flipped, rows, progress)
    total = float(logits_nsr.sum())
    # Parts are signed, and those that turn an image are negative: so is their sum.
    moved = parts.sum(axis=0) if len(parts) else None
    shares = [
        LayerShare(
            layer=layer.layer,
            op_type=op_types[layer.layer],
            sqnr_db=_decibels(own_nsr[index]),
            logits_sqnr_db=_decibels(logits_nsr[index]),
            logits_share=float(logits_nsr[index]) / total if total > 0.0 else 0.0,
            flip_share=None if moved is None else float(moved[index] / moved.sum()),
        )
        for index, layer in enumerate(layers)
    ]
    return Attribution(
        layers=tuple(sorted(shares, key=lambda share: -share.logits_share)),
        flips=flips,
        n_images=len(sample),
        n_float_layers=n_layers - len(layers),
    )


def _energies(
    runner: Runner,
    model: ModelArtifact,
    layers: Sequence[SwitchedLayer],
    sample: Sequence[NDArray[np.uint8]],
    rows: int,
    progress: Progress,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Noise-to-signal ratios at the logits and at each layer's own output."""
    fit = PatternFit(len(layers))
    own = np.zeros((2, len(layers)))
    for index, image in enumerate(sample):
        patterns = Patterns(len(layers), seed=index)
        logits, energies = versions_of(runner, model, image, rows, patterns.switches)
        fit.add(patterns, logits)
        own += energies
        progress("attribution", index + 1, len(sample))
    ratios = fit.energies()
    return ratios, own[0] / np.maximum(own[1], np.finfo(np.float64).tiny)


def _margins(
    runner: Runner,
    model: ModelArtifact,
    layers: Sequence[SwitchedLayer],
    flipped: Sequence[JudgedImage],
    rows: int,
    progress: Progress,
) -> tuple[tuple[FlippedMargin, ...], NDArray[np.float64]]:
    """The flipped images, and every layer's part in each: float64 ``[flips, layers]``."""
    columns = hadamard(2 ** math.ceil(math.log2(len(layers) + 1)))[:, 1 : len(layers) + 1]
    off = np.zeros((1, len(layers)), np.float32)
    flips: list[FlippedMargin] = []
    parts = []
    for index, image in enumerate(flipped):
        progress("flipped images", index, len(flipped))
        assert image.int8_logits is not None, "an image to explain has int8's answer"
        exact = versions_of(runner, model, image.pixels, rows, off)[0][0]
        before, after = int(exact.argmax()), int(image.int8_logits.argmax())
        if before == after:
            continue
        logits, _ = versions_of(runner, model, image.pixels, rows, columns.astype(np.float32))
        part = columns.T @ (logits[:, before] - logits[:, after]) / len(columns)
        order = np.argsort(part)[:_LISTED]
        parts.append(part)
        flips.append(
            FlippedMargin(
                key=image.key,
                before=before,
                after=after,
                margin_fp32=float(exact[before] - exact[after]),
                margin_int8=float(image.int8_logits[before] - image.int8_logits[after]),
                explained=float(part.sum()),
                layers=tuple((layers[i].layer, float(part[i])) for i in order),
            )
        )
    progress("flipped images", len(flipped), len(flipped))
    return tuple(flips), np.array(parts).reshape(len(flips), len(layers))


def _decibels(nsr: float) -> float | None:
    return -10.0 * math.log10(nsr) if nsr > 0.0 else None
