from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
from fake_stream import JETSON, FakeApp, entered
from prometheus_client import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families
from waiting import SLACK_S

from apps.streaming.contracts import SourceState
from apps.streaming.metrics import BUCKET_EDGES_S, STAGES
from apps.streaming.serve import PageServer

Serve = Callable[..., PageServer]
Ask = Callable[..., Any]


@pytest.fixture
def busy(app: FakeApp) -> FakeApp:
    """Two sources with a history, a device with sensors, an output with a queue."""
    gate, rtsp = app.sources
    gate.run(30, age_s=0.04)
    gate.run(10, age_s=0.4)
    rtsp.run(5, age_s=20.0)
    for _ in range(3):
        gate.metrics.frame_read()
        gate.metrics.frame_dropped("newer frame")
    gate.metrics.frame_inferred(True)
    rtsp.state, rtsp.restarts, rtsp.frozen = SourceState.DEGRADED, 4, True
    app.device = JETSON
    app.events = {"mqtt": {"published": 9, "delivered": 6, "dropped": 1, "queued": 2, "failures": 3}}
    return app


def scrape(page: PageServer, asking: Ask) -> dict[str, Metric]:
    answer = asking(page, "/metrics")
    assert answer.headers["Content-Type"].startswith("text/plain")
    return {family.name: family for family in text_string_to_metric_families(answer.text)}


def value(families: dict[str, Metric], name: str, **labels: str) -> float:
    """The one sample of that name and exactly those labels."""
    (found,) = [
        sample.value
        for family in families.values()
        for sample in family.samples
        if sample.name == name and sample.labels == labels
    ]
    return found


def test_figures_agree_with_the_view(serve: Serve, asking: Ask, busy: FakeApp) -> None:
    families = scrape(serve(), asking)
    for source in busy.sources:
        snapshot = source.metrics.snapshot()
        assert value(families, "edgefold_frames_read_total", source=source.name) == snapshot.frames_read
        assert (
            value(families, "edgefold_frames_inferred_total", source=source.name) == snapshot.frames_inferred
        )
    assert value(families, "edgefold_frames_dropped_total", source="gate", reason="newer frame") == 3
    assert value(families, "edgefold_frames_labelled_total", source="gate") == 1
    assert value(families, "edgefold_frames_correct_total", source="gate") == 1
    rtsp = busy.sources[1].name
    assert value(families, "edgefold_source_restarts_total", source=rtsp) == 4
    assert value(families, "edgefold_source_stalls_total", source=rtsp) == 2
    assert value(families, "edgefold_source_frozen", source=rtsp) == 1
    assert 0.05 <= value(families, "edgefold_source_last_frame_age_seconds", source="gate") < SLACK_S
    assert value(families, "edgefold_engine_batches_total") == 400
    assert value(families, "edgefold_engine_batched_frames_total") == 1000
    assert value(families, "edgefold_frame_age_limit_seconds") == 1.0
    assert value(families, "edgefold_events_total", output="mqtt", result="dropped") == 1
    assert value(families, "edgefold_events_queued", output="mqtt") == 2
    assert value(families, "edgefold_power_watts", rail="VDD_IN") == 7.32
    assert value(families, "edgefold_temperature_celsius", sensor="GPU") == 49.0
    assert value(families, "edgefold_memory_resident_bytes") == 412 * 2**20
    labels = {"bundle": "harbour", "digest": "3f9a0c11d2e4", "engine": "openvino", "precision": "int8"}
    assert value(families, "edgefold_engine_info", **labels) == 1


def test_exactly_one_state_holds(serve: Serve, asking: Ask, busy: FakeApp) -> None:
    samples = scrape(serve(), asking)["edgefold_source_state"].samples
    for source in busy.sources:
        states = {
            sample.labels["edgefold_source_state"]: sample.value
            for sample in samples
            if sample.labels["source"] == source.name
        }
        assert set(states) == {state.value for state in SourceState}
        assert [name for name, holds in states.items() if holds] == [source.state.value]


def test_histograms_in_seconds(serve: Serve, asking: Ask, busy: FakeApp) -> None:
    families = scrape(serve(), asking)
    family = families["edgefold_stage_seconds"]
    assert family.type == "histogram"
    for source in busy.sources:
        for stage in STAGES:
            samples = [
                sample
                for sample in family.samples
                if sample.labels["source"] == source.name and sample.labels["stage"] == stage
            ]
            buckets = [
                (float(sample.labels["le"]), sample.value)
                for sample in samples
                if sample.name.endswith("_bucket")
            ]
            assert [edge for edge, _ in buckets] == [*BUCKET_EDGES_S, math.inf]
            counts = [count for _, count in buckets]
            assert counts == sorted(counts)
            (count,) = [sample.value for sample in samples if sample.name.endswith("_count")]
            assert counts[-1] == count == source.n_frames
    where = {"source": "gate", "stage": "age"}
    assert value(families, "edgefold_stage_seconds_bucket", **where, le="0.035") == 0
    assert value(families, "edgefold_stage_seconds_bucket", **where, le="0.05") == 30
    assert value(families, "edgefold_stage_seconds_bucket", **where, le="0.5") == 40
    assert value(families, "edgefold_stage_seconds_sum", **where) == pytest.approx(30 * 0.04 + 10 * 0.4)
    late = {"source": busy.sources[1].name, "stage": "age"}
    assert value(families, "edgefold_stage_seconds_bucket", **late, le="10.0") == 0


def test_names_follow_the_rules(serve: Serve, asking: Ask, busy: FakeApp) -> None:
    """Those of `promtool check metrics`, and: what tells two series apart is a label, not a name."""
    text = asking(serve(), "/metrics").text
    families = list(text_string_to_metric_families(text))
    assert len({family.name for family in families}) == len(families) > 20
    declared = re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE)
    for name, kind in declared:
        assert re.fullmatch(r"edgefold(_[a-z]+)+", name), name
        assert name.endswith("_total") == (kind == "counter"), name
        assert not re.search(r"_(ms|milliseconds|mw|percent|mib|histogram|gauge|counter)(_|$)", name), name
        assert kind != "histogram" or name.endswith("_seconds"), name
    series = set()
    for family in families:
        assert family.documentation, family.name
        for sample in family.samples:
            key = (sample.name, *sorted(sample.labels.items()))
            assert key not in series
            series.add(key)


def test_a_camera_more_adds_no_name(serve: Serve, asking: Ask, busy: FakeApp) -> None:
    few = set(scrape(serve(), asking))
    busy.sources.append(type(busy.sources[0])("yard"))
    assert set(scrape(serve(), asking)) == few


def test_what_the_machine_does_not_say_is_left_out(serve: Serve, asking: Ask) -> None:
    families = scrape(serve(), asking)
    samples = {sample.name for family in families.values() for sample in family.samples}
    assert not samples & {"edgefold_temperature_celsius", "edgefold_cpu_ratio", "edgefold_power_mode_info"}
    assert not any(math.isnan(sample.value) for family in families.values() for sample in family.samples)


def test_openmetrics_where_it_is_asked_for(serve: Serve, asking: Ask, busy: FakeApp) -> None:
    answer = asking(serve(), "/metrics", Accept="application/openmetrics-text; version=1.0.0")
    assert answer.headers["Content-Type"].startswith("application/openmetrics-text")
    names = {family.name for family in parse_openmetrics(answer.text)}
    assert {"edgefold_stage_seconds", "edgefold_source_state", "edgefold_engine"} <= names


def test_odd_names_survive(serve: Serve, asking: Ask, app: FakeApp) -> None:
    app.sources[0].name = 'hall "north"\\2\nx'
    families = scrape(serve(), asking)
    assert value(families, "edgefold_frames_read_total", source=app.sources[0].name) == 0


def test_the_page_s_own_events_are_counted(serve: Serve) -> None:
    page = serve()
    for index in range(60):
        page.events.publish(entered("gate", "ship", index))
    assert page.events.counters()["published"] == 60
    assert [event.timestamp_ns for event in page.events.latest()] == list(range(59, 9, -1))
