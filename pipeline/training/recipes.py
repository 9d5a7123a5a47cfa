"""Training recipes: the papers' and a modern one, as values.

``paper`` is arXiv 1512.00567, section 8, and 1602.07261, section 4: RMSProp with decay 0.9 and ε 1.0,
learning rate 0.045 multiplied by 0.94 every two epochs, gradients clipped at norm 2.0, labels smoothed
by 0.1, evaluated on a running average of the weights.

``modern`` is what reaches the same accuracy in a tenth of the epochs: SGD with Nesterov momentum, a
one-cycle learning rate (arXiv 1708.07120), no weight decay on norms and biases, an average of the weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from pipeline.errors import UsageError

__all__ = ["RECIPES", "Recipe", "learning_rate", "make_optimizer", "recipe_named"]


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a network is trained.

    Attributes:
        optimizer: ``rmsprop`` (TensorFlow's, with ε inside the root, as the papers used) or ``sgd``.
        peak_lr: highest learning rate at ``batch_size``.
        weight_decay: L2, of convolution and linear weights only.
        schedule: ``step`` multiplies by 0.94 every two epochs; ``one_cycle`` rises linearly for
            ``warmup`` of the run and falls linearly to zero.
        label_smoothing: mass spread over all classes.
        clip_norm: limit of the global gradient norm.
        ema_decay: of the weight average, per step.
    """

    name: str
    optimizer: Literal["rmsprop", "sgd"]
    peak_lr: float
    batch_size: int
    epochs: int
    weight_decay: float
    schedule: Literal["step", "one_cycle"]
    warmup: float
    label_smoothing: float
    clip_norm: float
    ema_decay: float


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("paper", "rmsprop", 0.045, 32, 100, 4e-5, "step", 0.0, 0.1, 2.0, 0.9999),
        Recipe("modern", "sgd", 0.3, 256, 20, 5e-4, "one_cycle", 0.2, 0.1, 2.0, 0.99),
    )
}


def recipe_named(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        UsageError: there is none.
    """
    try:
        return RECIPES[name]
    except KeyError:
        raise UsageError(f"no training recipe {name!r}; there are {', '.join(RECIPES)}") from None


def make_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """The recipe's optimizer over `model`, with weight decay on matrices and kernels only."""
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    plain = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [
        {"params": decayed, "weight_decay": recipe.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.peak_lr, momentum=0.9, nesterov=True)
    from timm.optim.rmsprop_tf import RMSpropTF

    optimizer: torch.optim.Optimizer = RMSpropTF(groups, lr=recipe.peak_lr, alpha=0.9, eps=1.0, momentum=0.9)
    return optimizer


def learning_rate(recipe: Recipe, step: int, total_steps: int, steps_per_epoch: int) -> float:
    """The learning rate of `step` (from 0) of `total_steps`."""
    if recipe.schedule == "step":
        return recipe.peak_lr * float(0.94 ** (step // (2 * steps_per_epoch)))
    rise = max(1, round(recipe.warmup * total_steps))
    if step < rise:
        return recipe.peak_lr * (step + 1) / rise
    return recipe.peak_lr * (total_steps - step) / max(1, total_steps - rise)
