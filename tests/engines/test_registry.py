from __future__ import annotations

import subprocess
import sys

import pytest

import engines
from engines import BACKENDS, BackendEntry, get_backend
from pipeline.errors import UnsupportedError


@pytest.mark.parametrize("name", sorted(BACKENDS))
def test_every_entry_is_a_backend_of_its_name(name):
    pytest.importorskip(BACKENDS[name].requires)
    backend = get_backend(name)
    assert backend.name == name
    assert all(callable(getattr(backend, method)) for method in ("build", "load", "fingerprint"))


def test_unknown_name_lists_those_there_are():
    with pytest.raises(UnsupportedError, match=r"'tensorr'.*openvino, onnxruntime"):
        get_backend("tensorr")


def test_missing_engine_says_what_to_install(monkeypatch):
    entry = BackendEntry("engines.openvino", "no_such_engine_here", "pip install no-such-engine")
    monkeypatch.setattr(engines, "BACKENDS", {"absent": entry})
    with pytest.raises(UnsupportedError, match=r"'absent'.*no_such_engine_here.*pip install no-such-engine"):
        get_backend("absent")


def test_registry_imports_no_engine():
    code = (
        "import sys, engines, engines.measure; "
        "sys.exit(bool({'openvino', 'onnxruntime', 'onnx', 'torch'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
