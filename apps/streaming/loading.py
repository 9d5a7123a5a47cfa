"""From a bundle to an engine that is ready to answer frames: opened, loaded, warmed, checked.

The same at start and at a reload, so that a bundle which is refused at one is refused at the other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

import engines
from apps.streaming.config import StreamConfig, StreamPrecision
from apps.streaming.feeding import PLAN_ENGINES, Feeder, make_feeder
from apps.streaming.sources import ModelClasses, SourceUri
from pipeline.artifacts import EngineArtifact, EngineOptions
from pipeline.bundle import MANIFEST_NAME, Bundle, open_bundle
from pipeline.contracts import Runner
from pipeline.errors import EngineError, IntegrityError, UsageError

__all__ = [
    "EngineRequest",
    "LoadedEngine",
    "batch_wait_ms",
    "check_golden",
    "engine_request",
    "load_engine",
    "model_classes",
]

_FOLDED_NAME = "model.onnx"
_CPU_ENGINE = "openvino"
_DIGEST_DIGITS = 12
_THROUGHPUT_BATCH = 4
"""Images a request for whoever waits for all answers: weights are fetched, threads are woken and Python is run once for
the four (docs/decisions/0015)."""
_LONGEST_REQUEST_S = 0.5
"""With a slower engine four images are so long under way that the app could not end within five seconds of SIGTERM."""
_QUICK_BATCH = 8
_QUICK_REQUEST_S = 0.05
"""Four images in so little, and what a request costs beside the engine is worth sharing among eight."""
_BATCH_WAIT_MS = 5.0
_UNHURRIED_BATCH_WAIT_MS = 100.0
"""Within it any film that is worth a batch fills one. A request of fewer images is not only shared by fewer: engines
prepare for every change of its size."""
_PLAN_STREAMS = 2
"""So that one request's copies and kernel overlap another one's engine."""


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """How a bundle is to be run; the same for every bundle that is swapped in.

    Attributes:
        engine: a name of `engines.BACKENDS`; by default the one the bundle was built for.
        precision: ``fp32`` runs the folded model instead of the bundle's engine, to compare.
        max_batch: images a request; by default what suits `mode` on a CPU that takes it, else one.
        streams: requests that run at the same time; by default two for a plan, else the engine's choice for `mode`.
        mode: ``latency`` for whoever waits for each answer, ``throughput`` for whoever waits for all.
        cache_dir: where the engine keeps what it compiled; ``None``: nowhere.
    """

    engine: str | None = None
    precision: StreamPrecision | None = None
    max_batch: int | None = None
    streams: int | None = None
    mode: Literal["latency", "throughput"] = "latency"
    cache_dir: Path | None = None


@dataclass(slots=True)
class LoadedEngine:
    """An engine that is ready, and how a frame becomes its input.

    Attributes:
        classes: what its scores stand for.
        feeder: makes frames its input.
        row_shape: of one image of the batch.
        file: the graph or plan of the bundle that it runs.
        golden: what the golden frames found.
    """

    bundle: Bundle
    digest: str
    runner: Runner
    engine: str
    precision: StreamPrecision
    file: str
    classes: ModelClasses
    feeder: Feeder
    row_shape: tuple[int, ...]
    max_batch: int
    golden: str = "not verified: not checked yet"


def engine_request(config: StreamConfig, uris: Sequence[SourceUri], cache_dir: Path | None) -> EngineRequest:
    """What `config` asks of an engine, of whichever bundle.

    Where every source waits, no answer is hurried: several streams, and several images a request, then do more. One
    image a request where answers have an age to keep; and where the pictures are looked at, or a request would hold so
    many of a source's buffers that it waits.

    Args:
        config: what to run.
        uris: of its sources, in their order.
        cache_dir: where the engine keeps what it compiled; ``None``: nowhere.
    """
    throughput = _all_wait(config, uris)
    return EngineRequest(
        engine=config.engine,
        precision=config.precision,
        max_batch=config.max_batch or (None if throughput and _is_unseen(config) else 1),
        streams=config.streams,
        mode="throughput" if throughput else "latency",
        cache_dir=cache_dir,
    )


def batch_wait_ms(config: StreamConfig, uris: Sequence[SourceUri]) -> float:
    """How long the first frame of a batch waits for others.

    Unless `config` says it, briefly, and at most half the age that answers may have; until the batch is full, as good
    as always, where nobody waits for the single answer, nor for a camera's next frame.

    Args:
        config: what to run.
        uris: of its sources, in their order.
    """
    if config.batch_wait_ms is not None:
        return config.batch_wait_ms
    if _all_wait(config, uris) and _is_unseen(config) and not any(uri.live for uri in uris):
        return _UNHURRIED_BATCH_WAIT_MS
    return _BATCH_WAIT_MS if config.max_age_ms is None else min(_BATCH_WAIT_MS, config.max_age_ms / 2)


def _all_wait(config: StreamConfig, uris: Sequence[SourceUri]) -> bool:
    """Whether every source waits for the engine."""
    return all(
        source.policy_for(uri.live) == "every" for source, uri in zip(config.sources, uris, strict=True)
    )


def _is_unseen(config: StreamConfig) -> bool:
    """Whether no answer is looked at as it comes, nor has an age to keep."""
    recorded = any(source.record for source in config.sources)
    return config.headless and config.serve is None and not recorded and config.max_age_ms is None


def load_engine(bundle: Bundle | Path | str, request: EngineRequest) -> LoadedEngine:
    """Opens, verifies, loads and warms; the golden frames are checked last.

    A path is resolved once: a link that is set to another bundle meanwhile does not mix the two.

    Raises:
        UsageError: no bundle there, or it has no such engine, precision or batch.
        IntegrityError: the bundle is not what its manifest says, or the golden frames came out wrong.
        UnsupportedError: something this machine lacks.
        EngineError: the engine does not load or run.
    """
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(Path(bundle).resolve())
    precision = request.precision or opened.manifest.precision
    engine = request.engine or _engine_for(opened, precision)
    try_batch = functools.partial(_load_with_batch, opened, engine, precision, request)
    if request.max_batch is not None:
        return try_batch(request.max_batch)
    if request.mode == "throughput" and engine not in PLAN_ENGINES:
        # Nobody asked for it: a graph of a fixed batch, or one that cannot keep images apart, has one image.
        with contextlib.suppress(UsageError, EngineError):
            loaded = try_batch(_THROUGHPUT_BATCH)
            began_s = time.monotonic()
            _run(loaded, _THROUGHPUT_BATCH)
            took_s = time.monotonic() - began_s
            if took_s <= _QUICK_REQUEST_S:
                return _widened(loaded, _QUICK_BATCH)
            if took_s <= _LONGEST_REQUEST_S:
                return loaded
            loaded.runner.close()
    return try_batch(1)


def _load_with_batch(
    bundle: Bundle, engine: str, precision: StreamPrecision, request: EngineRequest, max_batch: int
) -> LoadedEngine:
    classes = model_classes(bundle)
    runner, file = _load_runner(bundle, engine, precision, request, max_batch)
    try:
        loaded = _around(bundle, runner, engine, precision, file, classes, max_batch)
        _warm(loaded)
        loaded.golden = check_golden(loaded)
    except BaseException:
        runner.close()
        raise
    return loaded


def _widened(engine: LoadedEngine, max_batch: int) -> LoadedEngine:
    """The same engine with room for more images a request."""
    manifest = engine.bundle.manifest
    feeder = make_feeder(
        engine.runner, engine.engine, manifest.preprocess, manifest.input_color, max_batch=max_batch
    )
    wider = dataclasses.replace(engine, feeder=feeder, max_batch=max_batch)
    try:
        _run(wider, max_batch)
    except BaseException:
        engine.runner.close()
        raise
    return wider


def check_golden(engine: LoadedEngine) -> str:
    """Hands the bundle's golden frames to the live path; one line for a person.

    Raises:
        IntegrityError: colour order, range or size is wrong (the message says which), or the engine answers
            otherwise than it did at the build.
    """
    from pipeline.golden import check_live_path

    report = check_live_path(engine.bundle, engine.feeder.engine_input, engine.runner, file=engine.file)
    return report.summary()


def model_classes(bundle: Bundle) -> ModelClasses:
    """The classes of a bundle.

    Raises:
        IntegrityError: as many labels as classes it has not.
    """
    labels, count = bundle.manifest.labels, bundle.manifest.model.num_classes
    if labels and len(labels) != count:
        raise IntegrityError(
            f"the bundle {bundle.path} names {len(labels)} labels for {count} classes; build it again"
        )
    return ModelClasses(labels, count)


def _around(
    bundle: Bundle,
    runner: Runner,
    engine: str,
    precision: StreamPrecision,
    file: str,
    classes: ModelClasses,
    max_batch: int,
) -> LoadedEngine:
    declared = runner.inputs[0]
    batch, *row = declared.shape
    if isinstance(batch, int) and batch != max_batch:
        raise UsageError(
            f"the engine of {bundle.path} takes {batch} image{'s' if batch > 1 else ''} a request, --batch "
            f"{max_batch} was asked for; its batch is fixed"
        )
    n_scores = runner.outputs[0].shape[-1]
    if isinstance(n_scores, int) and n_scores != classes.count:
        raise IntegrityError(
            f"the model in {bundle.path} gives {n_scores} scores, its manifest says "
            f"{classes.count} classes; build the bundle again"
        )
    spec, color = bundle.manifest.preprocess, bundle.manifest.input_color
    height, width = spec.input_hw
    takes_pixels = declared.dtype == "uint8"
    channels_first = not takes_pixels and spec.layout == "NCHW"
    row_shape = (3, height, width) if channels_first else (height, width, 3)
    if any(isinstance(size, int) and size != wanted for size, wanted in zip(row, row_shape, strict=True)):
        raise IntegrityError(
            f"the model in {bundle.path} takes images of {row}, its manifest's preprocessing makes "
            f"{list(row_shape)}; build the bundle again"
        )
    manifest_bytes = (bundle.path / MANIFEST_NAME).read_bytes()
    return LoadedEngine(
        bundle=bundle,
        digest=hashlib.sha256(manifest_bytes).hexdigest()[:_DIGEST_DIGITS],
        runner=runner,
        engine=engine,
        precision=precision,
        file=file,
        classes=classes,
        feeder=make_feeder(runner, engine, spec, color, max_batch=max_batch),
        row_shape=row_shape,
        max_batch=max_batch,
    )


def _warm(engine: LoadedEngine) -> None:
    """Runs the smallest and the largest batch: kernels are chosen and buffers made now, not at the first
    frame; a batch that the engine cannot take is found out."""
    sizes = (
        (engine.max_batch,) if isinstance(engine.runner.inputs[0].shape[0], int) else (1, engine.max_batch)
    )
    for size in dict.fromkeys(sizes):
        _run(engine, size)


def _run(engine: LoadedEngine, size: int) -> None:
    """Runs a batch of black images."""
    declared = engine.runner.inputs[0]
    batch = np.zeros((size, *engine.row_shape), declared.dtype)
    scores = engine.runner.submit({declared.name: batch}).result()[engine.runner.outputs[0].name]
    if scores.shape[0] != size:
        raise EngineError(
            f"the engine of {engine.bundle.path} answers {size} images with scores of shape "
            f"{list(scores.shape)}: its graph does not keep images apart; stream it with --batch 1"
        )


def _engine_for(bundle: Bundle, precision: StreamPrecision) -> str:
    """The engine that the bundle was built for; a CPU's for the folded model beside a plan."""
    built = bundle.manifest.ready_engine()
    beside_a_plan = bundle.manifest.deployment is not None and precision != bundle.manifest.precision
    return _CPU_ENGINE if beside_a_plan else built.backend


def _load_runner(
    bundle: Bundle, engine: str, precision: StreamPrecision, request: EngineRequest, max_batch: int
) -> tuple[Runner, str]:
    """The engine on the bundle's model file, and the file's name."""
    manifest, built = bundle.manifest, bundle.manifest.ready_engine()
    names = {"fp32": _FOLDED_NAME, manifest.precision: built.file}
    if precision not in names:
        raise UsageError(f"the bundle {bundle.path} has {' and '.join(names)} models, none in {precision}")
    name = names[precision]
    is_plan = manifest.deployment is not None and name == built.file
    if is_plan and engine != built.backend:
        raise UsageError(
            f"the engine of bundle {bundle.path} is a plan of {built.backend}, which {engine} cannot run: leave --engine out, "
            "or give --precision fp32 for the folded model"
        )
    backend = engines.get_backend(engine)
    artifact = EngineArtifact(
        path=bundle.file(name),
        sha256=bundle.sha256(name),
        model_sha256=bundle.sha256(name),
        backend=engine,
        # A plan is bound to what built it, and refused elsewhere by both names; an ONNX file is not.
        fingerprint=built.fingerprint if is_plan else backend.fingerprint(),
        portable=not is_plan,
    )
    # A fixed batch is faster; batches across cameras come in all sizes up to the largest.
    fixed = 1 if max_batch == 1 else None
    streams = request.streams or (_PLAN_STREAMS if is_plan else None)
    options = EngineOptions(mode=request.mode, batch=fixed, cache_dir=request.cache_dir, streams=streams)
    return backend.load(artifact, options), name
