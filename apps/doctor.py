"""``edgefold doctor``: what this machine has, and what each missing thing needs."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from pipeline.errors import EdgefoldError, UnsupportedError
from pipeline.kernels import kernels

__all__ = ["Finding", "diagnose", "doctor_command"]

_SELF_TEST_ATOL = 1e-4
_NVIDIA_SMI_TIMEOUT_S = 20


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing this machine has or lacks.

    ``needs`` says how to get what is missing, or what is lost without it.
    """

    area: str
    name: str
    present: bool
    detail: str
    needs: str | None = None


def doctor_command(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON to standard output.")] = False,
) -> None:
    """Say which engines, GPU, OpenCV back-ends and extras this machine has, and what each missing one needs."""
    findings = diagnose()
    if as_json:
        from apps.console import print_json

        print_json(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        _print_table(findings)
    if not any(finding.present for finding in findings if finding.area == "engines"):
        raise UnsupportedError("no engine can run here; install one: pip install openvino")


def diagnose() -> list[Finding]:
    """Look at everything, in the order it is shown. Nothing is changed and no GPU context is made."""
    probes: tuple[Callable[[], Iterator[Finding]], ...] = (
        _engines,
        _cpu,
        _opencv,
        _display,
        _extras,
        _gpu,
        _tensorrt,
        _jetpack,
    )
    return [finding for probe in probes for finding in probe()]


def _engines() -> Iterator[Finding]:
    from engines import BACKENDS, CPU_BACKENDS, get_backend

    for name, entry in BACKENDS.items():
        if importlib.util.find_spec(entry.requires) is None:
            yield Finding("engines", name, False, "not installed", entry.remedy)
            continue
        needs = entry.remedy if name in CPU_BACKENDS else "an NVIDIA GPU and its driver, to run plans"
        try:
            version = get_backend(name).fingerprint().version
            _self_test(name)
        except (EdgefoldError, ImportError) as error:
            yield Finding("engines", name, False, str(error), needs)
        else:
            yield Finding("engines", name, True, f"{version}, ran a test graph")


def _self_test(name: str) -> None:
    """Run a one-convolution graph: an engine that imports may still lack what it needs to run."""
    import hashlib

    import numpy as np
    import onnx.parser

    from engines import get_backend
    from pipeline.artifacts import EngineOptions, ModelArtifact, PreprocessSpec, TensorSpec
    from pipeline.errors import EngineError

    graph = """<ir_version: 8, opset_import: ["" : 13]>
        g (float[1,2,4,4] x) => (float[1,2,4,4] y) <float[2,2,1,1] w = {0,1,2,0}> { y = Conv(x, w) }"""
    data = onnx.parser.parse_model(graph).SerializeToString()
    interface = [TensorSpec(tensor, "float32", (1, 2, 4, 4)) for tensor in "xy"]
    backend = get_backend(name)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "self-test.onnx"
        path.write_bytes(data)
        sha256 = hashlib.sha256(data).hexdigest()
        spec = PreprocessSpec(input_hw=(4, 4))
        model = ModelArtifact(path, sha256, (interface[0],), (interface[1],), opset=13, preprocess=spec)
        artifact = backend.build(model, Path(folder), EngineOptions())
        with backend.load(artifact, EngineOptions()) as runner:
            x = np.linspace(-1, 1, 32, dtype=np.float32).reshape(1, 2, 4, 4)
            y = runner.infer({"x": x})["y"]
    error = float(np.abs(y - np.stack([x[0, 1], 2 * x[0, 0]])[None]).max())
    if not error <= _SELF_TEST_ATOL:
        raise EngineError(f"{name} computes a wrong convolution here: off by {error:.3g}")


def _cpu() -> Iterator[Finding]:
    from engines.base import available_cpus
    from engines.fingerprint import cpu_identity, int8_isa

    cpu = cpu_identity()
    yield Finding(
        "cpu", "model", True, f"{cpu.model}, {cpu.machine}, {available_cpus()} CPUs for this process"
    )
    isa = int8_isa(cpu)
    yield Finding(
        "cpu",
        "int8 instructions",
        isa is not None,
        isa or "none known",
        None if isa else "int8 runs without dot-product instructions: expect little gain over fp32",
    )
    yield Finding("cpu", "instruction sets", bool(cpu.isa), " ".join(cpu.isa) or "not known")
    yield Finding("cpu", "memory", True, _memory())
    compiled = kernels() is not None
    yield Finding(
        "cpu",
        "resampling kernel",
        compiled,
        "compiled" if compiled else "not compiled; Pillow resizes, to the same pixels",
        None
        if compiled
        else "a C compiler when edgefold is installed (sudo apt install gcc): frames in a quarter of the time",
    )


def _memory() -> str:
    gib = 1 << 30
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return "not known"
    parts = [f"{total / gib:.1f} GiB"]
    available = re.search(r"^MemAvailable:\s+(\d+) kB", _read("/proc/meminfo"), re.MULTILINE)
    if available:
        parts.append(f"{int(available[1]) * 1024 / gib:.1f} GiB available")
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    if limit.isdigit() and int(limit) < total:
        parts.append(f"{int(limit) / gib:.1f} GiB is this container's limit")
    return ", ".join(parts)


def _opencv() -> Iterator[Finding]:
    from apps.streaming import opencv

    try:
        cv2 = opencv.load("reading videos and cameras")
    except UnsupportedError as error:
        yield Finding(
            "opencv",
            "OpenCV",
            False,
            str(error.__cause__ or error),
            "pip install 'edgefold[opencv]', or sudo apt install python3-opencv with a "
            "--system-site-packages environment; image folders and the synthetic camera work without",
        )
        return
    yield Finding("opencv", "OpenCV", True, str(cv2.__version__))
    information = str(cv2.getBuildInformation())
    for name, needs in (
        (
            "FFMPEG",
            "pip install 'edgefold[opencv]' brings FFmpeg; without it most video files cannot be read",
        ),
        ("v4l/v4l2", "pip install 'edgefold[opencv]' on Linux; without it /dev/videoN cannot be read"),
        (
            "GStreamer",
            "the system's OpenCV: sudo apt install python3-opencv, in a --system-site-packages environment "
            "(pip's wheels never have GStreamer); needed for the CSI cameras of a Jetson",
        ),
    ):
        detail = build_feature(information, name)
        yield Finding("opencv", name, detail is not None, detail or "not built in", None if detail else needs)


def build_feature(information: str, name: str) -> str | None:
    """What OpenCV's build information says of `name`, or ``None`` where it is absent or ``NO``."""
    match = re.search(rf"^\s*{re.escape(name)}:\s*(\S.*)$", information, re.MULTILINE)
    return match[1].strip() if match and not match[1].startswith("NO") else None


def _display() -> Iterator[Finding]:
    variable = next((name for name in ("WAYLAND_DISPLAY", "DISPLAY") if os.environ.get(name)), None)
    present = variable is not None or platform.system() in ("Darwin", "Windows")
    detail = f"{variable}={os.environ[variable]}" if variable else ("desktop" if present else "none")
    needs = "a desktop, for a window; without one edgefold stream is headless, and --record keeps the picture"
    yield Finding("display", "display", present, detail, None if present else needs)


def _extras() -> Iterator[Finding]:
    for extra, purpose, distributions in (
        ("build", "to build and train", ("torch", "torchvision", "timm", "onnxscript", "safetensors")),
        ("av", "to read video files as planes, at less cost than OpenCV", ("av",)),
        ("report", "for the plots of a report", ("matplotlib",)),
        ("serve", "for the page and the metrics of edgefold stream", ("aiohttp", "prometheus-client")),
        ("mqtt", "for events to a broker", ("paho-mqtt",)),
    ):
        for name in distributions:
            version = _version(name)
            needs = None if version else f"pip install 'edgefold[{extra}]', {purpose}"
            yield Finding(f"extra: {extra}", name, version is not None, version or "not installed", needs)


def _gpu() -> Iterator[Finding]:
    needs = "an NVIDIA GPU and its driver; no CPU bundle uses it"
    smi = shutil.which("nvidia-smi")
    if smi is not None:
        query = [smi, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        try:
            done = subprocess.run(
                query, capture_output=True, text=True, timeout=_NVIDIA_SMI_TIMEOUT_S, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            yield Finding("gpu", "NVIDIA GPU", False, f"nvidia-smi does not answer: {error}", needs)
            return
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        if done.returncode == 0 and lines:
            for line in lines:
                yield Finding("gpu", "NVIDIA GPU", True, line)
            return
    version = _cuda_driver_version()
    if version is None:
        yield Finding("gpu", "NVIDIA GPU", False, "no driver library (libcuda)", needs)
    else:
        yield Finding("gpu", "NVIDIA GPU", True, f"driver library for CUDA {version}")


def _cuda_driver_version() -> str | None:
    """The CUDA version the driver supports, asked without making a context (Jetsons may lack nvidia-smi)."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if platform.system() == "Windows" else "libcuda.so.1")
        version = ctypes.c_int()
        if driver.cuDriverGetVersion(ctypes.byref(version)) != 0 or version.value == 0:
            return None
    except (OSError, AttributeError):
        return None
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def _tensorrt() -> Iterator[Finding]:
    flavours = [
        f"{name} {version}"
        for name, module, package in (
            ("full", "tensorrt", "tensorrt"),
            ("lean", "tensorrt_lean", "tensorrt-lean"),
            ("dispatch", "tensorrt_dispatch", "tensorrt-dispatch"),
        )
        if (version := _tensorrt_version(module, package))
    ]
    needs = "an NVIDIA GPU and: pip install tensorrt (on a Jetson it is JetPack's own); no CPU bundle uses it"
    detail = ", ".join(flavours)
    yield Finding(
        "tensorrt", "TensorRT", bool(flavours), detail or "not installed", None if flavours else needs
    )
    rtx = _tensorrt_version("tensorrt_rtx", "tensorrt-rtx")
    needs = "an RTX GPU and: pip install tensorrt-rtx; no CPU bundle uses it"
    yield Finding("tensorrt", "TensorRT-RTX", rtx is not None, rtx or "not installed", None if rtx else needs)


def _tensorrt_version(module: str, package: str) -> str | None:
    """Its version without importing it, which would load the CUDA libraries."""
    if importlib.util.find_spec(module) is None:
        return None
    versions = (_version(package + suffix) for suffix in ("", "-cu13", "-cu12"))
    return next((version for version in versions if version), "of unknown version")


def _jetpack() -> Iterator[Finding]:
    detail = jetpack_release(_read("/etc/nv_tegra_release"))
    yield Finding(
        "jetson",
        "JetPack",
        detail is not None,
        detail or "not a Jetson",
        None if detail else "a Jetson; no CPU bundle uses it",
    )


def jetpack_release(text: str) -> str | None:
    """JetPack's major version and the L4T release, from the text of ``/etc/nv_tegra_release``."""
    match = re.search(r"#\s*R(\d+)\s*\(release\),\s*REVISION:\s*([\d.]+)", text)
    if match is None:
        return None
    jetpack = {"32": "JetPack 4", "35": "JetPack 5", "36": "JetPack 6", "38": "JetPack 7"}.get(match[1])
    release = f"L4T {match[1]}.{match[2]}"
    return f"{jetpack} ({release})" if jetpack else release


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _print_table(findings: list[Finding]) -> None:
    from rich.markup import escape
    from rich.table import Table

    from apps.console import console

    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column()
    table.add_column(overflow="fold")
    area = ""
    for finding in findings:
        mark = "[green]✓[/]" if finding.present else "[yellow]–[/]"
        detail = escape(finding.detail)
        if finding.needs:
            detail += f"\n[yellow]needs:[/] {escape(finding.needs)}"
        heading = "" if finding.area == area else escape(finding.area)
        table.add_row(heading, f"{mark} {escape(finding.name)}", detail)
        area = finding.area
    console.print(table)
