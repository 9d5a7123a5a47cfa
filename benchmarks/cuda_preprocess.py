"""The CUDA preprocessing kernel on a GPU: time, bandwidth as a share of the copy rate, and the CPU beside it.

    python benchmarks/cuda_preprocess.py

Needs an NVIDIA GPU. Every frame size is checked against `pipeline.preprocess` before it is timed. The kernel is
captured in a CUDA graph of `BURST` launches, so that launching is not what is measured; events take the time.
Its traffic is what it must read of the frame (the crop) and write; the copy rate is that of device-to-device work of
the same kind, a kernel that copies 64 MiB. The CPU's time is one thread of Pillow on the same frames.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from typing import Any

import numpy as np
from harness import machine_stamp, write_results

from engines.tensorrt.device import Device, Stream, open_device
from engines.tensorrt.nvrtc import compile_kernels, nvrtc_version
from engines.tensorrt.preprocess import CudaPreprocessor, DeviceFrame
from pipeline.artifacts import PreprocessSpec
from pipeline.preprocess import to_network_pixels

FRAMES = {"VGA": (480, 640), "HD": (720, 1280), "full HD": (1080, 1920), "4K": (2160, 3840)}
MODES = (("bilinear", True), ("bicubic", True), ("lanczos", True), ("bilinear", False), ("bicubic", False))
BURST = 50
COPY_BYTES = 64 << 20
COPY = r"""
extern "C" __global__ void copy(uint4 *out, const uint4 *in, int n) {
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) out[i] = in[i];
}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input-size", type=int, default=299)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--name", default="cuda_preprocess")
    given = parser.parse_args()
    device = open_device()
    with device.current():
        stream = device.create_stream()
        copy_gb_s = 2 * COPY_BYTES / (time_copy_ms(device, stream, given.rounds) * 1e6)
        rows = [
            measure(device, stream, name, interpolation, antialias, given)
            for name in FRAMES
            for interpolation, antialias in MODES
        ]
        stream.close()
    for row in rows:
        row["share_of_copy_rate"] = row["gb_s"] / copy_gb_s
    tree = {
        "machine": machine_stamp(),
        "device": asdict(device.identity),
        "nvrtc": ".".join(map(str, nvrtc_version())),
        "copy_gb_s": copy_gb_s,
        "rows": rows,
    }
    device.close()
    print(json.dumps(rows, indent=2))
    print(f"written: {write_results(given.name, tree)}", file=sys.stderr)


def measure(
    device: Device, stream: Stream, name: str, interpolation: Any, antialias: bool, given: argparse.Namespace
) -> dict[str, Any]:
    """One frame size and interpolation, BGR in and uint8 NHWC out."""
    height, width = FRAMES[name]
    side = given.input_size
    spec = PreprocessSpec((side, side), "shorter", interpolation, antialias=antialias, crop_fraction=0.875)
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    reference = to_network_pixels(image, "BGR", spec, "RGB")
    begin = time.perf_counter()
    for _ in range(5):
        to_network_pixels(image, "BGR", spec, "RGB")
    cpu_ms = (time.perf_counter() - begin) / 5 * 1e3
    with CudaPreprocessor(spec, (height, width), "BGR", device=device, color="RGB") as preprocessor:
        pinned, frame = device.allocate_pinned(image.size), device.allocate(image.size)
        output, result = device.allocate(reference.size), device.allocate_pinned(reference.size)
        pinned.array[:] = image.ravel()
        device.copy_to_device(frame.address, pinned.array, stream)
        preprocessor.enqueue(DeviceFrame(frame.address, width * 3), output.address, stream)
        device.copy_to_host(result.array, output.address, stream)
        stream.synchronize()
        levels = int(np.abs(result.array.astype(int) - reference.ravel()).max())

        def enqueue() -> None:
            preprocessor.enqueue(DeviceFrame(frame.address, width * 3), output.address, stream)

        gpu_ms = time_ms(device, stream, enqueue, given.rounds)
        for memory in (pinned, frame, output, result):
            memory.free()
    crop = 0.875 * min(height, width)
    return {
        "frame": name, "interpolation": interpolation, "antialias": antialias, "max_levels_off": levels,
        "gpu_ms": gpu_ms, "cpu_ms": cpu_ms, "gb_s": (crop * crop * 3 + reference.size) / (gpu_ms * 1e6),
    }  # fmt: skip


def time_ms(device: Device, stream: Stream, enqueue: Any, rounds: int) -> float:
    """Median milliseconds of one `enqueue`, from a graph of `BURST` of them."""
    stream.begin_capture()
    for _ in range(BURST):
        enqueue()
    graph = stream.end_capture()
    start, end = device.create_event(), device.create_event()
    times = []
    for turn in range(rounds + 3):
        start.record(stream)
        graph.launch(stream)
        end.record(stream)
        end.synchronize()
        if turn >= 3:
            times.append(end.elapsed_ms(start) / BURST)
    graph.close()
    start.close()
    end.close()
    return float(np.median(times))


def time_copy_ms(device: Device, stream: Stream, rounds: int) -> float:
    """Median milliseconds to read and write `COPY_BYTES`."""
    kernel = device.load_kernel(compile_kernels(COPY, "copy.cu", device.identity.sm).cubin, "copy")
    source, target = device.allocate(COPY_BYTES), device.allocate(COPY_BYTES)
    arguments = [np.uint64(target.address), np.uint64(source.address), np.int32(COPY_BYTES // 16)]
    taken = time_ms(
        device, stream, lambda: kernel.launch((2048, 1, 1), (256, 1, 1), 0, arguments, stream), rounds
    )
    source.free()
    target.free()
    return taken


if __name__ == "__main__":
    main()
