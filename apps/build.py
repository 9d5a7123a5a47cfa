"""``edgefold build`` (and ``build-engine``): from a model to a bundle, in one command."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["build_command"]


class _Precision(str, Enum):
    int8 = "int8"
    fp16 = "fp16"
    fp32 = "fp32"


class _Calibrator(str, Enum):
    minmax = "minmax"
    percentile = "percentile"
    entropy = "entropy"
    mse = "mse"
    modelopt = "modelopt"


def build_command(
    model: Annotated[
        str,
        typer.Argument(
            help="inception_resnet_lite.signs, inception_v3, …, timm:NAME, torchvision:NAME, "
            "path/to/model.py:factory, or a file.onnx.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="Directory of the bundle.", show_default=False)],
    calib: Annotated[
        str | None,
        typer.Option(
            help="DATA to calibrate on, without labels if need be: an image folder, a folder with labels.csv, "
            "an .npz, a video, or synthetic:SEED[:COUNT]. Needed for int8.",
            show_default=False,
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="FILE (safetensors or checkpoint), pretrained, or random:SEED.", show_default=False
        ),
    ] = None,
    evaluate: Annotated[
        str | None,
        typer.Option(
            "--eval", help="Labelled DATA to judge the engine on against FP32 PyTorch.", show_default=False
        ),
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Refuse to publish if top-1 falls by more points than this (exit 3).",
            show_default=False,
        ),
    ] = None,
    min_agreement: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=100,
            help="Refuse to publish if fewer percent of the images of --eval keep fp32's answer (exit 3). "
            "Needs no labels.",
            show_default=False,
        ),
    ] = None,
    meet_budget: Annotated[
        bool,
        typer.Option(
            "--meet-budget",
            help="Search the layers that must stay in float to meet --max-drop or --min-agreement at the least "
            "measured latency, instead of refusing.",
        ),
    ] = False,
    target: Annotated[str, typer.Option(help="What it is for: a name of `edgefold targets`.")] = "cpu",
    jetpack: Annotated[
        str | None,
        typer.Option(
            help="JetPack on the target, 6.2 for example: checked before any work.", show_default=False
        ),
    ] = None,
    tensorrt: Annotated[
        str | None,
        typer.Option(
            help="TensorRT on the target, where it is no Jetson, 10.13 for example.", show_default=False
        ),
    ] = None,
    dla: Annotated[
        bool,
        typer.Option(
            "--dla", help="Also the calibration cache for the target's DLA, and what would not run on it."
        ),
    ] = False,
    precision: Annotated[_Precision, typer.Option(help="Of the engine.")] = _Precision.int8,
    calibrator: Annotated[
        _Calibrator | None,
        typer.Option(
            help="How ranges are chosen; mse if not given. modelopt: by NVIDIA Model Optimizer, if installed.",
            show_default=False,
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="Use the ranges of this BUNDLE (or its calibration.json) again, without images: only for the same "
            "model, preprocessing, method and tools.",
            show_default=False,
        ),
    ] = None,
    corrections: Annotated[
        str,
        typer.Option(
            help="What is done against the loss: auto (bias, and adaround where its estimate stays below a minute), "
            "none, or equalize, ranges, bias, adaround, with commas between."
        ),
    ] = "auto",
    calib_limit: Annotated[int, typer.Option(min=1, help="At most this many images of --calib.")] = 128,
    eval_limit: Annotated[
        int | None, typer.Option(min=1, help="At most this many images of --eval.", show_default=False)
    ] = None,
    input_size: Annotated[
        int | None, typer.Option(min=8, help="Side of the input, instead of the model's.", show_default=False)
    ] = None,
    num_classes: Annotated[
        int | None, typer.Option(min=1, help="Where the weights do not tell.", show_default=False)
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(help="Class names by index: one a line, or a JSON list.", show_default=False),
    ] = None,
    preprocess: Annotated[
        Path | None, typer.Option(help="PreprocessSpec as JSON, instead of the model's.", show_default=False)
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            help="What runs it on a CPU: openvino (if not given) or onnxruntime.", show_default=False
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace the bundle that is at --out.")] = True,
    json_output: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Export, fold, calibrate, compile and judge a model: one bundle, or an error and nothing."""
    from apps.building import build
    from apps.console import print_json, progress_display
    from apps.publishing import BuildRequest, print_build

    request = BuildRequest(
        model=model,
        out=out,
        calib=calib,
        weights=weights,
        eval_data=evaluate,
        max_drop_points=max_drop,
        min_agreement_percent=min_agreement,
        meet_budget=meet_budget,
        target=target,
        jetpack=jetpack,
        tensorrt=tensorrt,
        dla=dla,
        precision=precision.value,
        calibrator=calibrator.value if calibrator else None,
        calibration=calibration,
        corrections=corrections,
        calib_limit=calib_limit,
        eval_limit=eval_limit,
        input_size=input_size,
        num_classes=num_classes,
        labels=labels,
        preprocess=preprocess,
        engine=engine,
        overwrite=overwrite,
    )
    with progress_display() as progress:
        outcome = build(request, progress)
    if json_output:
        print_json(outcome.to_json())
    else:
        print_build(outcome)
