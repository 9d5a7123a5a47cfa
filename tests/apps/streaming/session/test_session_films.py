"""Films that nobody looks at are read in the network's size; the answers stay, and a bundle of other pixels does not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from apps.streaming.config import RecordConfig, ServeConfig, SourceConfig, StreamConfig
from apps.streaming.fitting import pixels_to_read
from apps.streaming.loading import EngineRequest, LoadedEngine, load_engine
from apps.streaming.session import StreamSession, StreamSummary
from apps.streaming.sources import NetworkPixels, parse_source
from pipeline.artifacts import PreprocessSpec
from pipeline.bundle import BundleWriter, open_bundle
from pipeline.errors import UsageError
from pipeline.kernels import kernels

pytest.importorskip("av", reason="needs PyAV")
pytestmark = pytest.mark.skipif(kernels() is None, reason="pipeline/planar.c was not compiled")
PIXELS = NetworkPixels(PreprocessSpec((16, 16)), "BGR")


@pytest.fixture(scope="module")
def engine(bundle: Path) -> LoadedEngine:
    loaded = load_engine(bundle, EngineRequest())
    loaded.runner.close()
    return loaded


def test_pictures_that_are_looked_at_stay_whole(engine: LoadedEngine, video: Path, tmp_path: Path) -> None:
    film, camera = parse_source(str(video)), parse_source("synthetic:1")
    plain = StreamConfig(tmp_path, (SourceConfig(str(video)),), headless=True)
    recorded = replace(plain.sources[0], record=RecordConfig(tmp_path / "out.mp4"))
    assert pixels_to_read(plain, [film], engine) == PIXELS
    assert pixels_to_read(plain, [camera, film], engine) == PIXELS
    for config, uris in (
        (replace(plain, serve=ServeConfig()), [film]),
        (replace(plain, sources=(recorded,)), [film]),
        (plain, [camera]),
    ):
        assert pixels_to_read(config, uris, engine) is None


def test_the_answers_are_those_of_whole_pictures(
    bundle: Path, video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from apps.streaming.session import run_stream

    answers = {}
    for name, looks in (("fitted", None), ("whole", RecordConfig(tmp_path / "out.mp4"))):
        log = tmp_path / f"{name}.jsonl"
        config = StreamConfig(
            bundle, (SourceConfig(str(video), record=looks),), headless=True, predictions=log
        )
        assert run_stream(config).frames_inferred == 30
        answers[name] = [json.loads(line)["top"] for line in log.read_text().splitlines()]
    assert answers["fitted"] == answers["whole"]


def with_preprocess(bundle: Path, out: Path, spec: PreprocessSpec) -> Path:
    opened = open_bundle(bundle)
    with BundleWriter(out) as writer:
        for name in opened.manifest.files:
            writer.add_file(name, opened.read_bytes(name))
        writer.commit(replace(opened.manifest, preprocess=spec))
    return out


def test_a_bundle_of_other_pixels_is_refused_while_a_film_runs(
    bundle: Path, video: Path, tmp_path: Path
) -> None:
    squashed = with_preprocess(bundle, tmp_path / "squashed", PreprocessSpec((16, 16), "squash"))
    alike = with_preprocess(bundle, tmp_path / "alike", PreprocessSpec((16, 16)))
    said: list[str] = []

    def swap() -> None:
        with pytest.raises(UsageError, match=r"resize squash.*--serve") as refused:
            session.reload(squashed)
        said.append(str(refused.value))
        session.reload(alike)

    config = StreamConfig(bundle, (SourceConfig(f"{video}#loop"),), headless=True, max_frames=60)
    session = StreamSession(config, on_running=swap)
    summary: StreamSummary = session.run()
    assert said
    assert summary.frames_inferred == 60
    assert (summary.reloads, summary.reload_failures) == (1, 1)
