from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fake_stream import FakeApp
from waiting import eventually

from apps.streaming.contracts import SourceState
from apps.streaming.serve import PageServer
from apps.streaming.serve.health import READY_LIMIT_S, Verdict, readiness


def ready(app: FakeApp) -> Verdict:
    return readiness(app.view(), time.monotonic_ns())


def test_ready_while_every_source_is_live(app: FakeApp) -> None:
    verdict = ready(app)
    assert verdict.ok
    assert verdict.reasons == ()


def test_one_dead_camera_is_named_and_tolerated(app: FakeApp) -> None:
    app.sources[1].state, app.sources[1].reason = SourceState.LOST, "404"
    app.sources[1].last_frame_age_s = None
    verdict = ready(app)
    assert verdict.ok
    assert verdict.reasons == ("rtsp://10.0.0.12:554/stream1: no frame yet, LOST: 404",)


def test_not_ready_when_all_frames_are_old(app: FakeApp) -> None:
    for source in app.sources:
        source.last_frame_age_s = READY_LIMIT_S + 0.5
    verdict = ready(app)
    assert not verdict.ok
    assert "last frame 5.5 s ago" in verdict.reasons[0]


def test_a_state_that_lags_does_not_make_an_old_frame_young(app: FakeApp) -> None:
    """By the frame's age: a runtime that has hung still calls its sources LIVE."""
    for source in app.sources:
        source.state, source.last_frame_age_s = SourceState.LIVE, 60.0
    assert not ready(app).ok


def test_not_ready_before_the_first_frame(app: FakeApp) -> None:
    for source in app.sources:
        source.state, source.last_frame_age_s = SourceState.CONNECTING, None
    verdict = ready(app)
    assert not verdict.ok
    assert verdict.reasons[-1] == "engine: it has not answered yet"


def test_not_ready_when_frames_come_and_the_engine_does_not_answer(app: FakeApp) -> None:
    view, later_ns = app.view(), int((READY_LIMIT_S + 1) * 1e9)
    sources = tuple(
        replace(source, status=replace(source.status, last_frame_ns=time.monotonic_ns() + later_ns))
        for source in view.sources
    )
    verdict = readiness(replace(view, sources=sources), time.monotonic_ns() + later_ns)
    assert verdict.sources == dict.fromkeys((source.name for source in app.sources), "ready")
    assert not verdict.ok
    assert verdict.reasons[0].startswith("engine: its last answer is for a frame 6.")


def test_not_ready_when_all_sources_have_ended(app: FakeApp) -> None:
    for source in app.sources:
        source.state = SourceState.ENDED
    assert not ready(app).ok


def test_over_http(serve: Callable[..., PageServer], asking: Callable[..., Any], app: FakeApp) -> None:
    page = serve()
    assert asking(page, "/readyz").json()["ok"] is True
    for source in app.sources:
        source.last_frame_age_s = 30.0
    # The view is shared for a quarter of a second.
    eventually(lambda: asking(page, "/readyz").status == 503)
    answer = asking(page, "/readyz")
    assert answer.json()["sources"]["gate"].startswith("last frame 3")  # 30 s ago, or a little more
