"""How many images a request has where nobody said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from apps.streaming import loading, session
from apps.streaming.config import RecordConfig, ServeConfig, SourceConfig, StreamConfig
from apps.streaming.loading import EngineRequest, batch_wait_ms, load_engine
from apps.streaming.session import StreamSummary
from apps.streaming.sources import parse_source

FIXED = """
<ir_version: 10, opset_import: ["" : 18]>
fixed (uint8[1, 16, 16, 3] input) => (float[1, 3] logits) {
    pixels = Cast <to = 1> (input)
    axes = Constant <value = int64[2] {1, 2}> ()
    logits = ReduceMean <keepdims = 0> (pixels, axes)
}
"""
MIXING = """
<ir_version: 10, opset_import: ["" : 18]>
mixing (uint8[batch, 16, 16, 3] input) => (float[one, 3] logits) {
    pixels = Cast <to = 1> (input)
    axes = Constant <value = int64[3] {0, 1, 2}> ()
    means = ReduceMean <keepdims = 0> (pixels, axes)
    shape = Constant <value = int64[2] {1, 3}> ()
    logits = Reshape (means, shape)
}
"""


@pytest.fixture
def batch_of() -> Callable[[Path, EngineRequest], int]:
    def load(bundle: Path, request: EngineRequest) -> int:
        engine = load_engine(bundle, request)
        engine.runner.close()
        return engine.max_batch

    return load


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_who_waits_for_all_answers_has_them_by_the_batch(
    bundle: Path, batch_of: Callable[..., int], engine: str
) -> None:
    assert batch_of(bundle, EngineRequest(engine, mode="throughput")) == 8
    assert batch_of(bundle, EngineRequest(engine, mode="throughput", max_batch=2)) == 2
    assert batch_of(bundle, EngineRequest(engine, mode="latency")) == 1


def test_an_engine_that_takes_its_time_has_half_as_many(
    bundle: Path, batch_of: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "_QUICK_REQUEST_S", 0.0)
    assert batch_of(bundle, EngineRequest(mode="throughput")) == 4


@pytest.mark.parametrize("graph", [FIXED, MIXING])
def test_a_graph_that_takes_one_image_has_one(
    make_bundle: Callable[..., Path], batch_of: Callable[..., int], tmp_path: Path, graph: str
) -> None:
    path = make_bundle(tmp_path / "one", graph)
    assert batch_of(path, EngineRequest(mode="throughput")) == 1


def test_a_slow_engine_answers_one_by_one(
    bundle: Path, batch_of: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or what is under way would outlast the seconds in which SIGTERM ends the app."""
    monkeypatch.setattr(loading, "_QUICK_REQUEST_S", 0.0)
    monkeypatch.setattr(loading, "_LONGEST_REQUEST_S", 0.0)
    assert batch_of(bundle, EngineRequest(mode="throughput")) == 1
    assert batch_of(bundle, EngineRequest(mode="throughput", max_batch=4)) == 4


def stream(
    bundle: Path, folder: Path, open_feed: Any, record: Path | None = None, **options: Any
) -> StreamSummary:
    kept = None if record is None else RecordConfig(record)
    config = StreamConfig(bundle, (SourceConfig(str(folder), record=kept),), **options)
    return session.run_stream(config, open_feed=open_feed)


def test_a_folder_is_answered_by_the_batch_and_as_well(bundle: Path, folder: Path, open_feed: Any) -> None:
    together = stream(bundle, folder, open_feed, headless=True, batch_wait_ms=500)
    alone = stream(bundle, folder, open_feed, headless=True, max_batch=1)
    assert together.frames_inferred == alone.frames_inferred == 12
    assert together.correct == alone.correct == 11
    assert (together.mean_batch, alone.mean_batch) == (6, 1)


@pytest.mark.parametrize(
    ("options", "wait_ms"),
    [
        ({}, 100),
        ({"batch_wait_ms": 7}, 7),
        ({"headless": False}, 5),
        ({"serve": ServeConfig()}, 5),
        ({"max_age_ms": 1000}, 5),
        ({"max_age_ms": 4}, 2),
    ],
    ids=str,
)
def test_a_recording_fills_its_batches_where_nobody_waits(
    bundle: Path, folder: Path, options: dict[str, Any], wait_ms: float
) -> None:
    config = StreamConfig(bundle, (SourceConfig(str(folder)),), **{"headless": True, **options})
    assert batch_wait_ms(config, [parse_source(str(folder))]) == wait_ms


def test_a_batch_does_not_wait_for_a_camera(bundle: Path, folder: Path) -> None:
    uris = [str(folder), "rtsp://127.0.0.1/cam"]
    config = StreamConfig(bundle, tuple(SourceConfig(uri, policy="every") for uri in uris), headless=True)
    assert batch_wait_ms(config, list(map(parse_source, uris))) == 5


def test_pictures_that_are_looked_at_are_not_held_for_a_batch(
    bundle: Path, folder: Path, open_feed: Any, tmp_path: Path
) -> None:
    recorded = stream(bundle, folder, open_feed, tmp_path / "out.mp4", headless=True)
    assert (recorded.frames_inferred, recorded.mean_batch) == (12, 1)


def test_an_age_that_answers_must_keep_is_not_spent_on_a_batch(
    bundle: Path, folder: Path, open_feed: Any
) -> None:
    summary = stream(bundle, folder, open_feed, headless=True, max_age_ms=60_000)
    assert (summary.frames_inferred, summary.mean_batch) == (12, 1)


def test_a_camera_is_answered_frame_by_frame(bundle: Path, folder: Path, open_feed: Any) -> None:
    cameras = tuple(
        SourceConfig(f"synthetic:{seed}:40", policy=policy) for seed, policy in ((1, "newest"), (2, "every"))
    )
    summary = session.run_stream(StreamConfig(bundle, cameras, headless=True), open_feed=open_feed)
    assert summary.frames_inferred > 0
    assert summary.mean_batch == 1
