"""A start that saves the first epochs: whitened pixels, identity kernels, a small classifier.

After arXiv 2404.00498, sections 3.2 and 3.3; the whitening is Page's, "How to train your ResNet 8" (2019).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.errors import UsageError

__all__ = ["classifier", "prepare"]

_VARIANCE_FLOOR = 5e-4
"""Added to the variance of a patch direction before its root is divided by: Page's value."""


def classifier(model: nn.Module) -> nn.Linear:
    """The last linear layer of `model`.

    Raises:
        UsageError: it has none.
    """
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    if not linear:
        raise UsageError(
            "the recipe scales the classifier, and the network has no linear layer; take --recipe modern"
        )
    return linear[-1]


@torch.no_grad()
def prepare(model: nn.Module, images: Tensor, head_scale: float) -> None:
    """Change the random weights of `model` in place into a better start.

    The first convolution answers to the principal directions of the image patches, both ways, each at unit
    variance; every later 3×3 convolution that does not narrow passes its input on; batch-norm scales are
    fixed at 1; the classifier is multiplied by `head_scale`.

    Args:
        images: normalized, float32 [n, C, H, W].
    """
    first, *others = (m for m in model.modules() if isinstance(m, nn.Conv2d))
    _whiten(first, images)
    for conv in others:
        width = conv.in_channels
        if conv.kernel_size == (3, 3) and conv.groups == 1 and conv.out_channels >= width:
            nn.init.dirac_(conv.weight[:width])
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.requires_grad = False
    head = classifier(model)
    head.weight *= head_scale
    if head.bias is not None:
        head.bias.zero_()


def _whiten(conv: nn.Conv2d, images: Tensor) -> None:
    height, width = conv.kernel_size
    patches = images.unfold(2, height, 1).unfold(3, width, 1).permute(0, 2, 3, 1, 4, 5)
    patches = patches.reshape(-1, conv.weight[0].numel())
    covariance = torch.cov(patches.T)
    variances, directions = torch.linalg.eigh(covariance)
    # eigh ascends; the directions that vary most come first.
    filters = (directions / (variances + _VARIANCE_FLOOR).sqrt()).T.flip(0)
    count = min(conv.out_channels // 2, len(filters))
    filters = filters[:count].reshape(count, *conv.weight.shape[1:])
    conv.weight[:count] = filters
    conv.weight[count : 2 * count] = -filters
