"""Operators, parameters and multiply-accumulates, against numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from bundle_fixtures import make_manifest
from onnx_text import batch_norm, onnx_model, weight

from pipeline.artifacts import StageRecord
from pipeline.bundle import BundleWriter
from pipeline.errors import IntegrityError
from pipeline.inspection import (
    Change,
    GraphSummary,
    compare,
    inspect_bundle,
    inspect_onnx,
    summarize,
    summarize_model,
)
from pipeline.onnx_files import save_model
from pipeline.passes import DEFAULT_PASSES, run_passes


@pytest.mark.parametrize(
    ("graph", "weights", "macs"),
    [
        # 6 outputs × 4 inputs × 3 × 3 at 5 × 5 positions
        ("agraph (float[N,4,7,7] x) => (float[N,6,5,5] z) { z = Conv (x, w) }", {"w": weight(6, 4, 3, 3)}, 5400),
        # the same with stride 2 and padding: 4 × 4 positions
        (
            "agraph (float[N,4,7,7] x) => (float[N,6,4,4] z) "
            "{ z = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (x, w) }",
            {"w": weight(6, 4, 3, 3)},
            3456,
        ),
        # depthwise: 4 × 1 × 3 × 3 at 5 × 5
        ("agraph (float[N,4,7,7] x) => (float[N,4,5,5] z) { z = Conv <group = 4> (x, w) }", {"w": weight(4, 1, 3, 3)}, 900),
        # transposed: every one of 3 × 3 inputs meets 4 × 6 × 2 × 2 weights
        (
            "agraph (float[N,4,3,3] x) => (float[N,6,6,6] z) { z = ConvTranspose <strides = [2, 2]> (x, w) }",
            {"w": weight(4, 6, 2, 2)},
            864,
        ),
        ("agraph (float[N,8] x) => (float[N,5] z) { z = Gemm (x, w) }", {"w": weight(8, 5)}, 40),
        ("agraph (float[N,3,8] x) => (float[N,3,5] z) { z = MatMul (x, w) }", {"w": weight(8, 5)}, 120),
        # a fixed batch counts in full
        ("agraph (float[2,8] x) => (float[2,5] z) { z = Gemm (x, w) }", {"w": weight(8, 5)}, 80),
    ],
)  # fmt: skip
def test_macs(graph: str, weights: dict[str, np.ndarray], macs: int) -> None:
    assert summarize_model(onnx_model(graph, **weights)).macs == macs


def test_shapes_are_not_parameters() -> None:
    model = onnx_model(
        "agraph (float[N,2,2] x) => (float[N,4] z) { y = Mul (x, s) z = Reshape (y, shape) }",
        s=weight(2, 2),
        shape=np.array([-1, 4]),
    )
    summary = summarize_model(model)
    assert (summary.n_parameters, summary.parameter_bytes) == (4, 16)
    assert summary.op_counts == {"Mul": 1, "Reshape": 1}


_CONV_BN = """agraph (float[N,4,7,7] x) => (float[N,6,5,5] z) {
    y = Conv (x, w) z = BatchNormalization (y, gamma, beta, mean, var) }"""


def test_a_summary_survives_json_and_a_file(tmp_path: Path) -> None:
    model = onnx_model(_CONV_BN, w=weight(6, 4, 3, 3), **batch_norm(6))
    save_model(model, tmp_path / "model.onnx")
    summary = summarize(tmp_path / "model.onnx")
    assert summary == summarize_model(model)
    assert GraphSummary.from_json(summary.as_json()) == summary


def test_inspecting_a_file_folds_it_in_memory(tmp_path: Path) -> None:
    model = onnx_model(_CONV_BN, w=weight(6, 4, 3, 3), **batch_norm(6))
    save_model(model, tmp_path / "model.onnx")
    inspection = inspect_onnx(tmp_path / "model.onnx")
    assert compare(inspection.graphs["before"], inspection.graphs["after"]) == (
        Change("n_nodes", 2, 1),
        Change("n_parameters", 216 + 24, 216 + 6),
        Change("parameter_bytes", 960, 888),
        Change("macs", 5400, 5400),
        Change("BatchNormalization", 1, 0),
        Change("Conv", 1, 1),
    )
    assert list(tmp_path.iterdir()) == [tmp_path / "model.onnx"]


def _bundle(folder: Path, checks: dict[str, object]) -> Path:
    """A bundle whose fold stage has these checks, with one convolution as its int8 graph."""
    stages = (StageRecord("fold", (), (), 0.5, checks),)
    with BundleWriter(folder) as writer:
        save_model(
            onnx_model(
                "agraph (float[N,4,7,7] x) => (float[N,6,5,5] z) { z = Conv (x, w) }", w=weight(6, 4, 3, 3)
            ),
            writer.path / "model.int8.onnx",
        )
        writer.commit(replace(make_manifest(), stages=stages))
    return folder


def test_a_bundle_tells_what_was_folded(tmp_path: Path) -> None:
    model = onnx_model(_CONV_BN, w=weight(6, 4, 3, 3), **batch_norm(6))
    before = summarize_model(model)
    folded, records = run_passes(model, DEFAULT_PASSES)
    checks = {
        "passes": [record.as_json() for record in records],
        "before": before.as_json(),
        "after": summarize_model(folded).as_json(),
    }
    inspection = inspect_bundle(_bundle(tmp_path / "bundle", checks))
    assert inspection.graphs["before"] == before
    assert inspection.graphs["after"] == summarize_model(folded)
    assert inspection.graphs["int8"].op_counts == {"Conv": 1}
    assert inspection.passes == records
    assert inspection.as_json()["passes"] == checks["passes"]


@pytest.mark.parametrize(
    "checks", [{}, {"passes": [{"name": "x"}], "before": {}, "after": {}}, {"passes": 3}]
)
def test_a_bundle_without_a_readable_fold_record_is_refused(
    checks: dict[str, object], tmp_path: Path
) -> None:
    with pytest.raises(IntegrityError, match="no readable record of the fold stage"):
        inspect_bundle(_bundle(tmp_path / "bundle", checks))
