"""Headless Chromium for a test, driven over the DevTools protocol: a page, its errors, its keyboard."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
from waiting import PATIENCE_S

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_START_S = 20.0
_POLL_S = 0.05
_KEYS = {"Enter": (13, "\r"), " ": (32, " "), "Escape": (27, ""), "Tab": (9, ""), "ArrowRight": (39, "")}


class Browser:
    """One tab. `problems` has what went to its console as an error and what was thrown."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._n_sent = 0
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self.problems: list[str] = []
        self._reader = asyncio.ensure_future(self._read())

    async def _read(self) -> None:
        async for message in self._socket:
            data = json.loads(message.data)
            if "id" in data:
                self._waiting.pop(data["id"]).set_result(data)
            elif data["method"] == "Runtime.exceptionThrown":
                self.problems.append(json.dumps(data["params"]["exceptionDetails"]))
            elif data["method"] == "Log.entryAdded" and data["params"]["entry"]["level"] == "error":
                self.problems.append(json.dumps(data["params"]["entry"]))

    async def call(self, method: str, **params: Any) -> Any:
        self._n_sent += 1
        future = self._waiting[self._n_sent] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": self._n_sent, "method": method, "params": params})
        answer = await asyncio.wait_for(future, _START_S)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    async def open(self, address: str, width: int = 1440, height: int = 900) -> None:
        await self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        await self.call("Page.navigate", url=address)

    async def evaluate(self, expression: str) -> Any:
        answer = await self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    async def until(self, expression: str, timeout_s: float = PATIENCE_S) -> Any:
        """Waits for an expression to be true, and returns its value."""
        deadline_s = asyncio.get_running_loop().time() + timeout_s
        while not (value := await self.evaluate(expression)):
            if asyncio.get_running_loop().time() > deadline_s:
                raise AssertionError(f"not true within {timeout_s:g} s: {expression}")
            await asyncio.sleep(_POLL_S)
        return value

    async def press(self, key: str) -> None:
        code, text = _KEYS[key]
        name = "Space" if key == " " else key
        common = {"key": key, "code": name, "windowsVirtualKeyCode": code}
        await self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **common)
        await self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    async def screenshot(self, path: Path) -> None:
        answer = await self.call("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(answer["data"]))

    async def close(self) -> None:
        self._reader.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reader


@contextlib.asynccontextmanager
async def browser(profile: Path) -> AsyncIterator[Browser]:
    """A Chromium of its own, with an empty profile in a folder that exists."""
    assert CHROMIUM is not None
    process = subprocess.Popen(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",  # containers run tests as root
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--no-proxy-server",
            "--disable-background-networking",
            "--remote-debugging-port=0",
            f"--user-data-dir={profile}",
            "about:blank",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        port = await _debugging_port(profile / "DevToolsActivePort", process)
        async with aiohttp.ClientSession() as session:
            address = await _page_address(session, port)
            async with session.ws_connect(address, max_msg_size=0) as socket:
                tab = Browser(socket)
                for domain in ("Page", "Runtime", "Log"):
                    await tab.call(f"{domain}.enable")
                yield tab
                await tab.close()
    finally:
        process.terminate()
        process.wait(PATIENCE_S)


async def _page_address(session: aiohttp.ClientSession, port: int) -> str:
    """Of the first tab, which may come a moment after the port."""
    for _ in range(round(_START_S / _POLL_S)):
        async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
            for target in await answer.json():
                if target["type"] == "page":
                    return str(target["webSocketDebuggerUrl"])
        await asyncio.sleep(_POLL_S)
    raise RuntimeError(f"Chromium has opened no tab within {_START_S:g} s")


async def _debugging_port(file: Path, process: subprocess.Popen[bytes]) -> int:
    for _ in range(round(_START_S / _POLL_S)):
        if process.poll() is not None:
            raise RuntimeError(f"Chromium ended with {process.returncode}")
        with contextlib.suppress(FileNotFoundError, IndexError, ValueError):
            return int(file.read_text().splitlines()[0])
        await asyncio.sleep(_POLL_S)
    raise RuntimeError(f"Chromium has not said where it listens within {_START_S:g} s")
