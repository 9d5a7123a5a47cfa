"""What each layer costs at the logits, against switching one layer at a time in the real int8 graph."""

from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
import onnx_ir as ir
import pytest
from calibration_models import DATASET, GRAPH, HW, batches, images, logits, make_model
from onnx_text import weight
from tolerances import SENSITIVITY_DB, SHARED_PATTERNS_RTOL

import calibration.sensitivity as sensitivity
from calibration.placement import PLACEMENTS
from calibration.quantizer import StaticQuantizer, apply_table
from calibration.sensitivity import LayerSensitivity, measure_sensitivity
from calibration.switches import layers_of_placement, switched_graph
from calibration.table import derive_table
from pipeline.errors import CalibrationError, IntegrityError
from pipeline.metrics import sqnr_db
from pipeline.onnx_files import load_model, save_model

pytest.importorskip("openvino")
from engines.openvino import fp32_runner

LAYERS = ("c", "d", "logits")
N_IMAGES = 8
WITHOUT_AVERAGES = GRAPH.replace("GlobalAveragePool(s)", "MaxPool<kernel_shape=[8,8]>(s)")
"""Every rounding is some layer's: a real int8 graph with one layer in int8 has the noise of that layer alone."""


def quiet(what, done, total):
    pass


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sensitivity")
    w = weight(8, 3, 3, 3) / 64.0
    v = weight(12, 8, 3, 3)
    w[0] *= 20.0  # the range of c is channel 0's, and the others get a few steps of it
    v[:, 0] /= 20.0
    model = make_model(folder / "fp32.onnx", graph=WITHOUT_AVERAGES, w=w, v=v)
    quantizer = StaticQuantizer("minmax", runner_factory=fp32_runner)
    statistics, _ = quantizer.statistics(model, batches, DATASET, quiet)
    return model, derive_table(statistics, "minmax"), statistics


def measure(calibrated, **options):
    model, table, statistics = calibrated
    settings = {"batches": batches, "runner_factory": fp32_runner, "progress": quiet, **options}
    return measure_sensitivity(model, table, statistics, **settings)


def one_at_a_time(calibrated, tmp_path, corrected=None):
    """SQNR of the logits of the int8 graph with one layer in int8 and the others in float."""
    model, table, _ = calibrated
    pixels = np.concatenate(list(batches()))[:N_IMAGES]
    expected = logits(model.path, pixels)
    found = {}
    for layer in LAYERS:
        path = tmp_path / f"{layer}.onnx"
        apply_table(model, table, "cpu", path, frozenset(LAYERS) - {layer}, corrected)
        found[layer] = sqnr_db(expected, logits(path, pixels))
    return found


def test_it_is_what_switching_one_layer_at_a_time_shows(calibrated, tmp_path):
    found = {entry.layer: entry for entry in measure(calibrated, n_images=N_IMAGES)}
    assert found.keys() == set(LAYERS)
    for layer, db in one_at_a_time(calibrated, tmp_path).items():
        assert found[layer].logits_sqnr_db == pytest.approx(db, abs=SENSITIVITY_DB), layer


def test_of_a_corrected_model_it_is_the_cost_of_the_corrected_layer(calibrated, tmp_path):
    """The weights of d cut off instead of rounded, c's bias moved: costs that the model itself has not."""
    model, _, _ = calibrated
    graph = load_model(model.path)
    for name, change in (
        ("v", lambda v: np.trunc(v / np.abs(v).max() * 127) * np.abs(v).max() / 127),
        ("b", lambda b: b + 0.05),
    ):
        value = graph.graph.initializers[name]
        value.const_value = ir.tensor(change(value.const_value.numpy()).astype(np.float32), name=name)
    path = tmp_path / "corrected.onnx"
    corrected = dataclasses.replace(model, path=path, sha256=save_model(graph, path))
    own = {entry.layer: entry.logits_sqnr_db for entry in measure(calibrated, n_images=N_IMAGES)}
    found = {
        entry.layer: entry.logits_sqnr_db
        for entry in measure(calibrated, n_images=N_IMAGES, corrected=corrected)
    }
    assert max(abs(found[layer] - own[layer]) for layer in ("c", "d")) > 3 * SENSITIVITY_DB
    singly = one_at_a_time(calibrated, tmp_path, corrected)
    for layer in ("c", "d"):
        assert found[layer] == pytest.approx(singly[layer], abs=SENSITIVITY_DB), layer


def test_the_layer_made_bad_comes_first(calibrated):
    ranked = measure(calibrated)
    assert ranked[0].layer == "d", "it reads the tensor whose range one channel has for itself"
    assert ranked[0].op_type == "Conv"
    assert ranked[0].macs == 12 * 8 * 3 * 3 * (HW // 2) ** 2
    assert ranked[0].logits_nsr > 10 * ranked[1].logits_nsr
    own = {entry.layer: entry.sqnr_db for entry in ranked}
    assert min(own, key=own.__getitem__) == "d"


def switched(calibrated, rows, path):
    model, table, _ = calibrated
    graph = load_model(model.path)
    switched_graph(graph, layers_of_placement(graph, PLACEMENTS["cpu"](graph), table.ranges), rows)
    save_model(graph, path)

    def run(pixels, switches):
        with fp32_runner(path, ()) as runner:
            assert [spec.name for spec in runner.outputs] == ["logits", "edgefold_energies"]
            feeds = {"image": pixels, "edgefold_switches": np.array(switches, np.float32)}
            return np.array(runner.infer(feeds)["logits"])

    return run


def test_without_noise_the_switched_graph_is_the_fp32_graph(calibrated, tmp_path):
    run = switched(calibrated, 4, tmp_path / "switched.onnx")
    pixels = images(4, seed=7)
    off = run(pixels, np.zeros((4, 3)))
    assert np.allclose(off, logits(calibrated[0].path, pixels), atol=1e-4 * np.abs(off).max())


def test_a_graph_of_one_row_with_everything_switched_on_is_the_int8_graph(calibrated, tmp_path):
    run = switched(calibrated, 1, tmp_path / "switched.onnx")
    int8 = _all_in_int8(calibrated, tmp_path)
    for pixels in images(4, seed=7)[:, None]:
        on = run(pixels, np.ones((1, 3)))
        expected = logits(int8, pixels)
        fp32 = logits(calibrated[0].path, pixels)
        assert np.abs(on - expected).max() < 0.05 * np.abs(expected - fp32).max()


def test_every_row_gets_the_noise_of_the_first(calibrated, tmp_path):
    run = switched(calibrated, 3, tmp_path / "switched.onnx")
    pixels = np.repeat(images(1, seed=7), 3, axis=0)
    last = np.array([[0, 0, 0], [0, 0, 1], [0, 0, -1]])  # of the last layer, behind which all is linear
    clean, plus, minus = run(pixels, last)
    assert np.allclose(plus - clean, clean - minus, atol=1e-5 * np.abs(clean).max())
    assert np.abs(plus - clean).max() > 1e-3 * np.abs(clean).max()


def _all_in_int8(calibrated, tmp_path):
    model, table, _ = calibrated
    apply_table(model, table, "cpu", tmp_path / "int8.onnx")
    return tmp_path / "int8.onnx"


@pytest.mark.parametrize("n_layers", [5, 31, 100])
def test_noises_are_told_apart(n_layers):
    """Layers whose noise at the logits is known, more of them than patterns or fewer."""
    rng = np.random.default_rng(0)
    energies = rng.exponential(1.0, n_layers) ** 2
    fit = sensitivity.PatternFit(n_layers)
    seen = np.zeros(n_layers)
    for index in range(64):
        patterns = sensitivity.Patterns(n_layers, seed=index)
        noise = rng.standard_normal((n_layers, 200)) * np.sqrt(energies / 200)[:, None]
        seen += np.einsum("lc,lc->l", noise, noise) / 64
        fp32 = np.full(200, 3.0)
        fit.add(patterns, fp32 + patterns.switches @ noise)
    found = fit.energies() * 200 * 9.0
    exact = n_layers < sensitivity.N_PATTERNS
    assert np.abs(found - seen).max() < (1e-9 if exact else SHARED_PATTERNS_RTOL * seen.max())


def test_a_rectified_noise_is_no_layers_noise():
    """What does not change its sign with the noise lands in the mean, not with a layer."""
    fit = sensitivity.PatternFit(3)
    patterns = sensitivity.Patterns(3, seed=0)
    noise = np.diag([1.0, 2.0, 3.0])
    fit.add(patterns, 10.0 + patterns.switches @ noise + np.abs(patterns.switches @ noise))
    assert fit.energies() * fit._signal == pytest.approx([1.0, 4.0, 9.0])


def test_a_fixed_batch_size_is_kept_to(tmp_path):
    model = make_model(tmp_path / "fixed.onnx", batch=3)
    statistics, _ = StaticQuantizer("minmax", runner_factory=fp32_runner).statistics(
        model, batches, DATASET, quiet
    )
    fixed = measure((model, derive_table(statistics, "minmax"), statistics), n_images=4)
    free = make_model(tmp_path / "free.onnx")
    statistics = dataclasses.replace(statistics, model_sha256=free.sha256)
    loose = measure((free, derive_table(statistics, "minmax"), statistics), n_images=4)
    assert [entry.layer for entry in fixed] == [entry.layer for entry in loose]
    assert [e.logits_nsr for e in fixed] == pytest.approx([e.logits_nsr for e in loose], rel=1e-3)


def test_only_so_many_images_are_read(calibrated):
    read = itertools.count()
    told = []

    def counting():
        for batch in batches():
            for image in batch:
                next(read)
                yield image[None]

    measure(calibrated, batches=counting, n_images=3, progress=lambda *event: told.append(event))
    assert next(read) == 3
    assert told == [("sensitivity", i, 3) for i in (1, 2, 3)]


def test_the_record_is_json(calibrated):
    record = [entry.to_json() for entry in measure(calibrated, n_images=2)]
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    silent = LayerSensitivity("y", "Conv", 0.0, 0.0, 1)
    assert (silent.to_json()["sqnr_db"], silent.to_json()["logits_sqnr_db"]) == (None, None)


def test_no_image_and_no_signal_are_errors(calibrated, tmp_path):
    with pytest.raises(CalibrationError, match="no image"):
        measure(calibrated, batches=lambda: iter(()))
    silent = make_model(tmp_path / "silent.onnx", h=np.zeros((12, 5)), k=np.zeros(5))
    statistics, _ = StaticQuantizer("minmax", runner_factory=fp32_runner).statistics(
        silent, batches, DATASET, quiet
    )
    with pytest.raises(CalibrationError, match="energy 0"):
        measure((silent, derive_table(statistics, "minmax"), statistics), n_images=2)


def test_another_models_table_is_refused(calibrated):
    model, table, statistics = calibrated
    other = dataclasses.replace(model, sha256="f" * 64)
    with pytest.raises(IntegrityError, match="is of model"):
        measure((other, table, statistics))
