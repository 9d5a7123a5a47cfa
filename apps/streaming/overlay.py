"""What is drawn over a frame: top-k with confidence bars, rate, drops, latency by stage."""

from __future__ import annotations

import unicodedata
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from apps.streaming import opencv
from apps.streaming.metrics import MetricsSnapshot
from apps.streaming.predictions import Prediction
from pipeline.artifacts import PixelFormat, YuvCoding
from pipeline.yuv import planes_to_bgr

__all__ = ["MIN_CANVAS_HW", "OverlayPainter", "to_bgr"]

MIN_CANVAS_HW = (360, 480)
"""Smaller frames are enlarged: a 32x32 picture has no room for a legible letter."""

_MAX_SIDE = 3840
_PIXEL_ART_SCALE = 4.0
_PANEL_OPACITY = 0.62
_WHITE = (240, 240, 240)
_GREY = (170, 170, 170)
_ACCENT = (90, 200, 120)  # BGR; the first class, and a right answer
_SECOND = (150, 130, 110)
_WRONG = (80, 80, 235)
_STAGE_NAMES = {"preprocess": "prep", "postprocess": "post"}


def to_bgr(
    image: NDArray[np.uint8], pixel_format: PixelFormat, yuv: YuvCoding | None = None
) -> NDArray[np.uint8]:
    """uint8 (H, W, 3) BGR for drawing and encoding; a view where the channels already are."""
    if yuv is not None:
        return planes_to_bgr(image, yuv)
    if pixel_format == "GRAY":
        return np.repeat(image[:, :, np.newaxis], 3, axis=2)
    return image[:, :, :3] if pixel_format.startswith("BGR") else image[:, :, 2::-1]


class OverlayPainter:
    """Draws the state of the stream onto a copy of a frame, at least `MIN_CANVAS_HW` in size.

    The look follows the canvas: text is a thirtieth of its height, panels sit in two corners.

    Raises:
        UnsupportedError: OpenCV is missing.
    """

    def __init__(self) -> None:
        self._cv2 = opencv.load("drawing the overlay")
        self._font = self._cv2.FONT_HERSHEY_SIMPLEX

    def draw(
        self,
        image: NDArray[np.uint8],
        pixel_format: PixelFormat,
        prediction: Prediction,
        metrics: MetricsSnapshot | None,
        yuv: YuvCoding | None = None,
    ) -> NDArray[np.uint8]:
        """A new picture: uint8 (H, W, 3) BGR, even sides (codecs want them); the classes alone without `metrics`."""
        canvas = self._canvas(to_bgr(image, pixel_format, yuv))
        height, width = canvas.shape[:2]
        unit = max(14, round(height / 30))
        self._draw_classes(canvas, prediction, unit)
        if metrics is not None:
            self._draw_metrics(canvas, metrics, unit, compact=width < 22 * unit)
        return canvas

    def _canvas(self, bgr: NDArray[np.uint8]) -> NDArray[np.uint8]:
        cv2 = self._cv2
        height, width = bgr.shape[:2]
        scale = max(1.0, MIN_CANVAS_HW[0] / height, MIN_CANVAS_HW[1] / width)
        scale = min(scale, _MAX_SIDE / max(height, width))
        if scale != 1.0:
            # Few pixels enlarged a lot are shown as they are; a blur would claim detail nobody saw.
            method = cv2.INTER_NEAREST if scale >= _PIXEL_ART_SCALE else cv2.INTER_LINEAR
            size = (2 * max(1, round(width * scale / 2)), 2 * max(1, round(height * scale / 2)))
            bgr = cv2.resize(np.ascontiguousarray(bgr), size, interpolation=method)
        height, width = bgr.shape[:2]
        canvas_h = max(height + height % 2, MIN_CANVAS_HW[0])
        canvas_w = max(width + width % 2, MIN_CANVAS_HW[1])
        canvas = np.zeros((canvas_h, canvas_w, 3), np.uint8)
        top, left = (canvas_h - height) // 2, (canvas_w - width) // 2
        canvas[top : top + height, left : left + width] = bgr
        return canvas

    def _draw_classes(self, canvas: NDArray[np.uint8], prediction: Prediction, unit: int) -> None:
        width = canvas.shape[1]
        row, pad = round(1.75 * unit), unit // 2
        panel_w = min(width - 2 * pad, 19 * unit)
        panel_h = row * len(prediction.top) + pad
        x, y = pad, pad
        self._panel(canvas, x, y, panel_w, panel_h)
        number_w = round(3.4 * unit)
        bar_x = x + pad
        bar_w = panel_w - 2 * pad - number_w
        for rank, ranked in enumerate(prediction.top):
            baseline = y + pad + row * rank + unit
            color = _ACCENT if rank == 0 else _SECOND
            if rank == 0 and prediction.correct is False:
                color = _WRONG
            self._text(canvas, ranked.label, (bar_x, baseline), unit, _WHITE if rank == 0 else _GREY, bar_w)
            bar_top, bar_h = baseline + round(0.3 * unit), max(2, unit // 5)
            self._fill(canvas, bar_x, bar_top, bar_w, bar_h, (60, 60, 60))
            self._fill(canvas, bar_x, bar_top, round(bar_w * ranked.confidence), bar_h, color)
            percent = f"{100 * ranked.confidence:.0f}%"
            self._text(canvas, percent, (x + panel_w - pad, baseline), unit, _WHITE, number_w, align="right")

    def _draw_metrics(
        self, canvas: NDArray[np.uint8], metrics: MetricsSnapshot, unit: int, compact: bool
    ) -> None:
        """Bottom left: a headline, and below it the percentiles of every stage that took time."""
        height = canvas.shape[0]
        size = max(10, round(0.8 * unit))
        row, pad = round(1.5 * size), unit // 2
        headline = f"{metrics.fps:.0f} FPS   {sum(metrics.dropped.values())} dropped"
        if metrics.top1 is not None:
            headline += f"   top-1 {100 * metrics.top1:.1f}%"
        shown = ("infer", "age") if compact else tuple(metrics.latency)
        stages = [(name, metrics.latency[name]) for name in shown if metrics.latency[name].count]
        panel_w = min(canvas.shape[1] - 2 * pad, 19 * unit)
        columns = [panel_w - 2 * pad - round(c * size) for c in (8.4, 4.2, 0.0)]
        panel_h = row * (2 + len(stages)) + pad
        x, y = pad, height - pad - panel_h
        self._panel(canvas, x, y, panel_w, panel_h)
        left, baseline = x + pad, y + row
        self._text(canvas, headline, (left, baseline), size, _WHITE, panel_w - 2 * pad)
        baseline += row
        self._text(canvas, "ms", (left, baseline), size, _GREY)
        for column, title in zip(columns, ("p50", "p95", "p99"), strict=True):
            self._text(canvas, title, (left + column, baseline), size, _GREY, align="right")
        for name, latency in stages:
            baseline += row
            self._text(canvas, _STAGE_NAMES.get(name, name), (left, baseline), size, _WHITE)
            for column, value in zip(columns, (latency.p50_ms, latency.p95_ms, latency.p99_ms), strict=True):
                self._text(
                    canvas, _milliseconds(value), (left + column, baseline), size, _WHITE, align="right"
                )

    def _panel(self, canvas: NDArray[np.uint8], x: int, y: int, width: int, height: int) -> None:
        region = canvas[max(0, y) : y + height, max(0, x) : x + width]
        # Darkening keeps the picture visible behind the text and the text readable on white.
        region[:] = self._cv2.convertScaleAbs(region, alpha=1.0 - _PANEL_OPACITY, beta=0)

    def _fill(self, canvas: NDArray[Any], x: int, y: int, width: int, height: int, color: Any) -> None:
        canvas[y : y + height, x : x + width] = color

    def _text(
        self,
        canvas: NDArray[np.uint8],
        text: str,
        at: tuple[int, int],
        size: int,
        color: tuple[int, int, int],
        max_width: int | None = None,
        align: Literal["left", "right"] = "left",
    ) -> None:
        """One line with its baseline at `at`, capitals `size` * 0.7 high, cut to `max_width`."""
        scale = size / 30.0  # FONT_HERSHEY_SIMPLEX has 21-pixel capitals at scale 1
        thickness = max(1, round(size / 16))
        text = _ascii(text)
        width = self._width(text, scale, thickness)
        while max_width is not None and width > max_width and len(text) > 1:
            text = text.rstrip(".")[:-1].rstrip() + ".." if len(text) > 3 else text[:-1]
            width = self._width(text, scale, thickness)
        x = at[0] - width if align == "right" else at[0]
        self._cv2.putText(canvas, text, (x, at[1]), self._font, scale, color, thickness, self._cv2.LINE_AA)

    def _width(self, text: str, scale: float, thickness: int) -> int:
        return int(self._cv2.getTextSize(text, self._font, scale, thickness)[0][0])


def _milliseconds(value: float) -> str:
    return f"{value:.1f}" if value < 99.95 else f"{value:.0f}"


def _ascii(text: str) -> str:
    """OpenCV's built-in font has ASCII only: accents are dropped, other letters become ``?``."""
    decomposed = unicodedata.normalize("NFKD", text)
    without_accents = "".join(c for c in decomposed if not unicodedata.combining(c))
    return without_accents.encode("ascii", "replace").decode()
