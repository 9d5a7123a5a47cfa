"""Plans on disk: packed ones come back byte for byte, and what is not whole is named, not loaded."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from engines.tensorrt import plan_file
from engines.tensorrt.plan_file import pack_plan, read_plan
from pipeline.errors import EngineError, IntegrityError, UnsupportedError

zstandard = pytest.importorskip("zstandard", reason="needs zstandard, which comes with tensorrt-rtx")
PLAN = b"vtrt" + b"__device__ float declarations;\n" * 4000 + np.random.default_rng(0).bytes(9000)


@pytest.fixture
def packed(tmp_path) -> Path:
    path = tmp_path / "model.rtx.plan.zst"
    path.write_bytes(PLAN)
    kept = pack_plan(path, PLAN)
    assert path.read_bytes() == kept
    return path


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_packed_plan_is_small_and_comes_back(packed):
    assert packed.stat().st_size < 10_000 < len(PLAN)
    assert read_plan(packed, digest(packed)) == PLAN


@pytest.mark.skipif(shutil.which("zstd") is None, reason="needs the zstd program")
def test_any_zstd_unpacks_it(packed):
    assert subprocess.run(["zstd", "-dc", packed], capture_output=True, check=True).stdout == PLAN


def test_a_plan_that_is_not_packed_is_read_as_it_is(tmp_path):
    path = tmp_path / "model.plan"
    path.write_bytes(b"ftrt and machine code")
    assert read_plan(path, digest(path)) == b"ftrt and machine code"


def test_another_file_than_described_is_not_even_unpacked(packed, monkeypatch):
    monkeypatch.setattr(zstandard, "get_frame_parameters", None)
    with pytest.raises(IntegrityError, match=r"model\.rtx\.plan\.zst has SHA-256 .* was not loaded"):
        read_plan(packed, "0" * 64)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[:-20],
        lambda data: data[:5],
        lambda data: data + b"more",
        lambda data: data[:200] + bytes([data[200] ^ 1]) + data[201:],
    ],
)
def test_what_was_packed_is_not_whole(packed, change):
    packed.write_bytes(change(packed.read_bytes()))
    with pytest.raises(IntegrityError, match=f"{packed} cannot be unpacked .* build it again"):
        read_plan(packed, digest(packed))


def test_what_unpacks_to_too_much(packed, monkeypatch):
    monkeypatch.setattr(plan_file, "_MAX_PLAN_BYTES", 50_000)
    with pytest.raises(IntegrityError, match=f"unpacks to {len(PLAN)} bytes, more than the 50000"):
        read_plan(packed, digest(packed))


def test_a_folder_is_no_plan(tmp_path):
    with pytest.raises(EngineError, match=f"plan {tmp_path} cannot be read: Is a directory"):
        read_plan(tmp_path, "0" * 64)


def test_a_place_that_cannot_be_written(tmp_path):
    with pytest.raises(EngineError, match="writing the plan failed: Is a directory"):
        pack_plan(tmp_path, PLAN)


def test_without_the_package_that_packs(packed, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(UnsupportedError, match="pip install zstandard"):
        read_plan(packed, digest(packed))
    with pytest.raises(UnsupportedError, match="pip install zstandard"):
        pack_plan(packed, PLAN)
