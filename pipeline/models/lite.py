"""``inception_resnet_lite``: the Inception-ResNet recipe at the size of an edge device.

Three stages of scaled residual blocks, as in arXiv 1602.07261, at a tenth of the width and a fraction of
the depth. The stem's first convolution has no padding, as in the full networks, so that mean, std and
channel order fold into it exactly.

======== ============ =====================================================================
stage    grid         block
======== ============ =====================================================================
stem     1/8 (1/2)    3×3/2 valid, 3×3, max-pool, 3×3, max-pool, 3×3
A        1/8 (1/2)    1×1 | 1×1 3×3 | 1×1 3×3 3×3, expanded and added at ``scales[0]``
B        1/16 (1/4)   1×1 | 1×1 1×7 7×1, expanded and added at ``scales[1]``
C        1/32 (1/8)   1×1 | 1×1 1×3 3×1, expanded and added at ``scales[2]``
======== ============ =====================================================================

In brackets: the stem for small inputs, 3×3 valid, 3×3, max-pool, 3×3.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pipeline.models.blocks import Branches, ConvNormAct, ScaledResidual

__all__ = ["SMALL_INPUT_PX", "InceptionResNetLite", "inception_resnet_lite"]

SMALL_INPUT_PX = 64
"""Up to this side of the input the stem keeps more of the resolution."""

_DEPTHS = (2, 3, 2)
_SCALES = (0.2, 0.2, 0.2)

_Width = Callable[[int], int]


def _width(channels: int, multiplier: float) -> int:
    """`channels` scaled, rounded to a multiple of 8: what int8 kernels want."""
    return max(8, int(channels * multiplier / 8 + 0.5) * 8)


class InceptionResNetLite(nn.Module):
    """``(N, 3, H, W) float32 -> (N, num_classes)`` logits.

    Args:
        num_classes: outputs of the head.
        width: multiplier of every channel count; 1.0 has about 1.0 M parameters with ten classes.
        small_input: the stem for inputs up to `SMALL_INPUT_PX`.
        scales: residual scale of the stages A, B, C.
        drop_rate: dropout before the head, training only.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        width: float = 1.0,
        small_input: bool = False,
        scales: tuple[float, float, float] = _SCALES,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()

        def w(channels: int) -> int:
            return _width(channels, width)

        a, b, c = w(80), w(192), w(320)
        stem: list[nn.Module]
        if small_input:
            stem, last = [ConvNormAct(3, w(24), 3), ConvNormAct(w(24), w(48), 3, padding=1)], w(48)
        else:
            stem, last = (
                [
                    ConvNormAct(3, w(24), 3, stride=2),
                    ConvNormAct(w(24), w(32), 3, padding=1),
                    nn.MaxPool2d(3, stride=2, padding=1),
                    ConvNormAct(w(32), w(64), 3, padding=1),
                ],
                w(64),
            )
        pool = nn.MaxPool2d(3, stride=2, padding=1)
        self.stem = nn.Sequential(*stem, pool, ConvNormAct(last, a, 3, padding=1))
        self.stage_a = nn.Sequential(*(self._block_a(a, w, scales[0]) for _ in range(_DEPTHS[0])))
        self.reduce_a = Branches(
            nn.MaxPool2d(3, stride=2, padding=1),
            ConvNormAct(a, b - a, 3, stride=2, padding=1),
        )
        self.stage_b = nn.Sequential(*(self._block_b(b, w, scales[1]) for _ in range(_DEPTHS[1])))
        self.reduce_b = Branches(
            nn.MaxPool2d(3, stride=2, padding=1),
            nn.Sequential(ConvNormAct(b, w(96), 1), ConvNormAct(w(96), c - b, 3, stride=2, padding=1)),
        )
        self.stage_c = nn.Sequential(*(self._block_c(c, w, scales[2]) for _ in range(_DEPTHS[2])))
        self.features = ConvNormAct(c, w(448), 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(w(448), num_classes)
        self._initialize()

    @staticmethod
    def _block_a(channels: int, w: _Width, scale: float) -> nn.Module:
        mix = Branches(
            ConvNormAct(channels, w(24), 1),
            nn.Sequential(ConvNormAct(channels, w(24), 1), ConvNormAct(w(24), w(24), 3, padding=1)),
            nn.Sequential(
                ConvNormAct(channels, w(24), 1),
                ConvNormAct(w(24), w(32), 3, padding=1),
                ConvNormAct(w(32), w(40), 3, padding=1),
            ),
        )
        return ScaledResidual(mix, w(24) + w(24) + w(40), channels, scale)

    @staticmethod
    def _block_b(channels: int, w: _Width, scale: float) -> nn.Module:
        mix = Branches(
            ConvNormAct(channels, w(64), 1),
            nn.Sequential(
                ConvNormAct(channels, w(48), 1),
                ConvNormAct(w(48), w(56), (1, 7), padding=(0, 3)),
                ConvNormAct(w(56), w(64), (7, 1), padding=(3, 0)),
            ),
        )
        return ScaledResidual(mix, 2 * w(64), channels, scale)

    @staticmethod
    def _block_c(channels: int, w: _Width, scale: float) -> nn.Module:
        mix = Branches(
            ConvNormAct(channels, w(64), 1),
            nn.Sequential(
                ConvNormAct(channels, w(64), 1),
                ConvNormAct(w(64), w(72), (1, 3), padding=(0, 1)),
                ConvNormAct(w(72), w(80), (3, 1), padding=(1, 0)),
            ),
        )
        return ScaledResidual(mix, w(64) + w(80), channels, scale)

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage_a(self.stem(x))
        x = self.stage_b(self.reduce_a(x))
        x = self.stage_c(self.reduce_b(x))
        x = torch.flatten(self.pool(self.features(x)), 1)
        logits: Tensor = self.head(self.drop(x))
        return logits


def inception_resnet_lite(
    num_classes: int = 1000, width: float = 1.0, small_input: bool = False, drop_rate: float = 0.0
) -> InceptionResNetLite:
    """The edge network; see `InceptionResNetLite`."""
    return InceptionResNetLite(num_classes, width, small_input, drop_rate=drop_rate)
