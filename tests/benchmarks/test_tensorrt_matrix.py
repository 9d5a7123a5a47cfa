"""The verdict of the matrix; its graphs and builds are in tests/engines/tensorrt/test_networks.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def matrix(monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.syspath_prepend(BENCHMARKS)
    import tensorrt_matrix

    yield tensorrt_matrix
    sys.modules.pop("tensorrt_matrix", None)


def row(network, precision, sm, *, built=True, **more):
    return {"network": network, "precision": precision, "sm": sm, "parsed": True, "built": built, **more}


def test_the_worst_cell_counts(matrix):
    rows = [
        row("inception_v3", "fp32", 75, built=False, error="no float32 on Turing"),
        row("inception_v3", "int8", 75, seconds=90.0),  # no fp32 plan to compare with
        row("inception_v3", "int8", 80, seconds=3.0, of_fp32_file=0.29, of_fp32_plan=0.37),
        row("inception_resnet_v2", "int8", 89, seconds=11.0, of_fp32_file=0.28, of_fp32_plan=0.38),
        row("inception_resnet_v2", "fp16", 89, seconds=70.0, of_fp32_file=0.49, of_fp32_plan=0.51),
        row(matrix.LITE, "int8", 89, seconds=2.0, of_fp32_file=0.34, of_fp32_plan=1.2),
    ]
    assert matrix.measured(rows) == {
        "parsed": 1.0,
        "built_on_sm_80_86_89_120": 1.0,
        "inception_resnet_v2_int8_seconds": 11.0,
        "int8_of_fp32_bytes": 0.34,
        "fp16_of_fp32_bytes": 0.49,
        "int8_of_fp32_bytes_unpacked": 0.38,
        "fp16_of_fp32_bytes_unpacked": 0.51,
        "lite_int8_of_fp32_bytes_unpacked": 1.2,
        "lite_fp16_of_fp32_bytes_unpacked": None,
    }


def test_a_failure_on_a_wanted_sm_shows(matrix):
    rows = [
        row("inception_v3", "int8", sm, built=sm != 86, seconds=1.0, of_fp32_file=0.3) for sm in matrix.SMS
    ]
    rows[0]["parsed"] = False
    found = matrix.measured(rows)
    assert found["built_on_sm_80_86_89_120"] == 0.75
    assert found["parsed"] == pytest.approx(5 / 6)
    assert found.keys() >= matrix.GOALS.keys()
