"""``edgefold validate``: what an engine gets right, and what each step to it cost."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["validate_command"]


class _Engine(str, Enum):
    openvino = "openvino"
    onnxruntime = "onnxruntime"


class _Against(str, Enum):
    auto = "auto"
    torch = "torch"
    onnx = "onnx"


def validate_command(
    bundles: Annotated[
        list[Path],
        typer.Argument(
            metavar="BUNDLE",
            help="The bundle that edgefold build wrote; several with --ensemble.",
            show_default=False,
        ),
    ],
    data: Annotated[
        str,
        typer.Option(
            help="Labelled DATA: an image folder by class, a folder with labels.csv, an .npz with labels, or "
            "synthetic:SEED[:COUNT]. With --min-agreement also images without labels, or a video.",
            show_default=False,
        ),
    ],
    labels: Annotated[
        Path | None,
        typer.Option(
            help="Class names in the order of the model's outputs, instead of the bundle's: one a line, or a "
            "JSON list.",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="At most this many images, all classes alike.", show_default=False),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images (or crops) a call.")] = 16,
    crops: Annotated[
        int,
        typer.Option(
            help="Crops of every image whose softmax is averaged, as the Inception papers count them: 1, 10, 12 or "
            "144."
        ),
    ] = 1,
    ensemble: Annotated[
        bool,
        typer.Option(
            "--ensemble", help="Judge several bundles that answer together, by the mean of their softmax."
        ),
    ] = False,
    engine: Annotated[
        _Engine | None, typer.Option(help="What runs it; by default the bundle's engine.", show_default=False)
    ] = None,
    as_target: Annotated[
        str | None,
        typer.Option(
            "--as",
            metavar="TARGET",
            help="The accuracy the network would have on this device (edgefold targets), emulated on this CPU from the "
            "bundle's calibration.",
            show_default=False,
        ),
    ] = None,
    against: Annotated[
        _Against,
        typer.Option(
            help="Where the chain starts: torch, the PyTorch model the bundle was built from (also runs a model's "
            "own .py file); onnx, the folded fp32 graph; auto, PyTorch if it is there."
        ),
    ] = _Against.auto,
    max_drop: Annotated[
        float | None,
        typer.Option(min=0, help="Exit 3 if top-1 falls by more points than this.", show_default=False),
    ] = None,
    min_agreement: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=100,
            metavar="PERCENT",
            help="Exit 3 if fewer images than this get the answer of the chain's first stage. Needs no labels.",
            show_default=False,
        ),
    ] = None,
    attribute: Annotated[
        bool,
        typer.Option(
            "--attribute",
            help="Also say which layers the int8 loss comes from, and what turned the images that flipped.",
        ),
    ] = False,
    resume: Annotated[
        Path | None,
        typer.Option(
            help="Keep the sums in this file meanwhile, and go on from it after an interruption; removed when done.",
            show_default=False,
        ),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Write a self-contained HTML report here.", show_default=False)
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Measure top-1, top-5 and the drop against FP32 PyTorch, in its parts, with 95% intervals."""
    from apps.validating_request import ValidateRequest, check_gates, present, validate

    request = ValidateRequest(
        bundles=tuple(bundles),
        data=data,
        labels=labels,
        limit=limit,
        batch_size=batch,
        crops=crops,
        ensemble=ensemble,
        engine=engine.value if engine else None,
        as_target=as_target,
        against=against.value,
        max_drop_points=max_drop,
        min_agreement_percent=min_agreement,
        attribute=attribute,
        resume=resume,
        report=report,
        json_output=json_output,
    )
    outcome = validate(request)
    present(outcome, request)
    check_gates(outcome, request)
