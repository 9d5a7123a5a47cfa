"""The rows a network table is written in, and the module they make.

A table is a *path*: a tuple of rows applied one after another. A row's name **is** the state-dict key of
its parameters, dots included (``branch1.0``), so that a table and the public checkpoint it must load can
be read side by side and no key map is needed. Channel counts of inputs are inferred.

=========== =======================================================================================
row         what it does
=========== =======================================================================================
`Conv`      convolution, batch norm, ReLU (`blocks.ConvNormAct`)
`Pool`      3×3 max or average pooling
`Concat`    runs several paths on the same input and joins their outputs along the channels
`Residual`  the same, then ``x + scale * up(joined)``: arXiv 1602.07261, section 3.2 and figure 20
`Block`     a path whose keys are prefixed with the block's name
=========== =======================================================================================

As in the papers' figures, convolutions keep the size (zero padding) unless they are marked `valid`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.models.blocks import ConvNormAct, Size2d

__all__ = [
    "Block",
    "Classifier",
    "Concat",
    "Conv",
    "Path",
    "Pool",
    "Residual",
    "TableModule",
    "avg_pool",
    "conv",
    "max_pool",
    "residual_rows",
    "valid",
]


@dataclass(frozen=True, slots=True)
class Conv:
    """A `ConvNormAct`; made by `conv` or `valid`."""

    name: str
    out_channels: int
    kernel_size: Size2d
    stride: int
    padding: Size2d


@dataclass(frozen=True, slots=True)
class Pool:
    """3×3 pooling. ``count_include_pad`` differs between the public ports of average pooling."""

    kind: Literal["max", "avg"]
    stride: int
    padding: int = 0
    count_include_pad: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        if self.kind == "max":
            return functional.max_pool2d(x, 3, self.stride, self.padding)
        return functional.avg_pool2d(
            x, 3, self.stride, self.padding, count_include_pad=self.count_include_pad
        )


@dataclass(frozen=True, slots=True)
class Concat:
    """Paths side by side."""

    paths: tuple[Path, ...]


@dataclass(frozen=True, slots=True)
class Residual:
    """``relu(x + scale * up(concat(paths)))``; ``up`` is a linear 1×1 convolution with bias.

    ``relu=False`` gives the linear last block of the public checkpoints.
    """

    paths: tuple[Path, ...]
    up: str
    scale: float
    relu: bool = True


@dataclass(frozen=True, slots=True)
class Block:
    """A path under its own name."""

    name: str
    path: Path


Row = Conv | Pool | Concat | Residual | Block
Path = tuple[Row, ...]


def conv(name: str, out_channels: int, kernel_size: Size2d) -> Conv:
    """A convolution that keeps the size: stride 1, zero padding."""
    height, width = kernel_size if isinstance(kernel_size, tuple) else (kernel_size, kernel_size)
    return Conv(name, out_channels, kernel_size, 1, (height // 2, width // 2))


def valid(name: str, out_channels: int, kernel_size: Size2d, stride: int = 1) -> Conv:
    """A convolution without padding, marked ``V`` in the figures of arXiv 1602.07261."""
    return Conv(name, out_channels, kernel_size, stride, 0)


def max_pool(stride: int = 2) -> Pool:
    """3×3 max pooling without padding."""
    return Pool("max", stride)


def avg_pool(count_include_pad: bool = False) -> Pool:
    """3×3 average pooling that keeps the size."""
    return Pool("avg", 1, 1, count_include_pad)


class TableModule(nn.Module):
    """A path as a module: ``(N, in_channels, H, W) -> (N, out_channels, H', W')``, float32.

    The rows stay the description of the computation; parameters are registered under the rows' names.
    """

    def __init__(self, path: Path, in_channels: int) -> None:
        super().__init__()
        self.path = path
        self.out_channels = self._register_path(path, in_channels)

    def _register_path(self, path: Path, channels: int) -> int:
        for row in path:
            if isinstance(row, Conv):
                module = ConvNormAct(channels, row.out_channels, row.kernel_size, row.stride, row.padding)
                self._register(row.name, module)
                channels = row.out_channels
            elif isinstance(row, Block):
                block = TableModule(row.path, channels)
                self._register(row.name, block)
                channels = block.out_channels
            elif isinstance(row, Concat | Residual):
                joined = sum(self._register_path(path, channels) for path in row.paths)
                if isinstance(row, Residual):
                    self._register(row.up, nn.Conv2d(joined, channels, 1))
                else:
                    channels = joined
        return channels

    def _register(self, name: str, module: nn.Module) -> None:
        """Adds `module` under a dotted name, with an empty module for every part before a dot."""
        *parents, leaf = name.split(".")
        owner: nn.Module = self
        for part in parents:
            if not hasattr(owner, part):
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        owner.add_module(leaf, module)

    def _run(self, path: Path, x: Tensor) -> Tensor:
        for row in path:
            if isinstance(row, Pool):
                x = row(x)
            elif isinstance(row, Concat):
                x = torch.cat([self._run(path, x) for path in row.paths], dim=1)
            elif isinstance(row, Residual):
                joined = torch.cat([self._run(path, x) for path in row.paths], dim=1)
                x = x + self.get_submodule(row.up)(joined) * row.scale
                x = functional.relu(x) if row.relu else x
            else:
                x = self.get_submodule(row.name)(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self._run(self.path, x)


class Classifier(TableModule):
    """A table, global average pooling, dropout and a linear head.

    ``(N, 3, H, W) float32 -> (N, num_classes)`` logits.

    Args:
        path: the table.
        head: state-dict key of the linear layer.
        num_classes: outputs of the head.
        drop_rate: dropout before the head, training only; 0.2 in both papers.
    """

    def __init__(self, path: Path, head: str, num_classes: int, drop_rate: float = 0.2) -> None:
        super().__init__(path, in_channels=3)
        self.head_name = head
        self.drop = nn.Dropout(drop_rate)
        self._register(head, nn.Linear(self.out_channels, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        features = functional.adaptive_avg_pool2d(super().forward(x), 1).flatten(1)
        logits: Tensor = self.get_submodule(self.head_name)(self.drop(features))
        return logits


def residual_rows(path: Path) -> Iterator[Residual]:
    """Every residual row of a table, in the order they run."""
    for row in path:
        if isinstance(row, Residual):
            yield row
        elif isinstance(row, Block):
            yield from residual_rows(row.path)
