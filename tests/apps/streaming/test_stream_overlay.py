from __future__ import annotations

import sys

import numpy as np
import pytest
from tolerances import YUV_ROUNDING_LEVELS

from apps.streaming.metrics import StreamMetrics
from apps.streaming.overlay import MIN_CANVAS_HW, OverlayPainter, to_bgr
from apps.streaming.predictions import Prediction, RankedClass
from pipeline.artifacts import YuvCoding
from pipeline.errors import UnsupportedError
from pipeline.yuv import rgb_to_planes


def prediction(confidence: float = 0.8, truth: int | None = None, label: str = "stop") -> Prediction:
    top = (RankedClass(0, label, confidence), RankedClass(1, "yield", 0.1), RankedClass(2, "crossing", 0.0))
    return Prediction("cam", 0, 0, top, truth)


def metrics(n: int = 3) -> StreamMetrics:
    result = StreamMetrics()
    for _ in range(n):
        for stage in ("capture", "queue", "preprocess", "infer", "postprocess", "age"):
            result.record(stage, 0.0123)
        result.frame_inferred(None)
    return result


def draw(image: np.ndarray, pixel_format: str = "BGR", shown: Prediction | None = None) -> np.ndarray:
    return OverlayPainter().draw(image, pixel_format, shown or prediction(), metrics().snapshot())


@pytest.mark.parametrize(
    "hw",
    [(2, 2), (32, 32), (8, 1000), (1000, 8), (240, 320), (241, 321), (360, 480), (1080, 1920), (2160, 3840)],
)
def test_any_frame_size_gives_a_legible_even_canvas(hw: tuple[int, int]) -> None:
    canvas = draw(np.full((*hw, 3), 128, np.uint8))
    height, width = canvas.shape[:2]
    assert canvas.dtype == np.uint8
    assert height >= MIN_CANVAS_HW[0]
    assert width >= MIN_CANVAS_HW[1]
    assert height % 2 == width % 2 == 0
    assert max(height, width) <= 3840
    # Text is there: bright strokes in both panels, on a darkened ground.
    assert canvas[: height // 3].max() > 200
    assert canvas[height // 2 :, : width // 2].max() > 200


def test_the_frame_itself_is_not_drawn_upon() -> None:
    image = np.full((480, 640, 3), 90, np.uint8)
    canvas = draw(image)
    assert (image == 90).all()
    assert (canvas[200:220, 620:] == 90).all()  # away from the panels the picture is what it was


@pytest.mark.parametrize(
    ("pixel_format", "pixel"),
    [
        ("RGB", (200, 100, 50)),
        ("BGR", (50, 100, 200)),
        ("RGBA", (200, 100, 50, 9)),
        ("BGRA", (50, 100, 200, 9)),
    ],
)
def test_colours_are_right_for_every_format(pixel_format: str, pixel: tuple[int, ...]) -> None:
    image = np.full((480, 640, len(pixel)), pixel, np.uint8)
    np.testing.assert_array_equal(draw(image, pixel_format)[210, 630], (50, 100, 200))


def test_gray_is_shown_gray() -> None:
    np.testing.assert_array_equal(draw(np.full((480, 640), 77, np.uint8), "GRAY")[210, 630], (77, 77, 77))
    assert to_bgr(np.zeros((4, 5), np.uint8), "GRAY").shape == (4, 5, 3)


def test_planes_are_shown_in_their_colours() -> None:
    coding = YuvCoding("bt709", True)
    image = np.full((480, 640, 3), (200, 100, 50), np.uint8)
    planes = rgb_to_planes(image, coding)
    canvas = OverlayPainter().draw(planes, "I420", prediction(), metrics().snapshot(), coding)
    np.testing.assert_allclose(canvas[210, 630], (50, 100, 200), atol=YUV_ROUNDING_LEVELS)


def green_pixels(canvas: np.ndarray) -> int:
    return int((canvas == (90, 200, 120)).all(axis=2).sum())


def test_the_bar_is_as_long_as_the_confidence() -> None:
    image = np.zeros((480, 640, 3), np.uint8)
    full, half = (green_pixels(draw(image, shown=prediction(c))) for c in (1.0, 0.5))
    assert full > 200
    assert half == pytest.approx(full / 2, rel=0.05)


def test_a_wrong_answer_is_marked() -> None:
    image = np.zeros((480, 640, 3), np.uint8)
    assert green_pixels(draw(image, shown=prediction(truth=0))) > 0
    wrong = draw(image, shown=prediction(truth=1))
    assert green_pixels(wrong) == 0
    assert (wrong == (80, 80, 235)).all(axis=2).any()


@pytest.mark.parametrize("label", ["", "x" * 400, "überholverbot", "停车标志", "a\tb\nc"])
def test_any_label_stays_inside_its_panel(label: str) -> None:
    image = np.full((360, 480, 3), 100, np.uint8)
    canvas = draw(image, shown=prediction(label=label))
    assert (canvas[:100, 300:] == 100).all()


def test_without_opencv_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(UnsupportedError, match=r"drawing the overlay needs OpenCV.*edgefold\[opencv\]"):
        OverlayPainter()
