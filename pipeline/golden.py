"""Golden frames: pictures whose network pixels and logits are known, to check a live path against.

A camera path that swaps two channels, scales to 0–1 or skips the crop still gives answers, only worse ones: a
top-1 of 75.6 fell to 35.1 in one reported case (tensorrtx issue 719), and nothing failed. So a build renders a few
frames, takes them through `pipeline.preprocess` and through its engines, and keeps all three in the bundle.
`check_live_path` hands the same frames to whatever prepares frames here, as cameras deliver them, and compares.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from pipeline.artifacts import Frame, PixelFormat, PreprocessSpec, YuvCoding, YuvMatrix
from pipeline.bundle import Bundle
from pipeline.contracts import Runner
from pipeline.errors import DataError, EngineError, IntegrityError
from pipeline.golden_diagnosis import Handed, diagnose, to_levels
from pipeline.golden_frames import GOLDEN_NAME, GoldenFrames, read_golden
from pipeline.metrics import sqnr_db
from pipeline.preprocess import normalize, to_network_pixels
from pipeline.yuv import planes_to_bgr, rgb_to_planes

__all__ = ["LOGITS_LIMIT_DB", "GoldenReport", "check_live_path", "golden_logits"]

_FOLDED_NAME = "model.onnx"
_PIXEL_LEVELS = 1.0
"""What a live path may differ by. `pipeline.preprocess` itself gives the same pixels everywhere; a kernel on a GPU is
allowed to round one level the other way (`engines.tensorrt.preprocess`)."""
_PLANES_MEAN_LEVELS = 2.5
"""What a frame handed over as planes may differ by on average, from the same planes turned into colours first: the two
round, clip and place chroma otherwise (`pipeline.planar`). 1.6 at most were measured on the golden frames, over five
sizes, two filters, two crops and all codings; the other matrix is 4.8 off, swapped colours 70 (the bars)."""
_CODINGS = tuple(
    YuvCoding(matrix, full_range, "center") for full_range in (False, True) for matrix in get_args(YuvMatrix)
)
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
        max_levels: largest difference of a pixel, in levels of 0 to 255; but for planes.
        planes_levels: largest mean difference of a frame that was handed over as planes; ``None`` where none was taken.
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
    planes_levels: float | None = None
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
        planes = "" if self.planes_levels is None else f" (planes: {self.planes_levels:g} on average)"
        refused = f", refuses {' '.join(self.refused)}" if self.refused else ""
        return (
            f"verified {self.checked_utc}: {self.n_frames} golden frames as {' '.join(self.formats)}, "
            f"pixels to {self.max_levels:g} levels{planes}{engine}{refused}"
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

    Every frame is handed over as BGR, RGB and BGRA, and as BGR cut out of a wider buffer, and as I420 in one of four
    codings; a frame without colour also as GRAY. BGR must be taken; another format may be refused with `DataError`, but not turned into other pixels.

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
    for pixel_format, cases in _handed_over(golden, manifest.preprocess, manifest.input_color).items():
        try:
            results = [_unbatched(prepare(case.frame)) for case in cases]
        except DataError:
            if pixel_format == "BGR":
                raise
            report = replace(report, refused=(*report.refused, pixel_format))
            continue
        levels = _compare(bundle, cases, results, takes_pixels)
        report = replace(report, formats=(*report.formats, pixel_format))
        if pixel_format == "I420":
            report = replace(report, planes_levels=levels)
        else:
            report = replace(report, max_levels=max(report.max_levels, levels))
    if runner is None:
        return report
    logits = golden_logits(golden, runner, manifest.preprocess, manifest.input_color)
    found_db, limit_db = _compare_logits(bundle, golden, logits, file)
    return replace(report, logits_db=found_db, limit_db=limit_db)


def _compare(
    bundle: Bundle, cases: Sequence[_Case], results: Sequence[NDArray[Any]], takes_pixels: bool
) -> float:
    """The largest difference in levels (of planes: the largest mean); raises where it is past the limit."""
    spec, color = bundle.manifest.preprocess, bundle.manifest.input_color
    planar = cases[0].frame.pixel_format == "I420"
    worst_levels, worst = 0.0, cases[0]
    for case, result in zip(cases, results, strict=True):
        shown = to_levels(result, case.expected, spec, color, takes_pixels)
        off = None if shown is None else np.abs(shown - case.expected)
        levels = math.inf if off is None else float(off.mean() if planar else off.max())
        if not levels <= worst_levels:
            worst_levels, worst = levels, case
    limit = _PLANES_MEAN_LEVELS if planar else _PIXEL_LEVELS
    if worst_levels <= (limit if takes_pixels else limit + _FLOAT_LEVELS):
        return round(worst_levels, 2)
    handed = [Handed(case.image, case.expected, result) for case, result in zip(cases, results, strict=True)]
    amount = (
        f"differs by {worst_levels:.0f} levels on average"
        if planar
        else f"differs by up to {worst_levels:.0f} levels"
    )
    raise IntegrityError(
        f"the live path does not make the pixels that bundle {str(bundle.path)!r} was built with: golden frame "
        f"{worst.name!r} ({worst.image.shape[1]}×{worst.image.shape[0]}, as {worst.frame.pixel_format}) "
        f"{'is no such input at all' if math.isinf(worst_levels) else amount} (limit {limit:g}). "
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


@dataclass(frozen=True, slots=True)
class _Case:
    """A golden frame as one format, the picture that it is (uint8 HWC RGB), and what it must become."""

    name: str
    frame: Frame
    image: NDArray[np.uint8]
    expected: NDArray[np.uint8]


def _handed_over(
    golden: GoldenFrames, spec: PreprocessSpec, color: Literal["RGB", "BGR"]
) -> dict[PixelFormat, list[_Case]]:
    """The frames as sources deliver them, by format; one of them in a buffer with padded rows."""
    forms: dict[PixelFormat, list[_Case]] = {"BGR": [], "RGB": [], "BGRA": [], "GRAY": [], "I420": []}
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
            frame = Frame(array, pixel_format, "golden", index, 0)
            forms[pixel_format].append(_Case(name, frame, rgb, golden.pixels[index]))
        if spec.resize != "none":  # which takes one size only, and planes have even sides
            forms["I420"].append(
                _as_planes(name, index, rgb[: height // 2 * 2, : width // 2 * 2], spec, color)
            )
    return {pixel_format: cases for pixel_format, cases in forms.items() if cases}


def _as_planes(
    name: str, index: int, rgb: NDArray[np.uint8], spec: PreprocessSpec, color: Literal["RGB", "BGR"]
) -> _Case:
    """As a decoder hands a frame over. Chroma has lost detail, so what must come out is made of the planes again."""
    coding = _CODINGS[index % len(_CODINGS)]
    planes = rgb_to_planes(rgb, coding)
    bgr = planes_to_bgr(planes, coding)
    expected = to_network_pixels(bgr, "BGR", spec, color)
    return _Case(name, Frame(planes, "I420", "golden", index, 0, yuv=coding), bgr[..., ::-1], expected)


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
