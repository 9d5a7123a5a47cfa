"""Exporting a module, importing somebody else's file, and what either refuses."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
import torch
from onnx_text import batch_norm, op_counts, weight
from tolerances import EXPORTED_RELATIVE, FOLDED_RELATIVE
from torch import Tensor, nn

from pipeline.artifacts import PreprocessSpec, TensorSpec
from pipeline.errors import ExportError, IntegrityError, ModelSpecError, UsageError
from pipeline.export import export_module, import_onnx
from pipeline.onnx_files import file_sha256, load_model
from pipeline.passes import fold
from pipeline.passes.graph_pass import Feeds
from pipeline.passes.verify import execute
from pipeline.preprocess import normalize

_SPEC = PreprocessSpec(input_hw=(16, 16), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.conv(x)) * 0.5)
        out: Tensor = self.head(self.drop(x.mean((2, 3))))
        return out


class _Noisy(_Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.rand(1)


class _Branching(_Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else -x)


class _WithAuxiliaryHead(_Net):
    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return logits, logits * 2.0  # type: ignore[return-value]


def test_a_free_batch_is_exported_raw_and_quietly(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    module = _Net().train()
    artifact = export_module(module, _SPEC, (16, 16), tmp_path / "m.onnx", labels=list("abcde"))
    assert capfd.readouterr() == ("", "")
    assert not [warning for warning in recwarn if "onnx" in str(warning.message).lower()]
    assert not module.training
    assert artifact.inputs == (TensorSpec("input", "float32", ("batch", 3, 16, 16)),)
    assert artifact.outputs == (TensorSpec("logits", "float32", ("batch", 5)),)
    assert (artifact.opset, artifact.labels, artifact.input_color) == (18, tuple("abcde"), "RGB")
    assert artifact.sha256 == file_sha256(artifact.path)
    assert (tmp_path / "m.onnx").stat().st_mode & 0o777 == 0o644
    (record,) = artifact.history
    assert (record.stage, record.inputs, record.outputs) == ("export", (), (artifact.sha256,))
    assert record.checks["max_abs_error"] <= record.checks["max_abs_error_limit"]
    model = load_model(artifact.path)
    counts = op_counts(model)
    # The exporter must leave folding to the passes; dropout is nothing at inference.
    assert (counts["BatchNormalization"], counts["Mul"], counts["Dropout"], counts["Shape"]) == (1, 1, 0, 0)
    assert str(Path.cwd()) not in artifact.path.read_bytes().decode("latin-1"), "no stack traces in the file"
    pixels = np.random.default_rng(0).standard_normal((3, 3, 16, 16)).astype(np.float32)
    expected = module(torch.from_numpy(pixels)).detach().numpy()
    np.testing.assert_allclose(execute(model, {"input": pixels})["logits"], expected, atol=EXPORTED_RELATIVE)


def test_a_fixed_batch_and_a_newer_opset(tmp_path: Path) -> None:
    artifact = export_module(_Net(), _SPEC, (16, 16), tmp_path / "m.onnx", batch=1, opset=20)
    assert artifact.inputs[0].shape == (1, 3, 16, 16)
    assert artifact.outputs[0].shape == (1, 5)
    assert artifact.opset == 20
    folded, _ = fold(artifact, tmp_path / "f.onnx")
    assert folded.inputs[0].shape == (1, 16, 16, 3)


def test_an_export_that_disagrees_names_error_and_limit(tmp_path: Path) -> None:
    def wrong(model: object, feeds: Feeds) -> Feeds:
        return {name: values * np.float32(1.01) for name, values in execute(model, feeds).items()}

    with pytest.raises(ExportError, match=r"differ from the module's by up to .*, limit .* SQNR of 40\.0 dB"):
        export_module(_Net(), _SPEC, (16, 16), tmp_path / "m.onnx", batch=1, run=wrong)
    assert not (tmp_path / "m.onnx").exists()


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (_Noisy(), "random numbers"),
        (_Branching(), "control flow"),
        (_WithAuxiliaryHead(), "auxiliary heads"),
    ],
)
def test_modules_that_cannot_be_exported(module: nn.Module, message: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=message):
        export_module(module, _SPEC, (16, 16), tmp_path / "m.onnx", batch=1)
    assert list(tmp_path.iterdir()) == []


def test_nan_weights_are_named(tmp_path: Path) -> None:
    module = _Net()
    nn.init.constant_(module.head.bias, float("nan"))
    with pytest.raises(ExportError, match="NaN or Inf"):
        export_module(module, _SPEC, (16, 16), tmp_path / "m.onnx", batch=1)


@pytest.mark.parametrize(
    ("options", "message"), [({"opset": 17}, "opset 17 is too old"), ({"batch": 0}, "batch 0 is not")]
)
def test_impossible_requests(options: dict[str, int], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        export_module(_Net(), _SPEC, (16, 16), tmp_path / "m.onnx", **options)


# --- import ---------------------------------------------------------------------------------------

_CAFFE2 = """<ir_version: 3, opset_import: ["" : {opset}]> caffe2 (
    float[1,3,16,16] data, float[8,3,3,3] w, float[8] gamma, float[8] beta, float[8] mean, float[8] var,
    float[8,1,1] s, float[8,8,1,1] up, float[8,5] fc, float[5] fcb) => (float[1,5] prob) {{
        c = Conv <kernel_shape = [3, 3]> (data, w)
        n = BatchNormalization <epsilon = 0.001> (c, gamma, beta, mean, var)
        m = Mul (n, s)
        r = Relu (m)
        u = Conv <kernel_shape = [1, 1]> (r, up)
        k = Mul (u, s)
        a = Sum (r, k)
        p = GlobalAveragePool (a)
        f = Flatten (p)
        g = MatMul (f, fc)
        prob = Add (g, fcb)
    }}"""


def _weights() -> dict[str, np.ndarray]:
    return {
        "w": weight(8, 3, 3, 3),
        **batch_norm(8),
        "s": 0.5 + weight(8, 1, 1),
        "up": weight(8, 8, 1, 1),
        "fc": weight(8, 5),
        "fcb": weight(5),
    }


def _save(path: Path, text: str, weights: dict[str, np.ndarray]) -> Path:
    proto = onnx.parser.parse_model(text)
    for name, values in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(values.astype(np.float32), name))
    onnx.save_model(proto, path)
    return path


@pytest.mark.parametrize("opset", [7, 9, 13])
def test_an_old_file_with_separate_arithmetic_folds(opset: int, tmp_path: Path) -> None:
    """Caffe2: weights among the inputs, BatchNormalization, Mul, Sum, an old operator set."""
    source = _save(tmp_path / "caffe2.onnx", _CAFFE2.format(opset=opset), _weights())
    imported = import_onnx(source, _SPEC, tmp_path / "m.onnx", labels=list("abcde"))
    assert imported.inputs == (TensorSpec("data", "float32", (1, 3, 16, 16)),)
    assert imported.opset >= 18
    assert imported.history[0].inputs == (file_sha256(source),)
    folded, records = fold(imported, tmp_path / "f.onnx")
    counts = op_counts(load_model(folded.path))
    assert (counts["BatchNormalization"], counts["Mul"], counts["Add"], counts["Conv"]) == (0, 0, 0, 2)
    assert {record.name: record.n_rewrites for record in records}["residual_scale"] == 1
    pixels = np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3), dtype=np.uint8)
    # The same text as a current model: the evaluator's old batch norms take the statistics of the batch.
    feeds = {
        "data": normalize(pixels, _SPEC, "BGR"),
        **{k: v.astype(np.float32) for k, v in _weights().items()},
    }
    evaluator = onnx.reference.ReferenceEvaluator(onnx.parser.parse_model(_CAFFE2.format(opset=18)))
    (expected,) = evaluator.run(None, feeds)
    got = execute(load_model(folded.path), {"image": pixels})["prob"]
    np.testing.assert_allclose(got, expected, atol=FOLDED_RELATIVE * np.abs(expected).max())


_KERAS = """<ir_version: 8, opset_import: ["" : 15]> keras (float[N,H,W,3] x) => (float[N,5] y) {
    t = Transpose <perm = [0, 3, 1, 2]> (x)
    c = Conv (t, w) b = Add (c, bias) n = BatchNormalization (b, gamma, beta, mean, var) r = Relu (n)
    u = Conv (r, up) k = Mul (u, scale) a = Add (k, r)
    p = GlobalAveragePool (a) q = Squeeze (p, axes) g = MatMul (q, fc) y = Add (g, fcb) }"""


def test_a_keras_file_folds(tmp_path: Path) -> None:
    """NHWC input with a leading Transpose, bias as an Add before batch norm, free height and width."""
    spec = PreprocessSpec(input_hw=(16, 16), value_range=(-1.0, 1.0), layout="NHWC")
    weights = {**_weights(), "bias": weight(8, 1, 1), "scale": np.array(0.17)}
    weights.pop("s")
    source = tmp_path / "keras.onnx"
    proto = onnx.parser.parse_model(_KERAS)
    for name, values in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(values.astype(np.float32), name))
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array([2, 3]), "axes"))
    onnx.save_model(proto, source)
    imported = import_onnx(source, spec, tmp_path / "m.onnx")
    assert imported.inputs[0].shape == ("N", 16, 16, 3)
    folded, _ = fold(imported, tmp_path / "f.onnx")
    assert dict(op_counts(load_model(folded.path))) == {
        "Transpose": 1, "Cast": 1, "Conv": 2, "Relu": 1, "Add": 1, "GlobalAveragePool": 1, "Squeeze": 1, "Gemm": 1,
    }  # fmt: skip
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    expected = onnx.reference.ReferenceEvaluator(proto).run(None, {"x": normalize(pixels, spec, "BGR")})[0]
    got = execute(load_model(folded.path), {"image": pixels})["y"]
    np.testing.assert_allclose(got, expected, atol=FOLDED_RELATIVE * np.abs(expected).max())


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (
            _CAFFE2.replace("data, float[8,3,3,3]", "data, float[1] extra, float[8,3,3,3]"),
            ExportError,
            "inputs",
        ),
        (_CAFFE2.replace("[1,3,16,16]", "[1,3,20,16]"), ExportError, "correct the input size or the layout"),
        (_CAFFE2.replace("[1,3,16,16]", "[1,16,16,3]"), ExportError, "correct the input size or the layout"),
    ],
)
def test_files_that_are_no_classifier_of_this_input(
    text: str, error: type[Exception], message: str, tmp_path: Path
) -> None:
    source = _save(tmp_path / "bad.onnx", text.format(opset=13), _weights())
    with pytest.raises(error, match=message):
        import_onnx(source, _SPEC, tmp_path / "m.onnx")


def test_a_wrong_number_of_labels(tmp_path: Path) -> None:
    source = _save(tmp_path / "caffe2.onnx", _CAFFE2.format(opset=13), _weights())
    with pytest.raises(UsageError, match="3 labels for 5 classes"):
        import_onnx(source, _SPEC, tmp_path / "m.onnx", labels=list("abc"))


@pytest.mark.parametrize(
    "content", [b"", b"not protobuf at all", b"\x08\x09"], ids=["empty", "text", "no-graph"]
)
def test_what_is_no_onnx_file(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(content)
    with pytest.raises(ModelSpecError, match="is not an ONNX model"):
        import_onnx(tmp_path / "x.onnx", _SPEC, tmp_path / "m.onnx")
    with pytest.raises(ModelSpecError, match="cannot read"):
        import_onnx(tmp_path / "absent.onnx", _SPEC, tmp_path / "m.onnx")


def _external(folder: Path, location: str | None = None) -> Path:
    """A model whose weights lie in ``weights.bin`` beside it, or are said to lie at `location`."""
    source = _save(folder / "inside.onnx", _CAFFE2.format(opset=13), _weights())
    proto = onnx.load(source)
    onnx.save_model(
        proto, folder / "external.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0
    )
    source.unlink()
    if location is not None:
        proto = onnx.load(folder / "external.onnx", load_external_data=False)
        for entry in proto.graph.initializer[0].external_data:
            if entry.key == "location":
                entry.value = location
        (folder / "external.onnx").write_bytes(proto.SerializeToString())
    return folder / "external.onnx"


def test_external_data_beside_the_model_is_read_and_taken_in(tmp_path: Path) -> None:
    imported = import_onnx(_external(tmp_path), _SPEC, tmp_path / "m.onnx")
    (tmp_path / "weights.bin").unlink()
    assert load_model(imported.path).graph.initializers["w"].const_value.numpy().shape == (8, 3, 3, 3)


def _symlink(folder: Path) -> None:
    (folder / "link.bin").symlink_to(folder / "weights.bin")


def _symlinked_folder(folder: Path) -> None:
    (folder / "sub").symlink_to(folder.parent)


def _hardlink(folder: Path) -> None:
    os.link(folder / "weights.bin", folder / "hard.bin")


def _fifo(folder: Path) -> None:
    os.mkfifo(folder / "pipe.bin")


@pytest.mark.parametrize(
    ("location", "prepare", "message"),
    [
        ("../outside.bin", None, "leaves the model's folder"),
        ("a/../../outside.bin", None, "leaves the model's folder"),
        ("..\\outside.bin", None, "leaves the model's folder"),
        ("/etc/passwd", None, "not a relative path"),
        ("C:\\secret.bin", None, "not a relative path"),
        ("", None, "not a relative path"),
        ("link.bin", _symlink, "is a symbolic link"),
        ("sub/outside.bin", _symlinked_folder, "is a symbolic link"),
        ("hard.bin", _hardlink, "has 2 hard links"),
        ("pipe.bin", _fifo, "not a regular file"),
        ("absent.bin", None, "is missing"),
    ],
)
def test_external_data_elsewhere_is_refused_and_not_opened(
    location: str,
    prepare: Callable[[Path], None] | None,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "outside.bin").write_bytes(bytes(100_000))
    source = _external(folder, location)
    if prepare is not None:
        prepare(folder)

    def opened(*_: object) -> None:
        raise AssertionError("external data was read before it was checked")

    monkeypatch.setattr(onnx, "load_external_data_for_model", opened)
    with pytest.raises(IntegrityError, match=message):
        import_onnx(source, _SPEC, tmp_path / "m.onnx")


def test_truncated_external_data_is_refused(tmp_path: Path) -> None:
    source = _external(tmp_path)
    data = (tmp_path / "weights.bin").read_bytes()
    (tmp_path / "weights.bin").write_bytes(data[: len(data) // 2])
    with pytest.raises(IntegrityError, match="cannot be read"):
        import_onnx(source, _SPEC, tmp_path / "m.onnx")
