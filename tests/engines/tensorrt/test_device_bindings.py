"""The bindings over a driver in host memory, and opening a device where something is missing."""

from __future__ import annotations

import ctypes
import importlib.util
import subprocess
import sys
from pathlib import Path

import host_driver
import pytest

from engines.tensorrt.device import cuda_version_text, device_identity, driver_version, open_device
from pipeline.errors import UnsupportedError

HERE = Path(__file__).parent
ROOT = HERE.parents[2]


@pytest.fixture(scope="session")
def fake_driver(tmp_path_factory) -> Path:
    """A folder with a ``libcuda.so.1`` of ours."""
    return host_driver.build(tmp_path_factory.mktemp("driver"))


@pytest.mark.parametrize("binding", ["cuda-python", "pycuda"])
@pytest.mark.parametrize("file", ["test_device_contract.py", "test_lanes_on_a_gpu.py"])
def test_a_binding_does_what_every_device_does(fake_driver, binding, file):
    """cuda-python is the real one; pycuda is a stand-in, which keeps to pycuda's source."""
    host_driver.needs(binding)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "not gpu", str(HERE / file)],
        env=host_driver.environment(fake_driver, binding),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


LEAKS = """
import ctypes, numpy as np
from engines.tensorrt.device import open_device
device = open_device(binding={binding!r})
with device.current():
    stream, event, memory = device.create_stream(), device.create_event(), device.allocate(64)
    pinned, kernel = device.allocate_pinned(64), device.load_kernel(b"\\x7fELF", "add_bytes")
    stream.begin_capture()
    device.copy_to_device(memory.address, pinned.array, stream)
    graph = stream.end_capture()
    for part in (graph, stream, event):
        part.close()
    for part in (memory, pinned):
        part.free()
device.close()
driver = ctypes.CDLL("libcuda.so.1")
print(driver.fake_live(), driver.fake_retained(), driver.fake_depth())
"""


@pytest.mark.parametrize("binding", ["cuda-python", "pycuda"])
def test_nothing_is_left_behind(fake_driver, binding):
    host_driver.needs(binding)
    done = subprocess.run(
        [sys.executable, "-c", LEAKS.format(binding=binding)],
        env=host_driver.environment(fake_driver, binding), cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.split() == ["0", "0", "0"], done.stdout + done.stderr


def test_pycuda_comes_first_and_cuda_python_where_it_is_absent(fake_driver):
    host_driver.needs("cuda-python")
    code = "from engines.tensorrt.device import open_device; print(type(open_device()).__name__)"
    environment = host_driver.environment(fake_driver, "")
    for path, wanted in ((environment["PYTHONPATH"], "PycudaDevice"), (str(ROOT), "CudaPythonDevice")):
        if wanted == "CudaPythonDevice" and importlib.util.find_spec("pycuda") is not None:
            continue
        done = subprocess.run(
            [sys.executable, "-c", code], env={**environment, "PYTHONPATH": path}, cwd=ROOT,
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stdout.strip() == wanted


def _has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


@pytest.mark.skipif(_has_driver(), reason="a CUDA driver is installed here")
def test_without_a_driver_the_remedy_is_named():
    host_driver.needs("cuda-python")
    for call in (open_device, device_identity, lambda: open_device(binding="cuda-python")):
        with pytest.raises(UnsupportedError, match="install the NVIDIA driver") as caught:
            call()
        assert caught.value.exit_code == 4


def test_without_any_binding_both_are_named(monkeypatch):
    for name in ("pycuda", "pycuda.driver", "cuda.bindings", "cuda.bindings.driver"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("engines.tensorrt.device_pycuda", "engines.tensorrt.device_cuda_python"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(
        UnsupportedError, match=r"pycuda: .*cuda-python: .*edgefold\[jetson\].*edgefold\[tensorrt\]"
    ):
        open_device()


@pytest.mark.parametrize(
    ("text", "version"),
    [
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.95.05  Tue Sep 23 10:11:16 UTC 2025\nGCC version:",
            "580.95.05",
        ),
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  540.4.0  Release Build  (buildbrain@x)\n",
            "540.4.0",
        ),
        ("nothing of the kind", "unknown"),
    ],
)
def test_driver_version_from_the_kernels_text(text, version):
    assert driver_version(text) == version


def test_cuda_version_text():
    assert [cuda_version_text(number) for number in (13000, 12060, 11040)] == ["13.0", "12.6", "11.4"]
