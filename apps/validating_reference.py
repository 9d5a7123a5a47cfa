"""Where a validation chain starts: the PyTorch module that a bundle was built from, loaded again and proved."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pipeline.errors import EdgefoldError, UnsupportedError, UsageError, WeightsError

if TYPE_CHECKING:
    from pipeline.manifest import Manifest
    from pipeline.models.resolve import ResolvedModel

__all__ = ["Against", "Reference", "find_reference"]

Against = Literal["auto", "torch", "onnx"]


@dataclass(frozen=True, slots=True)
class Reference:
    """The PyTorch module to start the chain from, or why there is none."""

    model: ResolvedModel | None
    why_not: str = ""


def find_reference(manifest: Manifest, against: Against) -> Reference:
    """Load the PyTorch module a bundle was built from, if that can be done and proved.

    Weights from a file must have the SHA-256 that the manifest records. A model built by a Python
    file of the user's runs that file: only ``against="torch"`` does, so that looking at somebody
    else's bundle runs no code that it names.

    Args:
        manifest: of the bundle.
        against: ``torch`` insists, ``auto`` gives the reason where it cannot, ``onnx`` never tries.

    Raises:
        UnsupportedError, ModelSpecError, WeightsError: ``against="torch"`` and it cannot be done.
    """
    if against == "onnx":
        return Reference(None, "left out with --against onnx")
    try:
        if against == "auto" and manifest.model.spec.rpartition(":")[0].endswith(".py"):
            raise UsageError(
                f"the model is built by {manifest.model.spec}, Python code that runs only if you ask for it "
                "with --against torch"
            )
        return Reference(_load_reference(manifest))
    except EdgefoldError as error:
        if against == "torch":
            raise
        return Reference(None, str(error))


def _load_reference(manifest: Manifest) -> ResolvedModel:
    source = manifest.model
    if source.spec.endswith(".onnx"):
        raise UsageError("the model came as an ONNX file")
    if importlib.util.find_spec("torch") is None:
        raise UnsupportedError("PyTorch is not installed here (pip install 'edgefold[build]')")
    from pipeline.models.resolve import resolve_model

    weights = source.weights_option
    if weights is not None and source.weights_sha256 is not None:
        _require_digest(Path(weights), source.weights_sha256)
    model = resolve_model(
        source.spec, weights=weights, num_classes=source.num_classes, input_size=source.input_size
    )
    if model.weights_sha256 != source.weights_sha256 or model.num_classes != source.num_classes:
        raise WeightsError(
            f"{source.spec} with weights {source.weights!r} is not what the bundle was built from (SHA-256 "
            f"{model.weights_sha256}, recorded {source.weights_sha256}); build the bundle again"
        )
    return model


def _require_digest(path: Path, expected: str) -> None:
    from pipeline.onnx_files import file_sha256

    if not path.is_file():
        raise WeightsError(f"the weights {str(path)!r} that the bundle was built from are not there")
    found = file_sha256(path)
    if found != expected:
        raise WeightsError(
            f"the weights {str(path)!r} have changed since the build (SHA-256 {found}, recorded {expected})"
        )
