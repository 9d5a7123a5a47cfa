"""The camera app from its configuration to its summary: opens everything, runs, closes everything."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from apps.streaming.config import CaptureLimits, EventConfig, SourceConfig, StreamConfig
from apps.streaming.config_check import check_options
from apps.streaming.contracts import EngineView, EventOutput, Feed, SourceView, StreamView
from apps.streaming.display import ShownSource, StreamDisplay
from apps.streaming.engine_slot import EngineSlot
from apps.streaming.loading import LoadedEngine, batch_wait_ms, check_golden, engine_request, load_engine
from apps.streaming.metrics import StreamMetrics
from apps.streaming.outputs import SourceOutput, open_event_outputs
from apps.streaming.reload import Reloader
from apps.streaming.runtime import END_OF_SOURCE, Answer, RuntimeLimits, StreamRuntime
from apps.streaming.scheduling import RuntimeFeed
from apps.streaming.signals import stream_signals
from apps.streaming.sinks import PredictionLog, Window, window_obstacle
from apps.streaming.sources import ModelClasses, SourceUri, parse_source
from apps.streaming.summary import StreamSummary, summarize
from pipeline.errors import DataError, DeviceFaultError, IntegrityError, UsageError

if TYPE_CHECKING:
    from apps.streaming.serve import PageServer

__all__ = ["FeedOpener", "StreamSession", "StreamSummary", "run_stream"]

_USER_CLOSED = "window closed"
_LIVE_MAX_AGE_MS = 1000.0
_HOUSEKEEPING_S = 0.25


class FeedOpener(Protocol):
    """Makes the feed of a source; `apps.streaming.capture.open_feed` but in tests."""

    def __call__(
        self,
        source: SourceConfig,
        uri: SourceUri,
        classes: ModelClasses,
        limits: CaptureLimits,
        metrics: StreamMetrics,
    ) -> Feed:
        """Opens nothing yet; `Feed.start` does."""
        ...


def run_stream(
    config: StreamConfig,
    *,
    cache_dir: Path | None = None,
    display: StreamDisplay | None = None,
    open_feed: FeedOpener | None = None,
    on_running: Callable[[], None] = lambda: None,
) -> StreamSummary:
    """Streams sources through a bundle's engine until they end, a limit, or SIGINT or SIGTERM.

    Signals are taken over only in the main thread, and given back. SIGHUP loads the bundle anew; a second
    SIGINT or SIGTERM ends the process at once.

    Args:
        config: what to run.
        cache_dir: where the engine keeps what it compiled; ``None``: nowhere.
        display: what the terminal shows meanwhile.
        open_feed: how sources are captured.
        on_running: called when everything is open, before the first frame.

    Returns:
        Counters, latencies and, where a source knows the truth, the accuracy.

    Raises:
        UsageError, DataError: options or sources cannot be used; or no frame could be inferred.
        UnsupportedError: something this machine lacks.
        IntegrityError: the bundle is not what its manifest says, or the golden frames came out wrong.
        EngineError, DeviceFaultError: the engine failed.
    """
    session = StreamSession(
        config, cache_dir=cache_dir, display=display, open_feed=open_feed, on_running=on_running
    )
    return session.run()


class StreamSession:
    """One run of the camera app. `view`, `reload` and `check` may be called from any thread meanwhile."""

    def __init__(
        self,
        config: StreamConfig,
        *,
        cache_dir: Path | None = None,
        display: StreamDisplay | None = None,
        open_feed: FeedOpener | None = None,
        on_running: Callable[[], None] = lambda: None,
    ) -> None:
        """Checks the options; opens nothing.

        Raises:
            UsageError: an option that leaves nothing to do, or contradicts another.
        """
        check_options(config)
        self._config = config
        self._display = display or StreamDisplay()
        self._open_feed = open_feed
        self._on_running = on_running
        self._cache_dir = cache_dir
        self._sources: list[RuntimeFeed] = []
        self._outputs: dict[str, SourceOutput] = {}
        self._event_outputs: dict[str, EventOutput] = {}
        self._closers: list[Callable[[], None]] = []
        self._page: PageServer | None = None
        self._hangup = False
        self._reloading = False
        self._tidied_s = 0.0
        self._started_s = time.monotonic()
        self._max_age_ms: float | None = None

    def run(self) -> StreamSummary:
        """Runs once; as `run_stream`."""
        from apps.streaming.logs import StateLog
        from apps.streaming.service import Notifier

        config = self._config
        uris = [parse_source(source.uri) for source in config.sources]
        notes: list[str] = []
        with ExitStack() as stack:
            request = engine_request(config, uris, self._cache_dir)
            engine = load_engine(config.bundle, request)
            self._slot = EngineSlot(engine)
            stack.callback(self._close_engine)
            self._reloader = Reloader(
                self._slot,
                config.bundle,
                functools.partial(load_engine, request=request),
                self._on_swap,
            )
            stack.callback(self._close_together)
            self._open_sources(uris, engine.classes)
            self._max_age_ms = self._budget_ms()
            self._notifier = stack.enter_context(Notifier())
            self._states = StateLog()
            self._open_page_and_events()
            outputs = self._open_outputs(stack, notes)
            self._runtime = StreamRuntime(
                self._sources,
                self._slot,
                RuntimeLimits(
                    self._max_age_ms, batch_wait_ms(config, uris), config.max_frames, config.max_seconds
                ),
                keep_images=any(output.needs_images for output in outputs),
            )
            stack.enter_context(self._display)
            self._started_s = time.monotonic()
            with stream_signals(self._runtime.request_stop, self._hang_up), _closing(outputs):
                self._on_running()
                self._notifier.ready(f"{len(self._sources)} sources, {engine.engine} {engine.precision}")
                ended = self._runtime.run(self._take, self._tick)
                seconds = time.monotonic() - self._started_s
                self._notifier.stopping(ended)
            self._reloader.close()
        return self._summary(ended, seconds, notes)

    # --- what others see and ask ------------------------------------------------------------------

    def view(self) -> StreamView:
        """Everything at this moment."""
        from apps.streaming.device import read_device

        sources = tuple(
            SourceView(
                status=source.feed.status(),
                metrics=source.metrics.snapshot(),
                latest=self._outputs[source.feed.source_id].latest,
                present=self._outputs[source.feed.source_id].present,
            )
            for source in self._sources
        )
        return StreamView(
            uptime_s=time.monotonic() - self._started_s,
            sources=sources,
            engine=self._engine_view(),
            device=read_device(),
            events={name: output.counters() for name, output in self._event_outputs.items()},
            max_age_ms=self._max_age_ms,
            preprocessing=self._slot.current.golden,
        )

    def reload(self, bundle: Path | None = None) -> None:
        """Loads the configured bundle anew, or another; returns when it infers.

        Raises:
            EdgefoldError: it was refused; the old one infers.
        """
        self._reloader.reload(bundle)

    def check(self) -> str:
        """Hands the golden frames to the live path and says what they found; the stream goes on.

        Raises:
            IntegrityError: they came out wrong; says which of colour order, range and size.
        """
        engine = self._slot.lease()
        try:
            engine.golden = check_golden(engine)
        except IntegrityError as error:
            engine.golden = str(error)
            raise
        finally:
            self._slot.give_back(engine)
        return engine.golden

    def _engine_view(self) -> EngineView:
        engine = self._slot.current
        return EngineView(
            bundle=str(engine.bundle.path),
            bundle_digest=engine.digest,
            engine=engine.engine,
            precision=engine.precision,
            reloads=self._reloader.reloads,
            reload_failures=self._reloader.failures,
            last_reload_error=self._reloader.last_error,
            batches=self._runtime.batches,
            batched_frames=self._runtime.batched_frames,
        )

    # --- opening ----------------------------------------------------------------------------------

    def _open_sources(self, uris: Sequence[SourceUri], classes: ModelClasses) -> None:
        open_feed = self._open_feed or _capture_feed()
        for source, uri in zip(self._config.sources, uris, strict=True):
            metrics = StreamMetrics()
            feed = open_feed(source, uri, classes, self._config.limits, metrics)
            if any(feed.source_id == other.feed.source_id for other in self._sources):
                raise UsageError(
                    f"two sources are called {feed.source_id}; give each its own name in the --config file"
                )
            self._sources.append(RuntimeFeed(feed, metrics))
            self._closers.append(feed.close)

    def _budget_ms(self) -> float | None:
        if self._config.max_age_ms is not None:
            return self._config.max_age_ms
        live = any(source.feed.policy == "newest" for source in self._sources)
        return _LIVE_MAX_AGE_MS if live else None

    def _open_page_and_events(self) -> None:
        config = self._config
        source_ids = [source.feed.source_id for source in self._sources]
        for name, output in open_event_outputs(config, source_ids):
            self._event_outputs[name] = output
            self._closers.append(output.close)
        if config.serve is not None:
            from apps.streaming.logs import log_event
            from apps.streaming.serve import PageServer

            page = PageServer(config.serve, self.view, self.reload, self.check)
            self._closers.append(page.close)
            log_event("page", page.url)
            self._event_outputs["page"] = page.events
            self._page = page

    def _open_outputs(self, stack: ExitStack, notes: list[str]) -> list[SourceOutput]:
        config = self._config
        predictions = None if config.predictions is None else PredictionLog(config.predictions)
        if predictions is not None:
            stack.callback(predictions.close)
        obstacle = None if config.headless else window_obstacle()
        if obstacle is not None:
            notes.append(f"no window: {obstacle}")
        events = config.events
        if events is None and self._event_outputs:
            events = EventConfig()
        for asked, source in zip(config.sources, self._sources, strict=True):
            source_id = source.feed.source_id
            shown = not config.headless and obstacle is None
            self._outputs[source_id] = SourceOutput(
                source,
                record=asked.record,
                window=Window(f"edgefold: {source_id}") if shown else None,
                predictions=predictions,
                events=events,
                event_outputs=tuple(self._event_outputs.values()),
                hub=None if self._page is None else self._page.hub,
                silence_s=config.limits.degraded_s,
            )
        return list(self._outputs.values())

    # --- while it runs, in the calling thread -----------------------------------------------------

    def _take(self, answer: Answer) -> None:
        output = self._outputs[answer.frame.source_id]
        output.take(answer)
        if output.user_closed:
            self._runtime.request_stop(_USER_CLOSED)

    def _tick(self) -> None:
        if self._hangup:
            self._hangup = False
            if self._reloader.start():
                self._reloading = True
                self._notifier.reloading()
        self._notifier.alive(self._runtime.last_beat_ns)
        if self._page is not None:
            self._page.beat()
        now_s = time.monotonic()
        if now_s - self._tidied_s < _HOUSEKEEPING_S:
            return
        self._tidied_s = now_s
        if self._reloading and not self._reloader.busy:
            self._reloading = False
            self._notifier.ready()
        self._states.update(source.feed.status() for source in self._sources)
        for output in self._outputs.values():
            output.tick()
        self._display.update(
            [
                ShownSource(
                    source.feed.source_id,
                    source.feed.status().state.value,
                    source.metrics,
                    self._outputs[source.feed.source_id].latest,
                )
                for source in self._sources
            ]
        )

    def _hang_up(self) -> None:
        """Asks for a reload. Takes no lock, so a signal handler may call it."""
        self._hangup = True

    def _on_swap(self, old: LoadedEngine, new: LoadedEngine) -> None:
        for source in self._sources:
            source.metrics.engine_changed()

    # --- closing ----------------------------------------------------------------------------------

    def _close_together(self) -> None:
        """Feeds, page and event outputs: each may take its two seconds, and one after the other they would
        take more than the five that a service manager is promised."""
        if self._closers:
            with ThreadPoolExecutor(len(self._closers), "stream-close") as pool:
                for closing in [pool.submit(close) for close in self._closers]:
                    closing.result()

    def _close_engine(self) -> None:
        runtime: StreamRuntime | None = getattr(self, "_runtime", None)
        if runtime is None or not runtime.engine_stuck:
            self._slot.current.runner.close()

    def _summary(self, ended: str, seconds: float, notes: list[str]) -> StreamSummary:
        if self._runtime.engine_stuck:
            raise DeviceFaultError(
                f"the engine did not answer when the stream ended ({ended}); restart the process"
            )
        summary = summarize(
            self._config,
            self._sources,
            self._engine_view(),
            ended,
            seconds,
            max_age_ms=self._max_age_ms,
            preprocessing=self._slot.current.golden,
            notes=notes,
        )
        if summary.frames_inferred == 0 and ended == END_OF_SOURCE:
            raise DataError(
                f"{summary.source} gave no usable frame: {summary.frames_read} read, "
                f"dropped {_reasons(summary.dropped)}" + "".join(f"; {note}" for note in summary.notes)
            )
        return summary


def _capture_feed() -> FeedOpener:
    from apps.streaming.capture import open_feed

    opener: FeedOpener = open_feed
    return opener


@contextmanager
def _closing(outputs: Sequence[SourceOutput]) -> Iterator[None]:
    """Closes all outputs, after an error too: what was recorded up to then is kept, and playable. All are
    stopped before the first is closed, since a disk that hangs is waited for."""
    with ExitStack() as stack:
        for output in outputs:
            stack.callback(output.close)
        for output in outputs:
            stack.callback(output.stop)
        yield


def _reasons(dropped: dict[str, int]) -> str:
    return ", ".join(f"{count} ({reason})" for reason, count in dropped.items()) or "none"
