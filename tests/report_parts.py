"""Results of validation as a report shows them, and a reader of its page."""

import io
from dataclasses import asdict, replace
from html.parser import HTMLParser

import numpy as np
from rich.console import Console

from apps.report import print_validation
from pipeline.artifacts import CalibrationTable, Fingerprint, PreprocessSpec, Sample, StageRecord, TensorRange
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


def printed(width: int, **options) -> str:
    stream = io.StringIO()
    result = measured(lost=9, assumed=[AssumedPart("preprocessing", "same by construction")])
    print_validation(result, Console(file=stream, width=width, highlight=False), **options)
    return stream.getvalue()


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
