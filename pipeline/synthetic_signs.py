"""The twelve road signs of the synthetic camera, drawn as vector shapes.

Coordinates are the sign's own: x to the right, y down, the plate inside [-1, 1]². A sign is drawn
once, large, and kept as a pyramid of smaller copies, so that a frame resamples from the copy
nearest its own size and neither aliases nor reads pixels it does not need.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise

from PIL import Image, ImageDraw

__all__ = ["CLASS_NAMES", "plate_homography", "project_sign", "sign_pyramid"]

Point = tuple[float, float]
Color = tuple[int, int, int]
Matrix = tuple[tuple[float, float, float], tuple[float, float, float], tuple[float, float, float]]

RED: Color = (193, 24, 36)
BLUE: Color = (22, 84, 168)
WHITE: Color = (240, 240, 236)
BLACK: Color = (24, 24, 26)
YELLOW: Color = (246, 190, 20)

_DRAWN_PX = 768
_LEVELS_PX = (384, 192, 96, 48, 24)


class _Plate:
    """An RGBA canvas addressed in sign coordinates."""

    def __init__(self, size_px: int) -> None:
        self.image = Image.new("RGBA", (size_px, size_px), (0, 0, 0, 0))
        self._draw = ImageDraw.Draw(self.image)
        self._half = size_px / 2

    def _px(self, point: Point) -> Point:
        return (point[0] + 1) * self._half, (point[1] + 1) * self._half

    def polygon(self, points: Sequence[Point], color: Color) -> None:
        self._draw.polygon([self._px(p) for p in points], fill=color)

    def disc(self, center: Point, radius: float, color: Color) -> None:
        x, y = self._px(center)
        r = radius * self._half
        self._draw.ellipse((x - r, y - r, x + r, y + r), fill=color)

    def stroke(self, points: Sequence[Point], width: float, color: Color) -> None:
        """A polyline with round caps and joints."""
        for point in points:
            self.disc(point, width / 2, color)
        for (x0, y0), (x1, y1) in pairwise(points):
            length = math.hypot(x1 - x0, y1 - y0)
            if length == 0:
                continue
            nx, ny = (y0 - y1) / length * width / 2, (x1 - x0) / length * width / 2
            self.polygon(
                [(x0 + nx, y0 + ny), (x1 + nx, y1 + ny), (x1 - nx, y1 - ny), (x0 - nx, y0 - ny)], color
            )


def _arc(center: Point, rx: float, ry: float, start_deg: float, end_deg: float) -> list[Point]:
    """Points along an ellipse; 0° is to the right, 90° is down."""
    n = max(2, round(abs(end_deg - start_deg) / 6))
    angles = [math.radians(start_deg + (end_deg - start_deg) * i / n) for i in range(n + 1)]
    return [(center[0] + rx * math.cos(a), center[1] + ry * math.sin(a)) for a in angles]


def _regular(n: int, radius: float, start_deg: float) -> list[Point]:
    return [
        (radius * math.cos(a), radius * math.sin(a))
        for a in (math.radians(start_deg + 360 * i / n) for i in range(n))
    ]


def _placed(path: Sequence[Point], x: float, y: float, width: float, height: float) -> list[Point]:
    """A path in the unit cell [0, 1]² (y down) moved to a box whose top left is (x, y)."""
    return [(x + px * width, y + py * height) for px, py in path]


# Glyphs as strokes in the unit cell: no font file is needed, and none can differ between machines.
_GLYPHS: dict[str, tuple[list[Point], ...]] = {
    "0": (_arc((0.5, 0.5), 0.5, 0.5, 0, 360),),
    "3": (_arc((0.45, 0.26), 0.45, 0.26, -160, 90) + _arc((0.45, 0.74), 0.5, 0.26, -90, 160),),
    "5": ([(0.92, 0.0), (0.16, 0.0), (0.08, 0.45), *_arc((0.44, 0.68), 0.52, 0.32, -125, 155)],),
    "8": (_arc((0.5, 0.25), 0.42, 0.25, 0, 360), _arc((0.5, 0.75), 0.5, 0.25, 0, 360)),
    "S": (_arc((0.5, 0.25), 0.45, 0.25, -20, -270) + _arc((0.5, 0.75), 0.45, 0.25, -90, 160),),
    "T": ([(0.0, 0.0), (1.0, 0.0)], [(0.5, 0.0), (0.5, 1.0)]),
    "O": (_arc((0.5, 0.5), 0.5, 0.5, 0, 360),),
    "P": ([(0.05, 1.0), (0.05, 0.0), *_arc((0.5, 0.27), 0.45, 0.27, -90, 90), (0.05, 0.54)],),
}


def _write(
    plate: _Plate, text: str, box: tuple[float, float, float, float], weight: float, color: Color
) -> None:
    """Write into ``box`` = (left, top, right, bottom); ``weight`` is the stroke's width."""
    left, top, right, bottom = box
    gap = weight * 1.75
    advance = (right - left + gap) / len(text)
    for i, character in enumerate(text):
        for path in _GLYPHS[character]:
            plate.stroke(_placed(path, left + i * advance, top, advance - gap, bottom - top), weight, color)


def _ring(plate: _Plate) -> None:
    plate.disc((0, 0), 0.97, WHITE)
    plate.disc((0, 0), 0.94, RED)
    plate.disc((0, 0), 0.72, WHITE)


def _blue_disc(plate: _Plate) -> None:
    plate.disc((0, 0), 0.97, WHITE)
    plate.disc((0, 0), 0.92, BLUE)


def _speed(digit: str) -> Callable[[_Plate], None]:
    def draw(plate: _Plate) -> None:
        _ring(plate)
        _write(plate, digit + "0", (-0.44, -0.33, 0.44, 0.33), 0.14, BLACK)

    return draw


def _turn(direction: float) -> Callable[[_Plate], None]:
    """Turn ahead: up from below, then to the side (-1 is left)."""

    def draw(plate: _Plate) -> None:
        _blue_disc(plate)
        bend = _arc((-0.02, 0.08), 0.26, 0.28, 180, 270)
        stem = [(-0.28, 0.56), *bend, (0.22, -0.2)]
        plate.stroke([(x * direction, y) for x, y in stem], 0.22, WHITE)
        head = [(0.18, -0.58), (0.66, -0.2), (0.18, 0.18)]
        plate.polygon([(x * direction, y) for x, y in head], WHITE)

    return draw


def _stop(plate: _Plate) -> None:
    plate.polygon(_regular(8, 1.0, 22.5), WHITE)
    plate.polygon(_regular(8, 0.93, 22.5), RED)
    _write(plate, "STOP", (-0.66, -0.26, 0.66, 0.26), 0.1, WHITE)


def _yield(plate: _Plate) -> None:
    for scale, color in ((1.0, WHITE), (0.95, RED), (0.58, WHITE)):
        plate.polygon(
            [(x * scale, y * scale - 0.14) for x, y in ((-0.98, -0.57), (0.98, -0.57), (0.0, 1.13))], color
        )


def _no_entry(plate: _Plate) -> None:
    plate.disc((0, 0), 0.97, WHITE)
    plate.disc((0, 0), 0.92, RED)
    plate.polygon([(-0.66, -0.17), (0.66, -0.17), (0.66, 0.17), (-0.66, 0.17)], WHITE)


def _priority_road(plate: _Plate) -> None:
    for radius, color in ((0.98, BLACK), (0.94, WHITE), (0.62, YELLOW)):
        plate.polygon(_regular(4, radius, 0), color)


def _roundabout(plate: _Plate) -> None:
    _blue_disc(plate)
    for start_deg in (-90, 30, 150):
        plate.stroke(_arc((0, 0), 0.47, 0.47, start_deg + 14, start_deg + 74), 0.17, WHITE)
        tip, base = math.radians(start_deg + 118), math.radians(start_deg + 78)
        plate.polygon(
            [
                (0.47 * math.cos(tip), 0.47 * math.sin(tip)),
                (0.72 * math.cos(base), 0.72 * math.sin(base)),
                (0.22 * math.cos(base), 0.22 * math.sin(base)),
            ],
            WHITE,
        )


def _pedestrian_crossing(plate: _Plate) -> None:
    for half, color in ((0.9, WHITE), (0.85, BLUE)):
        plate.polygon([(-half, -half), (half, -half), (half, half), (-half, half)], color)
    plate.polygon([(0.0, -0.74), (0.74, 0.64), (-0.74, 0.64)], WHITE)
    plate.disc((0.03, -0.33), 0.095, BLACK)
    plate.stroke([(0.02, -0.16), (-0.02, 0.14)], 0.17, BLACK)
    plate.stroke([(-0.02, 0.14), (0.17, 0.32), (0.2, 0.54)], 0.1, BLACK)
    plate.stroke([(-0.02, 0.14), (-0.11, 0.34), (-0.24, 0.54)], 0.1, BLACK)
    plate.stroke([(-0.2, 0.1), (0.0, -0.16), (0.21, 0.09)], 0.08, BLACK)


def _no_overtaking(plate: _Plate) -> None:
    _ring(plate)
    for x, color in ((-0.31, RED), (0.31, BLACK)):
        plate.polygon([(x - 0.26, -0.02), (x + 0.26, -0.02), (x + 0.26, 0.2), (x - 0.26, 0.2)], color)
        plate.polygon([(x - 0.16, -0.22), (x + 0.16, -0.22), (x + 0.24, 0.0), (x - 0.24, 0.0)], color)
        for wheel in (x - 0.17, x + 0.17):
            plate.polygon(
                [(wheel - 0.06, 0.2), (wheel + 0.06, 0.2), (wheel + 0.06, 0.32), (wheel - 0.06, 0.32)], color
            )


_SIGNS: dict[str, Callable[[_Plate], None]] = {
    "no_entry": _no_entry,
    "no_overtaking": _no_overtaking,
    "pedestrian_crossing": _pedestrian_crossing,
    "priority_road": _priority_road,
    "roundabout": _roundabout,
    "speed_30": _speed("3"),
    "speed_50": _speed("5"),
    "speed_80": _speed("8"),
    "stop": _stop,
    "turn_left": _turn(-1.0),
    "turn_right": _turn(1.0),
    "yield": _yield,
}

CLASS_NAMES: tuple[str, ...] = tuple(_SIGNS)
"""Index to name, in alphabetical order: frames saved to class folders get the same indices."""


@cache
def sign_pyramid(label: int) -> tuple[Image.Image, ...]:
    """The sign of one class as RGBA squares whose side covers [-1, 1], largest first.

    The images are shared between callers; do not change them.

    Args:
        label: index into `CLASS_NAMES`.
    """
    plate = _Plate(_DRAWN_PX)
    _SIGNS[CLASS_NAMES[label]](plate)
    return tuple(plate.image.resize((px, px), Image.Resampling.BOX) for px in _LEVELS_PX)


def plate_homography(
    center: Point, radius: float, yaw: float, pitch: float, roll: float, distance: float
) -> Matrix:
    """Sign coordinates to pixels, for a plate turned in space and seen by a pinhole.

    Args:
        center: pixel that the middle of the plate falls on.
        radius: half the plate's side in pixels, seen from the front.
        yaw: turn about the vertical axis, radians.
        pitch: turn about the horizontal axis, radians.
        roll: turn in the image plane, radians, clockwise as seen.
        distance: from the eye to the plate in plate radii; the nearer, the stronger the perspective.
    """
    cy, sy, cp, sp = math.cos(yaw), math.sin(yaw), math.cos(pitch), math.sin(pitch)
    cr, sr = math.cos(roll), math.sin(roll)
    # The first two columns of Rz(roll) Rx(pitch) Ry(yaw): the plate is the plane z = 0.
    r00, r01 = cr * cy - sr * sp * sy, -sr * cp
    r10, r11 = sr * cy + cr * sp * sy, cr * cp
    x, y = center
    w0, w1 = -cp * sy / distance, sp / distance
    return (
        (radius * r00 + x * w0, radius * r01 + x * w1, x),
        (radius * r10 + y * w0, radius * r11 + y * w1, y),
        (w0, w1, 1.0),
    )


def project_sign(label: int, homography: Matrix, radius: float) -> tuple[Image.Image, tuple[int, int]]:
    """The sign as seen through ``homography``: an RGBA patch, and the pixel its top left belongs to.

    Args:
        label: index into `CLASS_NAMES`.
        homography: sign coordinates to pixels, from `plate_homography`.
        radius: the plate's half side in pixels; chooses how fine a copy is resampled.
    """
    (a, b, c), (d, e, f), (g, h, _) = homography
    corners = [
        ((a * u + b * v + c) / (g * u + h * v + 1), (d * u + e * v + f) / (g * u + h * v + 1))
        for u, v in ((-1, -1), (1, -1), (1, 1), (-1, 1))
    ]
    left, top = math.floor(min(x for x, _ in corners)), math.floor(min(y for _, y in corners))
    right, bottom = math.ceil(max(x for x, _ in corners)), math.ceil(max(y for _, y in corners))
    # Pixels of the patch, not of the frame; then the inverse (by cofactors, up to scale).
    a, b, c, d, e, f = a - left * g, b - left * h, c - left, d - top * g, e - top * h, f - top
    scale = a * e - b * d
    to_u = ((e - f * h) / scale, (c * h - b) / scale, (b * f - c * e) / scale)
    to_v = ((f * g - d) / scale, (a - c * g) / scale, (c * d - a * f) / scale)
    to_w = ((d * h - e * g) / scale, (b * g - a * h) / scale, 1.0)

    pyramid = sign_pyramid(label)
    source = next((level for level in reversed(pyramid) if level.width >= 2 * radius), pyramid[0])
    half_px = source.width / 2
    coefficients = [half_px * (t + w) for to in (to_u, to_v) for t, w in zip(to, to_w, strict=True)]
    patch = source.transform(
        (right - left, bottom - top),
        Image.Transform.PERSPECTIVE,
        [*coefficients, *to_w[:2]],
        Image.Resampling.BILINEAR,
    )
    return patch, (left, top)
