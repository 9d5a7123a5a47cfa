"""What `run_stream` refuses, and what it keeps when it fails."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import pytest

from apps.streaming.session import StreamSummary
from pipeline.errors import DataError, IntegrityError, UnsupportedError, UsageError


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


def test_a_source_without_one_usable_frame_is_an_error(
    bundle: Path, tmp_path: Path, run_stream: Callable[..., StreamSummary]
) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG rubbish")
    with pytest.raises(DataError, match=r"gave no usable frame: 1 read, dropped 1 \(no image\)"):
        run_stream(bundle, str(tmp_path), headless=True)


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
