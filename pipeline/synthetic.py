"""A camera that renders its own labelled frames: one road sign in each, truth known.

It gives the product something to train on, validate on and stream where no data set and no camera
are at hand. Every frame is a pure function of ``(seed, index, frame_hw)``; `docs/synthetic-camera.md`
lists what varies and by how much. Needs NumPy and Pillow only.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from pipeline.artifacts import Sample
from pipeline.errors import UsageError
from pipeline.synthetic_signs import CLASS_NAMES, plate_homography, project_sign

__all__ = ["CLASS_NAMES", "RENDERER_VERSION", "SyntheticCamera", "SyntheticDataset"]

RENDERER_VERSION = 2
"""Raised whenever a frame's pixels change: weights trained on other pixels are told apart by it."""

Color = tuple[int, int, int]

_LABEL_STREAM = 1  # keeps the random numbers that order the labels apart from those of a frame
_MARGIN = 0.06  # of the shorter side: drawn around the frame so that blur has something to read
_NOISE_LENGTH = 1 << 20
_MIN_FRAME_PX = 32


class _Dice:
    """Random choices from one stream of doubles.

    Only `Generator.random` is used: it is the draw least likely to change between NumPy versions.
    """

    def __init__(self, *key: int) -> None:
        self._random = np.random.default_rng(key).random

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * float(self._random())

    def log_uniform(self, low: float, high: float) -> float:
        return float(low * (high / low) ** float(self._random()))

    def below(self, n: int) -> int:
        return int(float(self._random()) * n)

    def chance(self, probability: float) -> bool:
        return float(self._random()) < probability

    def color(self, low: Color, high: Color) -> Color:
        """Between two colours, and a little off the line between them."""
        t = self._random()
        r, g, b = (
            min(255, max(0, round(lo + (hi - lo) * t + self.uniform(-12, 12))))
            for lo, hi in zip(low, high, strict=True)
        )
        return r, g, b

    def permutation(self, n: int) -> NDArray[np.intp]:
        return np.argsort(self._random(n), kind="stable")


@lru_cache(maxsize=1)
def _noise() -> NDArray[np.float32]:
    """Standard normal numbers, drawn once; frames read them from random offsets."""
    return np.random.default_rng(0x5EED).standard_normal(_NOISE_LENGTH, dtype=np.float32)


def _noise_slice(dice: _Dice, n: int) -> NDArray[np.float32]:
    if n > _NOISE_LENGTH:
        return np.resize(np.roll(_noise(), dice.below(_NOISE_LENGTH)), n)
    start = dice.below(_NOISE_LENGTH - n)
    return _noise()[start : start + n]


def _textured(dice: _Dice, size: tuple[int, int], cells: int, low: Color, high: Color) -> Image.Image:
    """A field between two colours: noise at about ``cells`` x ``cells``, upsampled."""
    width, height = cells * 4 // 3, cells
    field = _noise_slice(dice, width * height).reshape(height, width, 1) * 0.22 + 0.5
    colors = (
        np.asarray(low, np.float32) + (np.asarray(high, np.float32) - np.asarray(low, np.float32)) * field
    )
    return Image.fromarray(np.clip(colors, 0, 255).astype(np.uint8)).resize(size, Image.Resampling.BILINEAR)


def _background(dice: _Dice, size: tuple[int, int]) -> Image.Image:
    """Sky and ground with a road, and trees, houses or a wall on the horizon."""
    width, height = size
    horizon = round(height * dice.uniform(0.35, 0.75))
    top, bottom = dice.color((70, 120, 190), (200, 205, 210)), dice.color((150, 180, 210), (235, 232, 225))
    sky = Image.fromarray(np.array([[top], [bottom]], np.uint8)).resize(
        (1, height), Image.Resampling.BILINEAR
    )
    scene = sky.resize(size, Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(scene)

    kind = dice.below(4)
    if kind == 0:  # a wood behind the sign
        wood = _textured(dice, size, 18 + dice.below(40), (14, 30, 12), (110, 140, 70))
        scene.paste(wood, (0, round(horizon * dice.uniform(-0.2, 0.6))))
    elif kind == 1:  # houses
        _draw_houses(dice, draw, size, horizon)
    elif kind == 2:  # a wall or a hedge that fills the view
        low = dice.color((60, 50, 45), (120, 115, 110))
        scene.paste(
            _textured(dice, size, 12 + dice.below(60), low, dice.color((130, 110, 95), (205, 200, 190)))
        )
    else:  # hills
        for _ in range(1 + dice.below(3)):
            x, r = dice.uniform(-0.2, 1.2) * width, dice.uniform(0.2, 0.7) * width
            y = horizon - dice.uniform(-0.02, 0.22) * height
            draw.ellipse((x - r, y, x + r, y + r), fill=dice.color((40, 60, 40), (120, 140, 110)))

    ground_low = dice.color((40, 45, 30), (90, 90, 80))
    ground_high = dice.color((90, 110, 60), (170, 165, 150))
    ground = _textured(dice, (width, height - horizon), 8 + dice.below(30), ground_low, ground_high)
    scene.paste(ground, (0, horizon))
    vanish = dice.uniform(0.1, 0.9) * width
    left, right = dice.uniform(-0.6, 0.5) * width, dice.uniform(0.6, 1.6) * width
    asphalt = dice.color((60, 60, 62), (125, 124, 122))
    draw.polygon(
        [(vanish - 4, horizon), (vanish + 4, horizon), (right, height), (left, height)], fill=asphalt
    )
    middle = (left + right) / 2
    draw.line([(vanish, horizon), (middle, height)], fill=(205, 205, 200), width=max(1, width // 90))
    return scene


def _draw_houses(dice: _Dice, draw: ImageDraw.ImageDraw, size: tuple[int, int], horizon: int) -> None:
    width, height = size
    x = -dice.uniform(0, 0.2) * width
    while x < width:
        w = dice.uniform(0.15, 0.5) * width
        top = horizon - dice.uniform(0.1, 0.8) * height
        draw.rectangle((x, top, x + w, horizon + 2), fill=dice.color((70, 60, 55), (200, 185, 170)))
        glass = dice.color((30, 36, 44), (150, 165, 180))
        pitch = dice.uniform(0.05, 0.11) * height
        for row in range(int((horizon - top) / pitch)):
            for column in range(int(w / pitch)):
                wx, wy = x + (column + 0.3) * pitch, top + (row + 0.3) * pitch
                draw.rectangle((wx, wy, wx + 0.45 * pitch, wy + 0.5 * pitch), fill=glass)
        x += w


def _distractors(dice: _Dice, draw: ImageDraw.ImageDraw, size: tuple[int, int]) -> None:
    """Coloured shapes and thin poles in the background: things a sign could be taken for."""
    width, height = size
    for _ in range(dice.below(5)):
        x, y = dice.uniform(0, 1) * width, dice.uniform(0.05, 0.95) * height
        r = dice.uniform(0.02, 0.1) * height
        fill = ((200, 40, 40), (30, 90, 180), (240, 190, 40), (235, 235, 230), (40, 40, 44))[dice.below(5)]
        fill = dice.color(fill, (128, 128, 128))
        kind = dice.below(4)
        if kind == 0:
            draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
        elif kind == 1:
            draw.rectangle((x - 2 * r, y - r, x + 2 * r, y + r), fill=fill)
        elif kind == 2:
            draw.polygon([(x - r, y + r), (x + r, y + r), (x, y - r)], fill=fill)
        else:
            draw.rectangle((x - 0.1 * r, y - 5 * r, x + 0.1 * r, y + 5 * r), fill=fill)


def _place_sign(
    dice: _Dice, scene: Image.Image, label: int, center: tuple[float, float], radius: float
) -> None:
    yaw, pitch = (math.radians(limit) * dice.uniform(-1, 1) for limit in (50.0, 25.0))
    roll = math.radians(dice.uniform(-9, 9) + dice.uniform(-9, 9))
    forward = plate_homography(center, radius, yaw, pitch, roll, dice.uniform(2.5, 6.0))
    if dice.chance(0.8):
        half = max(1.0, radius * dice.uniform(0.05, 0.11))
        pole = dice.color((70, 70, 72), (165, 165, 165))
        box = (center[0] - half, center[1], center[0] + half, scene.height)
        ImageDraw.Draw(scene).rectangle(box, fill=pole)
    patch, corner = project_sign(label, forward, radius)
    faded = dice.uniform(0, 1) ** 2 * 0.5
    dust = Image.new("RGB", patch.size, dice.color((90, 85, 80), (200, 200, 200)))
    scene.paste(Image.blend(patch.convert("RGB"), dust, faded), corner, patch.getchannel("A"))


def _occlude(dice: _Dice, scene: Image.Image, center: tuple[float, float], radius: float) -> None:
    """A branch, a post or stickers over part of the sign."""
    draw = ImageDraw.Draw(scene)
    x0, y0 = center
    kind = dice.below(3)
    if kind == 0:
        angle, reach = dice.uniform(0, 2 * math.pi), dice.uniform(0.25, 0.9)
        x, y = x0 + 1.6 * radius * math.cos(angle), y0 + 1.6 * radius * math.sin(angle)
        toward = angle + math.pi + dice.uniform(-0.5, 0.5)
        length = (1.6 - reach + 0.6) * radius
        dx, dy = math.cos(toward) * length, math.sin(toward) * length
        draw.line(
            (x, y, x + dx, y + dy),
            fill=dice.color((40, 30, 20), (90, 75, 60)),
            width=max(1, round(radius * 0.06)),
        )
        low, high = dice.color((15, 40, 10), (60, 80, 30)), dice.color((60, 100, 30), (140, 150, 60))
        for _ in range(10 + dice.below(16)):
            t, r = dice.uniform(0, 1), radius * dice.uniform(0.05, 0.17)
            px, py = x + dx * t + dice.uniform(-1.6, 1.6) * r, y + dy * t + dice.uniform(-1.6, 1.6) * r
            draw.ellipse((px - r, py - 0.7 * r, px + r, py + 0.7 * r), fill=dice.color(low, high))
    elif kind == 1:
        half, x = radius * dice.uniform(0.06, 0.2), x0 + radius * dice.uniform(-0.9, 0.9)
        slant = radius * dice.uniform(-0.3, 0.3)
        points = [
            (x - half + slant, 0),
            (x + half + slant, 0),
            (x + half - slant, scene.height),
            (x - half - slant, scene.height),
        ]
        draw.polygon(points, fill=dice.color((30, 30, 30), (170, 170, 165)))
    else:
        for _ in range(1 + dice.below(3)):
            x, y = x0 + radius * dice.uniform(-0.7, 0.7), y0 + radius * dice.uniform(-0.7, 0.7)
            w, h = radius * dice.uniform(0.08, 0.26), radius * dice.uniform(0.08, 0.26)
            fill = dice.color((20, 20, 20), (245, 245, 245))
            if dice.chance(0.5):
                draw.ellipse((x - w, y - h, x + w, y + h), fill=fill)
            else:
                draw.rectangle((x - w, y - h, x + w, y + h), fill=fill)


def _light(dice: _Dice, scene: Image.Image) -> Image.Image:
    """Uneven light, exposure, haze and colour cast."""
    shade = np.clip(220 + 60 * _noise_slice(dice, 9), 90, 255).astype(np.uint8).reshape(3, 3)
    mask = Image.fromarray(shade).resize((128, 96), Image.Resampling.BICUBIC)
    if dice.chance(0.3):  # the edge of a shadow
        x, slant = dice.uniform(16, 112), dice.uniform(-48, 48)
        side = 0 if dice.chance(0.5) else 128
        points = [(side, 0), (x + slant, 0), (x - slant, 96), (side, 96)]
        ImageDraw.Draw(mask).polygon(points, fill=round(dice.uniform(70, 150)))
    mask = mask.resize(scene.size, Image.Resampling.BILINEAR)
    scene = ImageChops.multiply(scene, Image.merge("RGB", (mask, mask, mask)))

    gain = dice.log_uniform(0.3, 1.7)
    haze = dice.uniform(0, 1) ** 3 * 0.6
    veil = dice.uniform(120, 220) * min(1.0, gain)
    levels = np.arange(256, dtype=np.float64)
    curves = []
    for _ in range(3):
        lit = levels * gain * dice.uniform(0.85, 1.15)
        curves.append(np.clip(np.rint(lit * (1 - haze) + veil * haze), 0, 255))
    return scene.point(np.concatenate(curves).astype(int).tolist())


def _blur(dice: _Dice, scene: Image.Image, unit_px: float) -> Image.Image:
    """Motion along a line, then defocus; there is always a little of the lens."""
    if dice.chance(0.35):
        length, angle = unit_px * dice.log_uniform(0.008, 0.06), dice.uniform(0, math.pi)
        # Averaging with copies shifted by 1/2, 1/4 and 1/8 of the path is a box of eight taps.
        for part in (0.5, 0.25, 0.125):
            dx, dy = round(length * part * math.cos(angle)), round(length * part * math.sin(angle))
            if dx or dy:
                scene = Image.blend(scene, ImageChops.offset(scene, dx, dy), 0.5)
    sigma_px = unit_px * dice.log_uniform(0.0018, 0.011)
    # A box of the same variance: half the cost of a Gaussian, and nearer to a lens out of focus.
    return scene.filter(ImageFilter.BoxBlur((math.sqrt(12 * sigma_px**2 + 1) - 1) / 2))


def _sensor_and_jpeg(dice: _Dice, scene: Image.Image) -> NDArray[np.uint8]:
    """Shot and read noise, then JPEG: variance grows with the signal, plus a constant."""
    pixels = np.asarray(scene)
    strength = dice.log_uniform(1.0, 16.0)
    levels = np.arange(256, dtype=np.float32)
    sigma = (strength * np.sqrt(0.25 + 0.75 * levels / 128)).astype(np.float32)
    noisy = sigma.take(pixels)  # in place from here on: allocating 1 MB again and again costs more
    noisy *= _noise_slice(dice, pixels.size).reshape(pixels.shape)
    noisy += pixels
    noisy += np.float32(0.5)  # the cast truncates
    np.clip(noisy, 0, 255, out=noisy)
    encoded = io.BytesIO()
    Image.fromarray(noisy.astype(np.uint8)).save(encoded, "JPEG", quality=round(dice.uniform(25, 95)))
    with Image.open(encoded) as decoded:
        return np.array(decoded.convert("RGB"))


class SyntheticCamera:
    """Labelled frames at random access.

    Every block of 12 consecutive indices shows each class once, so any prefix is nearly balanced.
    Cameras of different seeds are independent. Not bound to a thread.

    Args:
        seed: 0 to 2³² - 1.
        frame_hw: height and width of the frames in pixels, each at least 32.

    Raises:
        UsageError: a seed out of range or a frame too small to show a sign.
    """

    def __init__(self, seed: int, frame_hw: tuple[int, int] = (240, 320)) -> None:
        if not 0 <= seed < 2**32:
            raise UsageError(f"the synthetic camera's seed is {seed}; give 0 to {2**32 - 1}")
        if min(frame_hw) < _MIN_FRAME_PX:
            raise UsageError(
                f"the synthetic camera's frame is {frame_hw[0]}x{frame_hw[1]} (height x width); "
                f"give at least {_MIN_FRAME_PX} pixels each way"
            )
        self.seed = seed
        self.frame_hw = frame_hw

    def label(self, index: int) -> int:
        """The class shown in frame ``index``, without rendering it."""
        if index < 0:
            raise IndexError(f"frame {index} of a synthetic camera; the first is 0")
        block, place = divmod(index, len(CLASS_NAMES))
        return int(_Dice(self.seed, block, _LABEL_STREAM).permutation(len(CLASS_NAMES))[place])

    def frame(self, index: int) -> tuple[NDArray[np.uint8], int]:
        """Render frame ``index``: uint8 HWC RGB of ``frame_hw``, and its label."""
        label = self.label(index)
        dice = _Dice(self.seed, index)
        height, width = self.frame_hw
        unit_px = float(min(height, width))
        margin = math.ceil(_MARGIN * unit_px)
        size = (width + 2 * margin, height + 2 * margin)

        scene = _background(dice, size)
        _distractors(dice, ImageDraw.Draw(scene), size)
        radius = unit_px * dice.log_uniform(0.07, 0.42)
        # Anywhere in the central square as long as the plate stays inside, a little less at the rim.
        room = 0.9 * max(0.0, unit_px / 2 - radius)
        center = (size[0] / 2 + room * dice.uniform(-1, 1), size[1] / 2 + room * dice.uniform(-1, 1))
        _place_sign(dice, scene, label, center, radius)
        if dice.chance(0.4):
            _occlude(dice, scene, center, radius)
        scene = _light(dice, scene)
        scene = _blur(dice, scene, unit_px)
        scene = scene.crop((margin, margin, margin + width, margin + height))
        return _sensor_and_jpeg(dice, scene), label


class SyntheticDataset:
    """The first ``count`` frames of a synthetic camera, as a `pipeline.contracts.Dataset`.

    Raises:
        UsageError: ``count`` below 1, or what `SyntheticCamera` refuses.
    """

    def __init__(self, seed: int, count: int, frame_hw: tuple[int, int] = (240, 320)) -> None:
        if count < 1:
            raise UsageError(f"a synthetic data set of {count} frames; give 1 or more")
        self._camera = SyntheticCamera(seed, frame_hw)
        self._count = count

    @property
    def name(self) -> str:
        """The spec that opens this data set again."""
        return f"synthetic:{self._camera.seed}:{self._count}"

    @property
    def class_names(self) -> tuple[str, ...]:
        """The twelve signs."""
        return CLASS_NAMES

    @property
    def sha256(self) -> str:
        """Digest of what determines the frames; the pixels need not be rendered to know them."""
        identity = {
            "renderer": RENDERER_VERSION,
            "seed": self._camera.seed,
            "count": self._count,
            "frame_hw": list(self._camera.frame_hw),
        }
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    @property
    def skipped(self) -> Sequence[tuple[str, str]]:
        """Always empty: every frame can be rendered."""
        return ()

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Sample]:
        for index in range(self._count):
            image, label = self._camera.frame(index)
            yield Sample(image=image, label=label, key=str(index))
