"""Inception-v2 and -v3 (arXiv 1512.00567) and Inception-v4 (arXiv 1602.07261) as tables.

`inception_v3` and `inception_v4` carry the keys of timm's (and, for v3, torchvision's) checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.models.tables import Block, Classifier, Concat, Path, Row, avg_pool, conv, max_pool, valid

__all__ = ["Stem", "inception_v2", "inception_v3", "inception_v4", "stem_for", "v4_stem"]


@dataclass(frozen=True, slots=True)
class Stem:
    """What the low-resolution variants change: strides only, so the weights keep their shapes."""

    first_stride: int = 2
    first_pool: bool = True

    @property
    def first_pool_rows(self) -> Path:
        return (max_pool(),) if self.first_pool else ()


_LOW_RESOLUTION = {151: Stem(first_stride=1), 79: Stem(first_stride=1, first_pool=False)}


def stem_for(input_size: int) -> Stem:
    """The stem of an input size: arXiv 1512.00567, section 8.

    At 151 pixels the first layer has stride 1; at 79 the pooling after it goes as well: the later stages
    then see (almost) the grids that 299 pixels give them. Any other size takes the 299-pixel stem.
    """
    return _LOW_RESOLUTION.get(input_size, Stem())


def _pool_branch(name: str, channels: int, count_include_pad: bool = False) -> Path:
    return (avg_pool(count_include_pad), conv(name, channels, 1))


def _figure5(name: str, pool_channels: int) -> Block:
    """Figure 5: the 5×5 convolution as two 3×3."""
    return Block(name, (Concat((
        (conv("branch1x1", 64, 1),),
        (conv("branch3x3_1", 48, 1), conv("branch3x3_2", 64, 3)),
        (conv("branch3x3dbl_1", 64, 1), conv("branch3x3dbl_2", 96, 3), conv("branch3x3dbl_3", 96, 3)),
        _pool_branch("branch_pool", pool_channels),
    )),))  # fmt: skip


def _v3_block35(name: str, pool_channels: int) -> Block:
    """As figure 5, but the public Inception-v3 kept a 5×5 where the figure has a single 3×3."""
    return Block(name, (Concat((
        (conv("branch1x1", 64, 1),),
        (conv("branch5x5_1", 48, 1), conv("branch5x5_2", 64, 5)),
        (conv("branch3x3dbl_1", 64, 1), conv("branch3x3dbl_2", 96, 3), conv("branch3x3dbl_3", 96, 3)),
        _pool_branch("branch_pool", pool_channels, count_include_pad=True),
    )),))  # fmt: skip


def _reduction_35_to_17(name: str) -> Block:
    """Figure 10: stride-2 convolutions beside a pooling, so that nothing is lost in between."""
    return Block(name, (Concat((
        (valid("branch3x3", 384, 3, 2),),
        (conv("branch3x3dbl_1", 64, 1), conv("branch3x3dbl_2", 96, 3), valid("branch3x3dbl_3", 96, 3, 2)),
        (max_pool(),),
    )),))  # fmt: skip


def _figure6(name: str, width: int, count_include_pad: bool = False) -> Block:
    """Figure 6 with n = 7: 7×7 as 1×7 and 7×1."""
    return Block(name, (Concat((
        (conv("branch1x1", 192, 1),),
        (conv("branch7x7_1", width, 1), conv("branch7x7_2", width, (1, 7)), conv("branch7x7_3", 192, (7, 1))),
        (
            conv("branch7x7dbl_1", width, 1),
            conv("branch7x7dbl_2", width, (7, 1)),
            conv("branch7x7dbl_3", width, (1, 7)),
            conv("branch7x7dbl_4", width, (7, 1)),
            conv("branch7x7dbl_5", 192, (1, 7)),
        ),
        _pool_branch("branch_pool", 192, count_include_pad),
    )),))  # fmt: skip


def _reduction_17_to_8(name: str) -> Block:
    return Block(name, (Concat((
        (conv("branch3x3_1", 192, 1), valid("branch3x3_2", 320, 3, 2)),
        (
            conv("branch7x7x3_1", 192, 1),
            conv("branch7x7x3_2", 192, (1, 7)),
            conv("branch7x7x3_3", 192, (7, 1)),
            valid("branch7x7x3_4", 192, 3, 2),
        ),
        (max_pool(),),
    )),))  # fmt: skip


def _figure7(name: str, count_include_pad: bool = False) -> Block:
    """Figure 7: the 3×3 spread into 1×3 beside 3×1, for the coarsest grid."""
    return Block(name, (Concat((
        (conv("branch1x1", 320, 1),),
        (
            conv("branch3x3_1", 384, 1),
            Concat(((conv("branch3x3_2a", 384, (1, 3)),), (conv("branch3x3_2b", 384, (3, 1)),))),
        ),
        (
            conv("branch3x3dbl_1", 448, 1),
            conv("branch3x3dbl_2", 384, 3),
            Concat(((conv("branch3x3dbl_3a", 384, (1, 3)),), (conv("branch3x3dbl_3b", 384, (3, 1)),))),
        ),
        _pool_branch("branch_pool", 192, count_include_pad),
    )),))  # fmt: skip


def inception_v2(num_classes: int = 1000, input_size: int = 299) -> Classifier:
    """Inception-v2 as Table 1 of arXiv 1512.00567 lists it: 3 × figure 5, 5 × figure 6, 2 × figure 7.

    The table gives the grids and the widths between the stages (288, 768, 1280, 2048). The widths inside
    the modules are Inception-v3's, which make those sums, with the 7×7 branches kept narrow enough for the
    paper's "less than 25 million parameters". Every convolution is batch-normalized. There is no public
    checkpoint of this table (what is commonly called "Inception-v2" is BN-Inception).
    """
    stem = stem_for(input_size)
    path: Path = (
        valid("conv_1", 32, 3, stem.first_stride),
        valid("conv_2", 32, 3),
        conv("conv_3", 64, 3),
        *stem.first_pool_rows,
        valid("conv_4", 80, 3),
        valid("conv_5", 192, 3, 2),
        conv("conv_6", 288, 3),
        *(_figure5(f"mixed_35.{i}", pool_channels=64) for i in range(3)),
        _reduction_35_to_17("reduce_35"),
        *(_figure6(f"mixed_17.{i}", width) for i, width in enumerate((128, 128, 128, 160, 160))),
        _reduction_17_to_8("reduce_17"),
        *(_figure7(f"mixed_8.{i}") for i in range(2)),
    )
    return Classifier(path, "fc", num_classes)


def inception_v3(num_classes: int = 1000, input_size: int = 299) -> Classifier:
    """Inception-v3 without its auxiliary head, as the public checkpoints have it."""
    stem = stem_for(input_size)
    path: Path = (
        valid("Conv2d_1a_3x3", 32, 3, stem.first_stride),
        valid("Conv2d_2a_3x3", 32, 3),
        conv("Conv2d_2b_3x3", 64, 3),
        *stem.first_pool_rows,
        valid("Conv2d_3b_1x1", 80, 1),
        valid("Conv2d_4a_3x3", 192, 3),
        max_pool(),
        _v3_block35("Mixed_5b", pool_channels=32),
        _v3_block35("Mixed_5c", pool_channels=64),
        _v3_block35("Mixed_5d", pool_channels=64),
        _reduction_35_to_17("Mixed_6a"),
        _figure6("Mixed_6b", 128, count_include_pad=True),
        _figure6("Mixed_6c", 160, count_include_pad=True),
        _figure6("Mixed_6d", 160, count_include_pad=True),
        _figure6("Mixed_6e", 192, count_include_pad=True),
        _reduction_17_to_8("Mixed_7a"),
        _figure7("Mixed_7b", count_include_pad=True),
        _figure7("Mixed_7c", count_include_pad=True),
    )
    return Classifier(path, "fc", num_classes)


def v4_stem(stem: Stem, names: tuple[str, str, str, str, str, str]) -> tuple[Row, ...]:
    """Figure 3 of arXiv 1602.07261: 299 pixels to 384 channels of 35×35.

    The first pooling stands beside a convolution of the same stride; without pooling both have stride 1.
    """
    first, second, third, mixed_3a, mixed_4a, mixed_5a = names
    pool_stride = 2 if stem.first_pool else 1
    return (
        valid(first, 32, 3, stem.first_stride),
        valid(second, 32, 3),
        conv(third, 64, 3),
        Block(mixed_3a, (Concat(((max_pool(pool_stride),), (valid("conv", 96, 3, pool_stride),))),)),
        Block(mixed_4a, (Concat((
            (conv("branch0.0", 64, 1), valid("branch0.1", 96, 3)),
            (
                conv("branch1.0", 64, 1),
                conv("branch1.1", 64, (1, 7)),
                conv("branch1.2", 64, (7, 1)),
                valid("branch1.3", 96, 3),
            ),
        )),)),
        Block(mixed_5a, (Concat(((valid("conv", 192, 3, 2),), (max_pool(),))),)),
    )  # fmt: skip


def _v4_block_a(name: str) -> Block:
    return Block(name, (Concat((
        (conv("branch0", 96, 1),),
        (conv("branch1.0", 64, 1), conv("branch1.1", 96, 3)),
        (conv("branch2.0", 64, 1), conv("branch2.1", 96, 3), conv("branch2.2", 96, 3)),
        _pool_branch("branch3.1", 96),
    )),))  # fmt: skip


def _v4_reduction_a(name: str) -> Block:
    return Block(name, (Concat((
        (valid("branch0", 384, 3, 2),),
        (conv("branch1.0", 192, 1), conv("branch1.1", 224, 3), valid("branch1.2", 256, 3, 2)),
        (max_pool(),),
    )),))  # fmt: skip


def _v4_block_b(name: str) -> Block:
    return Block(name, (Concat((
        (conv("branch0", 384, 1),),
        (conv("branch1.0", 192, 1), conv("branch1.1", 224, (1, 7)), conv("branch1.2", 256, (7, 1))),
        (
            conv("branch2.0", 192, 1),
            conv("branch2.1", 192, (7, 1)),
            conv("branch2.2", 224, (1, 7)),
            conv("branch2.3", 224, (7, 1)),
            conv("branch2.4", 256, (1, 7)),
        ),
        _pool_branch("branch3.1", 128),
    )),))  # fmt: skip


def _v4_reduction_b(name: str) -> Block:
    return Block(name, (Concat((
        (conv("branch0.0", 192, 1), valid("branch0.1", 192, 3, 2)),
        (
            conv("branch1.0", 256, 1),
            conv("branch1.1", 256, (1, 7)),
            conv("branch1.2", 320, (7, 1)),
            valid("branch1.3", 320, 3, 2),
        ),
        (max_pool(),),
    )),))  # fmt: skip


def _v4_block_c(name: str) -> Block:
    return Block(name, (Concat((
        (conv("branch0", 256, 1),),
        (
            conv("branch1_0", 384, 1),
            Concat(((conv("branch1_1a", 256, (1, 3)),), (conv("branch1_1b", 256, (3, 1)),))),
        ),
        (
            conv("branch2_0", 384, 1),
            conv("branch2_1", 448, (3, 1)),
            conv("branch2_2", 512, (1, 3)),
            Concat(((conv("branch2_3a", 256, (1, 3)),), (conv("branch2_3b", 256, (3, 1)),))),
        ),
        _pool_branch("branch3.1", 256),
    )),))  # fmt: skip


def inception_v4(num_classes: int = 1000, input_size: int = 299) -> Classifier:
    """Inception-v4, figure 9 of arXiv 1602.07261: stem, 4 × A, 7 × B, 3 × C."""
    blocks = (*[_v4_block_a] * 4, _v4_reduction_a, *[_v4_block_b] * 7, _v4_reduction_b, *[_v4_block_c] * 3)
    stem = v4_stem(
        stem_for(input_size),
        ("features.0", "features.1", "features.2", "features.3", "features.4", "features.5"),
    )
    path: Path = (*stem, *(block(f"features.{i}") for i, block in enumerate(blocks, start=len(stem))))
    return Classifier(path, "last_linear", num_classes)
