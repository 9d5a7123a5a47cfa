"""NVIDIA Model Optimizer as a quantizer: its calibrators choose the ranges, Edgefold places Q/DQ for each engine.

Theirs are the histograms and the choice of the largest magnitude of each tensor: `HistogramCalibrator` (percentile)
of ``modelopt.torch.quantization.calib``, on CPU tensors. Ours is everything around it: the fp32 run, which tensors are
observed, the placement, the weights' scales, which are of each output channel, and the table that every engine's form
is derived from. So its ranges can be used where its own graphs cannot: those are in TensorRT's form only.

Model Optimizer's other door, ``modelopt.onnx``, gives whole graphs, which lack the ranges that other engines need (both
inputs of a residual Add), pins versions of onnx and onnxruntime that collide with others, and takes *random* scales
where it is given no data (facts checked with 0.47). It is not used. Without its extras the package leaves all others as
they are. It does not import without PyTorch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

import numpy as np

from calibration.placement import PLACEMENTS, observed_by_all
from calibration.quantizer import apply_table
from pipeline.artifacts import CalibrationTable, ModelArtifact, StageRecord, TensorRange
from pipeline.contracts import Batches, Progress, RunnerFactory
from pipeline.errors import CalibrationError, UnsupportedError, UsageError
from pipeline.onnx_files import load_model
from pipeline.preprocess import preprocess_sha256

__all__ = ["METHOD", "ModelOptQuantizer", "modelopt_version"]

METHOD = "modelopt"
"""The table's method; its options and the version among its tools say what it is."""
_PACKAGE = "nvidia-modelopt"
_MODULE = "modelopt.torch.quantization.calib"
_ALGORITHM = "percentile"
_PERCENT = 99.99
_BINS = 2048
_REMEDY = "pip install 'edgefold[modelopt]', or choose another --calibrator"


class ModelOptQuantizer:
    """`pipeline.contracts.Quantizer` whose ranges Model Optimizer chooses."""

    def __init__(
        self,
        placement: str = "cpu",
        *,
        runner_factory: RunnerFactory,
        tools: Mapping[str, str] | None = None,
    ) -> None:
        """Load Model Optimizer.

        Args:
            placement: the engine family, a key of `calibration.placement.PLACEMENTS`.
            runner_factory: makes the fp32 runner the images go through.
            tools: name to version of what else the ranges come from; kept in the table.

        Raises:
            UnsupportedError: Model Optimizer is not installed, or cannot be imported.
            UsageError: no such placement.
        """
        if placement not in PLACEMENTS:
            raise UsageError(f"no placement {placement!r}; choose one of {', '.join(PLACEMENTS)}")
        version = modelopt_version()
        try:
            self._torch = importlib.import_module("torch")
            self._calib = importlib.import_module(_MODULE)
        except ImportError as error:
            raise UnsupportedError(
                f"--calibrator modelopt: {_PACKAGE} {version} cannot be imported ({error}); install what it lacks, or "
                "choose another --calibrator"
            ) from error
        self._placement = placement
        self._runner_factory = runner_factory
        self._tools = {**(tools or {}), _PACKAGE: version}

    def quantize(
        self,
        model: ModelArtifact,
        batches: Batches,
        dataset_sha256: str,
        out_path: Path,
        progress: Progress,
    ) -> tuple[ModelArtifact, CalibrationTable, StageRecord]:
        """Calibrate `model` and write its int8 form to `out_path`.

        Args:
            model: folded fp32 ONNX.
            batches: uint8 NHWC images at the input's size.
            dataset_sha256: digest of the images.
            out_path: where the Q/DQ ONNX goes, replaced atomically.
            progress: told of every batch.

        Raises:
            CalibrationError: no images, or NaN or Inf in an activation.
        """
        start = time.perf_counter()
        table = self.table(model, batches, dataset_sha256, progress)
        ranged = time.perf_counter()
        quantized, record = apply_table(model, table, self._placement, out_path)
        record = dataclasses.replace(
            record,
            inputs=(model.sha256, dataset_sha256),
            seconds=time.perf_counter() - start,
            checks={
                **record.checks,
                "algorithm": _ALGORITHM,
                _PACKAGE: self._tools[_PACKAGE],
                "ranges_seconds": ranged - start,
            },
        )
        return dataclasses.replace(quantized, history=(*model.history, record)), table, record

    def table(
        self, model: ModelArtifact, batches: Batches, dataset_sha256: str, progress: Progress
    ) -> CalibrationTable:
        """The ranges by Model Optimizer of every tensor that any placement needs, from one pass.

        Its calibrators see magnitudes. The side of a tensor that reaches less far than the magnitude chosen
        ends where the last value was seen: behind a Relu, at 0.

        Args:
            model: folded fp32 ONNX.
            batches: uint8 NHWC images at the input's size.
            dataset_sha256: digest of the images.
            progress: told of every batch.

        Raises:
            CalibrationError: no images, or NaN or Inf in an activation.
        """
        names = list(observed_by_all(load_model(model.path)))
        calibrators = {name: self._calib.HistogramCalibrator(num_bits=8, num_bins=_BINS) for name in names}
        low, high = dict.fromkeys(names, np.inf), dict.fromkeys(names, -np.inf)
        n_samples = 0
        with self._runner_factory(model.path, names) as runner:
            for pixels in batches():
                outputs = runner.infer({model.inputs[0].name: pixels})
                for name in names:
                    seen = np.asarray(outputs[name], np.float32)
                    ends = float(seen.min()), float(seen.max())
                    if not np.isfinite(ends).all():
                        raise CalibrationError(
                            f"tensor {name!r} holds NaN or Inf on the calibration images; check the model's weights and "
                            "its preprocessing"
                        )
                    low[name], high[name] = min(low[name], ends[0]), max(high[name], ends[1])
                    # A copy: the runner's buffers are read-only to torch, and live until the next image.
                    calibrators[name].collect(self._torch.from_numpy(np.array(seen)))
                n_samples += len(pixels)
                progress("calibrate", n_samples, None)
        if n_samples == 0:
            raise CalibrationError(
                "no calibration image was given; Model Optimizer's ranges are never made up: pass real images"
            )
        ranges = {}
        for name in names:
            magnitude = _magnitude(calibrators[name], name, max(-low[name], high[name]))
            ranges[name] = TensorRange(max(low[name], -magnitude), min(high[name], magnitude))
        return CalibrationTable(
            ranges=ranges,
            method=METHOD,
            n_samples=n_samples,
            statistics_sha256=_statistics_sha256(low, high, ranges),
            model_sha256=model.sha256,
            dataset_sha256=dataset_sha256,
            preprocess_sha256=preprocess_sha256(model.preprocess),
            method_options={"bins": _BINS, "percent": _PERCENT},
            tools=self._tools,
        )


def modelopt_version() -> str:
    """The version of Model Optimizer that is installed; nothing is imported.

    Raises:
        UnsupportedError: none is.
    """
    try:
        return installed_version(_PACKAGE)
    except PackageNotFoundError:
        raise UnsupportedError(f"--calibrator modelopt needs NVIDIA Model Optimizer: {_REMEDY}") from None


def _magnitude(calibrator: Any, name: str, largest: float) -> float:
    if largest == 0.0:
        return 0.0  # of an empty histogram it would make NaN
    found = float(calibrator.compute_amax(_ALGORITHM, percentile=_PERCENT))
    if not np.isfinite(found) or found <= 0.0:
        raise CalibrationError(
            f"Model Optimizer found the largest magnitude {found} for tensor {name!r}, whose values reach {largest:g}; "
            "choose another --calibrator"
        )
    return found


def _statistics_sha256(
    low: Mapping[str, float], high: Mapping[str, float], ranges: Mapping[str, TensorRange]
) -> str:
    """Digest of what was seen, as far as Model Optimizer lets it be seen."""
    digest = hashlib.sha256()
    for name in sorted(ranges):
        found = ranges[name]
        digest.update(name.encode() + b"\0")
        digest.update(np.array([low[name], high[name], found.low, found.high], "<f8").tobytes())
    return digest.hexdigest()
