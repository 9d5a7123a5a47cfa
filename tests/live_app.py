"""`edgefold stream` as a process that runs while a test looks at its page and does things to it.

with live_app(tmp_path, config) as app:
    app.until(lambda: app.source("gate")["status"]["state"] == "LIVE")
    status, summary = app.stop()
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ports import reserved_port
from waiting import PATIENCE_S

__all__ = ["COMMAND", "LiveApp", "environment", "live_app"]

COMMAND = (sys.executable, "-c", "from apps.cli import main; main()", "stream")
_POLL_S = 0.05


def environment(folder: Path, **more: str) -> dict[str, str]:
    """Without a display, and with a cache of its own."""
    kept = {key: value for key, value in os.environ.items() if key not in ("DISPLAY", "WAYLAND_DISPLAY")}
    return {**kept, "EDGEFOLD_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "2", **more}


@dataclass
class LiveApp:
    """A running app with a page on `port`; its standard error goes to `log`, its standard output to `out`."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path
    out: Path

    def get(self, path: str, method: str = "GET") -> tuple[int, str]:
        """Status and body of an answer of the page; 0 where it does not answer."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", method=method, headers={"X-Edgefold": "1"}
        )
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError:
            return 0, ""

    def view(self) -> dict[str, Any]:
        """Everything the page shows."""
        status, body = self.get("/api/view")
        assert status == 200, (status, self.log.read_text())
        view: dict[str, Any] = json.loads(body)
        return view

    def source(self, name: str) -> dict[str, Any]:
        """One source of the view: ``status``, ``metrics``, ``latest``, ``present``."""
        return next(one for one in self.view()["sources"] if one["status"]["source_id"] == name)

    def state(self, name: str) -> str:
        return str(self.source(name)["status"]["state"])

    def metric(self, name: str, **labels: str) -> float:
        """Of /metrics, summed over the labels that are not given."""
        _, body = self.get("/metrics")
        total = 0.0
        for line in body.splitlines():
            found = re.fullmatch(rf"{name}(?:\{{(.*)\}})? (\S+)", line)
            if found and all(f'{key}="{value}"' in (found[1] or "") for key, value in labels.items()):
                total += float(found[2])
        return total

    def until(self, condition: Callable[[], Any], seconds: float = PATIENCE_S) -> None:
        """Waits for something to become so; fails when the app ends, or it does not."""
        deadline_s = time.monotonic() + seconds
        while not condition():
            ended = self.process.poll()
            assert ended is None, f"the app ended with {ended}: {self.log.read_text()[-3000:]}"
            assert time.monotonic() < deadline_s, (
                f"not within {seconds:g} s: {self.get('/api/view')[1][:3000]} {self.log.read_text()[-3000:]}"
            )
            time.sleep(_POLL_S)

    def until_state(self, name: str, state: str) -> None:
        self.until(lambda: self.state(name) == state)

    def frames(self, name: str) -> int:
        return int(self.source(name)["metrics"]["frames_inferred"])

    def until_more(self, name: str, count: int = 3) -> None:
        """Waits until so many more frames of the source were classified."""
        before = self.frames(name)
        self.until(lambda: self.frames(name) >= before + count)

    def children(self) -> dict[int, str]:
        """The capture processes: process id and command line. Their parents are threads of the app."""
        found: dict[int, str] = {}
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            with contextlib.suppress(OSError):
                for pid in (task / "children").read_text().split():
                    found[int(pid)] = Path(f"/proc/{pid}/cmdline").read_bytes().decode()
        return found

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, dict[str, Any]]:
        """Exit status, and the summary that it printed."""
        self.process.send_signal(number)
        status = self.process.wait(PATIENCE_S)
        printed = self.out.read_text()
        return status, json.loads(printed) if printed.strip() else {}


@contextlib.contextmanager
def live_app(
    folder: Path,
    config: str,
    *,
    program: str | None = None,
    wait_for_page: bool = True,
    variables: Mapping[str, str] = {},
) -> Iterator[LiveApp]:
    """Starts the app on a configuration; kills it at the end.

    Args:
        folder: for its files.
        config: TOML without ``[serve]``.
        program: Python that runs in the place of the command's own entry point.
        wait_for_page: until the page answers.
        variables: of the environment, besides the caller's.
    """
    with ExitStack() as stack:
        app = _start(folder, config, stack.enter_context(reserved_port()), program, variables)
        stack.callback(app.process.wait)
        stack.callback(app.process.kill)
        if wait_for_page:
            app.until(lambda: app.get("/healthz")[0] == 200)
        yield app


def _start(
    folder: Path, config: str, port: int, program: str | None, variables: Mapping[str, str]
) -> LiveApp:
    path = folder / "cameras.toml"
    path.write_text(f"{config}\n[serve]\nport = {port}\nmax_clients = 4\n")
    command = [*COMMAND] if program is None else [sys.executable, "-c", program, "stream"]
    log, out = folder / "log.txt", folder / "out.txt"
    with log.open("wb") as errors, out.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--config", str(path), "--json"],
            stdout=output,
            stderr=errors,
            env=environment(folder, **variables),
        )
    return LiveApp(process, port, log, out)
