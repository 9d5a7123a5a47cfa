"""Factories in a file of the user's, and ONNX files."""

import sys

import onnx.parser
import pytest
import torch

from pipeline.artifacts import PreprocessSpec
from pipeline.errors import ModelSpecError, WeightsError
from pipeline.models.resolve import resolve_model

# --- factories --------------------------------------------------------------------------------------

FACTORY = """
from torch import nn
import {helper}

def build(num_classes=6):
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(4, num_classes))

def fixed():
    return build()

def required(num_classes):
    return build(num_classes)

def greedy(width, depth):
    return build()

def broken():
    return 1 / 0

def number():
    return 3

def pair():
    class Pair(nn.Module):
        def forward(self, x):
            return x, x
    return Pair()

def binary():
    return build(1)

def segmenter():
    return nn.Conv2d(3, 2, 1)

def declared():
    module = build()
    module.edgefold_preprocess = {preprocess}
    return module

net = build()
"""


@pytest.fixture
def factory_file(tmp_path):
    helper = f"helper_{tmp_path.name}"
    (tmp_path / f"{helper}.py").write_text("")
    path = tmp_path / "my model.py"
    path.write_text(FACTORY.format(helper=helper, preprocess={"input_hw": [40, 40], "color": "BGR"}))
    return path


def test_a_factory_s_own_weights_are_accepted_with_a_note(factory_file):
    path_before = list(sys.path)
    model = resolve_model(f"{factory_file}:build", weights=None, input_size=48)
    assert model.num_classes == 6
    assert model.weights == "as built by the factory"
    assert model.name == "my model:build"
    notes = "\n".join(model.notes)
    assert "those the factory gave" in notes
    assert (
        "assumed, not known (ImageNet defaults): shorter resize, bilinear, crop fraction 0.875 to 48×48"
        in notes
    )
    assert sys.path == path_before


def test_a_factory_takes_the_class_count(factory_file):
    assert resolve_model(f"{factory_file}:build", weights=None, num_classes=9).num_classes == 9
    assert resolve_model(f"{factory_file}:required", weights="random:1", num_classes=9).num_classes == 9
    with pytest.raises(ModelSpecError, match="fixed has 6 outputs and --num-classes says 9"):
        resolve_model(f"{factory_file}:fixed", weights=None, num_classes=9)
    with pytest.raises(ModelSpecError, match="requires num_classes: give --num-classes"):
        resolve_model(f"{factory_file}:required", weights=None)


def test_a_factory_with_a_weights_file(factory_file, tmp_path):
    trained = resolve_model(f"{factory_file}:build", weights="random:1", num_classes=11).module
    torch.save({"state_dict": trained.state_dict()}, tmp_path / "trained.pth")
    model = resolve_model(f"{factory_file}:build", weights=str(tmp_path / "trained.pth"))
    assert model.num_classes == 11
    assert torch.equal(model.module[4].weight, trained[4].weight)
    with pytest.raises(WeightsError, match=r"2 misshapen: 4\.weight \(file 11×4, model 6×4\)"):
        resolve_model(f"{factory_file}:fixed", weights=str(tmp_path / "trained.pth"))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("biuld", r"'biuld' is not in the file.*build, fixed"),
        ("net", "is a Sequential, not a function"),
        ("greedy", "requires width, depth"),
        ("broken", r"broken raised ZeroDivisionError: division by zero \(my model\.py, line 19\)"),
        ("number", "returned int; it must return an nn.Module"),
        ("pair", "returns tuple; wrap it"),
        ("binary", r"returns shape \(1, 1\).*at least 2 classes"),
        ("segmenter", r"returns shape \(1, 2, 224, 224\)"),
    ],
)
def test_a_factory_that_is_none(factory_file, name, said):
    with pytest.raises(ModelSpecError, match=said):
        resolve_model(f"{factory_file}:{name}", weights=None)


def test_a_factory_declares_its_preprocessing(factory_file):
    model = resolve_model(f"{factory_file}:declared", weights=None)
    assert model.preprocess == PreprocessSpec((40, 40), color="BGR")
    assert model.preprocess_source == "edgefold_preprocess of my model.py"
    assert not any("assumed" in note for note in model.notes)


def test_a_factory_s_declaration_is_checked(factory_file):
    factory_file.write_text(factory_file.read_text() + "edgefold_preprocess = {'inptu_hw': [1, 1]}\n")
    with pytest.raises(ModelSpecError, match=r"(?s)edgefold_preprocess of .*inptu_hw"):
        resolve_model(f"{factory_file}:build", weights=None)


def test_a_file_that_raises(tmp_path):
    path = tmp_path / "model.py"
    path.write_text("import not_there_at_all\n")
    with pytest.raises(ModelSpecError, match=r"ModuleNotFoundError.*not_there_at_all.*model\.py, line 1"):
        resolve_model(f"{path}:build", weights=None)
    with pytest.raises(ModelSpecError, match="no such file"):
        resolve_model(f"{tmp_path}/other.py:build", weights=None)
    with pytest.raises(ModelSpecError, match=r"write .*model\.py:FACTORY"):
        resolve_model(str(path), weights=None)


def test_two_files_of_one_name_are_two_modules(tmp_path):
    for folder, classes in (("one", 2), ("two", 3)):
        (tmp_path / folder).mkdir()
        source = f"from torch import nn\ndef build():\n    return nn.Sequential(nn.Flatten(), nn.Linear(12, {classes}))\n"
        (tmp_path / folder / "model.py").write_text(source)
    counts = [
        resolve_model(f"{tmp_path}/{folder}/model.py:build", weights=None, input_size=2).num_classes
        for folder in ("one", "two", "one")
    ]
    assert counts == [2, 3, 2]


# --- ONNX -------------------------------------------------------------------------------------------


@pytest.fixture
def onnx_file(tmp_path):
    def write(shape="N, 3, 32, 32", classes="4", dtype="float", perm="0, 1, 2, 3"):
        text = f"""
            <ir_version: 10, opset_import: ["" : 18]>
            toy ({dtype}[{shape}] image) => ({dtype}[N, {classes}] logits)
            <int64[2] axes = {{2, 3}}>
            {{
                t = Transpose <perm = [{perm}]> (image)
                pooled = ReduceMean <keepdims = 0> (t, axes)
                logits = Concat <axis = 1> (pooled, pooled)
            }}"""
        path = tmp_path / "toy.onnx"
        path.write_bytes(onnx.parser.parse_model(text).SerializeToString())
        return str(path)

    return write


def test_an_onnx_file_says_its_size_and_classes(onnx_file):
    path = onnx_file(classes="6")
    model = resolve_model(path, weights=None)
    assert (model.module, str(model.onnx_path), model.name) == (None, path, "toy")
    assert (model.num_classes, model.preprocess.input_hw) == (6, (32, 32))
    assert model.preprocess.layout == "NCHW"
    assert len(model.weights_sha256) == 64
    assert any("preprocessing is assumed" in note for note in model.notes)


def test_an_onnx_file_in_nhwc(onnx_file, tmp_path):
    path = onnx_file(shape="1, 32, 48, 3", perm="0, 3, 1, 2")
    assert resolve_model(path, weights=None).preprocess.input_hw == (32, 48)
    file = tmp_path / "preprocess.json"
    file.write_text('{"input_hw": [32, 48]}')
    assert resolve_model(path, weights=None, preprocess_file=file).preprocess.layout == "NHWC"


def test_an_onnx_file_of_any_size_needs_one(onnx_file):
    path = onnx_file(shape="N, 3, H, W", classes="C")
    with pytest.raises(ModelSpecError, match=r"any size .*--input-size N"):
        resolve_model(path, weights=None)
    with pytest.raises(ModelSpecError, match=r"class count .*--num-classes N"):
        resolve_model(path, weights=None, input_size=64)
    assert resolve_model(path, weights=None, input_size=64, num_classes=4).preprocess.input_hw == (64, 64)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"input_size": 64}, "takes 32×32 pixels, and 64×64"),
        ({"num_classes": 5}, "has 4 outputs and --num-classes says 5"),
        ({"weights": "random:0"}, "holds its own weights"),
    ],
)
def test_what_contradicts_an_onnx_file(onnx_file, arguments, said):
    with pytest.raises((ModelSpecError, WeightsError), match=said):
        resolve_model(onnx_file(), **{"weights": None, **arguments})


@pytest.mark.parametrize(
    ("fields", "said"),
    [({"dtype": "float16"}, "float16"), ({"shape": "N, 1, 32, 32"}, r"\(N, 3, H, W\)")],
)
def test_an_onnx_input_that_is_no_float_image(onnx_file, fields, said):
    with pytest.raises(ModelSpecError, match=said):
        resolve_model(onnx_file(**fields), weights=None)


def test_a_file_that_is_no_onnx(tmp_path):
    path = tmp_path / "x.onnx"
    with pytest.raises(ModelSpecError, match="no such file"):
        resolve_model(str(path), weights=None)
    path.write_bytes(b"not a model")
    with pytest.raises(ModelSpecError, match="not an ONNX model"):
        resolve_model(str(path), weights=None)
