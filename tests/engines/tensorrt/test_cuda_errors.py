"""CUDA's codes against CUDA's own names and texts, where a library has them."""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path

import pytest

from engines.tensorrt.cuda_errors import CUDA_CODES, STICKY, cuda_error, number_of
from pipeline.errors import DeviceFaultError, EngineError, UnsupportedError


def test_names_and_numbers_are_the_drivers():
    driver = pytest.importorskip("cuda.bindings.driver")
    theirs = {int(code): code.name.removeprefix("CUDA_ERROR_") for code in driver.CUresult}
    assert {number: code.name for number, code in CUDA_CODES.items()}.items() <= theirs.items()


def test_texts_are_the_librarys():
    """The run-time library answers without a driver; its numbers are the driver's since CUDA 10.1."""
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(folder) / "cu13/lib" for folder in (spec and spec.submodule_search_locations) or ()]
    libraries = [path for folder in folders for path in folder.glob("libcudart.so.*")]
    if not libraries:
        pytest.skip("the CUDA run-time library is not installed")
    text_of = ctypes.CDLL(str(libraries[0])).cudaGetErrorString
    text_of.restype = ctypes.c_char_p
    assert {number: text_of(number).decode() for number in CUDA_CODES} == {
        number: code.text for number, code in CUDA_CODES.items()
    }


@pytest.mark.parametrize(
    ("number", "kind", "words"),
    [
        (
            2,
            EngineError,
            r"2 \(OUT_OF_MEMORY, out of memory\) from cuMemAlloc\(64 bytes\): use a smaller batch",
        ),
        (100, UnsupportedError, "CUDA_VISIBLE_DEVICES"),
        (700, DeviceFaultError, "ILLEGAL_ADDRESS.*restart the process"),
        (719, DeviceFaultError, "LAUNCH_FAILED.*restart the process"),
        (214, DeviceFaultError, "memory is failing; the CUDA context"),
        (222, UnsupportedError, "compile it for this GPU"),
        (1234, EngineError, r"CUDA error 1234 from cuMemAlloc\(64 bytes\)"),
    ],
)
def test_each_kind_has_its_class_and_says_what_to_do(number, kind, words):
    error = cuda_error(number, "cuMemAlloc(64 bytes)")
    assert type(error) is kind
    with pytest.raises(kind, match=words):
        raise error


def test_sticky_ones_are_those_of_cuda_h():
    assert {214, 220, 226, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 721, 911} == STICKY


@pytest.mark.parametrize("number", sorted(CUDA_CODES))
def test_pycudas_messages_are_read_back(number):
    text = CUDA_CODES[number].text
    for message in (
        f"cuCtxPushCurrent failed: {text}",
        f"cuModuleLoadDataEx failed: {text} - ptxas said more",
    ):
        found = number_of(message)
        assert CUDA_CODES[found].text == text
        assert CUDA_CODES[found].error is CUDA_CODES[number].error


def test_other_messages_are_not():
    assert number_of("cuMemAlloc failed: something new") is None
    assert number_of("out of memory") is None
