"""From a PyTorch module, or from somebody else's ONNX file, to an ONNX file this product works on."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from pipeline.artifacts import ModelArtifact, PreprocessSpec, StageRecord
from pipeline.errors import ExportError, UsageError
from pipeline.metrics import max_abs_error, sqnr_db
from pipeline.onnx_files import file_sha256, interface, load_proto, opset_of, save_model
from pipeline.passes.graph_pass import EXACT_ALGEBRA, Feeds
from pipeline.passes.tidy import tidy
from pipeline.passes.verify import Execute, execute

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["MIN_OPSET", "export_module", "import_onnx", "load_current"]

MIN_OPSET = 18
"""What the torch exporter writes natively; older imported models are converted up to it."""

_PARITY_SEED = 0


def export_module(
    module: nn.Module,
    preprocess: PreprocessSpec,
    input_hw: tuple[int, int],
    out_path: Path,
    *,
    batch: int | None = None,
    labels: Sequence[str] = (),
    opset: int = MIN_OPSET,
    run: Execute = execute,
) -> ModelArtifact:
    """Export an image classifier and check that the graph computes what the module does.

    Batch norm and residual scales stay in the graph: folding them is `pipeline.passes`' work, which
    reports and verifies it. Only the exporter's own shape arithmetic is evaluated.

    Args:
        module: float32 ``[N, 3, H, W]`` → logits ``[N, classes]``; switched to evaluation and left so.
        preprocess: how images become the module's input.
        input_hw: height and width in pixels.
        out_path: the ONNX file to write; input ``input``, output ``logits``.
        batch: fixed batch size, or ``None`` for a free dimension named ``batch``.
        labels: class names, in the order of the logits.
        opset: version of the operator set, 18 or newer.
        run: executes the graph for the parity check.

    Raises:
        ExportError: the module cannot be exported, or the graph's logits differ from the module's.
        UsageError: `opset` or `batch` cannot be exported, or `labels` do not match the logits.
    """
    import torch

    if opset < MIN_OPSET:
        raise UsageError(f"opset {opset} is too old; the exporter writes {MIN_OPSET} or newer")
    if batch is not None and batch < 1:
        raise UsageError(f"batch {batch} is not a batch size; give 1 or more, or None for a free batch")
    started = time.monotonic()
    module = module.eval().float().cpu()
    # torch.export specializes a dimension of 1, so a free batch is traced with 2.
    example = torch.from_numpy(_seeded_images((batch or 2, 3, *input_hw)))
    expected = _logits(module, example)
    _check_labels(labels, expected.shape[1])
    try:
        with _quiet():
            program = torch.onnx.export(
                module,
                (example,),
                dynamo=True,
                opset_version=opset,
                # The exporter's optimizer would fold batch norm, unreported and unverified.
                optimize=False,
                verbose=False,
                input_names=["input"],
                output_names=["logits"],
                dynamic_shapes=None if batch else ({0: torch.export.Dim("batch")},),
            )
    except Exception as error:
        raise ExportError(
            f"torch could not export {type(module).__name__}: {_first_line(error)};"
            "the module must be free of control flow that depends on the values of its input"
        ) from error
    assert program is not None
    model = program.model
    del program
    tidy(model)
    common.ClearMetadataAndDocStringPass()(model)  # stack traces with the paths of this machine
    feeds = {"input": example.numpy()}
    checks = {**_parity(expected, model, feeds, run), "opset": opset_of(model)}
    return _write(model, preprocess, out_path, labels, "export", (), started, checks)


def import_onnx(
    path: Path, preprocess: PreprocessSpec, out_path: Path, labels: Sequence[str] = ()
) -> ModelArtifact:
    """Take an existing ONNX classifier: contained, converted to a current opset, self-contained.

    A free height or width is fixed to ``preprocess.input_hw``. Other exporters' BatchNormalization, Mul
    and Add stay for `pipeline.passes` to fold.

    Args:
        path: the model; external data must lie in its folder.
        preprocess: how images become its input, ``layout`` included.
        out_path: the ONNX file to write.
        labels: class names, in the order of the logits.

    Raises:
        ModelSpecError: not an ONNX file.
        IntegrityError: external data outside the model's folder or behind a link.
        ExportError: not an image classifier with one float or uint8 image as its input, or its opset
            cannot be converted.
    """
    started = time.monotonic()
    model = load_current(path)
    _fix_interface(model, preprocess, path)
    common.ShapeInferencePass()(model)
    outputs = interface(model)[1]
    if len(outputs) != 1:
        raise ExportError(f"{path} has {len(outputs)} outputs; a classifier has one: its logits")
    _check_labels(labels, outputs[0].shape[-1])
    checks = {"opset": opset_of(model), "file": path.name}
    return _write(model, preprocess, out_path, labels, "import", (file_sha256(path),), started, checks)


def load_current(path: Path) -> ir.Model:
    """An ONNX file as a model of a current operator set whose only inputs are data.

    Raises:
        ModelSpecError, IntegrityError: as `pipeline.onnx_files.load_proto`.
        ExportError: its opset cannot be converted.
    """
    proto = load_proto(path)
    opset = max((entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), default=1)
    if opset < MIN_OPSET:
        try:
            proto = onnx.version_converter.convert_version(proto, MIN_OPSET)
        except Exception as error:
            raise ExportError(
                f"{path} is of opset {opset} and cannot be converted to {MIN_OPSET}: {_first_line(error)}; "
                f"export it again with opset {MIN_OPSET} or newer"
            ) from error
    model = ir.serde.deserialize_model(proto)
    # Old exporters list weights as inputs, so that a caller may override them. Nobody does.
    common.RemoveInitializersFromInputsPass()(model)
    return model


def _write(
    model: ir.Model,
    preprocess: PreprocessSpec,
    out_path: Path,
    labels: Sequence[str],
    stage: str,
    sources: tuple[str, ...],
    started: float,
    checks: dict[str, Any],
) -> ModelArtifact:
    digest = save_model(model, out_path)
    inputs, outputs = interface(model)
    return ModelArtifact(
        path=out_path,
        sha256=digest,
        inputs=inputs,
        outputs=outputs,
        opset=opset_of(model),
        preprocess=dataclasses.replace(preprocess, input_hw=_input_hw(inputs[0].shape, preprocess)),
        input_color=preprocess.color,
        labels=tuple(labels),
        history=(StageRecord(stage, sources, (digest,), time.monotonic() - started, checks),),
    )


def _input_hw(shape: tuple[int | str, ...], preprocess: PreprocessSpec) -> tuple[int, int]:
    height, width = shape[2:] if preprocess.layout == "NCHW" else shape[1:3]
    return int(height), int(width)


def _seeded_images(shape: tuple[int, ...]) -> NDArray[np.float32]:
    return np.random.default_rng(_PARITY_SEED).standard_normal(shape, dtype=np.float32)


def _logits(module: nn.Module, images: Tensor) -> NDArray[np.float32]:
    """What the module itself says; raises `ExportError` where that is no classifier's answer."""
    import torch

    name = type(module).__name__
    try:
        with torch.inference_mode():
            logits = module(images)
    except Exception as error:
        raise ExportError(f"{name} cannot run on {tuple(images.shape)}: {_first_line(error)}") from error
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2:
        what = (
            f"a tensor of {logits.ndim} axes" if isinstance(logits, torch.Tensor) else type(logits).__name__
        )
        raise ExportError(
            f"{name} returns {what}; a classifier returns one tensor of logits [batch, classes]: drop auxiliary heads"
        )
    values: NDArray[np.float32] = logits.numpy()
    if not np.isfinite(values).all():
        raise ExportError(
            f"the logits of {name} hold NaN or Inf for standard normal input; check its weights"
        )
    return values


def _parity(expected: NDArray[np.float32], model: ir.Model, feeds: Feeds, run: Execute) -> dict[str, float]:
    """Compare the graph's logits with PyTorch's; the limits are those of an exact rewrite."""
    logits = run(model, feeds)["logits"]
    if logits.shape != expected.shape:
        raise ExportError(f"the graph returns logits of shape {logits.shape}, the module {expected.shape}")
    limit = EXACT_ALGEBRA.relative * float(np.abs(expected).max())
    error, sqnr = max_abs_error(expected, logits), sqnr_db(expected, logits)
    if not (error <= limit and sqnr >= EXACT_ALGEBRA.sqnr_db):
        raise ExportError(
            f"the graph's logits differ from the module's by up to {error:.3g}, limit {limit:.3g}, at an "
            f"SQNR of {sqnr:.1f} dB, limit {EXACT_ALGEBRA.sqnr_db:.0f} dB; the module may depend on random "
            "numbers or on the values of its input"
        )
    return {
        "max_abs_error": error,
        "max_abs_error_limit": limit,
        "sqnr_db": min(sqnr, 999.0),  # equal to the bit is infinite, which JSON has no number for
        "sqnr_db_limit": EXACT_ALGEBRA.sqnr_db,
    }


def _check_labels(labels: Sequence[str], n_classes: int | str) -> None:
    if labels and isinstance(n_classes, int) and len(labels) != n_classes:
        raise UsageError(f"{len(labels)} labels for {n_classes} classes; give one label for each logit")


def _fix_interface(model: ir.Model, preprocess: PreprocessSpec, path: Path) -> None:
    """Give the one image input static height and width and a named batch."""
    if len(model.graph.inputs) != 1:
        names = [value.name for value in model.graph.inputs]
        raise ExportError(f"{path} has the inputs {names}; an image classifier has one")
    image = model.graph.inputs[0]
    if image.dtype not in (ir.DataType.FLOAT, ir.DataType.UINT8):
        raise ExportError(f"input {image.name!r} of {path} is {image.dtype}; float32 or uint8 is needed")
    expected = (3, *preprocess.input_hw) if preprocess.layout == "NCHW" else (*preprocess.input_hw, 3)
    if image.dtype == ir.DataType.UINT8:
        expected = (*preprocess.input_hw, 3)
    shape = image.shape
    sizes = list(shape)[1:] if shape is not None and len(shape) == 4 else []
    fits = all(not isinstance(got, int) or got == want for got, want in zip(sizes, expected, strict=False))
    if not sizes or not fits:
        raise ExportError(
            f"input {image.name!r} of {path} has shape {shape}; preprocessing gives [N, "
            f"{', '.join(map(str, expected))}] ({preprocess.layout}): correct the input size or the layout"
        )
    assert shape is not None
    batch = shape[0] if isinstance(shape[0], int) else (shape[0].value or "batch")
    image.shape = ir.Shape([batch, *expected])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter: it prints, logs and warns about its own internals."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "torch.export")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}"
