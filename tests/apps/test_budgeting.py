"""`edgefold build --meet-budget` on real engines, with a network that int8 breaks in one layer."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnx_text import onnx_model
from tinted import FACTORY, write_tinted_images

from apps import budgeting
from apps.budget_images import BudgetImages
from apps.building import build
from apps.publishing import BuildRequest, print_build
from calibration.budget import Budget
from pipeline.bundle import open_bundle
from pipeline.errors import AccuracyGateError, DataError, UsageError

FRAGILE = FACTORY.replace("model[5].bias.zero_()", "model[5].bias.zero_(); model[1].bias[2] = 1e4")
"""A channel of 10,000 beside channels of 10: their int8 step is 39, and the classes are under it."""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEFOLD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(budgeting, "_TIMING_SECONDS", 0.01)
    monkeypatch.setattr(budgeting, "_CONFIRM_SECONDS", 0.05)
    monkeypatch.setattr(budgeting, "_CONFIRM_ROUNDS", 1)


@pytest.fixture
def _known_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers of microseconds are no measurement: a layer in float costs a millisecond."""
    monkeypatch.setattr(budgeting._Plans, "time", lambda _, plans: [1.0 + len(plan) for plan in plans])


def quiet(what: str, done: int, total: int | None) -> None:
    """A progress callback that draws nothing."""


GRAPH = """g (float[N,3,32,32] x) => (float[N,2] logits)
    { c = Conv<strides=[2,2]>(x, w, b) r = Relu(c) p = GlobalAveragePool(r) f = Flatten(p) logits = Gemm(f, h) }"""


@pytest.fixture
def fragile(tmp_path: Path) -> BuildRequest:
    """The same network as an ONNX file: no export in every test."""
    w, b, h = np.zeros((8, 3, 3, 3)), np.zeros(8), np.zeros((8, 2))
    w[0, 0], w[1, 2], b[2], h[0, 0], h[1, 1] = 1.0, 1.0, 1e4, 1.0, 1.0
    (tmp_path / "fragile.onnx").write_bytes(
        ir.serde.serialize_model(onnx_model(GRAPH, w=w, b=b, h=h)).SerializeToString()
    )
    images = str(write_tinted_images(tmp_path / "images"))
    return BuildRequest(
        model=str(tmp_path / "fragile.onnx"),
        out=tmp_path / "bundle",
        calib=images,
        eval_data=images,
        input_size=32,
        max_drop_points=5.0,
        meet_budget=True,
    )


def changed(request: BuildRequest, **changes: object) -> BuildRequest:
    return dataclasses.replace(request, **changes)  # type: ignore[arg-type]


def test_the_layer_that_breaks_stays_in_float_and_the_budget_is_met(
    fragile: BuildRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "fragile.py").write_text(FRAGILE)
    fragile = changed(fragile, model=f"{tmp_path / 'fragile.py'}:classifier")
    outcome = build(fragile, quiet)
    manifest = open_bundle(fragile.out).manifest
    assert manifest.accuracy is not None
    assert manifest.accuracy.drop_points == 0.0
    assert [stage.stage for stage in manifest.stages] == [
        "export",
        "fold",
        "correct",
        "quantize",
        "search",
        "engine",
    ]
    search = manifest.stages[4].checks
    # Which of the two plans is the faster one is up to the machine; the other layer alone is none.
    assert search["kept_in_float"][0]["layer"] == "logits"
    assert "of the logits' noise" in search["kept_in_float"][0]["reason"]
    assert search["budget"] == "a drop of at most 5 points"
    assert (search["lost"], search["gained"], search["n_images"]) == (0, 0, 20)
    assert search["n_quantized_layers"] == 2 - len(search["kept_in_float"])
    assert {entry["layer"] for entry in search["sensitivity"]} == {
        "logits",
        search["sensitivity"][1]["layer"],
    }
    assert set(search["confirmed_ms"]) == {"int8", "plan", "fp32"}
    assert manifest.files["model.int8.onnx"].sha256 in manifest.stages[4].outputs
    assert list((fragile.out.parent / "cache" / "search").glob("search-*.json")) == [], (
        "a finished search keeps nothing"
    )
    page = (fragile.out / "report.html").read_text()
    assert 'id="precision"' in page
    assert "Which layers cost most" in page
    print_build(outcome)
    assert "of 2 layers in float" in capsys.readouterr().err.replace("\n", " ")
    assert json.loads(outcome.to_json())["search"]["n_evaluations"] == search["n_evaluations"]


@pytest.mark.usefixtures("_known_latency")
def test_without_labels_the_answers_are_kept(fragile: BuildRequest, tmp_path: Path) -> None:
    shutil.move(tmp_path / "images" / "a_red" / "0.png", tmp_path / "images" / "0.png")
    flat = tmp_path / "flat"
    flat.mkdir()
    for file in (tmp_path / "images").rglob("*.png"):
        shutil.copy(file, flat / f"{file.parent.name}-{file.name}")
    data = str(flat)
    bare = changed(
        fragile,
        max_drop_points=None,
        min_agreement_percent=95.0,
        calib=data,
        eval_data=data,
        meet_budget=False,
    )
    with pytest.raises(AccuracyGateError, match="--min-agreement"):
        build(bare, quiet)
    outcome = build(changed(bare, meet_budget=True), quiet)
    assert outcome.agreement is not None
    assert outcome.agreement.total.agreement == 1.0
    assert outcome.bundle.manifest.accuracy is None
    assert outcome.searched is not None
    assert outcome.searched.result.plan == {"logits"}


@pytest.mark.usefixtures("_known_latency")
def test_a_search_that_was_broken_off_goes_on(
    fragile: BuildRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    judged = []
    real = budgeting._Plans.judge

    def counting(self, plan):  # type: ignore[no-untyped-def]
        judged.append(plan)
        return real(self, plan)

    monkeypatch.setattr(budgeting._Plans, "judge", counting)
    time = budgeting._Plans.time
    monkeypatch.setattr(budgeting._Plans, "time", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        build(fragile, quiet)
    before = list(judged)
    assert before
    monkeypatch.setattr(budgeting._Plans, "time", time)
    outcome = build(fragile, quiet)
    assert judged == before, "every judgement was kept"
    assert outcome.searched is not None
    assert outcome.searched.result.plan == {"logits"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_drop_points": None}, "--meet-budget needs a budget"),
        ({"min_agreement_percent": 99.0}, "two budgets"),
        ({"precision": "fp32"}, "--precision int8"),
        ({"target": "jetson-agx-orin"}, "--target cpu"),
        (
            {"max_drop_points": None, "min_agreement_percent": 99.0, "eval_data": None},
            "--min-agreement needs images",
        ),
    ],
)
def test_requests_that_contradict_themselves(
    fragile: BuildRequest, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        build(changed(fragile, **changes), quiet)


def test_data_of_one_class_and_too_few_images_are_refused(fragile: BuildRequest, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"20 images cannot judge a drop of at most 1 points.*At least 100"):
        build(changed(fragile, max_drop_points=1.0), quiet)
    only_red = tmp_path / "only_red"
    shutil.copytree(tmp_path / "images" / "a_red", only_red / "a_red")
    (tmp_path / "labels.txt").write_text("a_red\nb_blue\n")
    one_class = changed(
        fragile, eval_data=str(only_red), labels=tmp_path / "labels.txt", max_drop_points=20.0
    )
    with pytest.raises(DataError, match="all 10 images of only_red are of one class"):
        build(one_class, quiet)


def test_a_budget_that_fp32_misses_is_refused_before_any_search() -> None:
    images = BudgetImages.__new__(BudgetImages)
    images._budget, images.n = Budget.of_drop(5.0), 10
    images._answers = images._truth = np.zeros(10, np.int64)
    with pytest.raises(AccuracyGateError, match=r"in fp32 already .* loses 3 and gains 0 of the 10"):
        images._check_fp32(np.array([1, 1, 1, 0, 0, 0, 0, 0, 0, 0]))
