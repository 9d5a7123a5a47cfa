"""What `stream_vs_loop` compares, each a process that goes on until it is killed (see `turns`).

python benchmarks/stream_candidates.py stream BUNDLE FILM
python benchmarks/stream_candidates.py loop MODEL FILM
python benchmarks/stream_candidates.py decode FILM [--reader opencv|stream]
python benchmarks/stream_candidates.py engine BUNDLE
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from turns import answer_counts

__all__ = ["candidate"]


def candidate(*words: object) -> list[str]:
    """The command line of a candidate of this file."""
    return [sys.executable, str(Path(__file__).resolve()), *map(str, words)]


def stream(given: argparse.Namespace) -> None:
    """The session of `edgefold stream`, its capture process below it, on settings that are the command's own but for one:
    a source that has been silent for long is not in trouble, for between its turns it is stopped."""
    from apps.cache import cache_dir
    from apps.streaming.config import CaptureLimits, SourceConfig, StreamConfig
    from apps.streaming.session import StreamSession

    source = SourceConfig(f"{given.film}#loop", policy="every")
    limits = CaptureLimits(degraded_s=600.0, stall_s=600.0, open_s=600.0)
    config = StreamConfig(given.bundle, (source,), headless=True, limits=limits)
    session = StreamSession(config, cache_dir=cache_dir("engines"))

    def report() -> None:
        while not hasattr(session, "_runtime") or not session._runtime.batched_frames:
            time.sleep(0.1)
        runtime = session._runtime
        answer_counts(lambda: runtime.batched_frames, images_a_request=session._slot.current.max_batch)

    threading.Thread(target=report, daemon=True).start()
    session.run()


def loop(given: argparse.Namespace) -> None:
    """One frame after the other, as in any tutorial."""
    import cv2
    import numpy as np
    import openvino as ov

    from engines.openvino import compile_properties
    from pipeline.artifacts import EngineOptions

    asked = json.loads(given.model.with_suffix(".json").read_text())
    side, (low, high) = asked["side"], asked["range"]
    mean, std = np.float32(asked["mean"]), np.float32(asked["std"])
    core = ov.Core()
    network = core.read_model(given.model)
    network.reshape([1, 3, side, side])
    request = core.compile_model(network, "CPU", compile_properties(EngineOptions())).create_infer_request()
    capture = cv2.VideoCapture(str(given.film), cv2.CAP_FFMPEG)

    def step() -> None:
        ok, frame = capture.read()
        if not ok:
            capture.set(cv2.CAP_PROP_POS_FRAMES, 0)
            _, frame = capture.read()
        image = cv2.cvtColor(cv2.resize(frame, (side, side)), cv2.COLOR_BGR2RGB)
        values = (image.astype(np.float32) / 255 * (high - low) + low - mean) / std
        scores = request.infer({0: np.ascontiguousarray(values.transpose(2, 0, 1)[np.newaxis])})[0][0]
        text = f"class {int(scores.argmax())}"
        cv2.putText(frame, text, (20, 60), cv2.FONT_HERSHEY_SIMPLEX, 2, (0, 255, 0), 3)

    _repeat(step)


def decode(given: argparse.Namespace) -> None:
    """Reading the film into one array: with OpenCV, as anybody does, or with what `edgefold stream` reads it with here."""
    step, decoder = (_opencv_reader if given.reader == "opencv" else _stream_reader)(given.film)
    _repeat(step, decoder=decoder)


def _opencv_reader(film: Path) -> tuple[Callable[[], None], str]:
    import cv2

    capture = cv2.VideoCapture(str(film), cv2.CAP_FFMPEG)
    _, frame = capture.read()

    def step() -> None:
        if not capture.read(frame)[0]:
            capture.set(cv2.CAP_PROP_POS_FRAMES, 0)

    return step, "OpenCV"


def _stream_reader(film: Path) -> tuple[Callable[[], None], str]:
    from apps.streaming.sources import ModelClasses, open_source, parse_source

    source = open_source(parse_source(f"{film}#loop"), ModelClasses(("0",), 1))
    first = source.read()
    if first is None:
        raise SystemExit(f"{film} has no frames")

    def step() -> None:
        source.read(first.pixels)

    return step, "OpenCV" if first.yuv is None else "PyAV, planes"


def engine(given: argparse.Namespace) -> None:
    """The engine alone, loaded as the stream loads it and with requests of as many images; one more than it has streams
    is under way at any time."""
    import numpy as np

    from apps.cache import cache_dir
    from apps.streaming.loading import EngineRequest, load_engine

    loaded = load_engine(given.bundle, EngineRequest(mode="throughput", cache_dir=cache_dir("engines")))
    (spec,) = loaded.runner.inputs
    shape = (loaded.max_batch, *(int(size) for size in spec.shape[1:]))
    inputs = {spec.name: np.random.default_rng(0).integers(0, 256, shape).astype(spec.dtype)}
    under_way: deque[Future[Any]] = deque(
        loaded.runner.submit(inputs) for _ in range(loaded.runner.n_streams + 1)
    )

    def step() -> None:
        under_way.popleft().result()
        under_way.append(loaded.runner.submit(inputs))

    _repeat(step, frames_a_step=loaded.max_batch, streams=loaded.runner.n_streams)


def _repeat(step: Callable[[], None], *, frames_a_step: int = 1, **facts: object) -> None:
    steps = 0
    step()
    answer_counts(lambda: steps * frames_a_step, **facts)
    while True:
        step()
        steps += 1


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    candidates = parser.add_subparsers(required=True)
    for run, *words in (
        (stream, "bundle", "film"),
        (loop, "model", "film"),
        (decode, "film"),
        (engine, "bundle"),
    ):
        one = candidates.add_parser(run.__name__)
        one.set_defaults(run=run)
        for word in words:
            one.add_argument(word, type=Path)
        if run is decode:
            one.add_argument("--reader", choices=["opencv", "stream"], default="opencv")
    given = parser.parse_args()
    given.run(given)


if __name__ == "__main__":
    main()
