"""Which layers an int8 graph's loss comes from, against graphs with one layer in int8."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from calibration_models import DATASET, GRAPH, batches, images, logits, make_model
from onnx_text import weight
from tolerances import ATTRIBUTED_MARGIN_RTOL, SENSITIVITY_DB

from calibration.attribution import JudgedImage, attribute
from calibration.quantizer import StaticQuantizer, apply_table
from calibration.switches import layers_of_graph
from calibration.table import derive_table
from pipeline.errors import CalibrationError
from pipeline.metrics import sqnr_db
from pipeline.onnx_files import load_model

pytest.importorskip("openvino")
from engines.openvino import fp32_runner

LAYERS = ("c", "d", "logits")
WITHOUT_AVERAGES = GRAPH.replace("GlobalAveragePool(s)", "MaxPool<kernel_shape=[8,8]>(s)")
"""Every rounding is some layer's."""


def quiet(what, done, total):
    pass


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("attribution")
    w, v = weight(8, 3, 3, 3) / 64.0, weight(12, 8, 3, 3)
    w[0] *= 20.0  # the range of c is channel 0's, and the others get a few steps of it
    v[:, 0] /= 20.0
    changed = {"w": w, "v": v, "k": np.zeros(5, np.float32)}
    model = make_model(folder / "fp32.onnx", graph=WITHOUT_AVERAGES, **changed)
    # As many images for each class: some are near a tie then.
    changed["k"] = -logits(model.path, images(64, seed=4)).mean(axis=0)
    model = make_model(folder / "fp32.onnx", graph=WITHOUT_AVERAGES, **changed)
    statistics, _ = StaticQuantizer("minmax", runner_factory=fp32_runner).statistics(
        model, batches, DATASET, quiet
    )
    table = derive_table(statistics, "minmax")
    apply_table(model, table, "cpu", folder / "int8.onnx")
    return model, table, folder / "int8.onnx"


@pytest.fixture(scope="module")
def turned(built):
    """Images that int8 answers otherwise."""
    model, _, int8 = built
    pixels = images(400, seed=3)
    exact, rounded = logits(model.path, pixels), logits(int8, pixels)
    indices = np.flatnonzero(exact.argmax(1) != rounded.argmax(1))[:4]
    assert len(indices) >= 2, "the network is meant to suffer from int8"
    return [JudgedImage(str(i), pixels[i], rounded[i].astype(np.float64)) for i in indices]


def measured(built, flipped=(), n=8):
    model, _, int8 = built
    return attribute(model, int8, list(images(n, seed=2)), flipped, fp32_runner, quiet)


def test_a_layer_costs_what_it_costs_alone_in_int8(built, tmp_path):
    model, table, _ = built
    found = {share.layer: share for share in measured(built).layers}
    assert found.keys() == set(LAYERS)
    pixels = images(8, seed=2)
    for layer in LAYERS:
        apply_table(model, table, "cpu", tmp_path / "one.onnx", frozenset(LAYERS) - {layer})
        alone = sqnr_db(logits(model.path, pixels), logits(tmp_path / "one.onnx", pixels))
        assert found[layer].logits_sqnr_db == pytest.approx(alone, abs=SENSITIVITY_DB), layer
    # Nothing stands behind the last layer: at the logits its noise is its own.
    assert found["logits"].sqnr_db == pytest.approx(found["logits"].logits_sqnr_db, abs=0.1)
    assert sum(share.logits_share for share in found.values()) == pytest.approx(1.0)


def test_the_layer_made_bad_has_the_flips_too(built, turned):
    found = measured(built, turned)
    assert found.layers[0].layer == "d", "it reads the tensor whose range one channel has for itself"
    shares = {share.layer: share.flip_share for share in found.layers}
    assert max(shares, key=shares.__getitem__) == "d"
    assert sum(shares.values()) == pytest.approx(1.0)
    assert [flip.layers[0][0] for flip in found.flips].count("d") >= len(found.flips) / 2


def test_the_parts_of_a_flip_add_up_to_what_the_real_graph_does(built, turned):
    model, _, _ = built
    found = measured(built, turned)
    assert [flip.key for flip in found.flips] == [image.key for image in turned]
    for flip, image in zip(found.flips, turned, strict=True):
        exact = logits(model.path, image.pixels[None])[0]
        assert (flip.before, flip.after) == (exact.argmax(), image.int8_logits.argmax())
        assert flip.margin_fp32 == pytest.approx(exact[flip.before] - exact[flip.after], rel=1e-3)
        assert flip.margin_fp32 > 0.0 > flip.margin_int8
        assert flip.explained == pytest.approx(sum(part for _, part in flip.layers))
    assert found.explained == pytest.approx(1.0, abs=ATTRIBUTED_MARGIN_RTOL)


def test_an_image_turned_by_another_stage_is_passed_over(built, turned):
    model, _, _ = built
    same = dataclasses.replace(
        turned[0], int8_logits=logits(model.path, turned[0].pixels[None])[0].astype(np.float64)
    )
    found = measured(built, [same, turned[1]])
    assert [flip.key for flip in found.flips] == [turned[1].key]
    nothing = measured(built, [same])
    assert nothing.explained is None
    assert all(share.flip_share is None for share in nothing.layers)


def test_layers_left_in_float_are_counted_not_blamed(built, tmp_path):
    model, table, _ = built
    apply_table(model, table, "cpu", tmp_path / "mixed.onnx", frozenset({"d"}))
    found = attribute(model, tmp_path / "mixed.onnx", list(images(4, seed=2)), (), fp32_runner, quiet)
    assert {share.layer for share in found.layers} == {"c", "logits"}
    assert found.n_float_layers == 1


def test_weights_and_biases_are_those_that_ship(built, tmp_path):
    """Corrections change both; what stands in the graph counts, not what rounding to nearest would give."""
    model, _, _ = built
    quantizer = StaticQuantizer("minmax", runner_factory=fp32_runner, corrections=("bias", "adaround"))
    quantizer.quantize(model, batches, DATASET, tmp_path / "corrected.onnx", quiet)
    graph = load_model(model.path)
    plain = {layer.layer: layer for layer in layers_of_graph(graph, load_model(built[2]))}
    corrected = {
        layer.layer: layer for layer in layers_of_graph(graph, load_model(tmp_path / "corrected.onnx"))
    }
    moved = corrected["d"].weight - plain["d"].weight
    assert 0 < np.count_nonzero(np.abs(moved) > 1e-6) < moved.size
    assert corrected["c"].bias is not None
    assert plain["c"].grid is None, "pixels are exact"
    assert plain["d"].grid is not None
    exact = graph.graph.initializers["w"].const_value.numpy()
    assert np.abs(plain["c"].weight - exact).max() < 0.01 * np.abs(exact).max()


def test_json_and_errors(built, turned):
    model, _, _ = built
    tree = measured(built, turned[:1]).to_json()
    assert json.loads(json.dumps(tree, allow_nan=False))["flips"][0]["key"] == turned[0].key
    with pytest.raises(CalibrationError, match="no int8 layer"):
        attribute(model, model.path, list(images(1, seed=2)), (), fp32_runner, quiet)
    with pytest.raises(CalibrationError, match="no image"):
        measured(built, n=0)
