"""The blocks the Inception family is made of.

Every network of the family is a table over these few: a convolution with batch norm and ReLU, branches
side by side, and the scaled residual block of arXiv 1602.07261, section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["BN_EPS", "Branches", "ConvNormAct", "ScaledResidual"]

BN_EPS = 1e-3
"""The papers' (and every public checkpoint's) batch-norm epsilon; PyTorch's default is 1e-5."""

Size2d = int | tuple[int, int]


class ConvNormAct(nn.Module):
    """Convolution without bias, batch norm, ReLU: ``(N, C, H, W) -> (N, C', H', W')``."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size2d,
        stride: Size2d = 1,
        padding: Size2d = 0,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=BN_EPS)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.bn(self.conv(x)))
        return out


class Branches(nn.Module):
    """Branches that see the same input; their outputs are joined along the channels."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], dim=1)


class ScaledResidual(nn.Module):
    """``act(x + scale * up(branches(x)))``, the residual block of arXiv 1602.07261, figure 20.

    ``up`` is the linear 1×1 "filter-expansion" convolution, with a bias and without batch norm; the
    scale (0.1 to 0.3 in the paper) keeps training stable and is folded into ``up`` for inference.
    """

    def __init__(
        self, mix: nn.Module, mixed_channels: int, channels: int, scale: float, relu: bool = True
    ) -> None:
        super().__init__()
        self.mix = mix
        self.up = nn.Conv2d(mixed_channels, channels, 1)
        self.scale = scale
        self.act = nn.ReLU(inplace=False) if relu else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(x + self.up(self.mix(x)) * self.scale)
        return out
