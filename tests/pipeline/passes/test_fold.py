"""`fold`, from an exported network to the graph that is calibrated."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx_text import op_counts, relative_error
from tolerances import EXPORTED_RELATIVE
from torch import nn

from pipeline.artifacts import ModelArtifact, PreprocessSpec, TensorSpec
from pipeline.errors import PassError
from pipeline.export import export_module
from pipeline.inspection import GraphSummary
from pipeline.models.blocks import Branches, ConvNormAct, ScaledResidual
from pipeline.onnx_files import file_sha256, load_model
from pipeline.passes import PassRecord, fold
from pipeline.passes.verify import execute
from pipeline.preprocess import normalize

_SPEC = PreprocessSpec(input_hw=(24, 24), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
_LABELS = ("stop", "yield", "turn")


def with_statistics(module: nn.Module, size: int) -> nn.Module:
    """Batch norm as training leaves it: random gamma and beta, statistics of a batch."""
    torch.manual_seed(0)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, 0.0, 0.2)
            layer.reset_running_stats()
            layer.momentum = None
    with torch.no_grad():
        module.train()(torch.randn(4, 3, size, size))
    return module.eval()


def _mini() -> nn.Module:
    """Stem, two residual blocks with a scale (the last linear), head: Inception-ResNet in small."""
    torch.manual_seed(0)
    mixes = [Branches(ConvNormAct(16, 8, 1), ConvNormAct(16, 8, 3, padding=1)) for _ in range(2)]
    return with_statistics(
        nn.Sequential(
            ConvNormAct(3, 16, 3, stride=2),
            ScaledResidual(mixes[0], 16, 16, 0.17),
            ScaledResidual(mixes[1], 16, 16, 0.1, relu=False),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(16, 3),
        ),
        24,
    )


@pytest.fixture(scope="module")
def module() -> nn.Module:
    return _mini()


@pytest.fixture(scope="module")
def exported(module: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> ModelArtifact:
    path = tmp_path_factory.mktemp("fold") / "exported.onnx"
    return export_module(module, _SPEC, _SPEC.input_hw, path, labels=_LABELS)


@pytest.mark.parametrize("color", ["BGR", "RGB"])
def test_folds_a_scaled_residual_network(
    exported: ModelArtifact, module: nn.Module, tmp_path: Path, color: str
) -> None:
    folded, records = fold(exported, tmp_path / "model.onnx", input_color=color)
    graph = load_model(folded.path)
    counts = op_counts(graph)
    assert (counts["BatchNormalization"], counts["Mul"], counts["Sub"], counts["Conv"]) == (0, 0, 0, 7)
    done = {record.name: record.n_rewrites for record in records}
    assert done["batch_norm_into_linear"] == 5
    assert done["residual_scale"] == 2
    assert done["preprocess_into_first_conv"] == 1
    assert folded.inputs == (TensorSpec("image", "uint8", ("batch", 24, 24, 3)),)
    assert folded.outputs == (TensorSpec("logits", "float32", ("batch", 3)),)
    assert (folded.input_color, folded.labels, folded.preprocess) == (color, _LABELS, _SPEC)
    assert folded.preprocess_folded
    assert folded.sha256 == file_sha256(folded.path)
    for batch in (1, 3):
        pixels = np.random.default_rng(batch).integers(0, 256, (batch, 24, 24, 3), dtype=np.uint8)
        with torch.inference_mode():
            expected = module(torch.from_numpy(normalize(pixels, _SPEC, color))).numpy()
        assert relative_error(expected, execute(graph, {"image": pixels})["logits"]) < EXPORTED_RELATIVE


def test_the_record_tells_what_was_done(exported: ModelArtifact, tmp_path: Path) -> None:
    folded, records = fold(exported, tmp_path / "model.onnx")
    record = folded.history[-1]
    assert (record.stage, record.inputs, record.outputs) == ("fold", (exported.sha256,), (folded.sha256,))
    assert folded.history[:-1] == exported.history
    checks = json.loads(json.dumps(record.checks, allow_nan=False))
    assert checks == record.checks, "the record must survive a manifest unchanged"
    assert tuple(PassRecord.from_json(entry) for entry in checks["passes"]) == records
    before, after = (GraphSummary.from_json(checks[name]) for name in ("before", "after"))
    assert (before.op_counts["BatchNormalization"], before.op_counts["Mul"]) == (5, 2)
    assert "BatchNormalization" not in after.op_counts
    assert before.macs == after.macs


def test_folding_again_changes_nothing(exported: ModelArtifact, tmp_path: Path) -> None:
    once, _ = fold(exported, tmp_path / "once.onnx")
    twice, records = fold(once, tmp_path / "twice.onnx", input_color="RGB")
    assert sum(record.n_rewrites for record in records) == 0
    assert (twice.inputs, twice.input_color) == (once.inputs, "BGR")


def test_the_input_can_stay_as_it_is(exported: ModelArtifact, tmp_path: Path) -> None:
    folded, _ = fold(exported, tmp_path / "model.onnx", fold_input=False)
    assert folded.inputs == exported.inputs
    assert not folded.preprocess_folded


def test_nan_weights_stop_at_the_first_pass(exported: ModelArtifact, tmp_path: Path) -> None:
    import onnx_ir as ir

    from pipeline.onnx_files import save_model

    model = load_model(exported.path)
    bias = next(node for node in model.graph if node.op_type == "Gemm").inputs[2]
    bias.const_value = ir.tensor(np.full(3, np.nan, np.float32))
    broken = replace(exported, path=tmp_path / "nan.onnx", sha256=save_model(model, tmp_path / "nan.onnx"))
    with pytest.raises(PassError, match="NaN or Inf"):
        fold(broken, tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.slow
def test_inception_resnet_v2_has_no_batch_norm_and_no_mul_left(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    network = with_statistics(timm.create_model("inception_resnet_v2", pretrained=False), 139)
    spec = PreprocessSpec(input_hw=(139, 139), mean=(0.5,) * 3, std=(0.5,) * 3)
    exported = export_module(network, spec, spec.input_hw, tmp_path / "exported.onnx")
    folded, records = fold(exported, tmp_path / "model.onnx")
    before, after = (folded.history[-1].checks[side]["op_counts"] for side in ("before", "after"))
    assert (before["BatchNormalization"], before["Mul"], before["Conv"]) == (204, 40, 244)
    assert (after.get("BatchNormalization", 0), after.get("Mul", 0), after["Conv"]) == (0, 0, 244)
    assert set(after) == {
        "Transpose", "Cast", "Conv", "Relu", "Add", "Concat", "MaxPool", "AveragePool", "ReduceMean", "Reshape", "Gemm",
    }  # fmt: skip
    assert all(record.skipped == () for record in records)
