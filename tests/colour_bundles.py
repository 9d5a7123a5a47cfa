"""Real bundles of a network whose answer is the strongest colour of an image: small, exact, and easy to spoil."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
from PIL import Image

from pipeline.artifacts import Fingerprint, PreprocessSpec, StageRecord, TensorSpec
from pipeline.bundle import BundleWriter
from pipeline.manifest import EngineRecord, Manifest, ModelSource

LABELS = ("red", "green", "blue")
SPEC = PreprocessSpec(input_hw=(8, 8), resize="none", mean=(0.5, 0.4, 0.3), std=(0.25, 0.5, 0.2))
FACTORY = """
from pathlib import Path
import torch
Path(__file__).with_name("ran").touch()
edgefold_preprocess = {"input_hw": (8, 8), "resize": "none", "mean": (0.5, 0.4, 0.3), "std": (0.25, 0.5, 0.2)}

class Mean(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x):
        mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.25, 0.5, 0.2])
        return x.mean(dim=(2, 3)) * std + mean

def colour():
    return Mean()
"""


def graph(path, bias=(0.0, 0.0, 0.0), batch="N", side=8):
    """Logits are the mean red, green and blue of uint8 NHWC BGR pixels, plus a bias."""
    text = f"""
    <ir_version: 9, opset_import: ["" : 18]>
    colour (uint8[{batch}, {side}, {side}, 3] input) => (float[{batch}, 3] logits)
    <int64[2] axes = {{1, 2}}, int64[3] order = {{2, 1, 0}}, float full = {{255.0}},
     float[3] bias = {{{", ".join(map(str, bias))}}}>
    {{
        values = Cast<to = 1>(input)
        mean = ReduceMean<keepdims = 0>(values, axes)
        rgb = Gather<axis = 1>(mean, order)
        unit = Div(rgb, full)
        logits = Add(unit, bias)
    }}
    """
    model = onnx.parser.parse_model(text)
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString())
    return path


def images(n=90, seed=0):
    """Every image's class has the strongest channel, by little in some of them."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    pixels = rng.integers(80, 120, (n, 8, 8, 3))
    lift = np.linspace(4, 60, n).astype(int)
    pixels[np.arange(n), :, :, labels] += lift[:, None, None]
    return pixels.astype(np.uint8), labels


def manifest(spec, *, ships="model.int8.onnx", **changes):
    values = Manifest(
        name="colour",
        created_utc="2026-11-23T10:00:00Z",
        edgefold_version="0.1.0",
        tools={},
        target="cpu",
        precision="int8" if "int8" in ships else "fp32",
        model=ModelSource(spec, "as built by the factory", None, 3),
        inputs=(TensorSpec("input", "uint8", ("N", 8, 8, 3)),),
        outputs=(TensorSpec("logits", "float32", ("N", 3)),),
        preprocess=SPEC,
        preprocess_folded=True,
        input_color="BGR",
        labels=LABELS,
        calibration=None,
        accuracy=None,
        stages=(
            StageRecord(
                "export",
                (),
                (),
                1.0,
                {"max_abs_error": 2e-6, "max_abs_error_limit": 1e-4, "sqnr_db": 120.0, "sqnr_db_limit": 80.0},
            ),
        ),
        engine=EngineRecord("openvino", ships, Fingerprint("openvino", "1", "cpu")),
        files={},
    )
    return dataclasses.replace(values, **changes)


def write_folders(root, names):
    pixels, labels = images(12)
    for i, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        folder = root / names[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i}.png")
    return root


def write_colour_bundle(path, spec="a.onnx", bias=(0.04, 0.0, 0.0), side=8, **changes):
    """A bundle at `path` whose int8 graph has a bias of its own; where it lies."""
    if side != 8:
        changes["inputs"] = (TensorSpec("input", "uint8", ("N", side, side, 3)),)
        changes["preprocess"] = PreprocessSpec((side, side))
    with BundleWriter(path, overwrite=True) as writer:
        graph(writer.path / "model.onnx", side=side)
        if changes.get("ships", "int8").count("int8"):
            graph(writer.path / "model.int8.onnx", bias, side=side)
        return writer.commit(manifest(spec, **changes)).path
