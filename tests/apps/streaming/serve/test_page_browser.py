"""The page in a real browser: what it shows, that its video moves, its keyboard, and what it says when the
app is gone. Two runs of headless Chromium."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import devtools
import pytest
from devtools import Browser
from fake_stream import JETSON, FakeApp, entered, picture
from waiting import PATIENCE_S

from apps.streaming.contracts import SourceState
from apps.streaming.serve import PageServer

pytestmark = pytest.mark.skipif(devtools.CHROMIUM is None, reason="needs Chromium (apt install chromium)")

Serve = Callable[..., PageServer]
TOKEN = "only-for-the-tests-7"
CARD = "document.querySelector('article[data-source=\"gate\"]')"
PICTURES = f"Number({CARD}.querySelector('canvas').dataset.pictures ?? 0)"
LARGE = "document.querySelector('#single canvas')"


@contextmanager
def streaming(app: FakeApp, page: PageServer) -> Iterator[None]:
    ended = threading.Event()

    def run() -> None:
        count = 0
        while not ended.wait(1 / 30):
            count += 1
            page.beat()
            for source in app.sources:
                if source.state is SourceState.LIVE:
                    source.run(1)
                    if page.hub.wanted(source.name):
                        page.hub.publish(source.name, picture(count))

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def browse(profile: Path, visit: Callable[[Browser], Awaitable[None]]) -> None:
    async def run() -> None:
        async with devtools.browser(profile) as tab:
            await visit(tab)

    asyncio.run(run())


def test_the_page_on_a_desk(serve: Serve, app: FakeApp, tmp_path: Path) -> None:
    page = serve(token=TOKEN)
    rtsp = app.sources[1]
    rtsp.state, rtsp.reason, rtsp.last_frame_age_s = SourceState.DEGRADED, "no frame for 3.2 s", 3.2
    rtsp.name = '<img src=x onerror="alert(1)">'  # a name is text, whatever it says
    app.sources[0].metrics.frame_read()
    app.sources[0].metrics.frame_dropped("newer frame")
    app.device = JETSON
    page.events.publish(entered("gate", "ship"))

    async def visit(tab: Browser) -> None:
        await tab.open(f"{page.url}?token={TOKEN}")
        await tab.until("document.querySelectorAll('article').length === 2")
        assert await tab.evaluate("location.search") == ""  # the token is in the cookie now

        # States in words, reasons, figures.
        words = "[...document.querySelectorAll('article .badge span')].map((each) => each.textContent)"
        assert await tab.evaluate(words) == ["LIVE", "DEGRADED"]
        text = await tab.evaluate("document.querySelector('main').innerText")
        for shown in (
            "no frame for 3.2 s",
            "newer frame 1",
            "ship",
            "90%",
            "harbour",
            "2.50",
            "51.5 °C",
            "15W",
        ):
            assert shown in text, shown
        assert await tab.evaluate("document.querySelectorAll('article img').length") == 0
        assert await tab.evaluate("document.getElementById('device-panel').hidden") is False

        # The video moves: pictures come, and differ.
        first = await tab.until(PICTURES)
        before = await tab.evaluate(f"{CARD}.querySelector('canvas').toDataURL()")
        await tab.until(f"{PICTURES} > {first + 3}")
        assert await tab.evaluate(f"{CARD}.querySelector('canvas').toDataURL()") != before

        # A change of state is shown and announced.
        app.sources[0].state, app.sources[0].reason = SourceState.LOST, "no such device"
        await tab.until(f"{CARD}.querySelector('.badge').dataset.state === 'LOST'")
        assert await tab.evaluate("document.getElementById('announce').textContent") == (
            "gate is LOST: no such device"
        )
        app.sources[0].state, app.sources[0].reason = SourceState.LIVE, None
        await tab.until(f"{CARD}.querySelector('.badge').dataset.state === 'LIVE'")

        await _by_keyboard(tab)

        await tab.evaluate("document.getElementById('check').click()")
        await tab.until("document.getElementById('command-result').textContent.includes('verified just now')")
        await tab.evaluate("document.getElementById('reload').click()")
        await tab.until("document.getElementById('command-result').textContent.includes('loaded anew')")
        assert app.reloaded == [None]
        assert tab.problems == []

        # The app goes: the page says so, and says that what it shows is old.
        page.close()
        await tab.until("!document.getElementById('lost').hidden")
        assert "What you see is old" in await tab.evaluate("document.getElementById('lost').textContent")
        assert await tab.evaluate("document.getElementById('connection').dataset.state") == "LOST"

    with streaming(app, page):
        browse(tmp_path, visit)


async def _by_keyboard(tab: Browser) -> None:
    """Tab to the first source, open it with Enter, turn to the next, close it; the focus comes back."""
    order = []
    for _ in range(4):
        await tab.press("Tab")
        order.append(
            await tab.evaluate(
                "document.activeElement.getAttribute('aria-label') ?? document.activeElement.textContent"
            )
        )
    assert order[:2] == ["Skip to the sources", "Show gate large"]
    assert order[3] == "Check preprocessing"
    await tab.evaluate(f"{CARD}.querySelector('.picture').focus()")
    for key in ("Enter", " "):
        await tab.press(key)
        await tab.until("document.getElementById('single').open")
        assert await tab.evaluate("document.getElementById('single-name').textContent") == "gate"
        drawn = await tab.evaluate(f"Number({LARGE}.dataset.pictures)")
        await tab.until(f"Number({LARGE}.dataset.pictures) > {drawn + 2}")
        await tab.press("ArrowRight")
        await tab.until("document.getElementById('single-name').textContent !== 'gate'")
        await tab.press("ArrowRight")
        await tab.until("document.getElementById('single-name').textContent === 'gate'")
        await tab.press("Escape")
        await tab.until("!document.getElementById('single').open")
        await tab.until("document.activeElement.getAttribute('aria-label') === 'Show gate large'")


def test_the_page_on_a_phone_with_eight_sources(serve: Serve, app: FakeApp, tmp_path: Path) -> None:
    """Eight, since a browser opens six connections to a host: pictures and figures still come."""
    name = "/dev/v4l/by-id/usb-046d_HD_Pro_Webcam_C920_ABCDEF012345-video-index"
    app.sources = [type(app.sources[0])(f"{name}{index}") for index in range(8)]
    app.sources[0].present = ("a label that is quite a lot longer than most labels are",)
    page = serve()

    async def visit(tab: Browser) -> None:
        await tab.open(page.url, 390, 844)
        await tab.until("document.querySelectorAll('article').length === 8")
        every = "[...document.querySelectorAll('article canvas')].every((each) => each.dataset.pictures > 2)"
        await tab.until(every)
        await tab.until("parseFloat(document.querySelector('[data-figure=fps]').textContent) > 5")
        assert await tab.evaluate("document.documentElement.scrollWidth") <= 390
        assert await tab.evaluate("document.getElementById('device-panel').hidden") is True
        await tab.evaluate("document.querySelector('article .picture').click()")
        await tab.until("document.getElementById('single').open")
        width = await tab.evaluate("document.querySelector('.single-body').scrollWidth")
        assert width <= 390
        # Only the one is sent now.
        deadline_s = time.monotonic() + PATIENCE_S
        while page.hub.wanted(app.sources[1].name) or not await tab.evaluate(f"{LARGE}.dataset.pictures > 3"):
            assert time.monotonic() < deadline_s
        assert tab.problems == []

    with streaming(app, page):
        browse(tmp_path, visit)
