"""Golden frames: pictures whose network pixels and logits are known, to check a live path against.

A camera path that swaps two channels, scales to 0–1 or skips the crop still gives answers, only worse ones: a
top-1 of 75.6 fell to 35.1 in one reported case (tensorrtx issue 719), and nothing failed. So a build renders a few
frames, takes them through `pipeline.preprocess` and through its engines, and keeps all three in the bundle.
`check_live_path` hands the same frames to whatever prepares frames here, as cameras deliver them, and compares.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.artifacts import Frame, PixelFormat, PreprocessSpec
from pipeline.bundle import Bundle
from pipeline.contracts import Runner
from pipeline.errors import DataError, EngineError, IntegrityError
from pipeline.golden_diagnosis import Handed, diagnose, to_levels
from pipeline.golden_frames import GOLDEN_NAME, GoldenFrames, read_golden
from pipeline.metrics import sqnr_db
from pipeline.preprocess import normalize

__all__ = ["LOGITS_LIMIT_DB", "GoldenReport", "check_live_path", "golden_logits"]

_FOLDED_NAME = "model.onnx"
_PIXEL_LEVELS = 1.0
"""What a live path may differ by. `pipeline.preprocess` itself gives the same pixels everywhere; a kernel on a GPU is
allowed to round one level the other way (`engines.tensorrt.preprocess`)."""
_FLOAT_LEVELS = 0.01
"""More of it where pixels are normalized in float32: an error of 1e-7 of a value, in levels."""

LOGITS_LIMIT_DB = {"fp32": 60.0, "fp16": 30.0, "bf16": 20.0, "int8": 15.0}
"""The least SQNR of the logits against those of the build, by the precision of the engine.

fp32: other kernels add in another order; 115 dB and more were measured between OpenVINO and ONNX Runtime. int8: two
engines round the same graph differently wherever a value lies on the edge of a step; 30.8 to 38.0 dB were measured, and half
of the least in dB is asked (`benchmarks/golden_limits.py`). Half precision is not measured here: every activation is rounded
by 2^-12 (2^-9) on the average, which is 72 (54) dB a layer, and a hundred layers leave 20 dB less. An engine of another
model, or one that computes nonsense, lies about 0 dB."""


@dataclass(frozen=True, slots=True)
class GoldenReport:
    """What a check found. `verified` is false only where there was nothing to compare with.

    Attributes:
        checked_utc: ISO 8601, when.
        formats: pixel formats that were handed over and came out right.
        refused: formats that the path does not take; a refusal is an answer, a wrong picture is not.
        max_levels: largest difference of a pixel, in levels of 0 to 255.
        logits_db: SQNR against the logits of the build; ``None`` where no engine was given.
        limit_db: the least that was asked of it.
        reason: why it is not verified.
    """

    verified: bool
    checked_utc: str
    n_frames: int = 0
    formats: tuple[PixelFormat, ...] = ()
    refused: tuple[PixelFormat, ...] = ()
    max_levels: float = 0.0
    logits_db: float | None = None
    limit_db: float | None = None
    reason: str | None = None

    def to_json(self) -> dict[str, Any]:
        """JSON-compatible values; an infinite ratio (the same to the bit) is the string ``"inf"``, as in a manifest."""
        values = asdict(self)
        if self.logits_db is not None and math.isinf(self.logits_db):
            values["logits_db"] = str(self.logits_db)
        return {**values, "summary": self.summary()}

    def summary(self) -> str:
        """One line for a person, a log and the page."""
        if not self.verified:
            return f"not verified: {self.reason}"
        engine = ""
        if self.logits_db is not None:
            figure = "exactly" if math.isinf(self.logits_db) else f"to {self.logits_db:.0f} dB"
            engine = f", the engine's answers {figure}"
        refused = f", refuses {' '.join(self.refused)}" if self.refused else ""
        return (
            f"verified {self.checked_utc}: {self.n_frames} golden frames as {' '.join(self.formats)}, "
            f"pixels to {self.max_levels:g} levels{engine}{refused}"
        )


def golden_logits(
    golden: GoldenFrames, runner: Runner, spec: PreprocessSpec, color: Literal["RGB", "BGR"]
) -> NDArray[np.float32]:
    """What an engine answers to the golden pixels, float32 (N, C).

    Raises:
        EngineError: an answer is not finite.
    """
    takes_pixels = runner.inputs[0].dtype == "uint8"
    rows = []
    for name, pixels in zip(golden.names, golden.pixels, strict=True):
        image = pixels[np.newaxis]
        rows.append(_answer(runner, image if takes_pixels else normalize(image, spec, color), name))
    return np.stack(rows)


def check_live_path(
    bundle: Bundle,
    prepare: Callable[[Frame], NDArray[Any]],
    runner: Runner | None,
    *,
    file: str | None = None,
) -> GoldenReport:
    """Compares what a live path makes of the golden frames with what the build made of them.

    Every frame is handed over as BGR, RGB and BGRA, and as BGR cut out of a wider buffer; a frame without colour also as
    GRAY. BGR must be taken; another format may be refused with `DataError`, but not turned into other pixels.

    Args:
        bundle: opened.
        prepare: frame to the engine's input, with or without the batch dimension: the function that the stream uses.
        runner: the loaded engine, to compare its answers too; ``None``: the pixels only.
        file: the graph of the bundle that `runner` runs, where it is not the bundle's engine.

    Returns:
        A report with ``verified``; without where the bundle has no golden frames.

    Raises:
        IntegrityError: the pixels differ, with the mistake that explains it; or the engine answers otherwise.
        EngineError: an answer is not finite.
    """
    now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    golden = read_golden(bundle)
    if golden is None:
        return GoldenReport(False, now, reason="the bundle was built before golden frames; build it again")
    manifest = bundle.manifest
    takes_pixels = (manifest if runner is None else runner).inputs[0].dtype == "uint8"
    report = GoldenReport(True, now, len(golden.names))
    for pixel_format, frames in _handed_over(golden).items():
        try:
            results = {name: _unbatched(prepare(frame)) for name, frame in frames}
        except DataError:
            if pixel_format == "BGR":
                raise
            report = replace(report, refused=(*report.refused, pixel_format))
            continue
        levels = _compare(bundle, golden, results, pixel_format, takes_pixels)
        report = replace(
            report, formats=(*report.formats, pixel_format), max_levels=max(report.max_levels, levels)
        )
    if runner is None:
        return report
    logits = golden_logits(golden, runner, manifest.preprocess, manifest.input_color)
    found_db, limit_db = _compare_logits(bundle, golden, logits, file)
    return replace(report, logits_db=found_db, limit_db=limit_db)


def _compare(
    bundle: Bundle,
    golden: GoldenFrames,
    results: Mapping[str, NDArray[Any]],
    pixel_format: PixelFormat,
    takes_pixels: bool,
) -> float:
    """The largest difference in levels; raises where it is past the limit."""
    spec, color = bundle.manifest.preprocess, bundle.manifest.input_color
    worst_levels, worst_name = 0.0, ""
    for name, result in results.items():
        expected = golden.pixels[golden.names.index(name)]
        shown = to_levels(result, expected, spec, color, takes_pixels)
        levels = math.inf if shown is None else float(np.abs(shown - expected).max())
        if not levels <= worst_levels:
            worst_levels, worst_name = levels, name
    limit = _PIXEL_LEVELS if takes_pixels else _PIXEL_LEVELS + _FLOAT_LEVELS
    if worst_levels <= limit:
        return round(worst_levels, 2)
    handed = [
        Handed(golden.images[i], golden.pixels[i], results[name])
        for i, name in enumerate(golden.names)
        if name in results
    ]
    image = golden.images[golden.names.index(worst_name)]
    amount = (
        "is no such input at all"
        if math.isinf(worst_levels)
        else f"differs by up to {worst_levels:.0f} levels"
    )
    raise IntegrityError(
        f"the live path does not make the pixels that bundle {str(bundle.path)!r} was built with: golden frame "
        f"{worst_name!r} ({image.shape[1]}×{image.shape[0]}, as {pixel_format}) {amount} (limit {limit:g}). "
        f"{diagnose(handed, spec, color, takes_pixels)}"
    )


def _compare_logits(
    bundle: Bundle, golden: GoldenFrames, logits: NDArray[np.float32], file: str | None
) -> tuple[float, float]:
    """SQNR and its limit; raises where it is below."""
    manifest = bundle.manifest
    file = file or manifest.ready_engine().file
    precision: str = "fp32" if file == _FOLDED_NAME and manifest.precision != "fp32" else manifest.precision
    graph = file
    if manifest.deployment is not None and file != _FOLDED_NAME:
        chosen = [c.file for c in manifest.deployment.candidates if c.name == manifest.deployment.chosen]
        graph = chosen[0] if chosen else file
    expected = golden.logits.get(graph)
    if expected is None:
        raise IntegrityError(
            f"{GOLDEN_NAME} of bundle {str(bundle.path)!r} has no answers of {graph!r}; it has those of "
            f"{', '.join(golden.logits) or 'nothing'}: build the bundle again"
        )
    if expected.shape != logits.shape:
        raise IntegrityError(
            f"the engine {file!r} of bundle {str(bundle.path)!r} gives {logits.shape[-1]} scores, the build had "
            f"{expected.shape[-1]}: build the bundle again"
        )
    found_db, limit_db = sqnr_db(expected, logits), LOGITS_LIMIT_DB[precision]
    if not found_db >= limit_db:
        raise IntegrityError(
            f"the engine {file!r} of bundle {str(bundle.path)!r} answers otherwise than at the build: {found_db:.1f} dB "
            f"on the golden frames (at least {limit_db:g} for {precision}). The pixels are right, so it is the engine: "
            "delete its cache, build the bundle (or run edgefold finish) again, or compare with --precision fp32"
        )
    return found_db, limit_db


def _handed_over(golden: GoldenFrames) -> dict[PixelFormat, list[tuple[str, Frame]]]:
    """The frames as cameras deliver them, by format; one of them in a buffer with padded rows."""
    forms: dict[PixelFormat, list[tuple[str, Frame]]] = {"BGR": [], "RGB": [], "BGRA": [], "GRAY": []}
    for index, (name, rgb) in enumerate(zip(golden.names, golden.images, strict=True)):
        height, width = rgb.shape[:2]
        padded = np.zeros((height, width + 5, 3), np.uint8)
        padded[:, :width] = rgb[..., ::-1]
        alpha = np.full((height, width, 1), 255 - 40 * index, np.uint8)
        arrays: dict[PixelFormat, NDArray[np.uint8]] = {
            "BGR": padded[:, :width],
            "RGB": rgb,
            "BGRA": np.concatenate([rgb[..., ::-1], alpha], axis=2),
        }
        if (rgb == rgb[..., :1]).all():
            arrays["GRAY"] = np.ascontiguousarray(rgb[..., 0])
        for pixel_format, array in arrays.items():
            forms[pixel_format].append((name, Frame(array, pixel_format, "golden", index, 0)))
    return forms


def _answer(runner: Runner, image: NDArray[Any], name: str) -> NDArray[np.float32]:
    """The scores (C,) of one image (1, …); repeated where the engine takes one batch size only."""
    batch = runner.inputs[0].shape[0]
    if isinstance(batch, int) and batch > 1:
        image = np.repeat(image, batch, axis=0)
    outputs = runner.infer({runner.inputs[0].name: image})
    scores: NDArray[np.float32] = np.array(outputs[runner.outputs[0].name], np.float32)[0].reshape(-1)
    if not np.isfinite(scores).all():
        raise EngineError(
            f"the engine answers golden frame {name!r} with {int((~np.isfinite(scores)).sum())} scores that are not "
            "finite; half precision may overflow in this network: build with --precision int8 or fp32"
        )
    return scores


def _unbatched(prepared: NDArray[Any]) -> NDArray[Any]:
    array = np.asarray(prepared)
    return array[0] if array.ndim == 4 and array.shape[0] == 1 else array
