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

In brackets: small inputs, where the stem is 3×3 valid, 3×3, max-pool, 3×3 and the factorized kernels of
stage B are 5 long. On so small a grid width is cheaper than depth, so they have a table of their own, and
between their stages a 3×3 before and after the max-pooling, which learn faster than a strided one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.models.blocks import Branches, ConvNormAct, ScaledResidual

__all__ = ["SMALL_INPUT_PX", "InceptionResNetLite", "inception_resnet_lite"]

SMALL_INPUT_PX = 64
"""Up to this side of the input, the table for small inputs applies."""

_SCALES = (0.2, 0.2, 0.2)

_Width = Callable[[int], int]


@dataclass(frozen=True, slots=True)
class _Table:
    """Output channels of every convolution at width 1.0, and the blocks of each stage."""

    stem: tuple[int, ...]
    channels: tuple[int, int, int]
    """Of the stages A, B, C."""
    depths: tuple[int, int, int]
    a: tuple[int, tuple[int, int], tuple[int, int, int]]
    b: tuple[int, tuple[int, int, int]]
    c: tuple[int, tuple[int, int, int]]
    factorized: int
    """Length of stage B's thin kernels; stage C's are 3 long."""
    pooled: bool
    """Reductions are 3×3, max-pool, 3×3, not max-pool | 3×3/2."""
    squeeze: int | None
    """Channels of a 1×1 before the second reduction's 3×3/2."""
    features: int


_CAMERA = _Table(
    stem=(24, 32, 64),
    channels=(80, 192, 320),
    depths=(2, 3, 2),
    a=(24, (24, 24), (24, 32, 40)),
    b=(64, (48, 56, 64)),
    c=(64, (64, 72, 80)),
    factorized=7,
    pooled=False,
    squeeze=96,
    features=448,
)
_SMALL = _Table(
    stem=(24, 64),
    channels=(128, 256, 256),
    depths=(1, 1, 1),
    a=(32, (32, 32), (32, 32, 32)),
    b=(64, (64, 64, 64)),
    c=(64, (64, 64, 64)),
    factorized=5,
    pooled=True,
    squeeze=None,
    features=256,
)


def _width(channels: int, multiplier: float) -> int:
    """`channels` scaled, rounded to a multiple of 8: what int8 kernels want."""
    return max(8, int(channels * multiplier / 8 + 0.5) * 8)


def _halve() -> nn.Module:
    return nn.MaxPool2d(3, stride=2, padding=1)


class InceptionResNetLite(nn.Module):
    """``(N, 3, H, W) float32 -> (N, num_classes)`` logits.

    Args:
        num_classes: outputs of the head.
        width: multiplier of every channel count; 1.0 has 1.0 M parameters with ten classes, 2.5 M in
            the table for small inputs.
        small_input: the table for inputs up to `SMALL_INPUT_PX`.
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

        table = _SMALL if small_input else _CAMERA
        a, b, c = map(w, table.channels)
        self.stem = nn.Sequential(*self._stem(table, w), ConvNormAct(w(table.stem[-1]), a, 3, padding=1))
        self.stage_a = nn.Sequential(*(self._block_a(table, a, w, scales[0]) for _ in range(table.depths[0])))
        self.reduce_a = self._reduction(table, a, b, None)
        self.stage_b = nn.Sequential(
            *(
                self._factorized_block(table.b, table.factorized, b, w, scales[1])
                for _ in range(table.depths[1])
            )
        )
        self.reduce_b = self._reduction(table, b, c, table.squeeze and w(table.squeeze))
        self.stage_c = nn.Sequential(
            *(self._factorized_block(table.c, 3, c, w, scales[2]) for _ in range(table.depths[2]))
        )
        self.features = ConvNormAct(c, w(table.features), 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(w(table.features), num_classes)
        self._initialize()

    @staticmethod
    def _stem(table: _Table, w: _Width) -> list[nn.Module]:
        first, second = w(table.stem[0]), w(table.stem[1])
        stride = 1 if table is _SMALL else 2
        layers: list[nn.Module] = [
            ConvNormAct(3, first, 3, stride=stride),
            ConvNormAct(first, second, 3, padding=1),
        ]
        for before, after in itertools.pairwise(map(w, table.stem[1:])):
            layers += [_halve(), ConvNormAct(before, after, 3, padding=1)]
        return [*layers, _halve()]

    @staticmethod
    def _reduction(table: _Table, before: int, after: int, squeeze: int | None) -> nn.Module:
        if table.pooled:
            return nn.Sequential(
                ConvNormAct(before, after, 3, padding=1), _halve(), ConvNormAct(after, after, 3, padding=1)
            )
        strided = ConvNormAct(squeeze or before, after - before, 3, stride=2, padding=1)
        if squeeze is None:
            return Branches(_halve(), strided)
        return Branches(_halve(), nn.Sequential(ConvNormAct(before, squeeze, 1), strided))

    @staticmethod
    def _block_a(table: _Table, channels: int, w: _Width, scale: float) -> nn.Module:
        one, two, three = w(table.a[0]), tuple(map(w, table.a[1])), tuple(map(w, table.a[2]))
        mix = Branches(
            ConvNormAct(channels, one, 1),
            nn.Sequential(ConvNormAct(channels, two[0], 1), ConvNormAct(two[0], two[1], 3, padding=1)),
            nn.Sequential(
                ConvNormAct(channels, three[0], 1),
                ConvNormAct(three[0], three[1], 3, padding=1),
                ConvNormAct(three[1], three[2], 3, padding=1),
            ),
        )
        return ScaledResidual(mix, one + two[1] + three[2], channels, scale)

    @staticmethod
    def _factorized_block(
        widths: tuple[int, tuple[int, int, int]], length: int, channels: int, w: _Width, scale: float
    ) -> nn.Module:
        """1×1 | 1×1, 1×length, length×1: a large kernel as two thin ones (arXiv 1512.00567, section 3.2)."""
        one, two, half = w(widths[0]), tuple(map(w, widths[1])), length // 2
        mix = Branches(
            ConvNormAct(channels, one, 1),
            nn.Sequential(
                ConvNormAct(channels, two[0], 1),
                ConvNormAct(two[0], two[1], (1, length), padding=(0, half)),
                ConvNormAct(two[1], two[2], (length, 1), padding=(half, 0)),
            ),
        )
        return ScaledResidual(mix, one + two[2], channels, scale)

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
