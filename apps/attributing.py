"""``edgefold validate --attribute``: the layers that the loss of int8 comes from, wired to real engines and images."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from apps.report.wording import percent, sqnr
from apps.validating import Subject
from apps.validating_device import folded_model
from calibration.attribution import MAX_FLIPS, Attribution, FlippedMargin, JudgedImage, attribute
from calibration.sensitivity import N_IMAGES
from engines.openvino import fp32_runner
from pipeline.artifacts import EngineArtifact, EngineOptions
from pipeline.bundle import Bundle
from pipeline.contracts import Dataset, EngineBackend, Progress, Runner
from pipeline.errors import UsageError
from pipeline.preprocess import to_network_pixels
from pipeline.validation_agreement import AgreementResult
from pipeline.validation_result import Flip, ValidationResult

__all__ = ["Attributed", "attribute_result", "check_attributable", "print_attribution"]

_SHOWN_LAYERS = 12
_SHOWN_FLIPS = 8


@dataclass(frozen=True, slots=True)
class Attributed:
    """What was found, with names for the classes."""

    found: Attribution
    labels: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """JSON-compatible values, with the classes by name."""
        tree = self.found.to_json()
        for flip in tree["flips"]:
            flip["before"], flip["after"] = self.labels[flip["before"]], self.labels[flip["after"]]
        return tree

    def turned(self, flip: FlippedMargin) -> str:
        """From which class to which."""
        return f"{self.labels[flip.before]} → {self.labels[flip.after]}"


def check_attributable(bundle: Bundle, *, crops: int, ensemble: bool, as_target: str | None) -> None:
    """Refuse before any image is judged what attribution cannot be made of.

    Raises:
        UsageError: names the option or the bundle.
    """
    if ensemble or as_target is not None:
        option = "--ensemble" if ensemble else "--as"
        raise UsageError(f"--attribute is of the graph in one bundle; leave {option} out")
    if crops > 1:
        raise UsageError(f"--attribute looks at the network's own crop; leave --crops {crops} out")
    manifest = bundle.manifest
    if manifest.deployment is not None or manifest.precision != "int8":
        raise UsageError(
            f"--attribute is of an int8 graph for a CPU, and bundle {str(bundle.path)!r} is {manifest.precision} for "
            f"{manifest.target}; build one with --target cpu --precision int8"
        )
    if any("equalize" in stage.checks.get("corrections", ()) for stage in manifest.stages):
        raise UsageError(
            f"bundle {str(bundle.path)!r} was built with --corrections equalize: its int8 channels have other scales "
            "than those of fp32, and no layer can be compared; --attribute needs one built without it"
        )


def attribute_result(
    bundle: Bundle,
    subject: Subject,
    backend: EngineBackend,
    dataset: Dataset,
    result: ValidationResult | AgreementResult,
    labels: tuple[str, ...],
    progress: Progress,
) -> Attributed:
    """Look again at some of the images that were judged, and at the most telling of those that flipped.

    Args:
        bundle: opened.
        subject: what was judged.
        backend: runs its int8 graph.
        dataset: the images, still in the same order.
        result: what was found on them.
        labels: a name for every output.
        progress: told of every image.

    Raises:
        CalibrationError: nothing is int8, or no image can be read.
    """
    assert subject.final is not None, "check_attributable asked for int8"
    with _one_at_a_time(backend, subject.final, subject.fixed_batch) as int8:
        sample, flipped = _look_again(subject, dataset, result.flips, int8)
    found = attribute(folded_model(bundle), subject.final.path, sample, flipped, fp32_runner, progress)
    return Attributed(found, labels)


def print_attribution(attributed: Attributed, console: Console) -> None:
    """The layers that cost most, and what turned each flipped image."""
    found = attributed.found
    table = Table(
        title=f"Layers that the int8 loss comes from ({found.n_images} images, {len(found.flips)} of the flipped)",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("layer", overflow="fold")
    table.add_column("op")
    for column in ("own SQNR", "logits SQNR", "of the noise", "of the flips"):
        table.add_column(column, justify="right", no_wrap=True)
    for share in found.layers[:_SHOWN_LAYERS]:
        table.add_row(
            Text(share.layer),
            share.op_type,
            sqnr(share.sqnr_db),
            "too little" if share.logits_sqnr_db is None else sqnr(share.logits_sqnr_db),
            percent(share.logits_share),
            "–" if share.flip_share is None else f"{100 * share.flip_share:+.1f}%",
        )
    console.print(table)
    if len(found.layers) > _SHOWN_LAYERS:
        rest = sum(share.logits_share for share in found.layers[_SHOWN_LAYERS:])
        console.print(
            Text(
                f"{len(found.layers) - _SHOWN_LAYERS} more layers: {percent(rest)} of the noise", style="dim"
            )
        )
    for flip in found.flips[:_SHOWN_FLIPS]:
        causes = ", ".join(f"{layer} {part:+.2f}" for layer, part in flip.layers[:3])
        console.print(
            Text(
                f"{flip.key}: {attributed.turned(flip)}, margin {flip.margin_fp32:+.2f} to {flip.margin_int8:+.2f}: "
                f"{causes}"
            )
        )
    if found.explained is not None:
        console.print(
            Text(
                f"The layers' parts add up to {percent(found.explained)} of how far these margins moved.",
                style="dim",
            )
        )


def _one_at_a_time(backend: EngineBackend, artifact: EngineArtifact, fixed_batch: bool) -> Runner:
    return backend.load(artifact, EngineOptions(mode="latency", batch=None if fixed_batch else 1))


def _look_again(
    subject: Subject, dataset: Dataset, flips: tuple[Flip, ...], int8: Runner
) -> tuple[list[NDArray[np.uint8]], list[JudgedImage]]:
    """An even selection of the images, and those that flipped: the lost ones first, as confident as they come."""
    order = sorted(flips, key=lambda flip: (flip.kind != "lost", -flip.confidence))[:MAX_FLIPS]
    wanted = {flip.key: index for index, flip in enumerate(order)}
    stride = max(1, math.ceil(len(dataset) / N_IMAGES))
    sample: list[NDArray[np.uint8]] = []
    flipped: dict[int, JudgedImage] = {}
    name, rows = int8.inputs[0].name, int8.inputs[0].shape[0]
    for index, image in enumerate(dataset):
        chosen = wanted.get(image.key)
        if chosen is None and index % stride:
            continue
        pixels = to_network_pixels(image.image, "RGB", subject.preprocess, subject.input_color)
        if index % stride == 0:
            sample.append(pixels)
        if chosen is not None:
            batch = np.repeat(pixels[None], rows if isinstance(rows, int) else 1, axis=0)
            logits = int8.infer({name: batch})[int8.outputs[0].name][0]
            flipped[chosen] = JudgedImage(image.key, pixels, np.array(logits, np.float64).ravel())
    return sample, [flipped[index] for index in sorted(flipped)]
