"""What a deserialized engine takes and gives, read from it and checked against what the runner can serve."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.base import fixed_batch_message
from pipeline.artifacts import TensorSpec
from pipeline.errors import EngineError

__all__ = ["EngineInterface", "read_interface"]

_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "INT8": "int8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
    "UINT8": "uint8",
}
"""TensorRT's names → NumPy's. BF16, FP8 and 4-bit types have none, and no place at an interface of ours."""


@dataclass(frozen=True, slots=True)
class EngineInterface:
    """Tensors in the engine's order; a free batch is the dimension ``"batch"``."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batches: tuple[int, int]
    """The smallest and the largest batch."""
    profile: int
    """Index of the optimization profile to use."""

    is_dynamic: bool
    """Whether the batch has to be set before a run, also where it is always the same."""


def read_interface(engine: Any, module: Any, path: Path, batch: int | None) -> EngineInterface:
    """The interface of `engine`, with its batch fixed where `batch` is given.

    Args:
        engine: an ``ICudaEngine``.
        module: the TensorRT it is of.
        path: the plan's file, for messages.
        batch: the one batch to be run, or ``None`` for all that the first profile admits.

    Raises:
        EngineError: the plan has another batch, or a tensor of a type, format, place or shape that is not served.
    """
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    specs = {name: _spec(engine, module, name, path) for name in names}
    inputs = [name for name in names if engine.get_tensor_mode(name) == module.TensorIOMode.INPUT]
    free = [name for name in inputs if specs[name].shape[:1] == ("batch",)]
    if free:
        profile, batches = _profile(engine, free, path, batch)
    else:
        fixed = int(specs[inputs[0]].shape[0])
        if batch is not None and batch != fixed:
            raise EngineError(fixed_batch_message(path, fixed, batch))
        profile, batches = 0, (fixed, fixed)
    if batch is not None:
        specs = {name: _with_batch(spec, batch) for name, spec in specs.items()}
    return EngineInterface(
        inputs=tuple(specs[name] for name in inputs),
        outputs=tuple(specs[name] for name in names if name not in inputs),
        batches=batches,
        profile=profile,
        is_dynamic=bool(free),
    )


def _spec(engine: Any, module: Any, name: str, path: Path) -> TensorSpec:
    dtype = engine.get_tensor_dtype(name).name
    if dtype not in _DTYPES:
        raise EngineError(
            f"plan {path}: tensor {name!r} is {dtype}, which is not exchanged; cast it in the graph to one of "
            f"{', '.join(sorted(_DTYPES.values()))}"
        )
    if engine.get_tensor_format(name) != module.TensorFormat.LINEAR:
        raise EngineError(
            f"plan {path}: tensor {name!r} has the format {engine.get_tensor_format(name).name}, only LINEAR is "
            "served; build it without restricting the formats of inputs and outputs"
        )
    if engine.get_tensor_location(name) != module.TensorLocation.DEVICE:
        raise EngineError(
            f"plan {path}: tensor {name!r} is a shape tensor on the host; an image classifier has none"
        )
    shape = tuple(engine.get_tensor_shape(name))
    if not shape or any(size < 0 for size in shape[1:]):
        raise EngineError(
            f"plan {path}: tensor {name!r} has the shape {list(shape)}; only the batch, its first dimension, may "
            "be free"
        )
    first: int | str = "batch" if shape[0] < 0 else int(shape[0])
    return TensorSpec(name, _DTYPES[dtype], (first, *(int(size) for size in shape[1:])))


def _profile(engine: Any, free: list[str], path: Path, batch: int | None) -> tuple[int, tuple[int, int]]:
    ranges = []
    for profile in range(engine.num_optimization_profiles):
        bounds = [engine.get_tensor_profile_shape(name, profile) for name in free]
        low = max(int(smallest[0]) for smallest, _, _ in bounds)
        high = min(int(largest[0]) for _, _, largest in bounds)
        if batch is None:
            return profile, (low, high)
        if low <= batch <= high:
            return profile, (batch, batch)
        ranges.append(f"{low} to {high}")
    raise EngineError(
        f"plan {path} was built for batches {', '.join(ranges)}; {batch} was asked for. Build it for that batch"
    )


def _with_batch(spec: TensorSpec, batch: int) -> TensorSpec:
    return TensorSpec(spec.name, spec.dtype, (batch, *spec.shape[1:]))
