"""The runner's lanes on a GPU: throughput, latency with and without a graph, copies, overlap, frames handed over.

    python benchmarks/cuda_lanes.py

Needs an NVIDIA GPU and no TensorRT: the engine is a kernel that takes the time it is told and one multiprocessor of the
GPU (``tests/cuda_engine.py``). So what is measured is what is Edgefold's own: what a run costs around the engine, and
whether one run's copies and waits hide behind another one's engine. It says nothing of TensorRT's speed.

Candidates of a comparison take turns, round by round; numbers are medians over the rounds. An answer of every runner
is checked before it is timed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from harness import machine_stamp, write_results
from numpy.typing import NDArray

sys.path.append(str(Path(__file__).parents[1] / "tests"))  # the stand-in engine is the tests'
from cuda_engine import CudaLibrary, engine_plan, expected_logits, open_library

from engines.tensorrt.device import Device, Stream
from engines.tensorrt.feeder import DeviceFeeder
from engines.tensorrt.nvrtc import nvrtc_version
from engines.tensorrt.preprocess import CudaPreprocessor, DeviceFrame
from engines.tensorrt.runner import TensorRtRunner
from pipeline.artifacts import EngineOptions, Frame, PreprocessSpec
from pipeline.kernels import kernels
from pipeline.preprocess import to_network_pixels

ENGINE_US = (300, 1000)
LANES = (1, 2, 3, 4)
LAUNCHES = (1, 60)
"""Kernels of a run in the latency's comparison: the fewest, and as many as a small network has layers."""
HW = (224, 224)
SMALL_HW = (32, 32)
COPY_BYTES = 64 << 20
FRAME_HW = (1080, 1920)
SPEC = PreprocessSpec((299, 299), "shorter", "bicubic", crop_fraction=0.875)
RTOL = 1e-5
"""Of logits whose sums a float32 no longer holds exactly."""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--binding", choices=["pycuda", "cuda-python"], default="cuda-python")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.12, help="of each round of a throughput")
    parser.add_argument("--name", default="cuda_lanes")
    given = parser.parse_args(arguments)
    begin = time.perf_counter()
    with open_library(given.binding) as library:
        assert isinstance(library, CudaLibrary)
        device = library.device
        tree: dict[str, Any] = {
            "machine": machine_stamp(),
            "device": asdict(device.identity),
            "binding": given.binding,
            "versions": _versions(),
            "nvrtc": ".".join(map(str, nvrtc_version())),
            "rounds": given.rounds,
        }
        for part in (throughput, latency, copies, overlap, frames):
            tree[part.__name__] = part(library, given.rounds, given.seconds)
            print(f"[{time.perf_counter() - begin:5.1f} s] {part.__name__}", file=sys.stderr, flush=True)
            print(json.dumps(tree[part.__name__], indent=2), flush=True)
    print(f"written: {write_results(given.name, tree)}", file=sys.stderr)


def throughput(library: CudaLibrary, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Images per second by engine and lanes, one image a request, from host memory to host memory."""
    images, rows = _noise((1, *HW, 3)), []
    for engine_us in ENGINE_US:
        library.spin_us = engine_us
        engine_ms = _engine_ms(library, images)
        with ExitStack() as stack:
            runners = {n: stack.enter_context(_runner(library, images, streams=n)) for n in LANES}
            rates: dict[int, list[float]] = {n: [] for n in LANES}
            for _ in range(rounds):
                for n, runner in runners.items():
                    count = max(8, int(seconds * 1e3 / engine_ms * n))
                    rates[n].append(_images_per_s(runner, images, count))
            graphs = {n: runner.cuda_graphs for n, runner in runners.items()}
        for n in LANES:
            found = float(np.median(rates[n]))
            rows.append(
                {
                    "engine_ms": engine_ms, "lanes": n, "images_per_s": found, "rounds_images_per_s": rates[n],
                    "share_of_engine_bound": found * engine_ms / 1e3 / n, "cuda_graphs": graphs[n],
                }
            )  # fmt: skip
    return rows


def latency(library: CudaLibrary, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Milliseconds of `infer` with the engine's work replayed and enqueued; what the device alone takes beside it.

    The stand-in enqueues its kernels from Python, which takes longer than TensorRT's own code: without a graph, the
    cost of many launches is an upper bound.
    """
    images, rows = _noise((1, *SMALL_HW, 3)), []
    library.spin_us = 0
    for n_launches in LAUNCHES:
        library.n_launches = n_launches
        with ExitStack() as stack:
            runners = {}
            for replayed in (True, False):
                library.refuses_capture = not replayed
                runners[replayed] = stack.enter_context(_runner(library, images))
            times: dict[bool, list[float]] = {True: [], False: []}
            for _ in range(rounds):
                for replayed, runner in runners.items():
                    times[replayed] += [
                        _wall_ms(lambda r=runner: r.infer({"pixels": images})) for _ in range(100)
                    ]
            for replayed, runner in runners.items():
                rows.append(
                    {
                        "launches": n_launches, "replayed": replayed, "cuda_graphs": runner.cuda_graphs,
                        "infer_ms": float(np.median(times[replayed])),
                        "infer_p90_ms": float(np.percentile(times[replayed], 90)),
                        "engine_ms": n_launches * _engine_ms(library, images),
                    }
                )  # fmt: skip
    library.n_launches, library.refuses_capture = 1, False
    return rows


def copies(library: CudaLibrary, rounds: int, seconds: float) -> dict[str, float]:
    """GB/s between host and device, from pinned memory and from what malloc gives, by the host's clock."""
    device, rates = library.device, {}
    with device.current():
        stream, memory = device.create_stream(), device.allocate(COPY_BYTES)
        pinned = device.allocate_pinned(COPY_BYTES)
        for name, host in (("pinned", pinned.array), ("pageable", pageable(device, COPY_BYTES))):
            host[:] = 1  # so that the system has given the pages
            for direction, copy in (
                ("to_device", lambda h=host: device.copy_to_device(memory.address, h, stream)),
                ("to_host", lambda h=host: device.copy_to_host(h, memory.address, stream)),
            ):
                taken = _median_wall_ms(lambda c=copy: (c(), stream.synchronize()), 2 * rounds)
                rates[f"{name}_{direction}_gb_s"] = COPY_BYTES / taken / 1e6
        _free(pinned, memory)
        stream.close()
    return rates


def overlap(library: CudaLibrary, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Work of two streams together against the sum of each alone: near 0.5 side by side, near 1 one after the other."""
    device = library.device
    with device.current():
        streams = device.create_stream(), device.create_stream()
        memories = [device.allocate(COPY_BYTES) for _ in range(2)]
        pinned = [device.allocate_pinned(COPY_BYTES) for _ in range(2)]
        work: dict[str, Callable[[Stream], None]] = {
            "copies to the device": lambda stream: _repeat(
                4, lambda: device.copy_to_device(memories[0].address, pinned[0].array, stream)
            ),
            "copies to the host": lambda stream: _repeat(
                4, lambda: device.copy_to_host(pinned[1].array, memories[1].address, stream)
            ),
            "kernel": lambda stream: _launch(library, stream, memories[1].address, memories[0].address),
        }

        def together(*names: str) -> float:
            def run() -> None:
                for name, stream in zip(names, streams, strict=False):
                    work[name](stream)
                for stream in streams:
                    stream.synchronize()

            return _median_wall_ms(run, rounds)

        library.spin_us = int(1e3 * together("copies to the device"))  # a kernel as long as the copies
        rows = []
        for first, second in (
            ("copies to the device", "kernel"), ("copies to the host", "kernel"), ("kernel", "kernel"),
            ("copies to the device", "copies to the host"),
        ):  # fmt: skip
            alone, both = [together(first), together(second)], together(first, second)
            rows.append({"first": first, "second": second, "alone_ms": alone, "together_ms": both,
                         "together_over_sum": both / sum(alone)})  # fmt: skip
        _free(*memories, *pinned)
        for stream in streams:
            stream.close()
    return rows


def frames(library: CudaLibrary, rounds: int, seconds: float) -> dict[str, Any]:
    """What a full HD frame costs on its way to the engine, part by part, and what the CPU takes for the same pixels."""
    device, image = library.device, _noise((*FRAME_HW, 3))
    frame = Frame(image, "BGR", "benchmark", 0, 0)
    rows: dict[str, Any] = {}
    reference = to_network_pixels(image, "BGR", SPEC, "RGB")
    rows["cpu_by"] = "Pillow" if kernels() is None else "resample.c"
    rows["cpu_ms"] = _median_wall_ms(lambda: to_network_pixels(image, "BGR", SPEC, "RGB"), 4 * rounds)
    library.spin_us = 0
    pixels = reference[np.newaxis]
    with _runner(library, pixels, streams=2) as runner:
        feeder = DeviceFeeder(runner, SPEC, "RGB", max_batch=1)
        found = feeder.engine_input(frame)[0]
        rows["max_levels_off"] = int(np.abs(found.astype(int) - reference).max())
        batches = deque(feeder.new_batch() for _ in range(4))
        for batch in batches:
            batch.put(0, frame)
        rows["put_ms"] = _median_wall_ms(lambda: batches[0].put(0, frame), 4 * rounds)
        rows["put_to_answer_ms"] = _median_wall_ms(
            lambda: (batches[0].put(0, frame), batches[0].submit(1).result()), 4 * rounds
        )
        rows["pixels_to_answer_ms"] = _median_wall_ms(lambda: runner.infer({"pixels": pixels}), 4 * rounds)
        rates = []
        for _ in range(rounds):
            count, under_way, begin = max(8, int(seconds * 400)), deque(), time.perf_counter()
            for _ in range(count):
                if len(under_way) == len(batches):
                    under_way.popleft().result()
                batches.rotate(-1)
                batches[-1].put(0, frame)
                under_way.append(batches[-1].submit(1))
            while under_way:
                under_way.popleft().result()
            rates.append(count / (time.perf_counter() - begin))
        rows["frames_per_s_2_lanes_1_feeding_thread"] = float(np.median(rates))
    rows["engine_ms"] = _engine_ms(library, pixels)
    rows |= _frame_on_the_device(device, image, reference.size, 4 * rounds)
    return rows


def _frame_on_the_device(
    device: Device, image: NDArray[np.uint8], n_bytes: int, rounds: int
) -> dict[str, float]:
    """Milliseconds of the frame's copy and of the kernel, by events of the device."""
    with (
        device.current(),
        CudaPreprocessor(SPEC, FRAME_HW, "BGR", device=device, color="RGB") as preprocessor,
    ):
        stream, pinned = device.create_stream(), device.allocate_pinned(image.size)
        memory, output = device.allocate(image.size), device.allocate(n_bytes)
        pinned.array[:] = image.ravel()
        on_device = DeviceFrame(memory.address, FRAME_HW[1] * 3)
        found = {
            "copy_ms": _device_ms(
                device, stream, lambda: device.copy_to_device(memory.address, pinned.array, stream), rounds
            ),
            "kernel_ms": _device_ms(
                device, stream, lambda: preprocessor.enqueue(on_device, output.address, stream), rounds
            ),
        }
        _free(pinned, memory, output)
        stream.close()
    return found


def pageable(device: Device, n_bytes: int) -> NDArray[np.uint8]:
    """Host memory that is not pinned."""
    return np.empty(n_bytes, np.uint8)


def _runner(library: CudaLibrary, images: NDArray[np.uint8], streams: int = 1) -> TensorRtRunner:
    """A runner whose lanes are warm and whose answer is right."""
    plan = engine_plan((images.shape[1], images.shape[2]), echo=False)
    options = EngineOptions(mode="throughput", threads=streams)
    runner = TensorRtRunner(plan, library.api, options, device=library.device)
    futures = [runner.submit({"pixels": images}) for _ in range(8 * streams)]
    for future in futures:
        np.testing.assert_allclose(future.result()["logits"], expected_logits(images), rtol=RTOL)
    return runner


def _images_per_s(runner: TensorRtRunner, images: NDArray[np.uint8], count: int) -> float:
    begin = time.perf_counter()
    futures = [runner.submit({"pixels": images}) for _ in range(count)]
    for future in futures:
        future.result()
    return count / (time.perf_counter() - begin)


def _engine_ms(library: CudaLibrary, images: NDArray[np.uint8]) -> float:
    """Of one launch of the engine's kernel on `images`."""
    device = library.device
    with device.current():
        stream, memory, logits = device.create_stream(), device.allocate(images.nbytes), device.allocate(256)
        taken = _device_ms(
            device,
            stream,
            lambda: _launch(library, stream, logits.address, memory.address, images.nbytes),
            11,
        )
        _free(memory, logits)
        stream.close()
    return taken


def _launch(library: CudaLibrary, stream: Stream, logits: int, pixels: int, n_bytes: int = 1024) -> None:
    assert library.launch(stream.handle, 1, n_bytes, {"logits": logits, "pixels": pixels}) == 0


def _device_ms(device: Device, stream: Stream, enqueue: Callable[[], None], rounds: int) -> float:
    """Median milliseconds by events; the first two do not count."""
    start, end, times = device.create_event(), device.create_event(), []
    for _ in range(rounds + 2):
        start.record(stream)
        enqueue()
        end.record(stream)
        end.synchronize()
        times.append(end.elapsed_ms(start))
    start.close()
    end.close()
    return float(np.median(times[2:]))


def _median_wall_ms(run: Callable[[], Any], rounds: int) -> float:
    """By the host's clock; the first two do not count."""
    return float(np.median([_wall_ms(run) for _ in range(rounds + 2)][2:]))


def _wall_ms(run: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    run()
    return (time.perf_counter() - begin) * 1e3


def _repeat(n: int, run: Callable[[], None]) -> None:
    for _ in range(n):
        run()


def _free(*parts: Any) -> None:
    for part in parts:
        part.free()


def _noise(shape: tuple[int, ...]) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def _versions() -> dict[str, str]:
    found = {}
    for name in ("cuda-bindings", "pycuda", "nvidia-cuda-nvrtc"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    main()
