"""The CUDA preprocessing kernels compiled for the CPU (``tests/engines/tensorrt/host_cuda.cpp``)."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from engines.tensorrt.preprocess_plan import KernelPlan, bytes_per_pixel

ROOT = Path(__file__).parents[1]


@functools.cache
def library(*defines: str) -> ctypes.CDLL:
    """The kernels as a shared library; skips the test where there is no C++ compiler."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler to build the CUDA kernels for the host")
    with tempfile.TemporaryDirectory() as folder:  # loaded, it is not needed any more
        target = Path(folder) / "host_cuda.so"
        subprocess.run(
            [
                # As NVRTC is told: a product and a sum are rounded each.
                compiler, "-O2", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared",
                *(f"-D{name}" for name in defines), "-I", ROOT / "engines/tensorrt", "-o", target,
                ROOT / "tests/engines/tensorrt/host_cuda.cpp",
            ],
            check=True,
        )  # fmt: skip
        return ctypes.CDLL(str(target))


def launch(
    plan: KernelPlan,
    pixels: NDArray[np.uint8],
    *,
    pitch: int,
    chroma: NDArray[np.uint8] | None = None,
    chroma_pitch: int = 0,
    descending: bool = False,
    defines: tuple[str, ...] = (),
) -> NDArray[np.uint8]:
    """Run `plan` and give the bytes it wrote."""
    output = np.full(plan.output_bytes, 0xEE, np.uint8)
    run(
        plan.kernel, plan.grid, plan.block, plan.shared_bytes, plan.words.ctypes.data, pixels.ctypes.data, pitch,
        0 if chroma is None else chroma.ctypes.data, chroma_pitch, output.ctypes.data, descending, defines,
    )  # fmt: skip
    return output


def run(
    kernel: str, grid: Any, block: Any, shared_bytes: int, plan: int, pixels: int, pitch: int, chroma: int,
    chroma_pitch: int, output: int, descending: bool = False, defines: tuple[str, ...] = (),
) -> None:  # fmt: skip
    """Launch on raw addresses."""
    failed = library(*defines).launch(
        int(kernel == "resample_neighbours"), (ctypes.c_uint * 3)(*grid), block[0], shared_bytes, int(descending),
        *(ctypes.c_void_p(plan), ctypes.c_void_p(pixels), ctypes.c_int(pitch)),
        *(ctypes.c_void_p(chroma), ctypes.c_int(chroma_pitch), ctypes.c_void_p(output)),
    )  # fmt: skip
    assert not failed


def padded(
    image: NDArray[np.uint8], pixel_format: Any, extra: int, seed: int
) -> tuple[NDArray[np.uint8], int]:
    """`image` with `extra` bytes of noise behind each row, and its pitch."""
    height = image.shape[0]
    row = image.reshape(height, -1)
    assert row.shape[1] % bytes_per_pixel(pixel_format) == 0
    noise = np.random.default_rng(seed).integers(0, 256, (height, extra)).astype(np.uint8)
    return np.ascontiguousarray(np.concatenate([row, noise], axis=1)), row.shape[1] + extra
