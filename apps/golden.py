"""Golden frames where engines are at hand: written by a build, checked on this machine for `edgefold inspect`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apps.publishing import Made
from pipeline.artifacts import EngineArtifact, EngineOptions, Frame, ModelArtifact
from pipeline.bundle import Bundle, BundleWriter
from pipeline.compile import FOLDED_NAME
from pipeline.contracts import EngineBackend
from pipeline.digest import file_sha256
from pipeline.golden import GoldenReport, check_live_path, golden_logits
from pipeline.golden_frames import GOLDEN_NAME, golden_to_bytes, make_golden
from pipeline.preprocess import normalize, to_network_pixels

__all__ = ["add_golden", "check_bundle"]


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
    with backend.load(artifact, EngineOptions(batch=1, cache_dir=cache_dir)) as runner:
        takes_pixels = runner.inputs[0].dtype == "uint8"

        def prepare(frame: Frame) -> NDArray[Any]:
            spec, color = manifest.preprocess, manifest.input_color
            pixels = to_network_pixels(frame.image, frame.pixel_format, spec, color)[np.newaxis]
            return pixels if takes_pixels else normalize(pixels, spec, color)

        return check_live_path(bundle, prepare, runner)


def _graphs(made: Made) -> list[str]:
    """The folded graph, and what else an engine of the bundle may run."""
    if made.deployment is not None:
        return list(dict.fromkeys([FOLDED_NAME, *(c.file for c in made.deployment.candidates)]))
    return list(dict.fromkeys([FOLDED_NAME, made.final.path.name]))


def _model(final: ModelArtifact, path: Path) -> ModelArtifact:
    return dataclasses.replace(final, path=path, sha256=file_sha256(path))
