"""What the process keeps of what it does not use any more. Hours of faults are for `benchmarks/soak.py`."""

from __future__ import annotations

import json
import platform
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from live_app import LiveApp
from tolerances import LOOKED_AT_BY_THE_COLLECTOR

# The real command, which says at its end how many arenas there are, and what the collector would look at.
TELLING = """
import atexit, ctypes, gc, json, os, pathlib
from apps.cli import main

def tell():
    libc, path = ctypes.CDLL(None), os.environ["TOLD"]
    libc.fopen.restype = ctypes.c_void_p
    libc.malloc_info.argtypes = [ctypes.c_int, ctypes.c_void_p]
    libc.fclose.argtypes = [ctypes.c_void_p]
    file = libc.fopen(path.encode(), b"w")
    libc.malloc_info(0, file)
    libc.fclose(file)
    arenas = pathlib.Path(path).read_text().count("<heap nr=")
    seen = {"arenas": arenas, "looked_at": len(gc.get_objects()), "set_aside": gc.get_freeze_count()}
    pathlib.Path(path).write_text(json.dumps(seen))

atexit.register(tell)
main()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has no malloc_info")
def test_reloads_and_clients_are_not_kept(
    run_app: Callable[..., LiveApp], bundle: Path, tmp_path: Path
) -> None:
    told = tmp_path / "told.json"
    config = f'bundle = "{bundle}"\n[[source]]\nname = "camera"\nuri = "synthetic:1"\nfps = 5\n'
    app = run_app(config, program=TELLING, variables={"TOLD": str(told)})
    app.until_more("camera")
    for count in range(1, 6):
        app.process.send_signal(signal.SIGHUP)
        app.until(lambda count=count: app.metric("edgefold_engine_reloads_total") == count)
        clients = []
        for _ in range(40):
            client = socket.create_connection(("127.0.0.1", app.port), timeout=10)
            client.sendall(b"GET /video/camera HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            clients.append(client)
        app.until(lambda count=count: app.metric("edgefold_page_clients_refused_total") >= 30 * count)
        for client in clients:
            client.close()
        app.until(lambda: app.metric("edgefold_page_clients", kind="video") == 0)
    status, _ = app.stop()
    assert status == 0, app.log.read_text()
    seen = json.loads(told.read_text())
    assert seen["arenas"] == 1
    assert seen["set_aside"] > LOOKED_AT_BY_THE_COLLECTOR
    assert seen["looked_at"] < LOOKED_AT_BY_THE_COLLECTOR
