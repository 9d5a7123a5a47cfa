"""The driver believes no pass: every kind of wrong rewrite is caught, and named."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx_text import batch_norm, onnx_model, positive, reference, weight

from pipeline.errors import PassError
from pipeline.passes import DEFAULT_PASSES, GraphPass, RewriteReport, Tolerance, run_passes
from pipeline.passes.batch_norm import fold_batch_norm
from pipeline.passes.graph_pass import Feeds
from pipeline.passes.verify import check_numerics, execute

_WEIGHTS = {"w": weight(6, 4, 3, 3), "b": weight(6), **batch_norm(6)}


def _model() -> ir.Model:
    return onnx_model(
        """agraph (float[N,4,7,7] x) => (float[N,6,5,5] z) {
            c = Conv (x, w, b) y = BatchNormalization <epsilon = 0.001> (c, gamma, beta, mean, var) z = Relu (y) }""",
        **_WEIGHTS,
    )


def _scaled_weight(model: ir.Model) -> RewriteReport:
    value = model.graph.initializers["w"]
    value.const_value = ir.tensor(value.const_value.numpy() * np.float32(1.001))
    return RewriteReport(1)


def _forgotten_epsilon(model: ir.Model) -> RewriteReport:
    for node in model.graph:
        if node.op_type == "BatchNormalization":
            node.attributes["epsilon"] = ir.AttrFloat32("epsilon", 0.0)
    return fold_batch_norm(model)


def _nan(model: ir.Model) -> RewriteReport:
    model.graph.initializers["b"].const_value = ir.tensor(np.full(6, np.nan, np.float32))
    return RewriteReport(1)


def _renamed_output(model: ir.Model) -> RewriteReport:
    model.graph.outputs[0].name = "other"
    return RewriteReport(1)


def _fixed_batch(model: ir.Model) -> RewriteReport:
    model.graph.inputs[0].shape = ir.Shape([1, 4, 7, 7])
    return RewriteReport(1)


def _unknown_op(model: ir.Model) -> RewriteReport:
    model.graph[-1].op_type = "Rleu"
    return RewriteReport(1)


def _wrong_shape(model: ir.Model) -> RewriteReport:
    value = model.graph.initializers["w"]
    value.const_value = ir.tensor(np.zeros((6, 4, 5, 5), np.float32))
    value.shape = ir.Shape([6, 4, 5, 5])
    return RewriteReport(1)


def _raises(model: ir.Model) -> RewriteReport:
    raise KeyError("w")


@pytest.mark.parametrize(
    ("rewrite", "step"),
    [
        (_scaled_weight, "numerics"),
        (_forgotten_epsilon, "numerics"),
        (_nan, "numerics"),
        (_renamed_output, "interface"),
        (_fixed_batch, "interface"),
        (_unknown_op, "check"),
        (_wrong_shape, "shapes"),
        (_raises, "rewrite"),
    ],
)
def test_a_wrong_rewrite_is_caught(rewrite: object, step: str) -> None:
    model = _model()
    with pytest.raises(PassError, match="bad") as caught:
        run_passes(model, (GraphPass("bad", rewrite),))
    assert (caught.value.pass_name, caught.value.step) == ("bad", step)
    np.testing.assert_array_equal(reference(model)[0], reference(_model())[0])  # the caller's model is intact


def test_the_pass_at_fault_is_named_among_good_ones() -> None:
    with pytest.raises(PassError) as caught:
        run_passes(_model(), (*DEFAULT_PASSES[:3], GraphPass("bad", _scaled_weight), *DEFAULT_PASSES[3:]))
    assert caught.value.pass_name == "bad"


def test_the_tolerance_is_the_passes_own() -> None:
    lenient = GraphPass("lenient", _scaled_weight, Tolerance(relative=0.01, sqnr_db=40.0))
    _, (record,) = run_passes(_model(), (lenient,))
    assert record.max_abs_error is not None
    assert record.sqnr_db is not None
    assert 50.0 < record.sqnr_db < 70.0  # a weight 0.1% too large: about 60 dB


def test_a_small_error_everywhere_and_a_large_one_somewhere_are_both_caught() -> None:
    """The largest error misses the former, the SQNR the latter."""
    reference_output = np.ones((1, 10_000), np.float32)
    everywhere = reference_output * np.float32(1 + 9e-4)
    somewhere = reference_output.copy()
    somewhere[0, 0] += 0.02
    graph_pass = GraphPass("p", _raises)
    for output in (everywhere, somewhere):
        with pytest.raises(PassError, match="moved by"):
            check_numerics(graph_pass, {"z": reference_output}, {"z": output})


def test_what_a_pass_changes_without_reporting_it_is_dropped() -> None:
    def silent(model: ir.Model) -> RewriteReport:
        _scaled_weight(model)
        return RewriteReport(0)

    result, (record,) = run_passes(_model(), (GraphPass("silent", silent),))
    assert (record.max_abs_error, record.sqnr_db) == (None, None)
    np.testing.assert_array_equal(reference(result)[0], reference(_model())[0])


def test_executions_are_counted_out() -> None:
    """One for the model as it came, one after each pass that rewrote something; none for the others."""
    runs: list[int] = []

    def counting(model: ir.Model, feeds: Feeds) -> Feeds:
        runs.append(len(list(model.graph)))
        return execute(model, feeds)

    model = onnx_model(
        """agraph (float[N,4,7,7] x) => (float[N,6,5,5] z) {
            c = Conv (x, w, b) y = BatchNormalization (c, gamma, beta, mean, var) z = Mul (y, s) }""",
        s=positive(6, 1, 1),
        **_WEIGHTS,
    )
    _, records = run_passes(model, DEFAULT_PASSES, run=counting)
    assert runs == [3, 2, 1]
    assert {record.name: record.n_rewrites for record in records} == {
        "tidy": 0,
        "pad_into_conv": 0,
        "batch_norm_into_linear": 1,
        "affine_into_linear": 1,
        "residual_scale": 0,
        "affine_before_linear": 0,
        "consecutive_pointwise": 0,
    }


def test_an_unchanged_model_is_not_executed() -> None:
    def never(model: ir.Model, feeds: Feeds) -> Feeds:
        raise AssertionError("nothing was rewritten")

    model = onnx_model("agraph (float[N,4,7,7] x) => (float[N,6,5,5] z) { z = Conv (x, w) }", w=_WEIGHTS["w"])
    run_passes(model, DEFAULT_PASSES, run=never)


def test_progress_names_the_passes() -> None:
    told: list[tuple[str, int, int | None]] = []
    run_passes(_model(), DEFAULT_PASSES[1:3], progress=lambda *step: told.append(step))
    assert told == [("fold: pad_into_conv", 0, 2), ("fold: batch_norm_into_linear", 1, 2), ("fold", 2, 2)]


def test_a_model_that_amplifies_rounding_is_judged_by_its_own() -> None:
    """The same change fails on a well-behaved model, and passes where the model's own rounding is as large."""
    before = {"z": np.linspace(-1.0, 1.0, 1000, dtype=np.float32)}
    after = {"z": before["z"] + np.float32(5e-4)}  # 61 dB
    graph_pass = GraphPass("p", _raises)
    for noise, fails in ((1e-6, True), (4e-4, False)):
        own = {"z": before["z"] + np.float32(noise)}
        if fails:
            with pytest.raises(PassError, match="moved by"):
                check_numerics(graph_pass, before, after, lambda own=own: own)
        else:
            assert check_numerics(graph_pass, before, after, lambda own=own: own)[1] == pytest.approx(
                61.3, abs=0.1
            )
    chaotic = {"z": before["z"] + np.float32(0.5)}
    with pytest.raises(PassError, match="limit 40 dB"):
        check_numerics(graph_pass, before, {"z": before["z"] + np.float32(0.02)}, lambda: chaotic)


def test_an_ill_conditioned_model_folds() -> None:
    """Two branches of about a thousand that cancel to about one: rounding alone is 60 dB."""
    w = 1e3 * weight(6, 4, 3, 3)
    model = onnx_model(
        """agraph (float[1,4,7,7] x) => (float[1,6,5,5] z) {
            c = Conv (x, w) y = BatchNormalization (c, gamma, beta, mean, var)
            d = Conv (x, v) k = BatchNormalization (d, gamma, beta, mean, var) z = Sub (y, k) }""",
        w=w,
        v=w * (1 + 1e-3 * weight(6, 4, 3, 3, seed=5)),
        **batch_norm(6),
    )
    _, records = run_passes(model, DEFAULT_PASSES)
    record = next(record for record in records if record.n_rewrites)
    assert record.sqnr_db is not None
    assert record.sqnr_db < 70.0, "otherwise this model tests nothing"
