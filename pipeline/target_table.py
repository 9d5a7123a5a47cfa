"""The target table: devices with their figures, and what each JetPack release brings. Pure data.

Every figure is dense. Where a document gives only a figure for 2:4 sparsity, half of it stands here and the source
says so. A figure without a source is ``None``; a `Source` with ``read=False`` names the maker's document without
its text having been at hand when this table was made.
"""

from __future__ import annotations

from pipeline.target_entry import JetPack, Peaks, Precision, Source, Target, TensorRtWindow

__all__ = ["JETPACKS", "TARGETS"]

JETPACKS: tuple[JetPack, ...] = (
    JetPack("4.6", "8.2", "3.6", (53, 62, 72), "the last for Jetson Nano and TX2"),
    JetPack("5.1", "8.5", "3.8", (72, 87), "the last for Xavier"),
    JetPack("6.0", "8.6", "3.10", (87,)),
    JetPack("6.1", "10.3", "3.10", (87,)),
    JetPack("6.2", "10.3", "3.10", (87,), "adds the Super modes of Orin Nano and Orin NX"),
    JetPack("7.0", "10.13", "3.12", (110,)),
    JetPack("7.1", "10.13", "3.12", (110,)),
    JetPack("7.2", "10.16.2", "3.12", (87, 110)),
    JetPack("7.2.2", "11.4.1", "3.12", (87, 110), "brings DLA back, on AGX Orin"),
)
"""In order. JetPack 4 and 5 are here for the reason they are refused with."""

_FROM_10_3 = TensorRtWindow("10.3")
"""The oldest TensorRT this product speaks to; Turing to Hopper are older than that."""
_FROM_10_8 = TensorRtWindow("10.8")
"""TensorRT 10.8.0 release notes: "supports NVIDIA Blackwell GPUs, such as the GeForce 50-series. B200 and GB200 NVL
have limited support in this release"."""

_VOLTA: tuple[Precision, ...] = ("int8", "fp16", "fp32")
_AMPERE: tuple[Precision, ...] = ("int8", "fp16", "bf16", "fp32")

_DLA_SW = "https://github.com/NVIDIA/Deep-Learning-Accelerator-SW"
_MODULES = "https://developer.nvidia.com/embedded/jetson-modules"
_HARDWARE = "https://huggingface.co/hardware"


def _jetson_modules(figures: str) -> Source:
    return Source(figures, "NVIDIA Jetson modules: technical specifications", _MODULES, read=False)


def _orin_brief(figures: str) -> Source:
    return Source(
        figures,
        "NVIDIA Jetson AGX Orin Series Technical Brief v1.2",
        "https://www.nvidia.com/content/dam/en-zz/Solutions/gtcf21/jetson-orin/nvidia-jetson-agx-orin-technical-brief.pdf",
        read=False,
    )


def _super_mode(figures: str) -> Source:
    return Source(
        figures,
        "NVIDIA JetPack 6.2 Brings Super Mode to NVIDIA Jetson Orin Nano and Jetson Orin NX Modules",
        "https://developer.nvidia.com/blog/nvidia-jetpack-6-2-brings-super-mode-to-nvidia-jetson-orin-nano-and-jetson-orin-nx-modules/",
        read=False,
    )


def _whitepaper(architecture: str, url: str) -> Source:
    return Source(
        "peaks, bandwidth, SMs, L2", f"NVIDIA {architecture} architecture whitepaper", url, read=False
    )


_DENSE_LIST = Source(
    "dense int8 and fp16 peaks, bandwidth",
    "Machine Learning Engineering: accelerators (a list of makers' figures without sparsity)",
    "https://github.com/stas00/ml-engineering/blob/master/compute/accelerator/README.md",
    read=True,
)
_AMPERE_PAPER = _whitepaper(
    "A100 Tensor Core GPU",
    "https://images.nvidia.com/aem-dam/en-zz/Solutions/data-center/nvidia-ampere-architecture-whitepaper.pdf",
)
_HOPPER_PAPER = _whitepaper(
    "H100 Tensor Core GPU", "https://resources.nvidia.com/en-us-tensor-core/gtc22-whitepaper-hopper"
)
_OLD_JETPACK = (
    "its last release is JetPack {jetpack}, with TensorRT {tensorrt}; Edgefold builds with TensorRT 10.3 and "
    "later. Use a Jetson Orin or Thor, or the 'cpu' target"
)
_JETPACK_4 = _OLD_JETPACK.format(jetpack="4.6", tensorrt="8.2")
_JETPACK_5 = _OLD_JETPACK.format(jetpack="5.1", tensorrt="8.5")

_CPU = Target(
    "cpu", "this machine's CPU, through OpenVINO or ONNX Runtime", "cpu", "cpu", None, ("int8", "fp32"), None,
    Peaks(None, None, None), (),
    note="portable: compiled where it is loaded; edgefold bench measures it",
)  # fmt: skip

_OLD_JETSONS = (
    Target(
        "jetson-nano", "Jetson Nano", "tensorrt", "jetson", 53, ("fp16", "fp32"), 4,
        Peaks(None, 0.472, 25.6), (_jetson_modules("0.472 TFLOPS fp16, 25.6 GB/s, 128 cores (1 SM)"),),
        sm_count=1, refusal=_JETPACK_4,
    ),
    Target(
        "jetson-tx2", "Jetson TX2", "tensorrt", "jetson", 62, ("fp16", "fp32"), 8,
        Peaks(None, 1.33, 59.7), (_jetson_modules("1.33 TFLOPS fp16, 59.7 GB/s, 256 cores (2 SMs)"),),
        sm_count=2, refusal=_JETPACK_4,
    ),
    Target(
        "jetson-xavier-nx", "Jetson Xavier NX 8 GB", "tensorrt", "jetson", 72, _VOLTA, 8,
        Peaks(12.3, 6.15, 59.7, dla_int8_tops=9.0),
        (
            Source(
                "GPU 12.3 int8 TOPS (fp16 at half the rate), DLA 4.5 each, 59.7 GB/s, 384 cores (6 SMs), 512 KiB L2",
                "Jetson Xavier NX System-on-Module data sheet, DS-10184-001",
                "https://developer.nvidia.com/embedded/downloads", read=False,
            ),
        ),
        sm_count=6, l2_mib=0.5, dla_cores=2, refusal=_JETPACK_5,
    ),
    Target(
        "jetson-agx-xavier", "Jetson AGX Xavier 32 GB", "tensorrt", "jetson", 72, _VOLTA, 32,
        Peaks(22.6, 11.3, 136.5, dla_int8_tops=11.4),
        (
            _jetson_modules("GPU 22 int8 TOPS, 11 TFLOPS fp16 at 1377 MHz; 136.5 GB/s; 512 cores (8 SMs), 512 KiB L2"),
            Source(
                "DLA 11.4 int8 TOPS", "Xavier at Hot Chips 30, as reported",
                "https://www.notebookcheck.net/Nvidia-presents-improved-Xavier-SoC-for-autonomous-machines.323992.0.html",
                read=True,
            ),
        ),
        sm_count=8, l2_mib=0.5, dla_cores=2, refusal=_JETPACK_5,
    ),
)  # fmt: skip

_ORINS = (
    Target(
        "jetson-orin-nano-4gb", "Jetson Orin Nano 4 GB", "tensorrt", "jetson", 87, _AMPERE, 4,
        Peaks(10, 5, 34.1),
        (_jetson_modules("20 sparse int8 TOPS (half is dense), 34 GB/s, 512 cores (4 SMs)"),
         _super_mode("34 sparse int8 TOPS, 51 GB/s")),
        sm_count=4, super_peaks=Peaks(17, 8.5, 51.2),
    ),
    Target(
        "jetson-orin-nano-8gb", "Jetson Orin Nano 8 GB", "tensorrt", "jetson", 87, _AMPERE, 8,
        Peaks(20, 10, 68.3),
        (_jetson_modules("40 sparse int8 TOPS (half is dense), 68 GB/s, 1024 cores (8 SMs)"),
         Source(
            "Super: 67 sparse int8 TOPS, 102 GB/s; 8 SMs", "Jetson Orin Nano Super: a summary of NVIDIA's data sheet",
            "https://www.brojogopalsapui.com/ai-foundations/sub_contents/AI_hardware/jetson_orin_nano_light.html",
            read=True,
        )),
        sm_count=8, super_peaks=Peaks(33.5, 16.8, 102.4), aliases=("jetson-orin-nano",),
    ),
    Target(
        "jetson-orin-nx-8gb", "Jetson Orin NX 8 GB", "tensorrt", "jetson", 87, _AMPERE, 8,
        Peaks(25, 12.5, 102.4, dla_int8_tops=10),
        (Source("70 sparse int8 TOPS in all", "Yahboom Jetson Orin NX kit", "https://github.com/YahboomTechnology/Jetson_Orin_NX", read=True), _orin_brief("GPU 50 and DLA 20 of the 70; 102.4 GB/s; 1024 cores (8 SMs)"),
         _super_mode("117 sparse int8 TOPS: GPU 77, DLA 40")),
        sm_count=8, dla_cores=1, super_peaks=Peaks(38.5, 19.2, 102.4, dla_int8_tops=20),
    ),
    Target(
        "jetson-orin-nx-16gb", "Jetson Orin NX 16 GB", "tensorrt", "jetson", 87, _AMPERE, 16,
        Peaks(30, 15, 102.4, dla_int8_tops=20),
        (Source("100 sparse int8 TOPS in all", "NVIDIA Jetson Orin NX Series data sheet", "https://github.com/icub-tech-iit/cad-libraries/files/13056089/JETSON-ORIN-NX-DATASHEET.pdf", read=True), _orin_brief("GPU 60 and DLA 40 of the 100; 102.4 GB/s; 1024 cores (8 SMs)"),
         _super_mode("157 sparse int8 TOPS: GPU 77, DLA 80")),
        sm_count=8, dla_cores=2, super_peaks=Peaks(38.5, 19.2, 102.4, dla_int8_tops=40),
        aliases=("jetson-orin-nx",),
    ),
    Target(
        "jetson-agx-orin-32gb", "Jetson AGX Orin 32 GB", "tensorrt", "jetson", 87, _AMPERE, 32,
        Peaks(54, 27, 204.8, dla_int8_tops=46),
        (_orin_brief("200 sparse int8 TOPS: GPU 108, DLA 92; 204.8 GB/s; 1792 cores (14 SMs), 4 MiB L2"),),
        sm_count=14, l2_mib=4, dla_cores=2,
    ),
    Target(
        "jetson-agx-orin-64gb", "Jetson AGX Orin 64 GB", "tensorrt", "jetson", 87, _AMPERE, 64,
        Peaks(85.5, 42.75, 204.8, dla_int8_tops=52.5),
        (
            Source("sparse int8 in MAXN: GPU 171, both DLAs 105", "Deep Learning Accelerator SW, README", _DLA_SW, read=True),
            _orin_brief("204.8 GB/s; 2048 cores (16 SMs), 4 MiB L2; fp16 at half the int8 rate"),
        ),
        sm_count=16, l2_mib=4, dla_cores=2, aliases=("jetson-agx-orin",),
    ),
)  # fmt: skip

_THORS = (
    Target(
        "jetson-thor-t4000", "Jetson T4000", "tensorrt", "jetson", 110, _AMPERE, 64,
        Peaks(None, None, 273),
        (Source(
            "64 GB, 273 GB/s, 1536 cores (12 SMs)",
            "Accelerate AI Inference for Edge and Robotics with NVIDIA Jetson T4000 and NVIDIA JetPack 7.1, as quoted",
            "https://developer.nvidia.com/blog/accelerate-ai-inference-for-edge-and-robotics-with-nvidia-jetson-t4000-and-nvidia-jetpack-7-1/",
            read=True,
        ),),
        sm_count=12, note="the maker gives FP4 with sparsity only: no int8 or fp16 figure to estimate with",
    ),
    Target(
        "jetson-thor-t5000", "Jetson T5000 (AGX Thor)", "tensorrt", "jetson", 110, _AMPERE, 128,
        Peaks(None, 258.5, 273),
        (Source("258.5 TFLOPS, an eighth of 2070 sparse FP4: taken for dense fp16; 128 GB", "Hugging Face hardware list", f"{_HARDWARE}/jetson-t5000", read=True),
         _jetson_modules("273 GB/s, 2560 cores (20 SMs), 2070 FP4 TFLOPS with sparsity")),
        sm_count=20, aliases=("jetson-thor", "jetson-agx-thor"),
        note="no document at hand gives an int8 figure",
    ),
)  # fmt: skip

_BOARDS = (
    Target(
        "t4", "NVIDIA T4", "tensorrt", "datacenter", 75, _VOLTA, 16, Peaks(130, 65, 320),
        (Source("130 int8 TOPS, 65 TFLOPS fp16, 320 GB/s", "NVIDIA T4 data sheet", "https://www.nvidia.com/en-us/data-center/tesla-t4/", read=False),
         Source("65 TFLOPS fp16, 320 GB/s, 40 SMs, 4 MiB L2", "GPU catalogue", "https://huggingface.co/RajBhope/gpu-runtime-predictor/blob/main/gpu_catalog.json", read=True)),
        sm_count=40, l2_mib=4, tensorrt=_FROM_10_3,
    ),
    Target(
        "a10", "NVIDIA A10", "tensorrt", "datacenter", 86, _AMPERE, 24, Peaks(250, 125, 600),
        (Source("250 int8 TOPS, 125 TFLOPS fp16, 600 GB/s, 72 SMs, 6 MiB L2", "NVIDIA A10 data sheet", "https://www.nvidia.com/en-us/data-center/products/a10-gpu/", read=False),
         Source("125 TFLOPS fp16, 600 GB/s", "a list of GPUs by FP16 compute", "https://gist.github.com/kimbochen", read=True)),
        sm_count=72, l2_mib=6, tensorrt=_FROM_10_3,
    ),
    Target(
        "a100-40gb", "NVIDIA A100 40 GB", "tensorrt", "datacenter", 80, _AMPERE, 40, Peaks(624, 312, 1555),
        (_DENSE_LIST, _AMPERE_PAPER), sm_count=108, l2_mib=40, tensorrt=_FROM_10_3,
    ),
    Target(
        "a100-80gb", "NVIDIA A100 80 GB PCIe", "tensorrt", "datacenter", 80, _AMPERE, 80, Peaks(624, 312, 1935),
        (_DENSE_LIST, _AMPERE_PAPER), sm_count=108, l2_mib=40, tensorrt=_FROM_10_3, aliases=("a100",),
        note="the SXM board has 2039 GB/s",
    ),
    Target(
        "l4", "NVIDIA L4", "tensorrt", "datacenter", 89, _AMPERE, 24, Peaks(242.5, 121, 300),
        (Source("485 sparse int8 TOPS, 242 sparse TFLOPS fp16 (halves are dense), 300 GB/s", "NVIDIA L4 data sheet", "https://www.nvidia.com/en-us/data-center/l4/", read=False),
         _whitepaper("Ada GPU", "https://images.nvidia.com/aem-dam/Solutions/Data-Center/l4/nvidia-ada-gpu-architecture-whitepaper-v2.1.pdf")),
        sm_count=58, l2_mib=48, tensorrt=_FROM_10_3,
    ),
    Target(
        "l40s", "NVIDIA L40S", "tensorrt", "datacenter", 89, _AMPERE, 48, Peaks(733, 362, 864),
        (_DENSE_LIST, Source("142 SMs", "NVIDIA L40S data sheet", "https://www.nvidia.com/en-us/data-center/l40s/", read=False)),
        sm_count=142, tensorrt=_FROM_10_3,
    ),
    Target(
        "h100-pcie", "NVIDIA H100 PCIe", "tensorrt", "datacenter", 90, _AMPERE, 80, Peaks(1513, 756, 2000),
        (_DENSE_LIST, _HOPPER_PAPER), sm_count=114, l2_mib=50, tensorrt=_FROM_10_3,
    ),
    Target(
        "h100-sxm", "NVIDIA H100 SXM", "tensorrt", "datacenter", 90, _AMPERE, 80, Peaks(1979, 989, 3350),
        (_DENSE_LIST, _HOPPER_PAPER), sm_count=132, l2_mib=50, tensorrt=_FROM_10_3, aliases=("h100",),
    ),
    Target(
        "h200", "NVIDIA H200 SXM", "tensorrt", "datacenter", 90, _AMPERE, 141, Peaks(1979, 989, 4800),
        (_DENSE_LIST, _HOPPER_PAPER), sm_count=132, l2_mib=50, tensorrt=_FROM_10_3,
    ),
    Target(
        "b200", "NVIDIA B200 SXM", "tensorrt", "datacenter", 100, _AMPERE, 180, Peaks(4500, 2250, 8000),
        (_DENSE_LIST,
         Source("180 GB", "MLPerf Inference v6.0, nebius_b200_n1.json", "https://raw.githubusercontent.com/mlcommons/inference_results_v6.0/main/closed/Nebius/systems/nebius_b200_n1.json", read=True),
         Source("148 SMs", "NVIDIA Blackwell architecture technical brief", "https://resources.nvidia.com/en-us-blackwell-architecture", read=False)),
        sm_count=148, tensorrt=_FROM_10_8, note="TensorRT 10.8 supports it early and in part",
    ),
    Target(
        "rtx-2080-ti", "GeForce RTX 2080 Ti", "tensorrt", "geforce", 75, _VOLTA, 11, Peaks(215.2, 53.8, 616),
        (_whitepaper("Turing GPU", "https://images.nvidia.com/aem-dam/en-zz/Solutions/design-visualization/technologies/turing-architecture/NVIDIA-Turing-Architecture-Whitepaper.pdf"),),
        sm_count=68, l2_mib=5.5, tensorrt=_FROM_10_3,
    ),
    Target(
        "rtx-3090", "GeForce RTX 3090", "tensorrt", "geforce", 86, _AMPERE, 24, Peaks(284, 71, 936),
        (_whitepaper("Ampere GA102 GPU", "https://www.nvidia.com/content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.pdf"),),
        sm_count=82, l2_mib=6, tensorrt=_FROM_10_3,
    ),
    Target(
        "rtx-4090", "GeForce RTX 4090", "tensorrt", "geforce", 89, _AMPERE, 24, Peaks(660.6, 165.2, 1008),
        (_whitepaper("Ada GPU", "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf"),
         Source("bandwidth, fp16 with float32 accumulation (165)", "Accelerator intensity", "https://gist.github.com/mikasenghaas/d63ded03f1f0417b1677627119bacc0d", read=True)),
        sm_count=128, l2_mib=72, tensorrt=_FROM_10_3,
    ),
    Target(
        "rtx-5090", "GeForce RTX 5090", "tensorrt", "geforce", 120, _AMPERE, 32, Peaks(838, 209.5, 1792),
        (_whitepaper("RTX Blackwell GPU", "https://images.nvidia.com/aem-dam/Solutions/geforce/blackwell/nvidia-rtx-blackwell-gpu-architecture.pdf"),
         Source("1792 GB/s, 32 GB", "The DGX Spark Handbook", "https://huggingface.co/blog/exolabs/the-dgx-spark-handbook", read=True)),
        sm_count=170, l2_mib=96, tensorrt=_FROM_10_8,
    ),
    Target(
        "dgx-spark", "NVIDIA DGX Spark (GB10)", "tensorrt", "workstation", 121, _AMPERE, 128, Peaks(None, None, 273),
        (Source("128 GB, 273 GB/s", "The DGX Spark Handbook", "https://huggingface.co/blog/exolabs/the-dgx-spark-handbook", read=True),
         Source("compute capability 12.1, 48 SMs", "Strata on the NVIDIA DGX Spark", "https://raw.githubusercontent.com/Niko1221/Strata/master/docs/DGX_SPARK_LINUX.md", read=True)),
        sm_count=48, tensorrt=TensorRtWindow(None),
        note="the maker gives FP4 with sparsity only: no int8 or fp16 figure to estimate with; the first TensorRT "
        "for sm_121 is not known (11.1 has it)",
    ),
)  # fmt: skip

TARGETS: tuple[Target, ...] = (_CPU, *_OLD_JETSONS, *_ORINS, *_THORS, *_BOARDS)
"""In the order they are shown: the CPU, Jetsons from old to new, data centre, GeForce, workstation."""
