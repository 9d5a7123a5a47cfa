"""``edgefold validate``: what an engine gets right, and what each step to it cost."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pipeline.artifacts import CalibrationTable
    from pipeline.bundle import Bundle

__all__ = ["validate_command"]


class _Engine(str, Enum):
    openvino = "openvino"
    onnxruntime = "onnxruntime"


class _Against(str, Enum):
    auto = "auto"
    torch = "torch"
    onnx = "onnx"


def validate_command(
    bundle: Annotated[Path, typer.Argument(help="The bundle that edgefold build wrote.", show_default=False)],
    data: Annotated[
        str,
        typer.Option(
            help="Labelled DATA: an image folder by class, a folder with labels.csv, an .npz with labels, or "
            "synthetic:SEED[:COUNT].",
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
    batch: Annotated[int, typer.Option(min=1, help="Images a call.")] = 16,
    engine: Annotated[
        _Engine | None, typer.Option(help="What runs it; by default the bundle's engine.", show_default=False)
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
    report: Annotated[
        Path | None, typer.Option(help="Write a self-contained HTML report here.", show_default=False)
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Measure top-1, top-5 and the drop against FP32 PyTorch, in its parts, with 95% intervals."""
    import dataclasses
    import json

    from apps.console import console, print_json, progress_display
    from apps.report import print_validation, render_report
    from apps.validating import find_reference, open_labelled, subject_of_bundle, validate_subject
    from engines import get_backend
    from pipeline.bundle import open_bundle
    from pipeline.datasets import read_labels
    from pipeline.validation_result import check_budget

    opened = open_bundle(bundle)
    backend = get_backend(engine.value if engine else opened.manifest.ready_engine().backend)
    subject = subject_of_bundle(opened, backend)
    if labels is not None:
        subject = dataclasses.replace(subject, labels=read_labels(labels))
    dataset = open_labelled(data, subject.labels, subject.num_classes, limit)
    with progress_display() as progress:
        reference = find_reference(opened.manifest, against.value)
        result = validate_subject(subject, dataset, backend, reference, batch_size=batch, progress=progress)
    if report is not None:
        render_report(
            report,
            validation=result,
            manifest=opened.manifest,
            max_drop_points=max_drop,
            calibration=_calibration_table(opened),
        )
    if json_output:
        print_json(json.dumps(result.to_json(), indent=2, allow_nan=False))
    else:
        print_validation(result, console, max_drop_points=max_drop)
        if report is not None:
            console.print(f"report: {report}", markup=False, soft_wrap=True)
    if max_drop is not None:
        check_budget(result, max_drop)


def _calibration_table(bundle: Bundle) -> CalibrationTable | None:
    from calibration.table import table_from_json

    if "calibration.json" not in bundle.manifest.files:
        return None
    return table_from_json(bundle.read_bytes("calibration.json"))
