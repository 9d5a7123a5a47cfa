"""A classifier that is right by construction, and images it tells apart: real parts for builds in tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

__all__ = ["FACTORY", "write_tinted_images"]

FACTORY = '''
import torch
from torch import nn


def classifier(num_classes=2):
    """Tells the redder half of the images from the bluer: right by construction."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes),
    )
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].weight[0, 0] = 1.0
        model[0].weight[1, 2] = 1.0
        model[5].weight.zero_()
        model[5].bias.zero_()
        model[5].weight[0, 0] = 1.0
        model[5].weight[1, 1] = 1.0
    return model
'''


def write_tinted_images(folder: Path) -> Path:
    """Twenty images, red ones and blue ones, with enough noise that INT8 has something to do."""
    rng = np.random.default_rng(0)
    for name, tint in (("a_red", (150, 60, 60)), ("b_blue", (60, 60, 150))):
        (folder / name).mkdir(parents=True)
        for i in range(10):
            pixels = np.clip(rng.normal(tint, 40, (40, 48, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder
