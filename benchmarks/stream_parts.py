"""What the stream benchmarks share: the film, the bundles, and workers that each print one JSON object.

A worker is a process of its own, for `harness.run_rounds`. What it counts, it counts after a warm-up, so that start-up is
left out of both sides of every comparison.

    python benchmarks/stream_parts.py once BUNDLE [-- OPTIONS OF EDGEFOLD STREAM]
    python benchmarks/stream_parts.py many BUNDLE SOURCES SECONDS [--batch N]
    python benchmarks/stream_parts.py engine BUNDLE FRAMES [--batch N] [--mode M] [--precision P]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from collections import deque
from concurrent.futures import Future
from pathlib import Path
from typing import Any

__all__ = ["CALIBRATION", "EDGEFOLD", "FILM_SECONDS", "bundle", "film", "worker"]

EDGEFOLD = (sys.executable, "-c", "from apps.cli import main; main()")
CALIBRATION = "synthetic:0:64"
FILM_SECONDS = 15
_FILM_SOURCE = "testsrc2=size=1920x1080:rate=30,noise=all_seed=1:alls=6:allf=t"
_FILM_ENCODER = ("-c:v", "libx264", "-preset", "medium", "-crf", "23", "-pix_fmt", "yuv420p")


def film(folder: Path, given: Path | None) -> dict[str, Any]:
    """A 1080p H.264 film at 30 FPS: moving patterns and text under a sensor's noise, about 8 Mbit/s.

    Args:
        folder: where it is kept, and found again.
        given: used instead of it.

    Returns:
        For the JSON: ``path``, ``made_by``, ``bytes``.
    """
    if given is not None:
        return {"path": str(given), "made_by": "given", "bytes": given.stat().st_size}
    path = folder / "film.mp4"
    command = ["ffmpeg", "-hide_banner", "-loglevel", "error", "-y", "-f", "lavfi", "-i", _FILM_SOURCE]
    command += ["-t", str(FILM_SECONDS), *_FILM_ENCODER]
    if not path.exists():
        partial = path.with_name("film.partial.mp4")
        subprocess.run([*command, str(partial)], check=True)
        partial.replace(path)
    return {"path": str(path), "made_by": " ".join(command), "bytes": path.stat().st_size}


def bundle(model: str, folder: Path, precision: str = "int8") -> Path:
    """The bundle of `model`, built unless `folder` has it; random weights where the model brings none."""
    path = folder / f"{model}.{precision}"
    if not path.exists():
        command = [*EDGEFOLD, "build", model, "--out", str(path), "--precision", precision, "--json"]
        if precision == "int8":
            # Corrections change weights, not what the engine has to do.
            command += ["--calib", CALIBRATION, "--corrections", "none"]
        if "." not in model:
            command += ["--weights", "random:0"]
        print(f"building {path.name}", file=sys.stderr)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return path


def worker(*words: object) -> list[str]:
    """The command line of a worker of this file."""
    return [sys.executable, str(Path(__file__).resolve()), *map(str, words)]


def once_worker(given: argparse.Namespace) -> dict[str, Any]:
    """`edgefold stream` once, as its summary has it."""
    command = [*EDGEFOLD, "stream", str(given.bundle), "--headless", "--json", *given.options]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with status {done.returncode}")
    summary = json.loads(done.stdout)
    latency = summary["latency"]
    return {
        "age": latency["age"],
        "infer": latency["infer"],
        "fps": summary["fps"],
        "mean_batch": summary["mean_batch"],
        "frames_read": summary["frames_read"],
        "frames_inferred": summary["frames_inferred"],
        "dropped": summary["dropped"],
    }


def many_worker(given: argparse.Namespace) -> dict[str, Any]:
    """Synthetic cameras on frames rendered beforehand, counted after all of them have come up.

    The session of `edgefold stream` in this process: its sources are threads, so all CPU time is its own.
    """
    from apps.cache import cache_dir
    from apps.streaming.config import SourceConfig, StreamConfig
    from apps.streaming.session import StreamSession

    sources = tuple(
        SourceConfig(f"synthetic:{seed}:16#loop", policy="newest") for seed in range(given.sources)
    )
    config = StreamConfig(
        given.bundle, sources, max_batch=given.batch, max_seconds=given.seconds + 4.0, headless=True
    )
    session = StreamSession(config, cache_dir=cache_dir("engines"))
    marks: list[tuple[float, float, list[int]]] = []

    def mark() -> None:
        counts = [source.metrics.frames_inferred for source in session.view().sources]
        marks.append((time.process_time(), time.monotonic(), counts))

    def watch() -> None:
        while not hasattr(session, "_runtime") or not all(
            source.metrics.frames_inferred for source in session.view().sources
        ):
            time.sleep(0.1)
        mark()
        time.sleep(given.seconds)
        mark()

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    summary = session.run()
    if len(marks) < 2:
        raise SystemExit("the sources took too long to come up; give more --seconds")
    (cpu_from, from_s, first), (cpu_to, to_s, last) = marks
    served = [after - before for before, after in zip(first, last, strict=True)]
    return {
        "cpu_ms": 1e3 * (cpu_to - cpu_from) / sum(served),
        "wall_ms": 1e3 * (to_s - from_s) / sum(served),
        "served": served,
        "worst_from_fair_share": max(abs(count * len(served) / sum(served) - 1) for count in served),
        "mean_batch": summary.mean_batch,
        "dropped": summary.dropped,
    }


def engine_worker(given: argparse.Namespace) -> dict[str, float]:
    """The engine alone, as the stream loads it: a request waits on every stream at any time."""
    import numpy as np

    from apps.cache import cache_dir
    from apps.streaming.loading import EngineRequest, load_engine

    request = EngineRequest(
        precision=given.precision, max_batch=given.batch, mode=given.mode, cache_dir=cache_dir("engines")
    )
    engine = load_engine(given.bundle, request)
    (spec,) = engine.runner.inputs
    shape = (given.batch, *(int(size) for size in spec.shape[1:]))
    pixels = np.random.default_rng(0).integers(0, 256, shape)
    inputs = {spec.name: pixels.astype(spec.dtype)}
    n_under_way = 2 * engine.runner.n_streams

    def submit(n_requests: int) -> None:
        under_way: deque[Future[Any]] = deque()
        for _ in range(n_requests):
            under_way.append(engine.runner.submit(inputs))
            if len(under_way) == n_under_way:
                under_way.popleft().result()
        for future in under_way:
            future.result()

    n_requests = max(1, given.frames // given.batch)
    submit(max(1, n_requests // 5))
    began_cpu_s, began_s = time.process_time(), time.monotonic()
    submit(n_requests)
    cpu_s, seconds = time.process_time() - began_cpu_s, time.monotonic() - began_s
    latencies_s = []
    for _ in range(max(10, n_requests // 5)):
        began_s = time.monotonic()
        engine.runner.infer(inputs)
        latencies_s.append(time.monotonic() - began_s)
    engine.runner.close()
    n_images = n_requests * given.batch
    return {
        "cpu_ms": 1e3 * cpu_s / n_images,
        "wall_ms": 1e3 * seconds / n_images,
        "latency_p50_ms": 1e3 * float(np.median(latencies_s)),
        "streams": engine.runner.n_streams,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    workers = parser.add_subparsers(required=True)
    once = workers.add_parser("once")
    once.set_defaults(run=once_worker)
    once.add_argument("bundle", type=Path)
    once.add_argument("options", nargs="*", help="behind --")
    many = workers.add_parser("many")
    many.set_defaults(run=many_worker)
    many.add_argument("bundle", type=Path)
    many.add_argument("sources", type=int)
    many.add_argument("seconds", type=float)
    many.add_argument("--batch", type=int, default=1)
    engine = workers.add_parser("engine")
    engine.set_defaults(run=engine_worker)
    engine.add_argument("bundle", type=Path)
    engine.add_argument("frames", type=int)
    engine.add_argument("--batch", type=int, default=1)
    engine.add_argument("--mode", choices=["latency", "throughput"], default="latency")
    engine.add_argument("--precision", choices=["int8", "fp32"])
    given = parser.parse_args()
    print(json.dumps(given.run(given)))


if __name__ == "__main__":
    main()
