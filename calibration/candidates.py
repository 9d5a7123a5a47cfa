"""Up to four graphs for a TensorRT that is elsewhere: the device times them, and keeps the fastest that is
accurate enough.

Which precision is fastest on a device, and by how much, is known only there. So the host ships what can
differ, all of it from one calibration:

* ``int8``: every layer in int8 that can be (`calibration.placement.tensorrt`);
* ``int8-mixed``: the few layers that lose most in half precision (`calibration.stragglers`);
* ``int8-untied``: Concats untied where sharing a grid takes a bit or more from a tensor that other layers
  read as well;
* ``fp16`` (or ``bf16``): no int8 at all; what int8 has to beat.

A model is corrected once, with every layer in int8 as the first candidate has them: the others differ from it in few
layers, which get their own weights back where they stay in half precision. Each candidate is then judged as it is.

A candidate that would be the same as another is not made.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from calibration.placement import Placement
from calibration.qdq import activation_params
from calibration.stragglers import MAX_MAC_SHARE, STANDS_OUT, LayerNoise, layer_noise, stragglers
from calibration.table import statistics_sha256
from calibration.tensorrt_form import TensorRTForms
from pipeline.artifacts import CalibrationTable, ModelArtifact, TensorStatistics
from pipeline.errors import IntegrityError
from pipeline.passes.half_precision import HalfType

__all__ = ["Candidate", "float_candidate", "tensorrt_candidates"]

Precision = Literal["int8", "fp16", "bf16", "fp32"]

_WIDENING = 2.0
"""A Concat is untied where it makes some grid this much coarser: one bit of eight."""
_HALF_NAMES: dict[HalfType, Precision] = {"float16": "fp16", "bfloat16": "bf16"}


@dataclass(frozen=True, slots=True)
class Candidate:
    """One graph to be timed.

    Attributes:
        name: ``int8``, ``int8-mixed``, ``int8-untied``, ``fp16`` or ``bf16``.
        model: the strongly typed graph.
        precision: of most of its layers.
        reason: what sets it apart, in words.
        float_layers: layers kept in floating point on purpose, by their output tensor.
        untied_concats: by their output tensor.
    """

    name: str
    model: ModelArtifact
    precision: Precision
    reason: str
    float_layers: frozenset[str] = frozenset()
    untied_concats: frozenset[str] = frozenset()


def tensorrt_candidates(
    model: ModelArtifact,
    table: CalibrationTable,
    out_dir: Path,
    *,
    statistics: TensorStatistics | None = None,
    remainder: HalfType | None = None,
    corrected: ModelArtifact | None = None,
) -> tuple[Candidate, ...]:
    """Write the candidates for `model` as ``model.NAME.onnx`` into `out_dir`.

    Args:
        model: folded fp32 ONNX.
        table: its calibration table.
        out_dir: an existing folder.
        statistics: what `table` was derived from. Without it nobody knows which layers lose most, and
            there is no ``int8-mixed``.
        remainder: the type of what is not int8; ``None``: float16 unless something overflows in it.
        corrected: `model` with the weights and biases of the layers in int8 (`calibration.quantizer.Corrected.model`).

    Returns:
        Two to four candidates, ``int8`` first.

    Raises:
        IntegrityError: the table is another model's, or not derived from `statistics`.
        CalibrationError: no layer can be quantized, or float16 is wanted and does not suffice.
        PassError: a step to TensorRT's form changed what the model computes.
    """
    if statistics is not None and statistics_sha256(statistics) != table.statistics_sha256:
        raise IntegrityError(
            f"the calibration table was derived from statistics {table.statistics_sha256}, not from "
            f"{statistics_sha256(statistics)}; derive it again"
        )
    forms = TensorRTForms(model, table, remainder, corrected=corrected)
    everywhere = forms.placement()

    def path(name: str) -> Path:
        return out_dir / f"model.{name}.onnx"

    half = _HALF_NAMES[forms.remainder]
    candidates = [
        Candidate(
            "int8",
            forms.int8(everywhere, path("int8"))[0],
            "int8",
            f"all {len(everywhere.weights)} layers that can be in int8 are; the rest is {half}",
        )
    ]
    if statistics is not None:
        noise = layer_noise(forms.graph, everywhere, table.ranges, statistics)
        worst = stragglers(noise)
        if worst:
            layers = frozenset(entry.layer for entry in worst)
            mixed, _ = forms.int8(forms.placement(float_layers=layers), path("int8-mixed"))
            candidates.append(
                Candidate("int8-mixed", mixed, "int8", _mixed_reason(worst, noise, half), layers)
            )
    widened = _widened_by(forms, everywhere, table)
    if widened:
        concats = frozenset(widened)
        untied, _ = forms.int8(forms.placement(untied_concats=concats), path("int8-untied"))
        tensor, factor = max(widened.values(), key=lambda item: item[1])
        candidates.append(
            Candidate(
                "int8-untied",
                untied,
                "int8",
                f"{len(concats)} Concats untied: sharing a grid makes that of {tensor!r} {factor:.1f} times "
                "coarser; their inputs are requantized instead",
                untied_concats=concats,
            )
        )
    candidates.append(
        Candidate(half, forms.half(path(half))[0], half, f"{half} throughout: {forms.remainder_reason}")
    )
    return tuple(candidates)


def float_candidate(model: ModelArtifact, out_dir: Path, precision: Literal["fp16", "fp32"]) -> Candidate:
    """The one candidate of a build without int8.

    Args:
        model: folded fp32 ONNX.
        out_dir: where ``model.NAME.onnx`` goes.
        precision: bfloat16 takes the place of float16 where a constant overflows in it.

    Raises:
        PassError: lowering changed what the model computes.
    """
    forms = TensorRTForms(model, None)
    if precision == "fp32":
        full, _ = forms.float32(out_dir / "model.fp32.onnx")
        return Candidate("fp32", full, "fp32", "fp32 throughout, as asked for")
    half = _HALF_NAMES[forms.remainder]
    lowered, _ = forms.half(out_dir / f"model.{half}.onnx")
    return Candidate(half, lowered, half, f"{half} throughout: {forms.remainder_reason}")


def _mixed_reason(worst: tuple[LayerNoise, ...], noise: tuple[LayerNoise, ...], half: str) -> str:
    share = sum(entry.macs for entry in worst) / sum(entry.macs for entry in noise)
    held = sum(entry.nsr for entry in worst) / sum(entry.nsr for entry in noise)
    ends = f"{min(entry.sqnr_db for entry in worst):.1f} to {max(entry.sqnr_db for entry in worst):.1f} dB"
    return (
        f"{len(worst)} of {len(noise)} layers in {half}: they alone hold {held:.0%} of the layers' own "
        f"noise ({ends}) in {share:.1%} of the multiplications. Taken were those {STANDS_OUT:.0f} times "
        f"as noisy as the median, until half was held or {MAX_MAC_SHARE:.0%} of the multiplications reached"
    )


def _widened_by(
    forms: TensorRTForms, everywhere: Placement, table: CalibrationTable
) -> dict[str, tuple[str, float]]:
    """Concats that make the grid of some tensor coarser by `_WIDENING`: that tensor, and how much."""

    def scales(placement: Placement) -> dict[str, float]:
        return {
            point.tensor: float(activation_params(point, placement, table.ranges).scale)
            for point in placement.activations
        }

    tied = scales(everywhere)
    widened: dict[str, tuple[str, float]] = {}
    for concat in forms.concats():
        untied = scales(forms.placement(untied_concats=frozenset({concat})))
        factors = {tensor: tied[tensor] / scale for tensor, scale in untied.items()}
        tensor = max(factors, key=factors.__getitem__)
        if factors[tensor] >= _WIDENING:
            widened[concat] = (tensor, factors[tensor])
    return widened
