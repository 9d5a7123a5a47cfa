"""A small manifest and bundle for tests of what reads them."""

from __future__ import annotations

from pathlib import Path

from pipeline.artifacts import Fingerprint, PreprocessSpec, StageRecord, TensorSpec
from pipeline.bundle import Bundle, BundleWriter
from pipeline.manifest import (
    AccuracySummary,
    CalibrationSummary,
    EngineRecord,
    Manifest,
    ModelSource,
)

FILES = {
    "model.onnx": b"fp32 graph " * 50,
    "model.int8.onnx": b"int8 graph " * 20,
    "calibration.json": b"{}",
    "report.html": b"<html></html>",
}


def make_manifest(name: str = "net") -> Manifest:
    """Everything a build writes down, with `files` still empty."""
    return Manifest(
        name=name,
        created_utc="2026-11-23T10:00:00Z",
        edgefold_version="0.1.0",
        tools={"onnx": "1.21", "openvino": "2026.4"},
        target="cpu",
        precision="int8",
        model=ModelSource("inception_v3", "random:0", None, 3),
        inputs=(TensorSpec("input", "uint8", ("batch", 75, 75, 3)),),
        outputs=(TensorSpec("logits", "float32", ("batch", 3)),),
        preprocess=PreprocessSpec((75, 75), crop_fraction=0.875, mean=(0.5, 0.5, 0.5)),
        preprocess_folded=True,
        input_color="BGR",
        labels=("ant", "bee", "cat"),
        calibration=CalibrationSummary("entropy", 128, "a" * 64, "b" * 64, "c" * 64, "photos"),
        accuracy=AccuracySummary("photos", "d" * 64, 500, 0.9, 0.89, 1.0, 0.2, 1.8, 0.98, 24.5),
        stages=(StageRecord("fold", ("e" * 64,), ("f" * 64,), 1.5, {"n_rewrites": 12, "limit": None}),),
        engine=EngineRecord(
            "openvino", "model.int8.onnx", Fingerprint("openvino", "2026.4", "cpu", ("vnni",))
        ),
    )


def write_bundle(out_dir: Path, name: str = "net", extra: bytes = b"") -> Bundle:
    """A complete bundle at `out_dir`, replacing one that is there."""
    with BundleWriter(out_dir, overwrite=True) as writer:
        for file_name, content in FILES.items():
            writer.add_file(file_name, content + extra)
        return writer.commit(make_manifest(name))
