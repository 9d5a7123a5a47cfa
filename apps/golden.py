"""Golden frames where engines are at hand: written by a build, checked on this machine for `edgefold inspect`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from apps.publishing import Made
from pipeline.artifacts import EngineArtifact, EngineOptions, ModelArtifact
from pipeline.bundle import Bundle, BundleWriter
from pipeline.compile import FOLDED_NAME
from pipeline.contracts import EngineBackend
from pipeline.digest import file_sha256
from pipeline.golden import GoldenReport, check_live_path, golden_logits
from pipeline.golden_frames import GOLDEN_NAME, golden_to_bytes, make_golden

__all__ = ["add_golden", "check_bundle", "check_engine"]


def add_golden(writer: BundleWriter, made: Made, work_dir: Path) -> None:
    """Writes the golden frames of what was made, with the answers of every graph the bundle's engine may run.

    Graphs for a device that compiles on itself answer as the host emulates them.

    Raises:
        EngineError: a graph does not load, or answers with what is not finite.
    """
    from engines import get_backend

    final = made.final
    golden = make_golden(final.preprocess, final.input_color)
    logits = {}
    for name in _graphs(made):
        model = _model(final, writer.path / name)
        backend: EngineBackend
        if made.deployment is None:
            assert made.engine is not None, "a bundle for a CPU has its engine"
            backend = get_backend(made.engine.backend)
        else:
            from apps.emulation import EMULATOR, emulated

            backend, model = EMULATOR, emulated(model, work_dir)
        artifact = EngineArtifact(model.path, model.sha256, model.sha256, backend.name, backend.fingerprint())
        with backend.load(artifact, EngineOptions()) as runner:
            logits[name] = golden_logits(golden, runner, final.preprocess, final.input_color)
    writer.add_file(GOLDEN_NAME, golden_to_bytes(dataclasses.replace(golden, logits=logits)))


def check_bundle(bundle: Bundle, cache_dir: Path | None) -> GoldenReport:
    """The golden frames through this machine's preprocessing and the bundle's engine.

    Raises:
        UnsupportedError: the bundle has no engine yet, or its engine cannot run here.
        IntegrityError: what comes out is not what the build had.
    """
    from engines import get_backend

    manifest, built = bundle.manifest, bundle.manifest.ready_engine()
    backend = get_backend(built.backend)
    portable = manifest.deployment is None
    artifact = EngineArtifact(
        path=bundle.file(built.file),
        sha256=bundle.sha256(built.file),
        model_sha256=bundle.sha256(built.file),
        backend=built.backend,
        fingerprint=backend.fingerprint() if portable else built.fingerprint,
        portable=portable,
    )
    return check_engine(bundle, artifact, cache_dir)


def check_engine(bundle: Bundle, artifact: EngineArtifact, cache_dir: Path | None = None) -> GoldenReport:
    """The golden frames through the path that ``edgefold stream`` takes for an engine, and through the engine.

    Args:
        bundle: with the manifest of the engine; it need not hold the engine's file yet.
        artifact: the engine.
        cache_dir: where it keeps what it compiled.

    Raises:
        UnsupportedError: the engine cannot run here.
        IntegrityError: what comes out is not what the build had.
    """
    from apps.streaming.feeding import make_feeder
    from engines import get_backend

    manifest = bundle.manifest
    options = EngineOptions(batch=1, cache_dir=cache_dir)
    with get_backend(artifact.backend).load(artifact, options) as runner:
        feeder = make_feeder(runner, artifact.backend, manifest.preprocess, manifest.input_color, max_batch=1)
        return check_live_path(bundle, feeder.engine_input, runner)


def _graphs(made: Made) -> list[str]:
    """The folded graph, and what else an engine of the bundle may run."""
    if made.deployment is not None:
        return list(dict.fromkeys([FOLDED_NAME, *(c.file for c in made.deployment.candidates)]))
    return list(dict.fromkeys([FOLDED_NAME, made.final.path.name]))


def _model(final: ModelArtifact, path: Path) -> ModelArtifact:
    return dataclasses.replace(final, path=path, sha256=file_sha256(path))
