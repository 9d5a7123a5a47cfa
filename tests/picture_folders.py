"""Folders of small pictures, and what a data set makes of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.artifacts import PreprocessSpec
from pipeline.contracts import Dataset

SPEC = PreprocessSpec((16, 16))


def write_image(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((20, 24, 3), value, np.uint8)).save(path)


def write_csv(folder: Path, text: str) -> None:
    (folder / "labels.csv").write_text(text)


def seen(dataset: Dataset) -> list[tuple[str, int | None, int]]:
    return [(sample.key, sample.label, int(sample.image[0, 0, 0])) for sample in dataset]
