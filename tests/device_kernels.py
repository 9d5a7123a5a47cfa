"""The CUDA preprocessing kernels on a `FakeDevice`, compiled for the CPU."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import host_cuda
import numpy as np
from fake_device import FakeDevice

_ONE_AT_A_TIME = threading.Lock()
"""The kernels' host form keeps its fibres in globals."""


def install(device: FakeDevice, before: Callable[[], None] = lambda: None) -> None:
    """Make `device` run the real kernels' source on the addresses it is given; `before` runs first, in a run's thread."""

    def kernel(name: str) -> Callable[..., Callable[[], None]]:
        def prepare(arguments: Sequence[Any], grid: Any, block: Any, shared_bytes: int) -> Callable[[], None]:
            kinds = [type(argument) for argument in arguments]
            assert kinds == [np.uint64, np.uint64, np.int32, np.uint64, np.int32, np.uint64]

            def work() -> None:
                before()
                with _ONE_AT_A_TIME:
                    plan, pixels, pitch, chroma, chroma_pitch, output = map(int, arguments)
                    host_cuda.run(
                        name, grid, block, shared_bytes, plan, pixels, pitch, chroma, chroma_pitch, output
                    )

            return work

        return prepare

    device.kernels = {name: kernel(name) for name in ("resample_filtered", "resample_neighbours")}
