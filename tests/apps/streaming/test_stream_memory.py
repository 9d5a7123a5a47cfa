"""What allocator and collector are told, by what it does to the memory of a process: each script is one."""

from __future__ import annotations

import contextlib
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tolerances import FREED_PAGES_LEFT_MB, ONE_ARENA_GROWTH_MB

from apps.streaming import memory
from apps.streaming.engine_slot import EngineSlot
from apps.streaming.reload import Reloader
from pipeline.bundle import BundleWriter, open_bundle
from pipeline.errors import IntegrityError

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has other arenas")

HEAD = """
import gc, json, pathlib, sys, threading
from apps.streaming import memory

def private_mb():
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024
"""
# As in the app: twenty threads that stay have their arenas, and every reload is a thread of its own.
RELOADS = """
from pipeline.bundle import open_bundle
if sys.argv[2] == "one":
    memory.keep_one_arena()
go_on = threading.Event()
def stay():
    kept = bytearray(4096)
    go_on.wait()
for _ in range(20):
    threading.Thread(target=stay, daemon=True).start()
def reload():
    thread = threading.Thread(target=open_bundle, args=(sys.argv[1],))
    thread.start()
    thread.join()
for _ in range(2):
    reload()
before_mb = private_mb()
for _ in range(40):
    reload()
print(json.dumps(private_mb() - before_mb))
"""
FREED = """
memory.keep_one_arena()
blocks = [bytearray(60_000) for _ in range(1000)]
del blocks[:-1]  # the last holds what is below it
held_mb = private_mb()
memory.give_back_freed()
print(json.dumps([held_mb, private_mb()]))
"""
COLLECTOR = """
kept = [[] for _ in range(50_000)]
garbage = []
garbage.append(garbage)
del garbage
memory.set_start_up_aside()
print(json.dumps([gc.get_freeze_count(), len(gc.get_objects()), gc.collect()]))
"""


def run(script: str, *arguments: str) -> Any:
    command = [sys.executable, "-c", HEAD + script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def large_bundle(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a file of megabytes, as networks have them."""
    small = open_bundle(bundle)
    with BundleWriter(tmp_path_factory.mktemp("large") / "bundle") as writer:
        for name in small.manifest.files:
            writer.add_file(name, bundle / name)
        writer.add_file("report.html", bytes(range(256)) * (1 << 14))
        return writer.commit(small.manifest).path


@glibc
def test_threads_in_turn_use_what_the_one_before_freed(large_bundle: Path) -> None:
    assert run(RELOADS, str(large_bundle), "one") < ONE_ARENA_GROWTH_MB
    # What is measured is there to be seen: without it, every arena keeps the megabyte that a file is read through.
    assert run(RELOADS, str(large_bundle), "as it is") > 2 * ONE_ARENA_GROWTH_MB


@glibc
def test_freed_pages_go_back_to_the_system() -> None:
    held_mb, left_mb = run(FREED)
    assert held_mb > 57
    assert held_mb - left_mb > 57 - FREED_PAGES_LEFT_MB


def test_the_collector_passes_over_what_was_there_at_the_start() -> None:
    set_aside, looked_at, collected = run(COLLECTOR)
    assert set_aside > 50_000
    assert looked_at < 1000
    assert collected == 0  # the garbage was collected, and not set aside


@pytest.mark.parametrize("refused", [False, True])
def test_a_reload_gives_back_what_it_freed(
    engine_around: Any, fake_runner: Any, monkeypatch: pytest.MonkeyPatch, refused: bool
) -> None:
    old, new = (engine_around(fake_runner(lambda pixels: pixels)) for _ in range(2))
    slot = EngineSlot(old)
    closed: list[bool] = []
    monkeypatch.setattr(old.runner, "close", lambda: closed.append(True))
    given_back_after: list[list[bool]] = []
    monkeypatch.setattr("apps.streaming.reload.give_back_freed", lambda: given_back_after.append(closed[:]))

    def load(path: Path) -> Any:
        if refused:
            raise IntegrityError(f"{path} is damaged")
        return new

    with pytest.raises(IntegrityError) if refused else contextlib.nullcontext():
        Reloader(slot, Path("bundle"), load).reload()
    assert given_back_after == [[] if refused else [True]]


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_glibc", lambda: None)
    memory.keep_one_arena()
    memory.give_back_freed()
