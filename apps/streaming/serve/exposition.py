"""``/metrics``: one `StreamView`, read at the scrape, as Prometheus has it.

Base units (seconds, bytes, watts), ``_total`` on what only rises, and whatever tells two series apart is
a label: a camera more adds series, not names.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
    StateSetMetricFamily,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from apps.streaming.contracts import DeviceReading, EngineView, SourceState, SourceView, StreamView
from apps.streaming.metrics import BUCKET_EDGES_S

__all__ = ["PageFigures", "exposition"]


@dataclass(frozen=True, slots=True)
class PageFigures:
    """What the server counts of its own clients."""

    video_clients: int
    event_clients: int
    refused: int
    """Clients above a cap, since the start."""
    cut: int
    """Clients that did not read in time, since the start."""
    pictures_accepted: int
    pictures_encoded: int


def exposition(view: StreamView, page: PageFigures, accept: str) -> tuple[bytes, str]:
    """The text and its content type, in the format that the ``Accept`` header asks for."""
    registry = CollectorRegistry()
    registry.register(_ViewCollector(view, page))
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type


class _ViewCollector(Collector):
    def __init__(self, view: StreamView, page: PageFigures) -> None:
        self._view = view
        self._page = page

    def collect(self) -> Iterator[Metric]:
        view = self._view
        yield _gauge("edgefold_uptime_seconds", "Time since the app was started.", view.uptime_s)
        yield from _sources(view.sources)
        yield from _engine(view.engine)
        yield from _events(view.events)
        yield from _device(view.device)
        yield from _page(self._page)
        if view.max_age_ms is not None:
            yield _gauge(
                "edgefold_frame_age_limit_seconds", "Older frames are dropped.", view.max_age_ms / 1e3
            )


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value)


def _counter(name: str, text: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(name, text, value)


def _sources(sources: tuple[SourceView, ...]) -> Iterator[Metric]:
    yield _stages(sources)
    yield from _frames(sources)
    state = StateSetMetricFamily("edgefold_source_state", "How the source is.", labels=["source"])
    counters = {
        "restarts": CounterMetricFamily(
            "edgefold_source_restarts", "Captures started again.", labels=["source"]
        ),
        "stalls": CounterMetricFamily(
            "edgefold_source_stalls", "Captures killed for being silent.", labels=["source"]
        ),
    }
    frozen = GaugeMetricFamily(
        "edgefold_source_frozen", "1: the last frames are identical.", labels=["source"]
    )
    age = GaugeMetricFamily(
        "edgefold_source_last_frame_age_seconds", "Time since the last usable frame.", labels=["source"]
    )
    now_ns = time.monotonic_ns()
    for source in sources:
        status, labels = source.status, [source.status.source_id]
        state.add_metric(labels, {each.value: each is status.state for each in SourceState})
        counters["restarts"].add_metric(labels, status.restarts)
        counters["stalls"].add_metric(labels, status.stalls)
        frozen.add_metric(labels, status.frozen)
        if status.last_frame_ns is not None:
            age.add_metric(labels, (now_ns - status.last_frame_ns) / 1e9)
    yield state
    yield from counters.values()
    yield frozen
    yield age


def _stages(sources: tuple[SourceView, ...]) -> Metric:
    family = HistogramMetricFamily(
        "edgefold_stage_seconds",
        "Time of a frame in each stage; age: from its capture to the end.",
        labels=["source", "stage"],
    )
    edges = [str(edge) for edge in BUCKET_EDGES_S]
    for source in sources:
        for stage, buckets in source.metrics.buckets.items():
            cumulative = [*zip(edges, buckets.cumulative, strict=True), ("+Inf", buckets.count)]
            family.add_metric([source.status.source_id, stage], cumulative, buckets.total_s)
    return family


def _frames(sources: tuple[SourceView, ...]) -> Iterator[Metric]:
    read = CounterMetricFamily("edgefold_frames_read", "Frames the source delivered.", labels=["source"])
    inferred = CounterMetricFamily("edgefold_frames_inferred", "Frames classified.", labels=["source"])
    dropped = CounterMetricFamily(
        "edgefold_frames_dropped", "Frames not classified.", labels=["source", "reason"]
    )
    labelled = CounterMetricFamily("edgefold_frames_labelled", "Frames of known class.", labels=["source"])
    correct = CounterMetricFamily("edgefold_frames_correct", "Of these, those got right.", labels=["source"])
    for source in sources:
        metrics, name = source.metrics, source.status.source_id
        read.add_metric([name], metrics.frames_read)
        inferred.add_metric([name], metrics.frames_inferred)
        for reason, count in metrics.dropped.items():
            dropped.add_metric([name, reason], count)
        if metrics.labelled:
            labelled.add_metric([name], metrics.labelled)
            correct.add_metric([name], metrics.correct)
    yield from (read, inferred, dropped, labelled, correct)


def _engine(engine: EngineView) -> Iterator[Metric]:
    yield InfoMetricFamily(
        "edgefold_engine",
        "What infers.",
        {
            "bundle": engine.bundle,
            "digest": engine.bundle_digest,
            "engine": engine.engine,
            "precision": engine.precision,
        },
    )
    yield _counter("edgefold_engine_batches", "Requests answered.", engine.batches)
    yield _counter("edgefold_engine_batched_frames", "Frames in them.", engine.batched_frames)
    yield _counter("edgefold_engine_reloads", "Bundles swapped in.", engine.reloads)
    yield _counter("edgefold_engine_reload_failures", "Bundles refused.", engine.reload_failures)


def _events(events: dict[str, dict[str, int]]) -> Iterator[Metric]:
    total = CounterMetricFamily("edgefold_events", "Events by output and fate.", labels=["output", "result"])
    queued = GaugeMetricFamily("edgefold_events_queued", "Events waiting for delivery.", labels=["output"])
    for output, counters in events.items():
        for result, count in counters.items():
            if result == "queued":
                queued.add_metric([output], count)
            else:
                total.add_metric([output, result], count)
    yield total
    yield queued


def _device(device: DeviceReading) -> Iterator[Metric]:
    temperature = GaugeMetricFamily("edgefold_temperature_celsius", "By sensor.", labels=["sensor"])
    for sensor, celsius in device.temperatures_c.items():
        temperature.add_metric([sensor], celsius)
    power = GaugeMetricFamily("edgefold_power_watts", "By rail.", labels=["rail"])
    for rail, milliwatts in device.power_mw.items():
        power.add_metric([rail], milliwatts / 1e3)
    yield temperature
    yield power
    if device.power_mode is not None:
        yield InfoMetricFamily("edgefold_power_mode", "As the machine names it.", {"mode": device.power_mode})
    if device.cpu_percent is not None:
        yield _gauge("edgefold_cpu_ratio", "CPU in use, 1 for 100%.", device.cpu_percent / 100)
    if device.memory_used_bytes is not None:
        yield _gauge(
            "edgefold_memory_resident_bytes",
            "Of the process and its capture processes.",
            device.memory_used_bytes,
        )


def _page(page: PageFigures) -> Iterator[Metric]:
    clients = GaugeMetricFamily("edgefold_page_clients", "Connected now.", labels=["kind"])
    clients.add_metric(["video"], page.video_clients)
    clients.add_metric(["events"], page.event_clients)
    yield clients
    yield _counter("edgefold_page_clients_refused", "Clients above the cap.", page.refused)
    yield _counter("edgefold_page_clients_cut", "Clients that did not read.", page.cut)
    yield _counter("edgefold_page_pictures_accepted", "Pictures taken.", page.pictures_accepted)
    yield _counter("edgefold_page_pictures_encoded", "Pictures encoded.", page.pictures_encoded)
