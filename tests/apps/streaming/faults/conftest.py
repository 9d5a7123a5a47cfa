"""One app over several cameras for the faults of cameras, so that each fault has neighbours to spare."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from live_app import LiveApp, live_app

from benchmarks.mjpeg_camera import MjpegCamera

pytest.importorskip("aiohttp")
pytest.importorskip("prometheus_client")
pytest.importorskip("cv2")

RED, BLUE = (220, 40, 40), (40, 40, 220)
LIMITS = """
[limits]
degraded_s = 1.0
stall_s = 5.0
frozen_s = 1.5
backoff_s = [0.1, 0.5]
restart_budget = 100000
lost_retry_s = 0.5
"""
"""Patient enough for a machine that is busy elsewhere: a camera that is well is never taken for silent. The sources'
own time-outs are longer, so that it is the watchdog that ends a stall."""


if sys.platform != "linux":  # capture processes need it
    collect_ignore_glob = ["test_*.py"]


@dataclass
class Site:
    """Two cameras that show red, `gate` to be hurt and `yard` to be left alone, and the app over both."""

    app: LiveApp
    gate: MjpegCamera
    yard: MjpegCamera
    folder: Path

    def recovers(self) -> None:
        """The camera is well again, and the app sees it."""
        self.gate.behaviour = "well"
        self.app.until_state("gate", "LIVE")
        self.app.until_more("gate")

    def untouched(self) -> None:
        """The other camera, of which nothing may be noticed."""
        self.app.until_state("yard", "LIVE")  # on a busy machine its frames may be late, too
        status = self.app.source("yard")["status"]
        assert (status["restarts"], status["stalls"]) == (0, 0)
        self.app.until_more("yard")


@pytest.fixture(scope="module")
def site(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    gate, yard = (MjpegCamera(rgb=RED, other_rgb=BLUE) for _ in range(2))
    (folder / "current").symlink_to(bundle)
    config = f"""
bundle = "{folder / "current"}"
max_age_ms = 5000
{LIMITS}
[[source]]
name = "gate"
uri = "{gate.url}#timeout=30"

[[source]]
name = "yard"
uri = "{yard.url}#timeout=30"
"""
    try:
        with live_app(folder, config) as app:
            for name in ("gate", "yard"):
                app.until_state(name, "LIVE")
            yield Site(app, gate, yard, folder)
            status, _ = app.stop()
            assert status == 0, app.log.read_text()[-3000:]
    finally:
        gate.close()
        yard.close()


@pytest.fixture
def run_app(tmp_path: Path) -> Iterator[Callable[..., LiveApp]]:
    """Starts apps that end with the test."""
    with ExitStack() as stack:
        yield lambda config, **options: stack.enter_context(live_app(tmp_path, config, **options))
