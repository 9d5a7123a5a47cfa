"""Every network × precision × SM through TensorRT-RTX's real parser and ahead-of-time builder. No GPU.

    python benchmarks/tensorrt_matrix.py [--networks NAME …] [--sms 80 89 …] [--images DATA]

Each network has random weights (seed 0) and is calibrated on the images; its graphs are those that ship:
int8 and fp16 of the TensorRT placement, and, for the size of its plan alone, fp32 with the cast in front
of the pixels. A cell is one plan for one SM. Writes benchmarks/results/tensorrt_matrix.json. Goals: all
parsed; all built for SM 80, 86, 89 and 120; Inception-ResNet-v2 int8 under 60 s on 2 cores; int8 plans at
most 0.40 of the fp32 plan's bytes, fp16 plans at most 0.55.

The sizes are of the files as a bundle has them, packed (`engines.tensorrt.plan_file`), all six networks and all
three precisions alike; those of the plans themselves are recorded beside. For SM 75 there is no fp32 plan to
compare with: TensorRT-RTX compiles no float32 matrix product for it.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness import machine_stamp, write_results

from calibration.quantizer import StaticQuantizer
from calibration.table import derive_table
from calibration.tensorrt_form import TensorRTForms
from engines.openvino import fp32_runner
from engines.tensorrt.api import TensorRtApi, load_api
from engines.tensorrt.builder import build_plan
from engines.tensorrt.options import BatchProfile, TensorRtOptions
from engines.tensorrt.plan_file import PLAN_NAMES, read_plan
from pipeline.artifacts import ModelArtifact
from pipeline.compile import export_resolved
from pipeline.datasets import batches, open_dataset
from pipeline.errors import EngineError
from pipeline.models.resolve import resolve_model
from pipeline.onnx_files import load_model, save_model
from pipeline.passes import fold, run_passes
from pipeline.passes.center_pixels import CENTER_PIXELS

LITE = "inception_resnet_lite"
NETWORKS = (
    "inception_v2",
    "inception_v3",
    "inception_v4",
    "inception_resnet_v1",
    "inception_resnet_v2",
    LITE,
)
SMS = (75, 80, 86, 89, 120, 121)
BUILT_SMS = (80, 86, 89, 120)
PRECISIONS = ("fp32", "fp16", "int8")
PROFILE = BatchProfile(1, 1, 8)
GOALS = {
    "parsed": 1.0,
    "built_on_sm_80_86_89_120": 1.0,
    "inception_resnet_v2_int8_seconds": 60.0,
    "int8_of_fp32_bytes": 0.40,
    "fp16_of_fp32_bytes": 0.55,
}


def make_graphs(name: str, images: str, folder: Path) -> dict[str, ModelArtifact]:
    """The three graphs of a network, by precision."""
    resolved = resolve_model(name, weights="random:0")
    exported = export_resolved(resolved, folder / "exported.onnx")
    folded, _ = fold(exported, folder / "folded.onnx", input_color="BGR", progress=_quiet)
    dataset = open_dataset(images)
    quantizer = StaticQuantizer("minmax", "tensorrt", runner_factory=fp32_runner, corrections=())
    passes = batches(dataset, folded.preprocess, "BGR", 1)
    statistics, _ = quantizer.statistics(folded, passes, dataset.sha256, _quiet)
    forms = TensorRTForms(folded, derive_table(statistics, "minmax"))
    int8, _ = forms.int8(forms.placement(), folder / "int8.onnx")
    fp16, _ = forms.half(folder / "fp16.onnx")
    centred, _ = run_passes(load_model(folded.path), (CENTER_PIXELS,))
    path = folder / "fp32.onnx"
    fp32 = dataclasses.replace(folded, path=path, sha256=save_model(centred, path))
    return {"fp32": fp32, "fp16": fp16, "int8": int8}


def cells(api: TensorRtApi, name: str, images: str, sms: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """One row a precision and SM."""
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        graphs = make_graphs(name, images, folder)
        fp32_bytes: dict[int, tuple[int, int]] = {}
        for precision in PRECISIONS:
            parsed = _parses(api, graphs[precision].path)
            for sm in sms:
                row: dict[str, Any] = {"network": name, "precision": precision, "sm": sm, "parsed": parsed}
                options = TensorRtOptions(sms=(sm,), profiles=(PROFILE,))
                try:
                    built = build_plan(
                        api, graphs[precision], folder / PLAN_NAMES["tensorrt_rtx"], options, _quiet
                    )
                except EngineError as error:
                    yield {**row, "built": False, "error": str(error).replace(f"{folder}/", "")}
                    continue
                sizes = built.size_bytes, len(read_plan(built.path, built.sha256))
                if precision == "fp32":
                    fp32_bytes[sm] = sizes
                row |= {
                    "built": True,
                    "seconds": built.seconds,
                    "file_bytes": sizes[0],
                    "plan_bytes": sizes[1],
                }
                if sm in fp32_bytes:
                    file_share, plan_share = (
                        round(size / of, 4) for size, of in zip(sizes, fp32_bytes[sm], strict=True)
                    )
                    row |= {"of_fp32_file": file_share, "of_fp32_plan": plan_share}
                yield {**row, "warnings": list(built.warnings)}


def measured(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """What `GOALS` are compared with: the share, or the worst cell; and the sizes of the plans themselves."""
    shipped = [row for row in rows if row["precision"] != "fp32"]
    wanted = [row for row in shipped if row["sm"] in BUILT_SMS]
    large = [row for row in rows if row["network"] != LITE]
    lite = [row for row in rows if row["network"] == LITE]
    return {
        "parsed": _share(shipped, "parsed"),
        "built_on_sm_80_86_89_120": _share(wanted, "built"),
        "inception_resnet_v2_int8_seconds": _worst(
            [row for row in rows if row["network"] == "inception_resnet_v2"], "int8", "seconds"
        ),
        "int8_of_fp32_bytes": _worst(rows, "int8", "of_fp32_file"),
        "fp16_of_fp32_bytes": _worst(rows, "fp16", "of_fp32_file"),
        "int8_of_fp32_bytes_unpacked": _worst(large, "int8", "of_fp32_plan"),
        "fp16_of_fp32_bytes_unpacked": _worst(large, "fp16", "of_fp32_plan"),
        "lite_int8_of_fp32_bytes_unpacked": _worst(lite, "int8", "of_fp32_plan"),
        "lite_fp16_of_fp32_bytes_unpacked": _worst(lite, "fp16", "of_fp32_plan"),
    }


def _share(rows: list[dict[str, Any]], key: str) -> float | None:
    return sum(row[key] for row in rows) / len(rows) if rows else None


def _worst(rows: list[dict[str, Any]], precision: str, key: str) -> float | None:
    found = [row[key] for row in rows if row["precision"] == precision and row.get(key) is not None]
    return max(found, default=None)


def _parses(api: TensorRtApi, path: Path) -> bool:
    trt = api.module
    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    return bool(trt.OnnxParser(network, logger).parse(path.read_bytes()))


def _quiet(what: str, done: int, total: int | None) -> None:
    """Nobody watches."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--sms", nargs="+", type=int, default=list(SMS))
    parser.add_argument("--images", default="synthetic:1:16")
    parser.add_argument("--name", default="tensorrt_matrix", help="of the results file")
    arguments = parser.parse_args()
    api = load_api("tensorrt_rtx")
    stamp = machine_stamp()
    rows = []
    for name in arguments.networks:
        for row in cells(api, name, arguments.images, tuple(arguments.sms)):
            print(row, file=sys.stderr, flush=True)
            rows.append(row)
    results = {
        "machine": stamp,
        "engine": {"name": api.flavour, "version": api.version_text},
        "weights": "random:0",
        "images": Path(arguments.images).name,
        "profile": PROFILE,
        "goals": GOALS,
        "measured": measured(rows),
        "cells": rows,
    }
    print(write_results(arguments.name, results))


if __name__ == "__main__":
    main()
