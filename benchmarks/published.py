"""Speeds that others published, for `edgefold estimate` to be held against. Data and nothing else."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PUBLISHED", "Published"]


@dataclass(frozen=True, slots=True)
class Published:
    """One figure: the latency of a batch on the GPU, or the images a second of the engines named, added up."""

    target: str
    network: str
    gpu_batch: int | None
    """``None`` where the GPU had no part in it."""
    dla_batch: int | None
    """Of each DLA core; ``None`` where no DLA had a part in it."""
    latency_ms: float | None
    images_per_s: float | None
    what: str
    source: str


_COMMITS = {
    "v0.7": "1321d137a1109dfcab9c8466dd3df6a755c2f5ca",
    "v1.1": "912dcdb9163736beca40a1f86e25d1305deab549",
    "v2.0": "e1f8956d1b96cb0b2c57e085ddd4e9b022159725",
    "v2.1": "c43f76f2447cc4b41a37952c86c108749f8d12f3",
    "v3.1": "eaf622a25c00f2b4b1d2c4f5b4f430570429d24a",
}
_MLPERF = "https://github.com/mlcommons/inference_results_{round}/blob/{commit}/closed/NVIDIA/results/{system}/resnet50/{scenario}/performance/run_1/mlperf_log_summary.txt"


def _mlperf(round_: str, system: str, scenario: str) -> str:
    return _MLPERF.format(round=round_, commit=_COMMITS[round_], system=system, scenario=scenario)


def _single_stream(target: str, round_: str, system: str, latency_ms: float) -> Published:
    """MLPerf SingleStream: the 90th percentile, with the copies of a discrete board and the harness's own time."""
    what = f"MLPerf Inference {round_} SingleStream, p90"
    return Published(
        target, "resnet50", 1, None, latency_ms, None, what, _mlperf(round_, system, "SingleStream")
    )


def _offline(
    target: str, round_: str, system: str, gpu_batch: int, dla_batch: int | None, images_per_s: float
) -> Published:
    """MLPerf Offline. Batches are those of NVIDIA's configurations of the round, or of one beside it."""
    engines = "" if dla_batch is None else ", GPU and both DLAs"
    what = f"MLPerf Inference {round_} Offline{engines}"
    source = _mlperf(round_, system, "Offline")
    return Published(target, "resnet50", gpu_batch, dla_batch, None, images_per_s, what, source)


_JETSON_BENCHMARKS = "https://github.com/NVIDIA-AI-IOT/jetson_benchmarks"
_DLA_SW = "https://github.com/NVIDIA/Deep-Learning-Accelerator-SW"
_ZOO = (
    "https://docs.nvidia.com/deeplearning/tensorrt/tensorflow-quantization-toolkit/docs/docs/model_zoo.html"
)
_GIST = "https://gist.github.com/hewumars/11ce749686d9d2eda588db0f3111ffbb"

PUBLISHED: tuple[Published, ...] = (
    Published(
        "jetson-xavier-nx", "inception_v4", 2, 1, None, 311.73,
        "jetson_benchmarks, trtexec's sums of GPU and both DLAs", _JETSON_BENCHMARKS,
    ),
    Published(
        "jetson-xavier-nx", "resnet50", 4, 2, None, 824.02,
        "jetson_benchmarks, trtexec's sums of GPU and both DLAs", _JETSON_BENCHMARKS,
    ),
    _single_stream("jetson-xavier-nx", "v2.0", "Xavier_NX_TRT", 2.460693),
    _offline("jetson-xavier-nx", "v2.0", "Xavier_NX_TRT", 64, 32, 1243.14),
    _single_stream("jetson-orin-nx-16gb", "v3.1", "Orin_NX_TRT", 1.0823),
    _offline("jetson-orin-nx-16gb", "v3.1", "Orin_NX_TRT", 256, 2, 2640.51),
    _single_stream("jetson-agx-orin-64gb", "v3.1", "Orin_TRT", 0.640258),
    _offline("jetson-agx-orin-64gb", "v3.1", "Orin_TRT", 256, 2, 6423.63),
    Published(
        "jetson-agx-orin-64gb", "resnet50", None, 2, None, 2037,
        "Deep Learning Accelerator SW, both DLAs, MAXN, JetPack 5.1.1", _DLA_SW,
    ),
    _single_stream("t4", "v0.7", "T4x1_TRT", 1.086217),
    _offline("t4", "v0.7", "T4x1_TRT", 256, None, 6035.57),
    Published("rtx-2080-ti", "resnet50", 1, None, 0.7206, None, "one user's TensorRT 7.1.3", _GIST),
    Published("rtx-2080-ti", "resnet50", 16, None, 16 * 0.1083, None, "one user's TensorRT 7.1.3", _GIST),
    _single_stream("a10", "v1.1", "A10x1_TRT", 0.465924),
    _offline("a10", "v1.1", "A10x1_TRT", 2048, None, 13805.2),
    _single_stream("a100-80gb", "v2.1", "A100-PCIe-80GBx1_TRT", 0.478518),
    _offline("a100-80gb", "v2.1", "A100-PCIe-80GBx1_TRT", 2048, None, 39814.4),
    Published("a100-80gb", "resnet50", 1, None, 0.46, None, "TensorFlow quantization toolkit, TensorRT 8.4", _ZOO),
    Published("a100-80gb", "resnet101", 1, None, 0.84, None, "TensorFlow quantization toolkit, TensorRT 8.4", _ZOO),
    Published("a100-80gb", "mobilenet_v2", 1, None, 0.30, None, "TensorFlow quantization toolkit, TensorRT 8.4", _ZOO),
    _single_stream("l4", "v3.1", "L4x1_TRT", 0.348735),
    _offline("l4", "v3.1", "L4x1_TRT", 32, None, 12881.7),
    _offline("h100-pcie", "v3.1", "H100-PCIe-80GBx1_TRT", 2048, None, 54851.4),
    _offline("h100-sxm", "v3.1", "DGX-H100_H100-SXM-80GBx1_TRT", 2048, None, 88526),
)  # fmt: skip
"""All int8, ResNet at 224×224, Inception-v4 at 299×299."""
