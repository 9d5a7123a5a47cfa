"""Training recipes: the papers' and a modern one, as values.

``paper`` is arXiv 1512.00567, section 8, and 1602.07261, section 4: RMSProp with decay 0.9 and ε 1.0,
learning rate 0.045 multiplied by 0.94 every two epochs, gradients clipped at norm 2.0, labels smoothed
by 0.1, evaluated on a running average of the weights.

``modern`` is what reaches the same accuracy in a tenth of the epochs: SGD with Nesterov momentum, a
one-cycle learning rate (arXiv 1708.07120), no weight decay on norms and biases, an average of the weights.

``fast`` is for small images, after arXiv 2404.00498 (sections 3.2 to 3.4): a prepared start
(`pipeline.training.start`), batch-norm scales fixed at 1 and their shifts at 64 times the rate, and a
classifier that starts small and learns slowly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from pipeline.errors import UsageError
from pipeline.training.start import classifier

__all__ = ["RECIPES", "Recipe", "learning_rate", "make_optimizer", "recipe_named"]


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a network is trained.

    Attributes:
        optimizer: ``rmsprop`` (TensorFlow's, with ε inside the root, as the papers used) or ``sgd``.
        peak_lr: highest learning rate at ``batch_size``.
        weight_decay: L2, of convolution and linear weights; see `make_optimizer`.
        schedule: ``step`` multiplies by 0.94 every two epochs; ``one_cycle`` rises linearly for
            ``warmup`` of the run and falls linearly to zero.
        label_smoothing: mass spread over all classes.
        clip_norm: limit of the global gradient norm.
        ema_decay: of the weight average, per step.
        momentum: of the optimizer.
        prepared: start from whitened pixels and identity kernels, and keep batch-norm scales at 1; not where
            weights are given.
        shift_rate: learning rate of batch-norm shifts and convolution biases, as a multiple.
        head_scale: the classifier starts at, and its rate is the square of, this multiple: what a factor
            on its logits would do.
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
    momentum: float = 0.9
    prepared: bool = False
    shift_rate: float = 1.0
    head_scale: float = 1.0


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("paper", "rmsprop", 0.045, 32, 100, 4e-5, "step", 0.0, 0.1, 2.0, 0.9999),
        Recipe("modern", "sgd", 0.3, 256, 20, 5e-4, "one_cycle", 0.2, 0.1, 2.0, 0.99),
        Recipe(
            *("fast", "sgd", 0.8, 512, 12, 1.3e-3, "one_cycle", 0.23, 0.2, 10.0, 0.99),
            momentum=0.85,
            prepared=True,
            shift_rate=64.0,
            head_scale=1 / 9,
        ),
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
    """The recipe's optimizer over `model`.

    Weight decay is for matrices and kernels, of a prepared network also for what shifts. ``lr_scale`` of a
    parameter group is the multiple of the schedule's rate it learns at; its decay is divided by it, so that
    all of them shrink at one pace.
    """
    head = [p for p in classifier(model).parameters() if p.requires_grad] if recipe.head_scale != 1.0 else []
    known = {id(p) for p in head}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    groups = [
        {
            "params": parameters,
            "weight_decay": decay / lr_scale,
            "lr": recipe.peak_lr * lr_scale,
            "lr_scale": lr_scale,
        }
        for parameters, decay, lr_scale in (
            ([p for p in rest if p.ndim > 1], recipe.weight_decay, 1.0),
            (
                [p for p in rest if p.ndim <= 1],
                recipe.weight_decay if recipe.prepared else 0.0,
                recipe.shift_rate,
            ),
            (head, recipe.weight_decay, recipe.head_scale**2),
        )
        if parameters
    ]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.peak_lr, momentum=recipe.momentum, nesterov=True)
    from timm.optim.rmsprop_tf import RMSpropTF

    optimizer: torch.optim.Optimizer = RMSpropTF(
        groups, lr=recipe.peak_lr, alpha=0.9, eps=1.0, momentum=recipe.momentum
    )
    return optimizer


def learning_rate(recipe: Recipe, step: int, total_steps: int, steps_per_epoch: int) -> float:
    """The learning rate of `step` (from 0) of `total_steps`."""
    if recipe.schedule == "step":
        return recipe.peak_lr * float(0.94 ** (step // (2 * steps_per_epoch)))
    rise = max(1, round(recipe.warmup * total_steps))
    if step < rise:
        return recipe.peak_lr * (step + 1) / rise
    return recipe.peak_lr * (total_steps - step) / max(1, total_steps - rise)
