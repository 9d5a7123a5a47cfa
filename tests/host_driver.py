"""The CUDA driver without a GPU (``tests/engines/tensorrt/fake_libcuda.c``), for processes of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HERE = ROOT / "tests/engines/tensorrt"


def build(folder: Path) -> Path:
    """A ``libcuda.so.1`` of ours in `folder`; skips the test where there is no C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler to build the driver without a GPU")
    library = folder / "libcuda.so.1"
    subprocess.run(
        [
            compiler, "-O1", "-fPIC", "-shared", "-Wl,-soname,libcuda.so.1", "-o", library,
            HERE / "fake_libcuda.c", "-ldl",
        ],
        check=True,
    )  # fmt: skip
    return folder


def environment(driver: Path, binding: str) -> dict[str, str]:
    """Of a process that finds the driver in the folder `driver`, and one binding."""
    # The stand-in also where pycuda is installed: pycuda wants the whole driver library to be there.
    path = [ROOT, ROOT / "tests", ROOT / "benchmarks", HERE / "pycuda_stand_in"]
    return {
        **os.environ,
        "LD_LIBRARY_PATH": str(driver),
        "PYTHONPATH": os.pathsep.join(map(str, path)),
        "EDGEFOLD_TEST_BINDING": binding,
    }


def needs(binding: str) -> None:
    """Skip where cuda-python is not installed."""
    if binding == "cuda-python":
        pytest.importorskip("cuda.bindings.driver")
