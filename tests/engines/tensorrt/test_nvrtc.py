"""The CUDA sources compile for every GPU of the target table, without a GPU."""

from __future__ import annotations

import re
from importlib import resources

import pytest

from engines.tensorrt import nvrtc
from engines.tensorrt.nvrtc import compile_kernels, nvrtc_version, supported_sms
from engines.tensorrt.preprocess import preprocess_kernels
from pipeline.errors import EngineError, UnsupportedError

SMS = (75, 80, 86, 87, 89, 90, 100, 110, 120, 121)
"""Compute capabilities of the target table; Xavier's 72 went with CUDA 13, Thor's 110 came with it."""


@pytest.fixture(scope="module", autouse=True)
def _needs_nvrtc():
    try:
        version = nvrtc_version()
    except UnsupportedError as error:
        pytest.skip(str(error))
    if version < (13, 0):
        pytest.skip(f"NVRTC {version} lacks GPUs of the table")


@pytest.mark.parametrize("sm", SMS)
def test_the_preprocessing_kernels_compile_for(sm):
    compiled = preprocess_kernels(sm)
    assert compiled.sm == sm
    assert compiled.cubin.startswith(b"\x7fELF")
    # e_machine 190 is CUDA; the names are those that are looked up
    assert int.from_bytes(compiled.cubin[18:20], "little") == 190
    for name in (b"resample_filtered", b"resample_neighbours"):
        assert name in compiled.cubin
        assert b".visible .entry " + name + b"(" in compiled.ptx
    assert re.search(rb"\.target sm_(\d+)", compiled.ptx)[1] == str(sm).encode()


def test_no_float_is_contracted_or_single_where_pillow_has_double():
    """`fma` would round once where NumPy rounds twice."""
    ptx = preprocess_kernels(87).ptx.decode()
    assert "fma.rn" not in ptx
    assert "mul.rn.f64" in ptx or "mul.f64" in ptx


def test_a_gpu_that_this_toolkit_has_dropped_is_named():
    if 72 in supported_sms():
        pytest.skip("an NVRTC that still has Xavier")
    with pytest.raises(
        UnsupportedError, match=r"NVRTC 1\d\.\d does not compile for compute capability 72, only for 75"
    ):
        preprocess_kernels(72)


def test_a_program_that_does_not_compile_gives_nvrtcs_log():
    with pytest.raises(
        EngineError, match=r"broken\.cu does not compile for compute capability 80: .*undefined"
    ):
        compile_kernels('extern "C" __global__ void f() { undefined(); }', "broken.cu", 80)


def test_without_nvrtc_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr(nvrtc, "_candidates", lambda: iter(["libnvrtc.so.0"]))
    nvrtc._nvrtc.cache_clear()
    supported_sms.cache_clear()
    try:
        with pytest.raises(UnsupportedError, match=r"libnvrtc\.so\.0.*CUDA toolkit.*edgefold\[tensorrt\]"):
            compile_kernels("", "empty.cu", 80)
    finally:
        nvrtc._nvrtc.cache_clear()


def test_the_source_is_part_of_the_package():
    assert resources.files("engines.tensorrt").joinpath("preprocess.cu").is_file()
