"""Graphs made for a GPU, executed on this machine's CPU for their accuracy."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from engines.openvino import EMULATOR
from pipeline.artifacts import ModelArtifact
from pipeline.onnx_files import load_model, save_model
from pipeline.passes.half_precision import widen

__all__ = ["EMULATOR", "emulated"]


def emulated(model: ModelArtifact, work_dir: Path) -> ModelArtifact:
    """The graph as a CPU can execute it: the constants it ships, half precision widened to float32.

    `EMULATOR` runs it, Q/DQ as written. A GPU's integer convolution adds bias and identity in float32 and rounds
    once, so with Q/DQ that is the closer arithmetic too.

    Args:
        model: strongly typed ONNX.
        work_dir: for the widened copy, which does not ship.
    """
    graph = load_model(model.path)
    widen(graph)
    path = work_dir / f"emulated.{model.path.name}"
    return dataclasses.replace(model, path=path, sha256=save_model(graph, path))
