"""Inception-ResNet-v1 and -v2 (arXiv 1602.07261) as tables.

`inception_resnet_v1` is facenet-pytorch's network and `inception_resnet_v2` timm's, keys included; the
``_paper`` functions are the figures of the paper. What differs:

===================== ==================================== ====================================
\\                     v1 paper → facenet-pytorch           v2 paper → timm
===================== ==================================== ====================================
stem                  the same                             figure 3 (384) → v3's and an A block (320)
blocks A/B/C          5/10/5 → 5/10/5 + a linear one       5/10/5 → 10/20/9 + a linear one
widths A/B/C          256/896/1792, the same               384/1152/2144 → 320/1088/2080
B branch              the same                             128 160 192, the same
after C               average pooling → a 512-d embedding  average pooling → 1×1 to 1536, pooling
===================== ==================================== ====================================

The paper's figures 17 and 19 print widths (1154, 2048) that their own reductions do not produce; a sum
needs equal widths, so 1152 and 2144 stand here. The paper gives the residual scale as "0.1 to 0.3".
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

from pipeline.models.blocks import BN_EPS
from pipeline.models.inception import Stem, stem_for, v4_stem
from pipeline.models.tables import (
    Block,
    Classifier,
    Concat,
    Path,
    Residual,
    TableModule,
    avg_pool,
    conv,
    max_pool,
    valid,
)

__all__ = [
    "EMBEDDING_SIZE",
    "FaceNetwork",
    "inception_resnet_v1",
    "inception_resnet_v1_embedding",
    "inception_resnet_v1_paper",
    "inception_resnet_v2",
    "inception_resnet_v2_paper",
]

EMBEDDING_SIZE = 512
"""Length of facenet-pytorch's embedding."""

Scales = tuple[float, float, float]
"""Residual scale of the stages A (35×35), B (17×17) and C (8×8)."""

PUBLIC_SCALES: Scales = (0.17, 0.10, 0.20)
"""Of every public checkpoint, after TensorFlow's own code."""


def _block_a(name: str, scale: float, widths: tuple[int, int, int]) -> Block:
    """Figures 10 and 16; `widths` of the branch with two 3×3."""
    first, second, third = widths
    return Block(name, (Residual((
        (conv("branch0", 32, 1),),
        (conv("branch1.0", 32, 1), conv("branch1.1", 32, 3)),
        (conv("branch2.0", first, 1), conv("branch2.1", second, 3), conv("branch2.2", third, 3)),
    ), "conv2d", scale),))  # fmt: skip


def _block_b(name: str, scale: float, widths: tuple[int, int, int, int]) -> Block:
    """Figures 11 and 17: 7×7 as 1×7 and 7×1."""
    first, second, third, fourth = widths
    return Block(name, (Residual((
        (conv("branch0", first, 1),),
        (conv("branch1.0", second, 1), conv("branch1.1", third, (1, 7)), conv("branch1.2", fourth, (7, 1))),
    ), "conv2d", scale),))  # fmt: skip


def _block_c(name: str, scale: float, widths: tuple[int, int, int], relu: bool = True) -> Block:
    """Figures 13 and 19: 3×3 as 1×3 and 3×1; the first branch has 192 channels in both."""
    first, second, third = widths
    return Block(name, (Residual((
        (conv("branch0", 192, 1),),
        (conv("branch1.0", first, 1), conv("branch1.1", second, (1, 3)), conv("branch1.2", third, (3, 1))),
    ), "conv2d", scale, relu),))  # fmt: skip


def _reduction_a(k: int, l: int, m: int, n: int) -> Block:  # noqa: E741 - the paper's letters
    """Figure 7; k, l, m, n are in table 1 of the paper."""
    return Block("mixed_6a", (Concat((
        (valid("branch0", n, 3, 2),),
        (conv("branch1.0", k, 1), conv("branch1.1", l, 3), valid("branch1.2", m, 3, 2)),
        (max_pool(),),
    )),))  # fmt: skip


def _reduction_b(middle: int, last: tuple[int, int]) -> Block:
    """Figures 12 and 18."""
    return Block("mixed_7a", (Concat((
        (conv("branch0.0", 256, 1), valid("branch0.1", 384, 3, 2)),
        (conv("branch1.0", 256, 1), valid("branch1.1", middle, 3, 2)),
        (conv("branch2.0", 256, 1), conv("branch2.1", last[0], 3), valid("branch2.2", last[1], 3, 2)),
        (max_pool(),),
    )),))  # fmt: skip


def _small_stem(stem: Stem) -> Path:
    """The stem up to 192 channels that v1 (figure 14) and the public v2 share."""
    return (
        valid("conv2d_1a", 32, 3, stem.first_stride),
        valid("conv2d_2a", 32, 3),
        conv("conv2d_2b", 64, 3),
        *stem.first_pool_rows,
        valid("conv2d_3b", 80, 1),
        valid("conv2d_4a", 192, 3),
    )


def _v1_path(stem: Stem, scales: Scales, last: Sequence[Block] = ()) -> Path:
    return (
        *_small_stem(stem),
        valid("conv2d_4b", 256, 3, 2),
        *(_block_a(f"repeat_1.{i}", scales[0], (32, 32, 32)) for i in range(5)),
        _reduction_a(192, 192, 256, 384),
        *(_block_b(f"repeat_2.{i}", scales[1], (128, 128, 128, 128)) for i in range(10)),
        _reduction_b(256, (256, 256)),
        *(_block_c(f"repeat_3.{i}", scales[2], (192, 192, 192)) for i in range(5)),
        *last,
    )


class FaceNetwork(TableModule):
    """facenet-pytorch's head on a table: a 512-d embedding, or a classifier on top of it.

    ``(N, 3, H, W) float32 -> (N, 512)`` unit vectors, or ``(N, num_classes)`` logits.

    Args:
        path: the table.
        num_classes: outputs of the classifier; ``None`` for the embedding.
        drop_rate: dropout before the embedding, training only.
    """

    def __init__(self, path: Path, num_classes: int | None, drop_rate: float = 0.6) -> None:
        super().__init__(path, in_channels=3)
        self.drop = nn.Dropout(drop_rate)
        self.last_linear = nn.Linear(self.out_channels, EMBEDDING_SIZE, bias=False)
        self.last_bn = nn.BatchNorm1d(EMBEDDING_SIZE, eps=BN_EPS)
        self.logits = None if num_classes is None else nn.Linear(EMBEDDING_SIZE, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        features = functional.adaptive_avg_pool2d(super().forward(x), 1).flatten(1)
        embedding: Tensor = self.last_bn(self.last_linear(self.drop(features)))
        if self.logits is None:
            return functional.normalize(embedding, dim=1)
        logits: Tensor = self.logits(embedding)
        return logits


def _face_network(num_classes: int | None, scales: Scales) -> FaceNetwork:
    linear = _block_c("block8", 1.0, (192, 192, 192), relu=False)
    return FaceNetwork(_v1_path(Stem(), scales, (linear,)), num_classes)


def inception_resnet_v1(num_classes: int = 8631, scales: Scales = PUBLIC_SCALES) -> FaceNetwork:
    """The face network as a classifier (8,631 identities in VGGFace2); input 160."""
    return _face_network(num_classes, scales)


def inception_resnet_v1_embedding(scales: Scales = PUBLIC_SCALES) -> FaceNetwork:
    """The face network as an embedding: 512-d, of length 1; input 160."""
    return _face_network(None, scales)


def inception_resnet_v1_paper(
    num_classes: int = 1000, input_size: int = 299, scales: Scales = PUBLIC_SCALES
) -> Classifier:
    """Inception-ResNet-v1, figure 15 with the stem of figure 14."""
    return Classifier(_v1_path(stem_for(input_size), scales), "last_linear", num_classes)


def inception_resnet_v2(
    num_classes: int = 1000, input_size: int = 299, scales: Scales = PUBLIC_SCALES
) -> Classifier:
    """Inception-ResNet-v2 as trained by its authors and published by timm: 10/20/10 blocks."""
    mixed_5b = Block("mixed_5b", (Concat((
        (conv("branch0", 96, 1),),
        (conv("branch1.0", 48, 1), conv("branch1.1", 64, 5)),
        (conv("branch2.0", 64, 1), conv("branch2.1", 96, 3), conv("branch2.2", 96, 3)),
        (avg_pool(), conv("branch3.1", 64, 1)),
    )),))  # fmt: skip
    path: Path = (
        *_small_stem(stem_for(input_size)),
        max_pool(),
        mixed_5b,
        *(_block_a(f"repeat.{i}", scales[0], (32, 48, 64)) for i in range(10)),
        _reduction_a(256, 256, 384, 384),
        *(_block_b(f"repeat_1.{i}", scales[1], (192, 128, 160, 192)) for i in range(20)),
        _reduction_b(288, (288, 320)),
        *(_block_c(f"repeat_2.{i}", scales[2], (192, 224, 256)) for i in range(9)),
        _block_c("block8", 1.0, (192, 224, 256), relu=False),
        conv("conv2d_7b", 1536, 1),
    )
    return Classifier(path, "classif", num_classes)


def inception_resnet_v2_paper(
    num_classes: int = 1000, input_size: int = 299, scales: Scales = PUBLIC_SCALES
) -> Classifier:
    """Inception-ResNet-v2, figure 15 with the stem of figure 3: 5/10/5 blocks."""
    path: Path = (
        *v4_stem(
            stem_for(input_size),
            ("conv2d_1a", "conv2d_2a", "conv2d_2b", "mixed_3a", "mixed_4a", "mixed_5a"),
        ),
        *(_block_a(f"repeat.{i}", scales[0], (32, 48, 64)) for i in range(5)),
        _reduction_a(256, 256, 384, 384),
        *(_block_b(f"repeat_1.{i}", scales[1], (192, 128, 160, 192)) for i in range(10)),
        _reduction_b(288, (288, 320)),
        *(_block_c(f"repeat_2.{i}", scales[2], (192, 224, 256)) for i in range(5)),
    )
    return Classifier(path, "last_linear", num_classes)
