"""Runs images through a model once and gathers statistics of its activations.

Handing every activation out of the engine costs half as much again as computing it: each must be
brought into plain layout and copied. So the reduction goes *into the graph*: every observed tensor gets
ReduceMax (and ReduceMin, where Relu does not bound it) over the whole of it, and a strided Slice as a
sample for the histogram. All of it leaves as one small tensor.

Extrema are exact. The histogram sees an even selection of at most about `SAMPLES_PER_IMAGE` values of an
image, every k-th row and column of all channels.
"""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import ShapeInferencePass

from calibration.observers import TensorObserver
from pipeline.artifacts import ModelArtifact, TensorStatistics
from pipeline.contracts import Batches, Progress, RunnerFactory
from pipeline.errors import CalibrationError
from pipeline.onnx_files import load_model, save_model
from pipeline.preprocess import preprocess_sha256

__all__ = [
    "SAMPLES_PER_IMAGE",
    "Observation",
    "collect",
    "fix_batch",
    "fixed_batch",
    "is_non_negative",
    "observation_graph",
]

SAMPLES_PER_IMAGE = 4096
_OBSERVATIONS = "edgefold_observations"
_ANCHOR = "edgefold_anchor"
_NON_NEGATIVE = frozenset({"Relu", "Sigmoid", "HardSigmoid", "Softmax", "Softplus", "Abs"})
_KEEPS_SIGN = frozenset(
    {"MaxPool", "AveragePool", "GlobalAveragePool", "Concat", "ReduceMean", "Reshape", "Flatten"}
)


@dataclass(frozen=True, slots=True)
class Observation:
    """The columns of the observation tensor that belong to one activation."""

    tensor: str
    low: int | None
    """Column of the smallest value; ``None``: no value is negative."""
    high: int
    samples: slice


def collect(
    model: ModelArtifact,
    tensors: Sequence[str],
    batches: Batches,
    dataset_sha256: str,
    runner_factory: RunnerFactory,
    progress: Progress,
) -> TensorStatistics:
    """One pass over the data.

    Args:
        model: the folded fp32 model.
        tensors: names of the float activations to observe.
        batches: uint8 NHWC batches.
        dataset_sha256: digest of what `batches` iterates over.
        runner_factory: makes the fp32 runner.
        progress: told of every batch.

    Raises:
        CalibrationError: there is no batch, a tensor is not in the model, or one holds NaN or Inf.
    """
    images = _rebatched(batches(), model.inputs[0].shape[0])
    first = next(images, None)
    if first is None:
        raise CalibrationError("no calibration image was given; ranges are never guessed: pass real images")
    batch = len(first)
    observers = {name: TensorObserver(name) for name in tensors}
    n_samples = 0
    with tempfile.TemporaryDirectory(prefix="edgefold-calibration-") as folder:
        graph = load_model(model.path)
        observations = observation_graph(graph, tensors, batch)
        path = Path(folder) / "observed.onnx"
        save_model(graph, path)
        del graph
        with runner_factory(path, [_OBSERVATIONS]) as runner:
            for pixels in itertools.chain([first], images):
                n = len(pixels)
                if n < batch:  # the last one: filled up with its own images, which are not counted again
                    pixels = np.resize(pixels, (batch, *pixels.shape[1:]))
                seen = runner.infer({model.inputs[0].name: pixels})[_OBSERVATIONS][:n]
                for observation in observations:
                    observers[observation.tensor].update(
                        None if observation.low is None else seen[:, observation.low],
                        seen[:, observation.high],
                        seen[:, observation.samples],
                    )
                n_samples += n
                progress("calibrate", n_samples, None)
    return TensorStatistics(
        min={name: observer.low for name, observer in observers.items()},
        max={name: observer.high for name, observer in observers.items()},
        histogram={name: observer.histogram for name, observer in observers.items()},
        n_samples=n_samples,
        dataset_sha256=dataset_sha256,
        model_sha256=model.sha256,
        preprocess_sha256=preprocess_sha256(model.preprocess),
    )


def observation_graph(model: ir.Model, tensors: Sequence[str], batch: int) -> tuple[Observation, ...]:
    """Make `model` compute what is observed, in place, for a fixed batch size.

    The observation tensor is float32 ``[batch, columns]``. It is no declared output, so that a runner which
    checks outputs for NaN leaves finding them to the observers, which can name the activation; an
    integer output derived from it keeps the engine from pruning it, and replaces the model's own outputs.

    Raises:
        CalibrationError: a tensor is not in the model, or its shape is not known.
    """
    fix_batch(model, batch)
    builder = _Builder(model.graph, batch)
    observations = tuple(builder.observe(name) for name in tensors)
    builder.finish()
    return observations


class _Builder:
    def __init__(self, graph: ir.Graph, batch: int) -> None:
        self._graph = graph
        self._batch = batch
        self._values = {v.name: v for v in (*graph.inputs, *(v for node in graph for v in node.outputs))}
        self._parts: list[ir.Value] = []
        self._n_columns = 0
        self._rows = self._constant("edgefold_rows", [batch, -1])
        self._strides: dict[tuple[int, ...], list[ir.Value]] = {}

    def observe(self, name: str) -> Observation:
        value = self._values.get(name)
        if value is None:
            raise CalibrationError(
                f"the model has no tensor {name!r} to observe; calibrate the model it came from"
            )
        shape = _static_shape(value)
        low = None if is_non_negative(value) else self._extremum("ReduceMin", value, len(shape))
        high = self._extremum("ReduceMax", value, len(shape))
        return Observation(name, low, high, self._samples(value, shape))

    def finish(self) -> None:
        observations = self._append("Concat", self._parts, axis=1)
        observations.name = _OBSERVATIONS
        first = self._constant("edgefold_first", [0])
        anchor = self._append(
            "Cast", [self._append("Gather", [observations, first], axis=1)], to=ir.DataType.INT32
        )
        anchor.name, anchor.dtype, anchor.shape = _ANCHOR, ir.DataType.INT32, ir.Shape([self._batch, 1])
        self._graph.outputs.clear()
        self._graph.outputs.append(anchor)

    def _extremum(self, op_type: str, value: ir.Value, rank: int) -> int:
        axes = self._constant(f"edgefold_axes_{rank}", list(range(1, rank)))
        reduced = self._append(op_type, [value, axes], keepdims=0) if rank > 1 else value
        return int(self._take(reduced, 1).start)

    def _samples(self, value: ir.Value, shape: tuple[int, ...]) -> slice:
        spatial = shape[2:]
        n_values = math.prod(shape[1:])
        stride = (
            math.ceil((n_values / SAMPLES_PER_IMAGE) ** (1 / len(spatial))) if spatial and n_values else 1
        )
        steps = tuple(min(stride, size) for size in spatial)
        if all(step == 1 for step in steps):
            return self._take(value, n_values)
        # From the middle of the first stride: the first row and column see more padding than others.
        starts = tuple((step - 1) // 2 for step in steps)
        axes = list(range(2, len(shape)))
        key = "_".join(map(str, steps))
        sliced = self._append(
            "Slice",
            [
                value,
                self._constant(f"edgefold_starts_{key}", list(starts)),
                self._constant(f"edgefold_ends_{len(spatial)}", [2**31 - 1] * len(spatial)),
                self._constant(f"edgefold_axes_from_2_{len(spatial)}", axes),
                self._constant(f"edgefold_steps_{key}", list(steps)),
            ],
        )
        sizes = [
            len(range(start, size, step)) for start, size, step in zip(starts, spatial, steps, strict=True)
        ]
        return self._take(sliced, shape[1] * math.prod(sizes))

    def _take(self, value: ir.Value, n_columns: int) -> slice:
        self._parts.append(self._append("Reshape", [value, self._rows]))
        columns = slice(self._n_columns, self._n_columns + n_columns)
        self._n_columns += n_columns
        return columns

    def _append(self, op_type: str, inputs: Sequence[ir.Value], **attributes: int) -> ir.Value:
        node = ir.node(op_type, inputs, attributes)
        self._graph.append(node)
        return node.outputs[0]

    def _constant(self, name: str, values: list[int]) -> ir.Value:
        if name not in self._graph.initializers:
            tensor = ir.tensor(np.asarray(values, np.int64), name=name)
            self._graph.initializers[name] = ir.Value(
                name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape([len(values)]), const_value=tensor
            )
        return self._graph.initializers[name]


def fixed_batch(model: ir.Model) -> int:
    """The batch size of a model that takes no other; else 1."""
    shape = model.graph.inputs[0].shape
    return shape[0] if shape is not None and isinstance(shape[0], int) else 1


def fix_batch(model: ir.Model, batch: int) -> None:
    """Give the free batch dimension its size, and every tensor its shape."""
    for value in model.graph.inputs:
        assert value.shape is not None, "an interface without a shape was read from a file"
        value.shape = ir.Shape([batch, *value.shape[1:]])
    for node in model.graph:
        for value in node.outputs:
            value.shape = None  # was inferred for a free batch
    ShapeInferencePass(data_prop=True)(model)


def _static_shape(value: ir.Value) -> tuple[int, ...]:
    shape = () if value.shape is None else tuple(value.shape)
    if not shape or not all(isinstance(size, int) for size in shape):
        raise CalibrationError(
            f"the shape of tensor {value.name!r} is not known ({value.shape}); export the model with a fixed image size"
        )
    return tuple(int(size) for size in shape if isinstance(size, int))


def is_non_negative(value: ir.Value) -> bool:
    """Whether no value of a tensor can be below 0, by what computes it."""
    node = value.producer()
    if node is None:
        return False
    if node.op_type == "Clip":
        bound = node.inputs[1].const_value if len(node.inputs) > 1 and node.inputs[1] is not None else None
        return bound is not None and float(bound.numpy()) >= 0.0
    if node.op_type in _NON_NEGATIVE:
        return True
    if node.op_type not in _KEEPS_SIGN:
        return False
    inputs = node.inputs if node.op_type == "Concat" else node.inputs[:1]
    return all(source is not None and is_non_negative(source) for source in inputs)


def _rebatched(batches: Iterator[NDArray[np.uint8]], fixed: int | str) -> Iterator[NDArray[np.uint8]]:
    """Batches as they come, cut to the model's batch size where that is fixed."""
    for batch in batches:
        step = fixed if isinstance(fixed, int) else len(batch)
        for start in range(0, len(batch), max(step, 1)):
            yield batch[start : start + step]
