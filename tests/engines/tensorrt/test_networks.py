"""The graphs that ship, of the lite network and of a full one, through the real parser and builder."""

from __future__ import annotations

import dataclasses

import pytest

from engines.tensorrt.builder import build_plan
from engines.tensorrt.options import BatchProfile, TensorRtOptions
from pipeline.errors import EngineError

SMS = (80, 86, 89, 120)
OPTIONS = TensorRtOptions(sms=SMS, profiles=(BatchProfile(1, 1, 8),))


def quiet(*told):
    """No progress."""


@pytest.fixture(scope="module", params=["inception_resnet_lite", "inception_v3"])
def graphs(request, tmp_path_factory):
    pytest.importorskip("tensorrt_rtx")
    pytest.importorskip("torch")
    from tensorrt_matrix import make_graphs

    return make_graphs(request.param, "synthetic:1:2", tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("precision", ["int8", "fp16"])
def test_parsed_and_built(rtx, graphs, precision, tmp_path):
    built = build_plan(rtx, graphs[precision], tmp_path / "model.plan", OPTIONS, quiet)
    assert built.compute_capabilities == SMS
    assert built.strongly_typed
    assert built.size_bytes > 1_000_000
    notes = [note for note in built.warnings if "Converting conv" not in note]  # scales go to float32 inside
    assert notes == []


def test_the_folded_graph_itself_is_no_graph_for_tensorrt(rtx, graphs, tmp_path):
    """Its pixels are transposed as uint8; the message names the pass and what to do."""
    folded = graphs["fp32"].path.with_name("folded.onnx")
    import hashlib

    sha256 = hashlib.sha256(folded.read_bytes()).hexdigest()
    model = dataclasses.replace(graphs["fp32"], path=folded, sha256=sha256)
    with pytest.raises(EngineError, match=r"Transpose 'image_transpose'.*pipeline\.passes\.preprocess.*Cast"):
        build_plan(rtx, model, tmp_path / "model.plan", OPTIONS, quiet)
