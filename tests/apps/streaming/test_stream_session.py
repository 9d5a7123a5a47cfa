"""`run_stream` on real parts: a bundle on disk, OpenVINO or ONNX Runtime, real files."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image
from waiting import PATIENCE_S, SLACK_S, eventually

from apps.streaming import session
from apps.streaming.config import RecordConfig, SourceConfig, StreamConfig
from apps.streaming.session import StreamSession, StreamSummary
from pipeline.errors import DataError, IntegrityError, UnsupportedError, UsageError

LABELS = ("blue", "green", "red")
RGB = {"blue": (20, 30, 220), "green": (10, 200, 40), "red": (230, 40, 10)}


@pytest.fixture
def run_stream(open_feed: Callable[..., Any]) -> Callable[..., StreamSummary]:
    """One source through `run_stream`, captured in a thread."""

    def run(
        bundle: Path,
        source: str,
        *,
        record: Path | None = None,
        policy: Any = None,
        fps: float | None = None,
        cache_dir: Path | None = None,
        **options: Any,
    ) -> StreamSummary:
        recorded = None if record is None else RecordConfig(record)
        asked = SourceConfig(source, policy=policy, fps=fps, record=recorded)
        config = StreamConfig(bundle, (asked,), **{"headless": True, **options})
        return session.run_stream(config, cache_dir=cache_dir, open_feed=open_feed)

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve one-coloured pictures; one blue one lies in the red folder."""
    root = tmp_path_factory.mktemp("colors")
    for name, rgb in RGB.items():
        (root / name).mkdir()
        for index in range(4):
            shown = RGB["blue"] if (name, index) == ("red", 2) else rgb
            Image.new("RGB", (40 + index, 30), shown).save(root / name / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten blue, ten green, ten red frames."""
    path = tmp_path_factory.mktemp("video") / "colors.mp4"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 25.0, (64, 48))
    for rgb in RGB.values():
        for _ in range(10):
            writer.write(np.full((48, 64, 3), rgb[::-1], np.uint8))
    writer.release()
    return path


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
@pytest.mark.parametrize("precision", ["int8", "fp32", None])
def test_a_labelled_folder_through_real_engines(
    bundle: Path, folder: Path, engine: str, precision: str | None, run_stream: Callable[..., StreamSummary]
) -> None:
    if engine == "onnxruntime":
        pytest.importorskip("onnxruntime")
    summary = run_stream(bundle, str(folder), headless=True, engine=engine, precision=precision)
    assert (summary.frames_read, summary.frames_inferred, summary.dropped) == (12, 12, {})
    assert (summary.labelled, summary.correct) == (12, 11)  # the blue picture among the red ones
    assert summary.top1 == 11 / 12
    assert (summary.policy, summary.ended) == ("every", "end of source")
    assert summary.precision == (precision or "int8")
    assert json.loads(json.dumps(summary.to_json()))["top1"] == 11 / 12


def test_a_video_is_classified_logged_and_recorded(
    bundle: Path, video: Path, tmp_path: Path, run_stream: Callable[..., StreamSummary]
) -> None:
    summary = run_stream(
        bundle,
        str(video),
        record=tmp_path / "out.mp4",
        predictions=tmp_path / "out.jsonl",
        headless=True,
        cache_dir=tmp_path / "cache",
    )
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["frame"] for line in lines] == list(range(30))
    assert [line["top"][0]["label"] for line in lines] == ["blue"] * 10 + ["green"] * 10 + ["red"] * 10
    assert summary.recording == str(tmp_path / "out.mp4")
    assert summary.top1 is None
    played = cv2.VideoCapture(str(tmp_path / "out.mp4"))
    assert played.get(cv2.CAP_PROP_FPS) == 25.0
    assert played.get(cv2.CAP_PROP_FRAME_COUNT) == 30
    assert played.get(cv2.CAP_PROP_FRAME_HEIGHT) >= 360  # enlarged, so that the overlay can be read
    assert all(summary.latency[stage].count == 30 for stage in summary.latency)


def test_newest_plays_a_file_at_its_own_rate(
    bundle: Path, video: Path, tmp_path: Path, run_stream: Callable[..., StreamSummary]
) -> None:
    log = tmp_path / "out.jsonl"
    summary = run_stream(
        bundle, str(video), policy="newest", record=tmp_path / "out.mp4", predictions=log, max_seconds=60
    )
    assert summary.ended == "end of source"
    assert 1.1 < summary.seconds < 1.2 + SLACK_S  # 30 frames at 25 a second
    assert summary.frames_read == summary.frames_inferred + sum(summary.dropped.values()) == 30
    times_ns = [json.loads(line)["timestamp_ns"] for line in log.read_text().splitlines()]
    played = cv2.VideoCapture(str(tmp_path / "out.mp4"))
    # As long as it was: dropped frames do not speed it up.
    assert abs(played.get(cv2.CAP_PROP_FRAME_COUNT) - 25 * (times_ns[-1] - times_ns[0]) / 1e9 - 1) <= 1


def test_the_live_synthetic_camera_ends_by_its_limits(
    bundle: Path, run_stream: Callable[..., StreamSummary]
) -> None:
    summary = run_stream(bundle, "synthetic:5", headless=True, max_seconds=0.6, fps=20)
    assert (summary.policy, summary.ended) == ("newest", "time limit")
    assert 1 <= summary.frames_inferred <= 20 * summary.seconds + 1  # fewer on a busy machine
    summary = run_stream(bundle, "synthetic:5", headless=True, max_frames=3)
    assert (summary.frames_inferred, summary.ended) == (3, "frame limit")


def test_top1_through_the_stream_is_that_of_validation(
    make_bundle: Callable[..., Path], tmp_path: Path, run_stream: Callable[..., StreamSummary]
) -> None:
    """The same bundle, data set and batch, once through the stream and once without it."""
    import engines
    from pipeline.artifacts import EngineArtifact, EngineOptions
    from pipeline.bundle import open_bundle
    from pipeline.datasets import labelled_batches, open_dataset
    from pipeline.synthetic import CLASS_NAMES

    # Twelve scores that depend on the picture in no simple way, so that some happen to be right.
    graph = """
    <ir_version: 10, opset_import: ["" : 18]>
    sine_head (uint8[batch, 16, 16, 3] input) => (float[batch, 12] logits) {
        pixels = Cast <to = 1> (input)
        flat = Flatten (pixels)
        start = Constant <value = float {0.0}> ()
        stop = Constant <value = float {9216.0}> ()
        step = Constant <value = float {1.0}> ()
        range = Range (start, stop, step)
        shape = Constant <value = int64[2] {768, 12}> ()
        angles = Reshape (range, shape)
        weights = Sin (angles)
        logits = MatMul (flat, weights)
    }
    """
    path = make_bundle(tmp_path / "head", graph, CLASS_NAMES)
    summary = run_stream(path, "synthetic:11:60", headless=True, policy="every")
    assert summary.labelled == 60

    opened = open_bundle(path)
    backend = engines.get_backend("openvino")
    artifact = EngineArtifact(
        opened.file("model.int8.onnx"),
        opened.sha256("model.int8.onnx"),
        opened.sha256("model.int8.onnx"),
        "openvino",
        backend.fingerprint(),
    )
    correct = 0
    with backend.load(artifact, EngineOptions(batch=1)) as runner:
        dataset = open_dataset("synthetic:11:60")
        for samples, pixels in labelled_batches(dataset, opened.manifest.preprocess, "BGR", 1):
            logits = runner.infer({"input": pixels})["logits"]
            correct += int(np.argmax(logits[0])) == samples[0].label
    assert summary.correct == correct
    assert 0 < correct < 60


def test_unusable_requests(
    bundle: Path, folder: Path, tmp_path: Path, run_stream: Callable[..., StreamSummary]
) -> None:
    with pytest.raises(UsageError, match="--max-frames 0"):
        run_stream(bundle, str(folder), max_frames=0)
    with pytest.raises(UsageError, match="--max-seconds -1"):
        run_stream(bundle, str(folder), max_seconds=-1)
    with pytest.raises(UsageError, match="no bundle at"):
        run_stream(tmp_path / "none", str(folder))
    with pytest.raises(UnsupportedError, match="no engine is called"):
        run_stream(bundle, str(folder), engine="abacus", headless=True)


def test_an_altered_bundle_is_refused_before_anything_runs(
    make_bundle: Callable[..., Path], folder: Path, tmp_path: Path, run_stream: Callable[..., StreamSummary]
) -> None:
    path = make_bundle(tmp_path / "altered")
    model = path / "model.int8.onnx"
    data = bytearray(model.read_bytes())
    data[40] ^= 1
    model.write_bytes(data)
    with pytest.raises(IntegrityError):
        run_stream(path, str(folder), headless=True, record=tmp_path / "out.mp4")
    assert not (tmp_path / "out.mp4").exists()


def test_a_class_count_that_is_not_the_labels_is_refused(
    make_bundle: Callable[..., Path], folder: Path, tmp_path: Path, run_stream: Callable[..., StreamSummary]
) -> None:
    path = make_bundle(tmp_path / "four", labels=("blue", "green", "red", "mauve"))
    with pytest.raises(IntegrityError, match="gives 3 scores, its manifest says 4 classes"):
        run_stream(path, str(folder), headless=True)
    path = make_bundle(tmp_path / "two", labels=("blue", "green"), num_classes=3)
    with pytest.raises(IntegrityError, match="names 2 labels for 3 classes"):
        run_stream(path, str(folder), headless=True)


def test_a_bundle_without_labels_streams(
    make_bundle: Callable[..., Path],
    folder: Path,
    video: Path,
    tmp_path: Path,
    run_stream: Callable[..., StreamSummary],
) -> None:
    path = make_bundle(tmp_path / "nameless", labels=(), num_classes=3)
    assert run_stream(path, str(folder), headless=True).top1 == 11 / 12  # names of the folders
    log = tmp_path / "out.jsonl"
    summary = run_stream(path, str(video), headless=True, predictions=log)
    assert json.loads(log.read_text().splitlines()[0])["top"][0]["label"] == "0"
    assert any("names no classes" in note for note in summary.notes)


def test_a_source_without_one_usable_frame_is_an_error(
    bundle: Path, tmp_path: Path, run_stream: Callable[..., StreamSummary]
) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG rubbish")
    with pytest.raises(DataError, match=r"gave no usable frame: 1 read, dropped 1 \(no image\)"):
        run_stream(bundle, str(tmp_path), headless=True)


def test_some_unusable_frames_are_reported_and_the_rest_inferred(
    bundle: Path, tmp_path: Path, run_stream: Callable[..., StreamSummary]
) -> None:
    Image.new("RGB", (30, 30), (9, 9, 250)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"\x89PNG rubbish")
    Image.new("L", (30, 30), 90).save(tmp_path / "c.png")
    summary = run_stream(bundle, str(tmp_path), headless=True)
    assert (summary.frames_read, summary.frames_inferred, summary.dropped) == (3, 2, {"no image": 1})
    assert any("skipped b.png" in note for note in summary.notes)


def test_a_recording_that_cannot_be_kept_fails_the_run(
    bundle: Path,
    video: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    run_stream: Callable[..., StreamSummary],
) -> None:
    from apps.streaming.sinks import Recorder
    from pipeline.errors import EdgefoldError

    monkeypatch.setattr(
        Recorder, "_check_whole", lambda self: (_ for _ in ()).throw(EdgefoldError("not whole"))
    )
    with pytest.raises(EdgefoldError, match="not whole"):
        run_stream(bundle, str(video), headless=True, record=tmp_path / "out.mp4")
    assert list(tmp_path.iterdir()) == []


def test_an_error_keeps_what_was_recorded_before_it(
    bundle: Path,
    video: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    run_stream: Callable[..., StreamSummary],
) -> None:
    from apps.streaming.outputs import SourceOutput
    from pipeline.errors import EngineError

    original = SourceOutput.take

    def fail_at_12(self, answer) -> None:
        if answer.frame.index == 12:
            raise EngineError("the engine broke")
        original(self, answer)

    monkeypatch.setattr(SourceOutput, "take", fail_at_12)
    with pytest.raises(EngineError, match="broke"):
        run_stream(bundle, str(video), headless=True, record=tmp_path / "out.mp4")
    assert cv2.VideoCapture(str(tmp_path / "out.mp4")).get(cv2.CAP_PROP_FRAME_COUNT) == 12


def sources(*uris: str, **options: Any) -> tuple[SourceConfig, ...]:
    return tuple(SourceConfig(uri, name=f"camera {index}", **options) for index, uri in enumerate(uris))


@pytest.mark.parametrize("streams", [None, 2])
def test_several_sources_in_batches_are_each_right(
    make_bundle: Callable[..., Path], bundle: Path, folder: Path, open_feed: Any, streams: int | None
) -> None:
    config = StreamConfig(
        bundle, sources(*[str(folder)] * 3), max_batch=3, batch_wait_ms=50, streams=streams, headless=True
    )
    summary = session.run_stream(config, open_feed=open_feed)
    assert [(one.source, one.frames_inferred, one.top1) for one in summary.sources] == [
        (f"camera {index}", 12, 11 / 12) for index in range(3)
    ]
    assert (summary.frames_inferred, summary.labelled, summary.correct) == (36, 36, 33)
    assert summary.latency["age"].count == 36
    assert summary.mean_batch > 1.5
    assert summary.to_json()["sources"][2]["source"] == "camera 2"


def test_two_sources_of_one_name_are_refused(bundle: Path, folder: Path, open_feed: Any) -> None:
    twice = (SourceConfig(str(folder)), SourceConfig(str(folder)))
    with pytest.raises(UsageError, match="the same URI already"):
        session.run_stream(StreamConfig(bundle, twice, headless=True), open_feed=open_feed)

    def nameless(source: SourceConfig, *arguments: Any) -> Any:
        feed = open_feed(source, *arguments)
        feed.source_id = "rtsp://***@pole"  # two that differ in what is not shown
        return feed

    config = StreamConfig(bundle, sources("synthetic:1:2", "synthetic:2:2"), headless=True)
    with pytest.raises(UsageError, match=r"two sources are called rtsp://\*\*\*@pole"):
        session.run_stream(config, open_feed=nameless)


def test_a_graph_with_a_fixed_batch_takes_no_larger_one(
    make_bundle: Callable[..., Path], folder: Path, open_feed: Any, tmp_path: Path
) -> None:
    fixed = """
    <ir_version: 10, opset_import: ["" : 18]>
    fixed (uint8[1, 16, 16, 3] input) => (float[1, 3] logits) {
        pixels = Cast <to = 1> (input)
        axes = Constant <value = int64[2] {1, 2}> ()
        logits = ReduceMean <keepdims = 0> (pixels, axes)
    }
    """
    path = make_bundle(tmp_path / "fixed", fixed)
    config = StreamConfig(path, sources(str(folder)), max_batch=4, headless=True)
    with pytest.raises(UsageError, match="takes 1 image a request, --batch 4"):
        session.run_stream(config, open_feed=open_feed)


SWAPPED = """
<ir_version: 10, opset_import: ["" : 18]>
inverted (uint8[batch, 16, 16, 3] input) => (float[batch, 3] logits) {
    pixels = Cast <to = 1> (input)
    axes = Constant <value = int64[2] {1, 2}> ()
    means = ReduceMean <keepdims = 0> (pixels, axes)
    scale = Constant <value = float {-0.05}> ()
    logits = Mul (means, scale)
}
"""


class Running:
    """A session in a thread of its own, until it is told to stop."""

    def __init__(self, config: StreamConfig, open_feed: Any) -> None:
        self.session = StreamSession(config, open_feed=open_feed)
        self.summary: StreamSummary | None = None
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        self.summary = self.session.run()

    def __enter__(self) -> Running:
        self._thread.start()
        return self

    def wait_for(self, condition: Callable[[], bool]) -> None:
        eventually(lambda: condition() or not self._thread.is_alive())
        assert self._thread.is_alive()

    def n_lines(self, log: Path) -> int:
        return log.read_text().count("\n") if log.exists() else 0

    def __exit__(self, *_: object) -> None:
        self.session._runtime.request_stop("test")
        self._thread.join(PATIENCE_S)


def test_a_link_to_another_bundle_is_reloaded_and_a_bad_one_is_refused(
    make_bundle: Callable[..., Path], open_feed: Any, tmp_path: Path
) -> None:
    first = make_bundle(tmp_path / "first")
    second = make_bundle(tmp_path / "second", SWAPPED, ("not blue", "not green", "not red"))
    bad = tmp_path / "bad"
    shutil.copytree(first, bad)
    with (bad / "model.int8.onnx").open("ab") as file:
        file.write(b"x")
    link, log = tmp_path / "current", tmp_path / "out.jsonl"
    link.symlink_to(first)
    config = StreamConfig(link, sources("synthetic:4:100000", fps=200.0), headless=True, predictions=log)
    with Running(config, open_feed) as running:
        running.wait_for(lambda: running.n_lines(log) > 10)
        before = running.session.view().engine
        link.unlink()
        link.symlink_to(bad)
        with pytest.raises(IntegrityError):
            running.session.reload()
        refused = running.session.view().engine
        assert (refused.reloads, refused.reload_failures) == (0, 1)
        assert "model.int8.onnx" in (refused.last_reload_error or "")
        assert refused.bundle_digest == before.bundle_digest
        link.unlink()
        link.symlink_to(second)
        running.session.reload()
        after = running.session.view()
        assert (after.engine.reloads, after.engine.last_reload_error) == (1, None)
        assert after.engine.bundle == str(second)
        assert after.engine.bundle_digest != before.bundle_digest
        n_after = running.n_lines(log)
        running.wait_for(lambda: running.n_lines(log) > n_after + 20)
        assert running.session.check() == running.session.view().preprocessing
    summary = running.summary
    assert summary is not None
    assert summary.frames_read == summary.frames_inferred + sum(summary.dropped.values())
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["frame"] for line in lines] == list(range(len(lines)))  # none lost over the swap
    named = [line["top"][0]["label"].startswith("not ") for line in lines]
    assert named == sorted(named)
    assert named[0] is False
    assert named[-1] is True


def test_sighup_reloads(bundle: Path, open_feed: Any) -> None:
    before = signal.getsignal(signal.SIGHUP)
    config = StreamConfig(bundle, sources("synthetic:4"), headless=True, max_seconds=PATIENCE_S)
    streaming = StreamSession(config, open_feed=open_feed)

    def hang_up_then_stop() -> None:
        while not hasattr(streaming, "_runtime") or not streaming._runtime.batches:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGHUP)
        while not streaming.view().engine.reloads:
            time.sleep(0.01)
        streaming._runtime.request_stop("done")

    helper = threading.Thread(target=hang_up_then_stop, daemon=True)
    helper.start()
    summary = streaming.run()
    helper.join(PATIENCE_S)
    assert (summary.ended, summary.reloads) == ("done", 1)
    assert signal.getsignal(signal.SIGHUP) is before
