"""`StaticQuantizer` with corrections: better, recorded, undone where they do harm."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx_text import onnx_model, weight
from tolerances import ADAPTIVE_GAIN_DB, EQUALIZATION_GAIN_DB, LOGITS_OF_GRIDS_DB

from calibration.correction import AUTO, CORRECTIONS, CorrectionRecord, parse_corrections
from calibration.correction import correcting as correcting_module
from calibration.correction import reconstruction as reconstruction_module
from calibration.correction.images import spread, take_images
from calibration.correction.judge import Judgement, LogitsJudge
from calibration.correction.records import gains, judging
from calibration.quantizer import StaticQuantizer, apply_table
from pipeline.artifacts import ModelArtifact, PreprocessSpec, TensorSpec
from pipeline.errors import IntegrityError, UsageError
from pipeline.metrics import sqnr_db

pytest.importorskip("openvino")
from engines.openvino import fp32_runner

WALKED = ("ranges", "bias", "adaround")
HW = 16
DATASET = "d" * 64
GRAPH = f"""g (uint8[{{batch}},{HW},{HW},3] image) => (float[{{batch}},5] logits)
    {{{{ f = Cast<to=1>(image)
      x = Transpose<perm=[0,3,1,2]>(f)
      c = Conv(x, w, b)
      r = Relu(c)
      d = Conv<group=16, pads=[1,1,1,1], strides=[2,2]>(r, v, e)
      s = Relu(d)
      t = Conv(s, u, z)
      a = Relu(t)
      p = GlobalAveragePool(a)
      q = Flatten(p)
      logits = Gemm(q, h, k) }}}}"""


def make_model(path, batch="N", **others):
    rng = np.random.default_rng(3)
    uneven = np.exp(rng.normal(0.0, 1.2, 16))
    model = onnx_model(
        GRAPH.format(batch=batch),
        w=weight(16, 3, 3, 3) / 64.0,  # pixels reach 255
        b=weight(16) / 4,
        v=weight(16, 1, 3, 3) * uneven.reshape(16, 1, 1, 1),
        e=weight(16) / 4 * uneven,
        u=weight(24, 16, 1, 1) / uneven.reshape(1, 16, 1, 1),
        z=weight(24) / 4,
        h=weight(24, 5),
        k=weight(5),
        **others,
    )
    data = ir.serde.serialize_model(model).SerializeToString()
    path.write_bytes(data)
    return ModelArtifact(
        path=path,
        sha256=hashlib.sha256(data).hexdigest(),
        inputs=(TensorSpec("image", "uint8", (batch, HW, HW, 3)),),
        outputs=(TensorSpec("logits", "float32", (batch, 5)),),
        opset=18,
        preprocess=PreprocessSpec(input_hw=(HW, HW)),
    )


def images(n, seed):
    """Smooth patches with a tint each: neighbouring pixels are alike, as a photograph's are."""
    rng = np.random.default_rng(seed)
    patches = rng.integers(0, 256, (n, 4, 4, 3)).repeat(4, axis=1).repeat(4, axis=2)
    return (patches * rng.random((n, 1, 1, 3))).astype(np.uint8)


def batches():
    yield from np.array_split(images(40, seed=1), [16, 32])


@pytest.fixture
def model(tmp_path):
    return make_model(tmp_path / "fp32.onnx")


def run(model, out, corrections, placement="cpu", method="minmax"):
    """The int8 model, its table, and the record of the corrections (of the quantization where there are none)."""
    quantizer = StaticQuantizer(method, placement, runner_factory=fp32_runner, corrections=corrections)
    quantized, table, record = quantizer.quantize(model, batches, DATASET, out, lambda *_: None)
    assert quantized.history[-1] == record
    return quantized, table, quantized.history[-2] if corrections else record


def logits(path, step=32):
    pixels = images(32, seed=2)
    with fp32_runner(path, ()) as runner:
        return np.concatenate(
            [
                np.array(runner.infer({"image": pixels[i : i + step]})["logits"])
                for i in range(0, len(pixels), step)
            ]
        )


def quality_db(model, quantized, step=32):
    expected = logits(model.path, step)
    return sqnr_db(expected - expected.mean(axis=0), logits(quantized.path, step) - expected.mean(axis=0))


def test_the_default_corrections_gain_on_images_not_seen(model, tmp_path):
    plain, _, _ = run(model, tmp_path / "plain.onnx", ())
    corrected, table, record = run(model, tmp_path / "corrected.onnx", (AUTO,))
    assert quality_db(model, corrected) > quality_db(model, plain) + ADAPTIVE_GAIN_DB
    assert record.inputs == (model.sha256, DATASET)
    assert record.outputs == corrected.history[-1].inputs[:1]
    assert record.checks["corrections"] == ["bias", "adaround"]
    assert [name for name, _ in record.checks["left_out"]] == ["equalize", "ranges"]
    assert list(record.checks["seconds_of"]) == ["judging", "bias", "bias+adaround"]
    assert record.seconds == pytest.approx(sum(record.checks["seconds_of"].values()), abs=2e-3)
    assert record.checks["n_correction_images"] == 40
    assert record.checks["not_corrected"] == []
    assert {entry[0] for entry in record.checks["corrected_layers"]} == {"c", "d", "t", "logits"}
    assert corrected.inputs == model.inputs
    assert table.method == "minmax"


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_each_by_itself_is_recorded_layer_by_layer(model, tmp_path, correction):
    _, _, record = run(model, tmp_path / "int8.onnx", (correction,))
    entries = record.checks["corrected_layers"]
    assert entries
    assert {entry[1] for entry in entries} == {correction}
    for _, _, before_db, after_db, verdict in entries:
        if correction != "equalize":  # there, the readers of one tensor are judged together
            assert verdict == ("kept" if after_db >= before_db else "undone")


def test_ranges_are_searched_for_inputs_with_a_grid_of_their_own(model, tmp_path):
    _, plain, _ = run(model, tmp_path / "plain.onnx", ())
    _, searched, record = run(model, tmp_path / "int8.onnx", ("ranges",))
    judged = [entry[0] for entry in record.checks["corrected_layers"]]
    assert judged.count("d") == judged.count("t") == 2, "the input's grid and the weight's"
    assert judged.count("c") == 1, "pixels are exact: the weight's only"
    assert judged.count("logits") == 1, "what a Flatten reads and returns has one grid"
    changed = {name for name in plain.ranges if plain.ranges[name] != searched.ranges[name]}
    assert changed
    assert changed <= {"r", "s"}
    stored = {
        t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(tmp_path / "int8.onnx").graph.initializer
    }
    for name in ("r", "s"):
        assert stored[f"{name}_scale"] == pytest.approx(searched.ranges[name].high / 255, rel=1e-5)


def test_none_at_all_is_plain_rounding(model, tmp_path):
    quantized, table, record = run(model, tmp_path / "int8.onnx", ())
    again, _ = apply_table(model, table, "cpu", tmp_path / "again.onnx")
    assert quantized.sha256 == again.sha256
    assert quantized.history == (record,)


def test_a_correction_that_does_harm_is_undone(model, tmp_path, monkeypatch):
    plain, _, _ = run(model, tmp_path / "plain.onnx", ())
    monkeypatch.setattr(
        reconstruction_module, "round_adaptively", lambda weights, *_: np.full(weights.shape, 100.0)
    )
    undone, _, record = run(model, tmp_path / "undone.onnx", ("adaround",))
    assert {entry[4] for entry in record.checks["corrected_layers"]} == {"undone"}
    assert np.array_equal(logits(undone.path), logits(plain.path))
    kept = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(plain.path).graph.initializer}
    for tensor in onnx.load(undone.path).graph.initializer:
        if tensor.name.endswith("_int8"):
            assert np.array_equal(onnx.numpy_helper.to_array(tensor), kept[tensor.name])


def test_the_file_holds_the_integers_that_were_chosen(model, tmp_path, monkeypatch):
    chosen = {}
    solve = reconstruction_module.round_adaptively

    def recording(weights, *arguments):
        steps = solve(weights, *arguments)
        chosen[steps.shape] = steps
        return steps

    monkeypatch.setattr(reconstruction_module, "round_adaptively", recording)
    _, _, record = run(model, tmp_path / "int8.onnx", ("bias", "adaround"))
    stored = {
        t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(tmp_path / "int8.onnx").graph.initializer
    }
    kept = {entry[0] for entry in record.checks["corrected_layers"] if entry[1:5:3] == ["adaround", "kept"]}
    assert kept, "else nothing is compared"
    for layer, name, shape in (("c", "w", (1, 16, 27)), ("d", "v", (16, 1, 9)), ("t", "u", (1, 24, 16))):
        if layer in kept:
            np.testing.assert_array_equal(stored[f"{name}_int8"].reshape(shape), chosen[shape])


def test_a_fixed_batch_size(tmp_path):
    fixed = make_model(tmp_path / "fixed.onnx", batch=8)
    plain, _, _ = run(fixed, tmp_path / "plain.onnx", ())
    corrected, _, record = run(fixed, tmp_path / "int8.onnx", ("equalize", *WALKED))
    assert record.checks["n_correction_images"] == 40
    assert quality_db(fixed, corrected, 8) > quality_db(fixed, plain, 8)


def test_equalization_gains_and_its_table_belongs_to_the_equalized_model(model, tmp_path):
    plain, _, _ = run(model, tmp_path / "plain.onnx", ())
    equalized, table, record = run(model, tmp_path / "equalized.onnx", ("equalize",))
    assert any(entry[4] == "kept" for entry in record.checks["corrected_layers"])
    assert quality_db(model, equalized) > quality_db(model, plain) + EQUALIZATION_GAIN_DB
    with pytest.raises(IntegrityError, match="calibration table is of model"):
        apply_table(model, table, "cpu", tmp_path / "wrong.onnx")


@pytest.mark.parametrize("clip", [False, True])
def test_equalization_is_undone_where_a_clip_was_reached(tmp_path, monkeypatch, clip):
    """Nothing is as like the original as is asked for here; without a clip there is nothing to ask."""
    monkeypatch.setattr(correcting_module, "_SAME_MODEL_DB", np.inf)
    graph = GRAPH.replace("r = Relu(c)", "r = Clip(c, low, high)") if clip else GRAPH
    limits = {"low": np.array(0.0), "high": np.array(500.0)} if clip else {}
    monkeypatch.setattr(f"{__name__}.GRAPH", graph)
    model = make_model(tmp_path / "fp32.onnx", **limits)
    quantizer = StaticQuantizer(runner_factory=fp32_runner, corrections=("equalize",), work_dir=tmp_path)
    found = quantizer.correct(model, batches, DATASET, lambda *_: None)
    verdicts = {entry[4] for entry in found.original.history[-1].checks["corrected_layers"]}
    assert (found.original.path == model.path) == clip
    assert verdicts == {"undone"} if clip else "kept" in verdicts
    assert (tmp_path / "equalized.onnx").exists() != clip


def test_the_tensorrt_form_is_corrected_too(model, tmp_path):
    ort = pytest.importorskip("onnxruntime")
    expected = logits(model.path)
    db = {}
    for corrections in ((), WALKED):
        out = tmp_path / f"{len(corrections)}.onnx"
        run(model, out, corrections, placement="tensorrt")
        session = ort.InferenceSession(str(out), providers=["CPUExecutionProvider"])
        got = session.run(None, {"image": images(32, seed=2)})[0]
        db[len(corrections)] = sqnr_db(expected - expected.mean(axis=0), got - expected.mean(axis=0))
    assert db[len(WALKED)] > db[0]


def judged_as(monkeypatch, *worths):
    """Every int8 form is worth the next of these, decibels of each image."""
    in_turn = iter(worths)

    def judge(self, *_):
        image_db = np.array(next(in_turn))
        return Judgement(float(image_db.mean()), image_db)

    monkeypatch.setattr(LogitsJudge, "judge", judge)


PLAIN = [30.0, 31.0, 32.0, 33.0]


@pytest.mark.parametrize(
    ("biased", "rounded", "made", "reasons"),
    [
        ([33.0, 34.1, 35.0, 36.2], [39.0, 41.0, 41.2, 42.0], ["bias", "adaround"], {}),
        (
            [33.0, 34.1, 35.0, 36.2],
            [35.0, 33.1, 37.0, 35.2],
            ["bias"],
            {"adaround": "from 34.6 to 35.1 dB, no clear gain on 8 images, and was undone"},
        ),
        (
            [30.5, 30.4, 32.5, 32.4],
            [30.0, 31.0, 32.0, 33.0],
            ["bias"],
            {"adaround": "no clear gain on 8 images"},
        ),
        (
            [28.0, 29.1, 30.0, 31.2],
            [29.0, 30.1, 31.0, 32.2],
            [],
            {"bias": "from 31.5 to 29.6 dB and was undone", "adaround": "from 31.5 to 30.6 dB"},
        ),
        ([28.0, 29.1, 30.0, 31.2], [39.0, 41.0, 41.2, 42.0], ["bias", "adaround"], {}),
    ],
)
def test_of_what_nobody_asked_for_the_best_is_kept(
    model, tmp_path, monkeypatch, biased, rounded, made, reasons
):
    judged_as(monkeypatch, PLAIN, biased, rounded)
    quantized, _, record = run(model, tmp_path / "int8.onnx", (AUTO,))
    assert record.checks["corrections"] == made
    worth = {(): PLAIN, ("bias",): biased, ("bias", "adaround"): rounded}[tuple(made)]
    assert record.checks["logits_db"] == [np.mean(PLAIN), round(float(np.mean(worth)), 2)]
    assert {entry[1] for entry in record.checks["corrected_layers"]} == set(made)
    left_out = dict(record.checks["left_out"])
    assert set(left_out) == {"equalize", "ranges", *reasons}
    for name, part in reasons.items():
        assert part in left_out[name]
    monkeypatch.undo()
    same, _, _ = run(model, tmp_path / "asked.onnx", tuple(made))
    if made != ["bias"]:  # those are made from fewer images where they are all
        assert np.array_equal(logits(same.path), logits(quantized.path))


def test_rounding_is_given_up_after_a_few_layers_that_do_not_gain(model, tmp_path, monkeypatch):
    monkeypatch.setattr(correcting_module, "_TRIED_LAYERS", 2)
    walked = []
    solve = reconstruction_module.round_adaptively
    monkeypatch.setattr(
        reconstruction_module, "round_adaptively", lambda *arguments: walked.append(1) or solve(*arguments)
    )
    biased, tried = [33.0, 34.1, 35.0, 36.2], [33.0, 34.0, 35.0, 36.0]
    judged_as(monkeypatch, PLAIN, biased, tried)
    _, _, record = run(model, tmp_path / "int8.onnx", (AUTO,))
    assert len(walked) == 2, "of four layers"
    assert record.checks["corrections"] == ["bias"]
    assert dict(record.checks["left_out"])["adaround"] == (
        "took the logits of the average image from 34.6 to 34.5 dB with the first 2 of 4 layers, and was given up there"
    )


def test_layers_tried_stand_in_the_graph_that_is_judged(model, tmp_path, monkeypatch):
    monkeypatch.setattr(correcting_module, "_TRIED_LAYERS", 2)
    seen = []
    judge = LogitsJudge.judge

    def watched(self, graph, ranges):
        seen.append({name: value.const_value.numpy() for name, value in graph.graph.initializers.items()})
        return judge(self, graph, ranges)

    monkeypatch.setattr(LogitsJudge, "judge", watched)
    monkeypatch.setattr(Judgement, "is_better_than", lambda *_: False)  # it goes on, whatever they say
    run(model, tmp_path / "int8.onnx", (AUTO,))
    _, biased, mixed, whole = seen
    for name, both in (("w", whole), ("v", whole), ("u", biased), ("h", biased), ("z", biased)):
        assert np.array_equal(mixed[name], both[name]), name
    assert not np.array_equal(mixed["w"], biased["w"])


def test_clearly_better_is_by_more_than_chance_would_give():
    few = Judgement(30.0, np.array([30.0, 31.0, 32.0, 33.0]))
    same_everywhere = Judgement(30.5, few.image_db + 0.5)
    one_image = Judgement(35.0, few.image_db + np.array([0.0, 0.0, 0.0, 8.0]))
    assert same_everywhere.is_clearly_better_than(few)
    assert one_image.is_better_than(few)
    assert not one_image.is_clearly_better_than(few)
    assert not few.is_better_than(few)
    alone = Judgement(40.0, np.array([40.0]))
    assert not alone.is_clearly_better_than(Judgement(20.0, np.array([20.0])))


def test_images_are_chosen_from_all_over():
    pixels = np.arange(10, dtype=np.uint8).reshape(10, 1, 1, 1)
    assert spread(pixels, 5).ravel().tolist() == [0, 2, 4, 6, 8]
    assert spread(pixels, 99).shape == pixels.shape


@pytest.mark.parametrize("placement", ["cpu", "tensorrt"])
def test_what_they_come_to_at_the_logits_is_what_the_int8_graphs_show(model, tmp_path, placement):
    ort = pytest.importorskip("onnxruntime")
    pixels = np.concatenate(list(batches()))
    pixels = pixels[judging(len(pixels))][:8]
    with fp32_runner(model.path, ()) as runner:
        expected = np.array(runner.infer({"image": pixels})["logits"])
    shown = []
    for name, corrections in (("plain", ()), ("corrected", (AUTO,))):
        out = tmp_path / f"{name}.onnx"
        _, _, record = run(model, out, corrections, placement)
        session = ort.InferenceSession(str(out), providers=["CPUExecutionProvider"])
        shown.append(sqnr_db(expected, session.run(None, {"image": pixels})[0]))
    assert record.checks["logits_db"] == pytest.approx(shown, abs=LOGITS_OF_GRIDS_DB)
    assert shown[1] > shown[0]


def test_what_each_won_is_the_median_of_its_layers():
    records = [
        CorrectionRecord("a", "bias", 10.0, 12.0, True),
        CorrectionRecord("b", "bias", 20.0, 17.0, False),
        CorrectionRecord("c", "bias", 30.0, 36.0, True),
        CorrectionRecord("a", "adaround", 12.0, 15.0, True),
    ]
    adaround, bias = sorted(gains(records), key=lambda gain: gain["correction"])
    assert bias == {
        "correction": "bias",
        "n_layers": 3,
        "n_undone": 1,
        "median_before_db": 20.0,
        "median_after_db": 20.0,
    }
    assert (adaround["n_layers"], adaround["median_after_db"]) == (1, 15.0)


def test_an_unknown_correction_is_refused_with_the_known_ones():
    with pytest.raises(UsageError, match=r"no correction 'smooth'.*equalize, ranges, bias, adaround"):
        StaticQuantizer(runner_factory=fp32_runner, corrections=("bias", "smooth"))
    with pytest.raises(UsageError, match="no correction 'auto'"):
        StaticQuantizer(runner_factory=fp32_runner, corrections=("bias", "auto"))


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("auto", ("auto",)),
        ("none", ()),
        ("bias", ("bias",)),
        ("adaround, equalize", ("equalize", "adaround")),
    ],
)
def test_names_from_the_command_line(text, names):
    assert parse_corrections(text) == names


@pytest.mark.parametrize("text", ["", " , ", "bias,none", "auto,bias", "gptq"])
def test_what_names_no_correction_is_refused(text):
    with pytest.raises(UsageError, match="equalize, ranges, bias, adaround, or none"):
        parse_corrections(text)


def numbered(sizes):
    first = 0
    for size in sizes:
        yield np.arange(first, first + size, dtype=np.uint8).reshape(-1, 1, 1, 1)
        first += size


@pytest.mark.parametrize(
    ("share", "at_most", "multiple", "expected"),
    [(1.0, 100, 1, 50), (0.5, 100, 1, 25), (1.0, 12, 1, 12), (1.0, 100, 8, 48), (0.02, 100, 1, 8)],
)
def test_images_are_taken_evenly(share, at_most, multiple, expected):
    taken = take_images(lambda: numbered([20, 1, 29]), share, at_most, multiple).ravel().astype(int)
    assert len(taken) == expected
    gaps = np.diff(taken)
    assert gaps.min() >= 1
    assert gaps.max() - gaps.min() <= max(2, 50 // expected)
    assert taken[-1] >= 50 - 2 * gaps.max()


def test_no_torch_is_needed():
    code = "import sys, calibration.quantizer; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
