"""From frames to the engine's input: prepared on the CPU, or handed over as they are and prepared on the GPU.

The runtime fills batches and submits them, and does not know which. A plan of TensorRT is fed on its device
(`engines.tensorrt.feeder`); where the kernel cannot be had there, and for every other engine, the CPU prepares.
"""

from __future__ import annotations

import logging
from concurrent.futures import Future
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.artifacts import Frame, PreprocessSpec
from pipeline.contracts import Outputs, Runner
from pipeline.errors import DeviceFaultError, EngineError, UnsupportedError
from pipeline.preprocess import normalize, to_network_pixels

__all__ = ["PLAN_ENGINES", "Feeder", "HostFeeder", "InputBatch", "make_feeder"]

_log = logging.getLogger("edgefold.engine")
PLAN_ENGINES = ("tensorrt", "tensorrt_rtx")
"""Engines that run a plan on a GPU."""


class InputBatch(Protocol):
    """Images on their way into an engine; used again when the future of its last run is done."""

    def put(self, index: int, frame: Frame) -> None:
        """Makes `frame` image `index`; its buffer may go back to the camera. Raises `DataError`."""
        ...

    def submit(self, n_images: int) -> Future[Outputs]:
        """Runs the first `n_images`; bounded as `Runner.submit`."""
        ...


class Feeder(Protocol):
    """What prepares frames for one engine, and lives as long as its runner."""

    def new_batch(self) -> InputBatch:
        """Room for the engine's largest batch."""
        ...

    def engine_input(self, frame: Frame) -> NDArray[Any]:
        """What `frame` becomes in the engine's input, (1, …): for checks. Raises `DataError`."""
        ...


class HostFeeder:
    """Prepares frames on the CPU, each in its place of a batch.

    Args:
        runner: with one input: uint8 NHWC pixels, or the network's own normalized float32.
        spec: the preprocessing.
        color: the channel order that the graph takes.
        max_batch: images a batch has room for.
    """

    def __init__(
        self, runner: Runner, spec: PreprocessSpec, color: Literal["RGB", "BGR"], *, max_batch: int
    ) -> None:
        self._runner = runner
        self._spec = spec
        self._color = color
        self._max_batch = max_batch
        self._takes_pixels = runner.inputs[0].dtype == "uint8"
        height, width = spec.input_hw
        channels_first = not self._takes_pixels and spec.layout == "NCHW"
        self._row_shape = (3, height, width) if channels_first else (height, width, 3)

    def new_batch(self) -> InputBatch:
        """An array, and views of it."""
        return _HostBatch(self, self._runner, self._array(self._max_batch))

    def engine_input(self, frame: Frame) -> NDArray[Any]:
        """As `put` prepares it.

        Raises:
            DataError: no frame that can be prepared.
        """
        array = self._array(1)
        self.prepare(frame, array[0])
        return array

    def prepare(self, frame: Frame, row: NDArray[Any]) -> None:
        """Writes `frame` into a row of a batch.

        Raises:
            DataError: no frame that can be prepared.
        """
        if self._takes_pixels:
            to_network_pixels(frame.image, frame.pixel_format, self._spec, self._color, row, frame.yuv)
            return
        # The graph takes the network's own input (a prologue that could not be folded, an imported plan).
        pixels = to_network_pixels(frame.image, frame.pixel_format, self._spec, self._color, yuv=frame.yuv)
        row[...] = normalize(pixels[np.newaxis], self._spec, self._color)[0]

    def _array(self, n_images: int) -> NDArray[Any]:
        return np.empty((n_images, *self._row_shape), self._runner.inputs[0].dtype)


class _HostBatch:
    def __init__(self, feeder: HostFeeder, runner: Runner, array: NDArray[Any]) -> None:
        self._feeder, self._runner, self._array = feeder, runner, array

    def put(self, index: int, frame: Frame) -> None:
        self._feeder.prepare(frame, self._array[index])

    def submit(self, n_images: int) -> Future[Outputs]:
        return self._runner.submit({self._runner.inputs[0].name: self._array[:n_images]})


def make_feeder(
    runner: Runner, engine: str, spec: PreprocessSpec, color: Literal["RGB", "BGR"], *, max_batch: int
) -> Feeder:
    """The feeder of an engine; on its device where that can prepare frames, else on the CPU with the reason logged.

    Args:
        runner: of the engine.
        engine: its name in `engines.BACKENDS`.
        spec: the preprocessing.
        color: the channel order that the graph takes.
        max_batch: images a batch has room for.

    Raises:
        DeviceFaultError: the device failed.
        DataError: the spec cannot be.
    """
    if engine in PLAN_ENGINES:
        from engines.tensorrt.feeder import DeviceFeeder
        from engines.tensorrt.runner import TensorRtRunner

        try:
            if isinstance(runner, TensorRtRunner):
                return DeviceFeeder(runner, spec, color, max_batch=max_batch)
        except DeviceFaultError:
            raise
        except (EngineError, UnsupportedError) as error:
            _log.warning("frames are prepared on the CPU, not on the GPU: %s", error)
    return HostFeeder(runner, spec, color, max_batch=max_batch)
