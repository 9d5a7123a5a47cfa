import io
import re
import sys
from dataclasses import asdict, replace
from html.parser import HTMLParser

import numpy as np
import pytest
from rich.console import Console

from apps.report import LatencyRow, print_agreement, print_validation, render_report, verdict
from apps.report.wording import agreement_verdict, p_value, percent, points, short, sqnr
from pipeline.artifacts import CalibrationTable, Fingerprint, PreprocessSpec, Sample, StageRecord, TensorRange
from pipeline.errors import EdgefoldError, UnsupportedError
from pipeline.manifest import CalibrationSummary, EngineRecord, FileRecord, Manifest, ModelSource
from pipeline.passes.graph_pass import PassRecord
from pipeline.statistics import wilson_interval
from pipeline.validation import EnsembleMember, Judge, judge_chain, judge_ensemble
from pipeline.validation_agreement import Agreement, AgreementResult
from pipeline.validation_crops import View
from pipeline.validation_result import AssumedPart, Flip, ValidationResult

SHA = "ab" * 32
SPEC = PreprocessSpec(input_hw=(4, 4), resize="none")
LABELS = ("ant", "<script>bee</script>", "cost $x_{ & 日本")
VOID = {"meta", "link", "img", "br"}


class Images:
    name, sha256, class_names = "photographs", SHA, LABELS
    skipped = (("broken.png", "truncated"),)

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __iter__(self):
        for i in range(self.n):
            yield Sample(np.full((4, 4, 3), i % 256, np.uint8), i % 3, f"img{i}.png")


def measured(lost=3, gained=1, n=600, **options) -> ValidationResult:
    truth = np.arange(n) % 3
    before, after = truth.copy(), truth.copy()
    after[:lost] = (truth[:lost] + 1) % 3
    before[n - gained :] = (truth[n - gained :] + 2) % 3

    def judge(name, part, answers, sure):
        logits = np.eye(3, dtype=np.float32)[answers] * sure
        return Judge(name, part, lambda samples, _: logits[[int(s.key[3:-4]) for s in samples]])

    chain = [
        judge("PyTorch fp32", "reference", before, 4),
        judge("OpenVINO fp32, folded", "export", before, 4),
        judge("OpenVINO int8", "INT8", after, 3),
    ]
    return judge_chain(chain, Images(n), spec=SPEC, color="RGB", labels=LABELS, batch_size=100, **options)


def bundle_manifest() -> Manifest:
    passes = [
        PassRecord("batch_norm", 62, (), 0.3, 2.1e-6, 118.2),
        PassRecord("pointwise", 0, (("Conv /a/b", "its output has <2> consumers"),), 0.1, None, None),
    ]
    graph = {"n_parameters": 1234567, "parameter_bytes": 5, "macs": 7654321, "inputs": [], "outputs": []}
    fold = {
        "passes": [asdict(record) for record in passes],
        "before": {"op_counts": {"Conv": 62, "BatchNormalization": 62}, "n_nodes": 124, **graph},
        "after": {"op_counts": {"Conv": 62, "Cast": 1}, "n_nodes": 63, **graph},
    }
    return Manifest(
        name="my model",
        created_utc="2026-11-23T10:00:00Z",
        edgefold_version="0.1.0",
        tools={"onnx": "1.21.0"},
        target="cpu",
        precision="int8",
        model=ModelSource("inception_v3", "weights.safetensors", SHA, 3),
        inputs=(),
        outputs=(),
        preprocess=SPEC,
        preprocess_folded=True,
        input_color="BGR",
        labels=LABELS,
        calibration=CalibrationSummary("entropy", 128, SHA, SHA, SHA, "train"),
        accuracy=None,
        stages=(
            StageRecord("fold", (SHA,), (SHA,), 1.5, fold),
            StageRecord("engine", (), (), 0.5, {"ok": 1}),
        ),
        engine=EngineRecord("openvino", "model.int8.onnx", Fingerprint("openvino", "2026.4", "x86")),
        files={"model.onnx": FileRecord(1000, SHA)},
    )


def table() -> CalibrationTable:
    ranges = {f"t{i}": TensorRange(-float(i), 2.0**i) for i in range(9)}
    return CalibrationTable(ranges, "entropy", 128, SHA, SHA, SHA, SHA)


class Page(HTMLParser):
    """Text, addresses and balance of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.images: list[dict[str, str]] = []
        self.text = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        assert tag not in ("script", "iframe", "object"), tag
        self.addresses += [attributes[key] for key in ("src", "href", "xlink:href") if key in attributes]
        if "id" in attributes:
            self.ids.append(attributes["id"])
        if tag == "img":
            self.images.append(attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


@pytest.fixture(scope="module")
def full_page(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    render_report(
        path,
        validation=measured(
            assumed=[AssumedPart("preprocessing", "same by construction")], notes=["by index"]
        ),
        manifest=bundle_manifest(),
        max_drop_points=0.5,
        calibration=table(),
        latency=[
            LatencyRow("OpenVINO", "fp32", 1, 4.0, 5.0, 6.0, 250.0),
            LatencyRow("OpenVINO", "int8", 1, 1.0, 1.2, 1.5, 1000.0),
        ],
        commands=["edgefold build inception_v3 --out <dir>"],
    )
    return path.read_text()


def test_the_page_needs_nothing_else(full_page):
    assert "http:" not in full_page
    assert "https:" not in full_page
    assert "@import" not in full_page
    assert "url(" not in full_page.replace("url(#", "")
    page = Page(full_page)
    assert all(address.startswith(("data:", "#")) for address in page.addresses)
    inner = {address[1:] for address in page.addresses if address.startswith("#")}
    inner |= set(re.findall(r"url\(#([^)]*)\)", full_page))
    assert inner <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))


def test_the_page_says_what_was_measured(full_page):
    text = " ".join(Page(full_page).text.split())
    for expected in (
        "Within the budget of 0.5 points, but on too few images to be sure",
        "99.83%",  # before: 599 of 600
        "99.50%",  # after: 597 of 600
        "+0.33",
        "same by construction",
        "by index",
        "1 image skipped",
        "3 lost, 1 gained",
        "BatchNormalization",
        "its output has <2> consumers",
        "entropy from 128 images of train",
        "4.00×",
        "1.23 M",
        "edgefold build inception_v3 --out <dir>",
        SHA,
    ):
        assert expected in text, expected


def test_names_from_outside_are_text_not_markup(full_page):
    # Page refuses any script element; the names must nevertheless be there, in tables and in plots.
    page = Page(full_page)
    assert page.text.count("<script>bee</script>") >= 2
    assert "cost $x_{ & 日本" in page.text
    assert any("<script>bee</script>" in image["alt"] for image in page.images)


def test_every_picture_has_words(full_page):
    page = Page(full_page)
    assert len(page.images) == 4
    assert page.images[0]["src"].startswith("data:image/jpeg;base64,/9j/")
    assert all("taken for" in image["alt"] for image in page.images)
    figures = re.findall(r'<figure role="img" aria-label="([^"]+)"', full_page)
    assert len(figures) == full_page.count("<svg") == 5
    for figure, starts in zip(
        figures,
        (
            "Drop of top-1 with 95% intervals: export 0.00 points",
            "Accuracy against confidence: PyTorch fp32: mean confidence 96.47%, right 99.83%, expected",
            "Accuracy of each class before and after: ant ",
            "Changes of confusions, truth against answer: ",
            "Calibrated range of each of 9 activations",
        ),
        strict=True,
    ):
        assert figure.startswith(starts)


def test_plots_take_the_colours_of_the_page(full_page):
    plots = re.findall(r"<svg.*?</svg>", full_page, re.DOTALL)
    for plot in plots:
        assert re.findall(r"(?:fill|stroke): #[0-9a-f]{6}", plot) == []
        assert "var(--ink)" in plot
        assert "DejaVu" not in plot
    assert "prefers-color-scheme: dark" in full_page
    assert "@media print" in full_page


def test_the_same_result_gives_the_same_bytes(tmp_path):
    result = measured()
    for name in ("a", "b"):
        render_report(tmp_path / name, validation=result)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_what_is_not_given_has_no_section(tmp_path):
    render_report(tmp_path / "r.html", validation=measured(lost=0, gained=0))
    html = (tmp_path / "r.html").read_text()
    page = Page(html)
    for name in ("folding", "calibration", "latency", "flips", "confusion"):
        assert name not in page.ids
    assert {"drop", "classes", "provenance"} <= set(page.ids)


def test_an_engine_that_was_not_validated_says_so(tmp_path):
    render_report(tmp_path / "r.html", validation=None, manifest=bundle_manifest())
    page = Page((tmp_path / "r.html").read_text())
    assert "Accuracy not measured" in page.text
    assert "folding" in page.ids
    assert "drop" not in page.ids


def test_many_classes_are_shown_by_how_much_they_changed(tmp_path):
    result = measured()
    many = tuple(
        replace(
            result.classes[0],
            index=i,
            label=f"class {i}",
            after_correct=180 - i,
            after_accuracy=0.9 - i / 200,
        )
        for i in range(60)
    )
    render_report(tmp_path / "r.html", validation=replace(result, classes=many))
    html = (tmp_path / "r.html").read_text()
    plot = re.search(r'aria-label="Accuracy of each class[^"]*"', html)[0]
    assert "class 59 " in plot
    assert "class 43 " not in plot
    assert "The 16 classes that changed most, of 60" in html


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(
        EdgefoldError, match=r"report\.html'?: No space left on device; give another --report"
    ):
        render_report(path, validation=measured())
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]
    with pytest.raises(EdgefoldError, match="No such file or directory"):
        render_report(tmp_path / "nowhere" / "r.html", validation=measured())


def test_without_matplotlib_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UnsupportedError, match=r"edgefold\[report\]"):
        render_report(tmp_path / "r.html", validation=measured())
    assert list(tmp_path.iterdir()) == []


class TestVerdict:
    def test_a_loss_that_chance_does_not_explain(self):
        said = verdict(measured(lost=60, gained=2))
        assert said.level == "bad"
        assert said.headline == "OpenVINO int8 costs accuracy: 9.67 points of top-1"
        assert "60 lost, 2 gained, a drop of 9.67 points" in said.sentences[0]
        assert "Chance alone hardly makes such a difference (McNemar p = < 0.0001)" not in said.sentences[1]
        assert "Chance alone hardly makes such a difference (McNemar p < 0.0001)" in said.sentences[1]

    def test_no_loss_on_enough_images(self):
        said = verdict(measured(lost=2, gained=2, n=3000))
        assert (said.level, said.headline) == ("good", "OpenVINO int8 keeps the accuracy")
        assert "no change in top-1" in said.sentences[0]

    def test_no_loss_shown_on_few_images(self):
        said = verdict(measured(lost=1, gained=1, n=90))
        assert said.level == "unsure"
        assert "90 images cannot rule out" in said.headline

    def test_a_gain(self):
        said = verdict(measured(lost=0, gained=30))
        assert said.level == "good"
        assert "a gain of 5.00 points" in said.sentences[0]

    def test_the_budget_decides_where_there_is_one(self):
        assert verdict(measured(lost=60, gained=2), 5).level == "bad"
        good = verdict(measured(lost=60, gained=2), 15)
        assert (good.level, good.sentences[-1]) == ("good", "The whole interval lies within the budget.")
        unsure = verdict(measured(lost=1, gained=1), 0.1)
        assert unsure.level == "unsure"
        assert "images are needed to show that an engine without a drop is within it" in unsure.sentences[-1]
        close = verdict(measured(lost=60, gained=2), 10)  # 9.67, and up to 12.3
        assert close.level == "unsure"
        assert close.sentences[-1].startswith("The interval reaches past the budget of 10; about ")


def test_numbers_as_text():
    assert [points(v) for v in (0.25, -0.1, 0.001, -0.001)] == ["+0.25", "−0.10", "0.00", "0.00"]
    assert percent(0.94155) == "94.16%"
    assert (sqnr(None), sqnr(18.26)) == ("identical", "18.3 dB")
    assert [short(n) for n in (999, 1500, 29197568, 13.2e9)] == ["999", "1.5 k", "29.2 M", "13.2 G"]
    assert (p_value(0.0321), p_value(1.0), p_value(1e-9)) == ("= 0.032", "= 1", "< 0.0001")


def printed(width: int, **options) -> str:
    stream = io.StringIO()
    result = measured(lost=9, assumed=[AssumedPart("preprocessing", "same by construction")])
    print_validation(result, Console(file=stream, width=width, highlight=False), **options)
    return stream.getvalue()


def test_the_terminal_tables_fit_80_columns_and_keep_every_number():
    text = printed(80, max_drop_points=0.5)
    assert max(map(len, text.splitlines())) <= 80
    for expected in (
        "export",
        "INT8",
        "total",
        "+1.33",
        "9/1",
        "98.33%",
        "Past the budget",
        "1 image skipped",
        "3.37%",  # ECE of the fp32 stages
        "Confusions that changed most: ",
        "3 of 3 that lost; none of 3 changed by",
    ):
        assert expected in text, expected
    assert "…" not in text


def unlabelled(same=97, n=100) -> AgreementResult:
    step = Agreement(
        "INT8", "OpenVINO fp32, folded", "OpenVINO int8", same, same / n, wilson_interval(same, n), 31.0, 0.5
    )
    export = replace(step, part="export", before="PyTorch fp32", after="OpenVINO fp32, folded", sqnr_db=None)
    flips = tuple(
        Flip(f"<b>{i}</b>.png", None, "ant", "bee", 0.6, 0.5, "changed", b"") for i in range(n - same)
    )
    return AgreementResult(
        "frames", SHA, n, 0, (), ("PyTorch fp32", "OpenVINO fp32, folded", "OpenVINO int8"), (export, step),
        replace(step, part="total", before="PyTorch fp32"), (), flips, ("a note",), 1.0, 1,
    )  # fmt: skip


class TestAgreement:
    def test_the_page_claims_no_accuracy(self, tmp_path):
        render_report(
            tmp_path / "r.html", validation=None, agreement=unlabelled(), manifest=bundle_manifest()
        )
        html = (tmp_path / "r.html").read_text()
        page = Page(html)
        assert "97.00% of the answers" in page.text
        assert "The images carry no labels: which answer is right is not known." in page.text
        assert "top-1 can have fallen by 3.00 points at most" in page.text
        assert "<b>2</b>.png" in page.text
        assert "a note" in page.text
        assert "Top-1 after" not in page.text
        assert "Accuracy not measured" not in page.text
        assert {"agreement", "flips", "provenance"} <= set(page.ids)
        assert "drop" not in page.ids

    def test_the_limit_decides_where_there_is_one(self):
        assert agreement_verdict(unlabelled(97), 98).level == "bad"
        assert agreement_verdict(unlabelled(97), 95).level == "unsure"  # 91.5 to 99.0
        assert "too few images to be sure" in agreement_verdict(unlabelled(97), 95).headline
        assert agreement_verdict(unlabelled(97), 90).level == "good"
        assert agreement_verdict(unlabelled(97)).headline == "OpenVINO int8 keeps 97.00% of the answers"

    def test_the_terminal_fits_80_columns(self):
        stream = io.StringIO()
        print_agreement(
            unlabelled(), Console(file=stream, width=80, highlight=False), min_agreement_percent=90
        )
        text = stream.getvalue()
        assert max(map(len, text.splitlines())) <= 80
        for expected in ("export", "INT8", "total", "97.00%", "identical", "31.0 dB", "note: a note"):
            assert expected in text, expected


def ensemble() -> ValidationResult:
    n = 60
    rng = np.random.default_rng(3)

    def judge(name, part):
        logits = rng.normal(size=(n, 3)) + 2 * np.eye(3)[np.arange(n) % 3]
        return Judge(name, part, lambda samples, _: logits[[int(s.key[3:-4]) for s in samples]], identity=SHA)

    members = [
        EnsembleMember(
            name, View(SPEC, "RGB"), judge(f"{name} fp32", "reference"), judge(f"{name} int8", "INT8")
        )
        for name in ("<i>first</i>", "second")
    ]
    return judge_ensemble(members, Images(n), precision="int8", labels=LABELS)


def test_an_ensemble_is_shown_with_each_of_its_networks(tmp_path):
    result = ensemble()
    render_report(tmp_path / "r.html", validation=result, title="both")
    page = Page((tmp_path / "r.html").read_text())
    assert "members" in page.ids
    for member in result.members:
        assert page.text.count(member.name) >= 2  # table and provenance; and the plot
        assert percent(member.after.top1) in page.text
        assert points(-member.to_ensemble.drop_points) in page.text
    assert "first" in page.text
    stream = io.StringIO()
    print_validation(result, Console(file=stream, width=80, highlight=False))
    assert max(map(len, stream.getvalue().splitlines())) <= 80
    assert "better by" in stream.getvalue()
    assert "<i>first</i>" in stream.getvalue()


def test_markup_in_names_is_not_interpreted():
    stream = io.StringIO()
    result = measured(notes=["[bold]not bold[/]"])
    print_validation(result, Console(file=stream, width=100))
    assert "[bold]not bold[/]" in stream.getvalue()
