"""The built-in networks: name, factory, and what goes with the name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import nn

from pipeline.artifacts import PreprocessSpec
from pipeline.models.inception import inception_v2, inception_v3, inception_v4, stem_for
from pipeline.models.inception_resnet import (
    EMBEDDING_SIZE,
    inception_resnet_v1,
    inception_resnet_v1_embedding,
    inception_resnet_v1_paper,
    inception_resnet_v2,
    inception_resnet_v2_paper,
)
from pipeline.models.lite import SMALL_INPUT_PX, inception_resnet_lite

__all__ = ["NETWORKS", "Network"]

_HALF = (0.5, 0.5, 0.5)
_INCEPTION = PreprocessSpec((299, 299), interpolation="bicubic", crop_fraction=0.875, mean=_HALF, std=_HALF)
"""The preprocessing of TensorFlow's Inception networks, which every port of their weights keeps."""

# (pixel - 127.5) / 128, on face crops that are resized whole.
_FACE = PreprocessSpec((160, 160), resize="squash", mean=_HALF, std=(128 / 255,) * 3)


@dataclass(frozen=True, slots=True)
class Network:
    """A built-in network.

    Attributes:
        build: ``build(num_classes, input_size) -> nn.Module``; also takes ``width`` where `has_width`.
        num_classes: outputs where nothing else says how many.
        preprocess: the default, at the default input size.
        paper_stems: whether 79 and 151 pixels select a low-resolution stem (`inception.stem_for`).
        has_width: whether there is a multiplier of the channel counts.
        timm_name: timm's name of the same network with the same state-dict keys.
        dropped: key prefixes of heads that its checkpoints carry and this network has no use for.
    """

    name: str
    summary: str
    build: Callable[..., nn.Module]
    preprocess: PreprocessSpec = _INCEPTION
    num_classes: int = 1000
    paper_stems: bool = True
    has_width: bool = False
    timm_name: str | None = None
    dropped: tuple[str, ...] = ()

    @property
    def input_size(self) -> int:
        """Side of the default input, pixels."""
        return self.preprocess.input_hw[0]

    def has_low_resolution_stem(self, input_size: int) -> bool:
        """Whether this input size selects another stem than the default size does."""
        return self.paper_stems and stem_for(input_size) != stem_for(self.input_size)


_ALL = (
    Network("inception_v2", "table 1 of arXiv 1512.00567", inception_v2),
    Network(
        "inception_v3",
        "timm's and torchvision's Inception-v3",
        inception_v3,
        timm_name="inception_v3",
        dropped=("AuxLogits.",),
    ),
    Network("inception_v4", "timm's Inception-v4", inception_v4, timm_name="inception_v4"),
    Network(
        "inception_resnet_v1",
        "facenet-pytorch's face network, classifier head",
        lambda num_classes, _: inception_resnet_v1(num_classes),
        _FACE,
        num_classes=8631,
        paper_stems=False,
    ),
    Network(
        "inception_resnet_v1_embedding",
        "facenet-pytorch's face network, 512-d embedding",
        lambda _, __: inception_resnet_v1_embedding(),
        _FACE,
        num_classes=EMBEDDING_SIZE,
        paper_stems=False,
        dropped=("logits.",),
    ),
    Network("inception_resnet_v1_paper", "figures 10 to 15 of arXiv 1602.07261", inception_resnet_v1_paper),
    Network(
        "inception_resnet_v2",
        "timm's Inception-ResNet-v2 (10/20/10 blocks)",
        inception_resnet_v2,
        replace(_INCEPTION, crop_fraction=0.8975),
        timm_name="inception_resnet_v2",
    ),
    Network(
        "inception_resnet_v2_paper",
        "figures 3, 7 and 15 to 19 of arXiv 1602.07261 (5/10/5 blocks)",
        inception_resnet_v2_paper,
    ),
    Network(
        "inception_resnet_lite",
        "edge version, about 1.0 M parameters",
        lambda num_classes, size, width=1.0: inception_resnet_lite(
            num_classes, width, small_input=size <= SMALL_INPUT_PX
        ),
        PreprocessSpec((96, 96), mean=_HALF, std=_HALF),
        paper_stems=False,
        has_width=True,
    ),
)

NETWORKS: dict[str, Network] = {network.name: network for network in _ALL}
"""By name."""
