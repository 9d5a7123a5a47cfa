"""Seeded weights of the lite network, as a checkpoint holds them."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.models.lite import inception_resnet_lite

__all__ = ["lite_state"]


def lite_state(num_classes: int = 5, small_input: bool = True) -> dict[str, Tensor]:
    """The same at every call."""
    torch.manual_seed(1)
    state: dict[str, Tensor] = inception_resnet_lite(num_classes, small_input=small_input).state_dict()
    return state
