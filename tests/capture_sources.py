"""Sources that misbehave on demand, opened by name in real capture processes.

What they do stands in the file that the URI names, as JSON: a list of steps, each done by one read. It
is read at every opening, with the number of the opening in ``FILE.count``, so a source can be bad once.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apps.streaming.sources import Delivered, ModelClasses, SourceUri
from pipeline.errors import DataError, SourceLostError

FPS = 200.0


class ScriptedSource:
    color = "BGR"
    self_paced = True
    fps = FPS

    def __init__(self, uri: SourceUri, classes: ModelClasses) -> None:
        self.source_id = uri.shown
        self.live = uri.live
        self.labels = classes.named(None, [])
        self.notes: list[str] = []
        counter = Path(f"{uri.path}.count")
        opening = int(counter.read_text()) if counter.exists() else 0
        counter.write_text(str(opening + 1))
        scripts = json.loads(uri.path.read_text())
        self._steps = iter(scripts[min(opening, len(scripts) - 1)])
        self._repeat: Any = None
        self._index = 0

    def read(self, into: NDArray[np.uint8] | None = None) -> Delivered | None:
        step = next(self._steps, None) if self._repeat is None else self._repeat
        if isinstance(step, str) and step.startswith("forever "):
            step = self._repeat = step.removeprefix("forever ")
        if step is None:
            return None
        return self._do(step, into)

    def _do(self, step: str, into: NDArray[np.uint8] | None) -> Delivered:
        kind, _, rest = step.partition(" ")
        if kind in ("frame", "same", "fast"):
            if kind != "fast":
                time.sleep(1 / FPS)
            h, w = (int(n) for n in rest.split("x")) if rest else (24, 32)
            value = 7 if kind == "same" else self._index % 251
            self._index += 1
            if into is not None and into.shape == (h, w, 3):
                into[...] = value
                return Delivered(into, value)
            return Delivered(np.full((h, w, 3), value, np.uint8), value)
        if kind == "array":
            shape = tuple(int(n) for n in rest.split("x"))
            return Delivered(np.full(shape, 9, np.uint8))
        if kind == "none":
            return Delivered(None)
        if kind == "hang":
            time.sleep(3600)
        if kind == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "say":
            print(rest, flush=True)
            return self._do("frame", into)
        if kind == "raise":
            raise RuntimeError(rest)
        if kind == "lost":
            raise SourceLostError("401: wrong password", "seldom")
        if kind == "bad":
            raise DataError("this is no video")
        raise AssertionError(step)

    def close(self) -> None:
        pass


def open_scripted(uri: SourceUri, classes: ModelClasses, fps: float | None) -> ScriptedSource:
    if uri.path.name.startswith("never"):
        time.sleep(3600)
    return ScriptedSource(uri, classes)
