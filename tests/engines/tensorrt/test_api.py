from __future__ import annotations

import importlib
import sys
import types

import pytest

from engines.tensorrt.api import FEATURES, load_api
from pipeline.errors import UnsupportedError

# Read out of the published bindings for Python 3.11 (the strings of tensorrt.so in the wheels
# tensorrt_cu12_bindings 10.3.0 and 10.13.2.6, tensorrt_cu13_bindings 11.4.0.106), which cannot be imported
# without the libraries they load.
FEATURES_OF = {
    "10.3.0": {"strong_typing", "weak_typing"},
    "10.13.2": {"strong_typing", "weak_typing", "same_compute_capability", "tiling", "runtime_config"},
    "11.4.0": {"strong_typing", "same_compute_capability", "tiling", "runtime_config", "engine_stat"},
}


@pytest.mark.parametrize("version", FEATURES_OF)
def test_features_are_found_by_name(fake_tensorrt, version):
    api = fake_tensorrt(version)
    assert {feature for feature in FEATURES if api.has(feature)} == FEATURES_OF[version]
    assert api.compute_capabilities == ()
    assert api.uses_timing_cache
    assert api.title == f"TensorRT {version}"


def test_the_real_rtx(rtx):
    assert {feature for feature in FEATURES if not rtx.has(feature)} == {"weak_typing"}
    assert {75, 80, 86, 89, 120} <= set(rtx.compute_capabilities)
    assert not rtx.uses_timing_cache
    assert rtx.version_text.startswith(".".join(map(str, rtx.version[:3])))


def test_too_old_names_both_versions(fake_tensorrt):
    with pytest.raises(UnsupportedError, match=r"TensorRT 8\.6\.2 is installed, 10\.3 is the oldest"):
        fake_tensorrt("8.6.2")


def test_the_oldest_that_is_supported(fake_tensorrt):
    assert fake_tensorrt("10.3.0.30").version == (10, 3, 0, 30)


def test_a_build_without_a_version_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", types.ModuleType("tensorrt"))
    with pytest.raises(UnsupportedError, match="TensorRT unknown is installed"):
        load_api("tensorrt")


@pytest.mark.parametrize("error", [ImportError("no module"), OSError("libnvinfer.so.10: cannot open")])
def test_missing_library_says_what_to_install(monkeypatch, error):
    def fail(name):
        raise error

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(UnsupportedError, match=rf"{error}.*pip install 'edgefold\[tensorrt-rtx\]'"):
        load_api("tensorrt_rtx")
