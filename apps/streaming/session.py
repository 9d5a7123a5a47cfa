"""One stream from a bundle and a source to its summary: opens everything, runs, closes everything."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

import engines
from apps.streaming.display import StreamDisplay
from apps.streaming.metrics import LatencySummary, StreamMetrics
from apps.streaming.overlay import OverlayPainter
from apps.streaming.predictions import Prediction
from apps.streaming.queues import DropPolicy
from apps.streaming.runtime import END_OF_SOURCE, StreamRuntime
from apps.streaming.sinks import PredictionLog, Recorder, Sink, Window, window_obstacle
from apps.streaming.sources import ModelClasses, Source, open_source, parse_source
from pipeline.artifacts import EngineArtifact, EngineOptions, Frame
from pipeline.bundle import Bundle, open_bundle
from pipeline.contracts import Runner
from pipeline.errors import DataError, DeviceFaultError, IntegrityError, UsageError
from pipeline.preprocess import normalize, to_network_pixels
from pipeline.validation_meter import AccuracyFigures

__all__ = ["StreamPrecision", "StreamSummary", "run_stream"]

StreamPrecision = Literal["int8", "fp16", "bf16", "fp32"]

_FOLDED_NAME = "model.onnx"
_CPU_ENGINE = "openvino"
_USER_CLOSED = "window closed"


@dataclass(frozen=True, slots=True)
class StreamSummary:
    """What a stream did. ``frames_read = frames_inferred + sum(dropped)``."""

    bundle: str
    source: str
    engine: str
    precision: StreamPrecision
    policy: DropPolicy
    ended: str
    """``end of source``, ``time limit``, ``frame limit``, ``window closed``, or a signal's name."""
    seconds: float
    fps: float
    """Inferred frames a second, over the whole run."""
    frames_read: int
    frames_inferred: int
    dropped: dict[str, int]
    """By reason."""
    labelled: int
    correct: int
    accuracy: AccuracyFigures | None
    """Of the labelled frames: top-1 with its interval, top-k, calibration of confidence."""
    latency: dict[str, LatencySummary]
    """By stage, see `apps.streaming.metrics.STAGES`."""
    recording: str | None
    predictions: str | None
    notes: tuple[str, ...]

    @property
    def top1(self) -> float | None:
        """Share of labelled frames classified right, in [0, 1]; ``None`` without labels."""
        return self.correct / self.labelled if self.labelled else None

    def to_json(self) -> dict[str, Any]:
        """JSON-compatible values."""
        return {**dataclasses.asdict(self), "top1": self.top1}


def run_stream(
    bundle: Path | str | Bundle,
    source: str,
    *,
    record: Path | None = None,
    predictions: Path | None = None,
    headless: bool = False,
    policy: DropPolicy | None = None,
    max_seconds: float | None = None,
    max_frames: int | None = None,
    engine: str | None = None,
    precision: StreamPrecision | None = None,
    fps: float | None = None,
    cache_dir: Path | None = None,
    display: StreamDisplay | None = None,
) -> StreamSummary:
    """Streams a source through a bundle's engine until it ends, a limit, or SIGINT or SIGTERM.

    Signals are taken over only in the main thread, and given back. A second signal ends the process
    at once.

    Args:
        bundle: an opened bundle, or where one lies.
        source: see `apps.streaming.sources`.
        record: MP4 to write the pictures with the overlay to.
        predictions: JSON-lines file to write every prediction to.
        headless: show no window even where one could be shown.
        policy: ``newest`` or ``every``; by default ``newest`` for live sources, else ``every``.
            Under ``newest`` a file plays at its own rate.
        max_seconds: end after this time.
        max_frames: end after inferring this many frames.
        engine: a name of `engines.BACKENDS`; by default the one the bundle was built for.
        precision: ``fp32`` runs the folded model instead of the bundle's engine, to compare.
        fps: rate of a synthetic camera or an image folder.
        cache_dir: where the engine keeps what it compiled; ``None``: nowhere.
        display: what the terminal shows meanwhile.

    Returns:
        Counters, latencies and, where the source knows the truth, the accuracy.

    Raises:
        UsageError, DataError: options or source cannot be used; or no frame could be inferred.
        UnsupportedError: something this machine lacks.
        IntegrityError: the bundle is not what its manifest says.
        EngineError, DeviceFaultError: the engine or the camera failed.
    """
    if max_frames is not None and max_frames < 1:
        raise UsageError(f"--max-frames {max_frames} leaves nothing to do; give at least 1")
    if max_seconds is not None and not max_seconds > 0:
        raise UsageError(f"--max-seconds {max_seconds:g} leaves nothing to do; give more than 0")
    uri = parse_source(source)
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    precision = precision or opened.manifest.precision
    engine = engine or _engine_for(opened, precision)
    classes = _model_classes(opened)
    notes: list[str] = []
    with ExitStack() as stack:
        frames = open_source(uri, classes, fps)
        runtime: StreamRuntime | None = None

        def close_source() -> None:
            # To release a device under a read that never returned can crash the process.
            if runtime is None or not runtime.capturing:
                frames.close()

        stack.callback(close_source)
        chosen_policy: DropPolicy = policy or ("newest" if frames.live else "every")
        sinks, window = _open_sinks(frames, chosen_policy, record, predictions, headless, notes)
        # Here for an engine that does not load; after a run they are closed below, under the signals.
        stack.enter_context(_closing(sinks))
        runner = _load_runner(opened, engine, precision, cache_dir)

        def close_runner() -> None:
            if runtime is None or not runtime.engine_stuck:
                runner.close()

        stack.callback(close_runner)
        metrics = StreamMetrics()
        runtime = StreamRuntime(
            frames,
            runner,
            _preparer(opened, runner),
            frames.labels,
            chosen_policy,
            metrics,
            pace_fps=_pace_fps(frames, chosen_policy, fps),
            max_frames=max_frames,
            max_seconds=max_seconds,
        )
        output = _Output(sinks, window, metrics, runtime, stack.enter_context(display or StreamDisplay()))
        started_s = time.monotonic()
        with _signals(runtime.request_stop), _closing(sinks):
            ended = runtime.run(output.take, output.tick)
        seconds = time.monotonic() - started_s
    if runtime.engine_stuck:
        raise DeviceFaultError(
            f"the engine did not answer when the stream ended ({ended}); restart the process"
        )
    final = metrics.snapshot()
    notes = frames.notes + notes
    if final.frames_inferred == 0 and ended == END_OF_SOURCE:
        raise DataError(
            f"{source} gave no usable frame: {final.frames_read} read, dropped {_reasons(final.dropped)}"
            + "".join(f"; {note}" for note in notes)
        )
    return StreamSummary(
        bundle=str(opened.path),
        source=source,
        engine=engine,
        precision=precision,
        policy=chosen_policy,
        ended=ended,
        seconds=seconds,
        fps=final.frames_inferred / seconds,
        frames_read=final.frames_read,
        frames_inferred=final.frames_inferred,
        dropped=final.dropped,
        labelled=final.labelled,
        correct=final.correct,
        accuracy=final.accuracy,
        latency=final.latency,
        recording=str(record) if record is not None and final.frames_inferred else None,
        predictions=None if predictions is None else str(predictions),
        notes=tuple(notes),
    )


class _Output:
    """Hands every prediction to the sinks, with a picture where one of them wants it."""

    def __init__(
        self,
        sinks: list[Sink],
        window: Window | None,
        metrics: StreamMetrics,
        runtime: StreamRuntime,
        display: StreamDisplay,
    ) -> None:
        self._sinks = sinks
        self._window = window
        self._metrics = metrics
        self._runtime = runtime
        self._display = display
        self._painter = OverlayPainter() if any(sink.needs_picture for sink in sinks) else None
        self._latest: Prediction | None = None

    def take(self, frame: Frame, prediction: Prediction) -> None:
        self._latest = prediction
        picture = None
        if self._painter is not None:
            picture = self._painter.draw(
                frame.image, frame.pixel_format, prediction, self._metrics.snapshot()
            )
        for sink in self._sinks:
            sink.write(frame, prediction, picture)
        if self._window is not None and self._window.closed:
            self._runtime.request_stop(_USER_CLOSED)

    def tick(self) -> None:
        self._display.update(self._metrics, self._latest)


def _open_sinks(
    source: Source,
    policy: DropPolicy,
    record: Path | None,
    predictions: Path | None,
    headless: bool,
    notes: list[str],
) -> tuple[list[Sink], Window | None]:
    sinks: list[Sink] = []
    window: Window | None = None
    if record is not None:
        # Frame by frame where nothing is dropped; else by time, or the video would run too fast.
        by_time = policy == "newest" or source.live
        sinks.append(Recorder(record, source.fps, by_time))
    if predictions is not None:
        sinks.append(PredictionLog(predictions))
    if not headless:
        obstacle = window_obstacle()
        if obstacle is None:
            window = Window(f"edgefold: {source.source_id}")
            sinks.append(window)
        else:
            notes.append(f"no window: {obstacle}")
    return sinks, window


@contextmanager
def _closing(sinks: list[Sink]) -> Iterator[None]:
    """Closes all sinks, after an error too: what was recorded up to then is kept, and playable."""
    with ExitStack() as stack:
        for sink in sinks:
            stack.callback(sink.close)
        yield


@contextmanager
def _signals(request_stop: Callable[[str], None]) -> Iterator[None]:
    """The first SIGINT or SIGTERM asks for a clean end, the second ends the process."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    seen = False

    def handle(number: int, _: object) -> None:
        nonlocal seen
        if seen:
            os._exit(128 + number)
        seen = True
        request_stop(signal.Signals(number).name)

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _model_classes(bundle: Bundle) -> ModelClasses:
    labels, count = bundle.manifest.labels, bundle.manifest.model.num_classes
    if labels and len(labels) != count:
        raise IntegrityError(
            f"the bundle {bundle.path} names {len(labels)} labels for {count} classes; build it again"
        )
    return ModelClasses(labels, count)


def _engine_for(bundle: Bundle, precision: StreamPrecision) -> str:
    """The engine that the bundle was built for; a CPU's for the folded model beside a plan."""
    built = bundle.manifest.ready_engine()
    beside_a_plan = bundle.manifest.deployment is not None and precision != bundle.manifest.precision
    return _CPU_ENGINE if beside_a_plan else built.backend


def _load_runner(bundle: Bundle, engine: str, precision: StreamPrecision, cache_dir: Path | None) -> Runner:
    """The engine on the bundle's model file, with the interface that the manifest promises."""
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
    runner = backend.load(artifact, EngineOptions(mode="latency", batch=1, cache_dir=cache_dir))
    n_scores = runner.outputs[0].shape[-1]
    if isinstance(n_scores, int) and n_scores != manifest.model.num_classes:
        runner.close()
        raise IntegrityError(
            f"the model in {bundle.path} gives {n_scores} scores, its manifest says "
            f"{manifest.model.num_classes} classes; build the bundle again"
        )
    return runner


def _preparer(bundle: Bundle, runner: Runner) -> Callable[[Frame], NDArray[Any]]:
    """Frame to the engine's input, batch of one; normalized here only where the graph does not."""
    spec, color = bundle.manifest.preprocess, bundle.manifest.input_color
    takes_pixels = runner.inputs[0].dtype == "uint8"

    def prepare(frame: Frame) -> NDArray[Any]:
        pixels = to_network_pixels(frame.image, frame.pixel_format, spec, color)[np.newaxis]
        return pixels if takes_pixels else normalize(pixels, spec, color)

    return prepare


def _pace_fps(source: Source, policy: DropPolicy, fps: float | None) -> float | None:
    """A camera sets its own pace. Whatever is to look live is played at its rate; the rest runs as
    fast as the engine takes it, unless a rate was asked for."""
    if source.self_paced:
        return None
    return source.fps if source.live or policy == "newest" or fps is not None else None


def _reasons(dropped: dict[str, int]) -> str:
    return ", ".join(f"{count} ({reason})" for reason, count in dropped.items()) or "none"
