"""`run_stream` on real parts: a bundle on disk, OpenVINO or ONNX Runtime, real files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from waiting import SLACK_S

from apps.streaming.session import StreamSummary


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


def test_some_unusable_frames_are_reported_and_the_rest_inferred(
    bundle: Path, tmp_path: Path, run_stream: Callable[..., StreamSummary]
) -> None:
    Image.new("RGB", (30, 30), (9, 9, 250)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"\x89PNG rubbish")
    Image.new("L", (30, 30), 90).save(tmp_path / "c.png")
    summary = run_stream(bundle, str(tmp_path), headless=True)
    assert (summary.frames_read, summary.frames_inferred, summary.dropped) == (3, 2, {"no image": 1})
    assert any("skipped b.png" in note for note in summary.notes)
