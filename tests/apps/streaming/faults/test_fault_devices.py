"""A USB camera that is pulled out and comes back under another number, in a running app.

There is a real app, a real link in ``/dev/v4l/by-id`` and a real capture process; the camera behind the link is played
(`tests/v4l2_stand_in`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from live_app import LiveApp

from benchmarks.mjpeg_camera import MjpegCamera

BY_ID = Path("/dev/v4l/by-id")
STAND_IN = Path(__file__).parents[3] / "v4l2_stand_in"
RED, BLUE = "40 40 220", "220 40 40"


@pytest.fixture
def link() -> Iterator[Path]:
    """Where the camera's link by id belongs; what had to be made for it is removed."""
    made = [folder for folder in (BY_ID, BY_ID.parent) if not folder.exists()]
    try:
        BY_ID.mkdir(parents=True, exist_ok=True)
        path = BY_ID / f"usb-Edgefold_Test_{os.getpid()}-video-index0"
        path.symlink_to("/nowhere")
        path.unlink()
    except OSError as error:
        pytest.skip(f"no link can be made in {BY_ID}: {error.strerror}")
    yield path
    path.unlink(missing_ok=True)
    for folder in made:
        folder.rmdir()


def test_a_camera_by_id_is_found_again_under_another_number(
    run_app: Callable[..., LiveApp], bundle: Path, tmp_path: Path, link: Path
) -> None:
    cameras = tmp_path / "dev"
    cameras.mkdir()

    def plug_in(number: int, color: str) -> None:
        (cameras / f"video{number}").write_text(color)
        link.symlink_to(cameras / f"video{number}")

    def pull_out(number: int) -> None:
        link.unlink()
        (cameras / f"video{number}").unlink()

    def shown() -> str:
        latest = app.source("usb")["latest"]
        return "" if latest is None else str(latest["top"][0]["label"])

    other = MjpegCamera()
    config = f"""
bundle = "{bundle}"
[limits]
degraded_s = 1
stall_s = 5
backoff_s = [0.1, 0.5]
restart_budget = 100000
[[source]]
name = "usb"
uri = "{link}"
[[source]]
name = "network"
uri = "{other.url}"
"""
    variables = {"V4L2_STAND_IN": str(cameras), "PYTHONPATH": str(STAND_IN)}
    try:
        app = run_app(config, variables=variables)
        # It is away when the app starts, which the app survives.
        app.until(lambda: "is not there" in (app.source("usb")["status"]["reason"] or ""))
        app.until_state("network", "LIVE")
        assert app.state("usb") == "CONNECTING"
        plug_in(7, RED)
        app.until_state("usb", "LIVE")
        app.until(lambda: shown() == "red")
        pull_out(7)
        app.until_state("usb", "DEGRADED")
        app.until(lambda: "unplugged" in (app.source("usb")["status"]["reason"] or ""))
        app.until_more("network")
        # Another device has taken its number meanwhile.
        (cameras / "video7").write_text(RED)
        plug_in(3, BLUE)
        app.until_state("usb", "LIVE")
        app.until(lambda: shown() == "blue")
        assert app.source("usb")["status"]["restarts"] >= 2
        app.until_state("network", "LIVE")
        assert app.source("network")["status"]["restarts"] == 0
        assert app.stop()[0] == 0
    finally:
        other.close()
