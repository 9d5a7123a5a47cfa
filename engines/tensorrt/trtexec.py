"""NVIDIA's own timing tool beside ours: the command lines that compare, how they are run, what they print.

trtexec changed what it measures by itself from TensorRT 10 to 11 (its ``sampleOptions.cpp``): CUDA graphs and spin-wait
were off and copies on, now it is the other way round, and the old switches are accepted and do nothing. A figure
says little without its command line, so every switch that a version has is given.

=====================  ==================================  =================================
                       TensorRT 10                         TensorRT 11
=====================  ==================================  =================================
CUDA graph             off; ``--useCudaGraph``             on; ``--noCudaGraph``
spin-wait              off; ``--useSpinWait``              on; ``--noSpinWait``
copies                 on; ``--noDataTransfers``           off; ``--includeDataTransfers``
types as in the graph  ``--stronglyTyped``                 always
=====================  ==================================  =================================
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from pipeline.artifacts import TensorSpec
from pipeline.errors import EngineError, UnsupportedError, UsageError

__all__ = [
    "Percentiles",
    "TrtexecSummary",
    "command_line",
    "find_trtexec",
    "parse_summary",
    "run_trtexec",
    "trtexec_major",
]

_PLACES = ("/usr/src/tensorrt/bin", "/opt/tensorrt/bin")
"""JetPack's and the Debian packages', and the NGC containers'."""
_MAJORS = (10, 11)
_VERSION_TIMEOUT_S = 60.0
_LAST_LINES = 5
_BANNER = re.compile(r"\[TensorRT v([\d.]+)\]")
_STAMP = re.compile(r"^\[\d\d/\d\d/\d{4}-\d\d:\d\d:\d\d\] ?")
_TIME = re.compile(r"(min|max|mean|median|percentile\((\d+(?:\.\d+)?)%\)) = (\S+) ms")


@dataclass(frozen=True, slots=True)
class Percentiles:
    """One line of the summary, in milliseconds."""

    min_ms: float
    max_ms: float
    mean_ms: float
    median_ms: float
    percentiles_ms: MappingProxyType[float, float]
    """By percentage, such as 99.0."""


@dataclass(frozen=True, slots=True)
class TrtexecSummary:
    """What trtexec prints under "Performance summary"."""

    version: str | None
    """TensorRT's, from the banner: ``10.3.0``."""
    queries_per_s: float
    """Batches, not images, a second."""
    latency: Percentiles
    """Copies and computation of one batch."""
    gpu_compute: Percentiles
    """Computation alone."""
    h2d: Percentiles
    d2h: Percentiles
    enqueue: Percentiles
    warnings: tuple[str, ...]
    """What trtexec says against its own figures: unstable clocks, the host as bottleneck."""


def command_line(
    *,
    major: int,
    onnx: Path | None = None,
    plan: Path | None = None,
    inputs: Sequence[TensorSpec] = (),
    batch: int = 1,
    transfers: bool = False,
    seconds: float = 3.0,
    binary: str = "trtexec",
    dla_core: int | None = None,
) -> list[str]:
    """The arguments, binary first, that time a model or a plan as `edgefold bench` does.

    Args:
        major: TensorRT's major version, 10 or 11.
        onnx: a strongly typed model to build and time; exactly one of this and `plan`.
        plan: a built engine to time.
        inputs: of the model; those with a free first dimension get it set to `batch`.
        batch: images a request.
        transfers: whether copies to and from the device count.
        seconds: how long it measures.
        binary: the program.
        dla_core: build for this DLA core, with the GPU for the layers it cannot run; only with `onnx`.

    Raises:
        UnsupportedError: a major version whose switches are not known.
        UsageError: neither or both of `onnx` and `plan`, an input with a free dimension other than the first, or a
            name that trtexec's notation for shapes cannot hold.
    """
    if major not in _MAJORS:
        raise UnsupportedError(
            f"the switches of trtexec {major} are not known; they are for TensorRT {_MAJORS[0]} and {_MAJORS[1]}"
        )
    if (onnx is None) == (plan is None):
        raise UsageError("trtexec times either a model or a plan; give one of them")
    command = [binary]
    if onnx is not None:
        command.append(f"--onnx={onnx}")
        if major == 10:
            command.append("--stronglyTyped")
        if dla_core is not None:
            command += [f"--useDLACore={dla_core}", "--allowGPUFallback"]
    else:
        command.append(f"--loadEngine={plan}")
    shapes = [_shape(spec, batch) for spec in inputs if isinstance(spec.shape[0], str)]
    if shapes:
        command.append(f"--shapes={','.join(shapes)}")
    if major == 10:
        command += ["--useCudaGraph", "--useSpinWait"]
        if not transfers:
            command.append("--noDataTransfers")
    elif transfers:
        command.append("--includeDataTransfers")
    # At least as many runs as ours, and percentiles of the same kind.
    command += [f"--duration={seconds:g}", "--percentile=50,95,99"]
    return command


def _shape(spec: TensorSpec, batch: int) -> str:
    free = [size for size in spec.shape[1:] if isinstance(size, str)]
    if free:
        raise UsageError(
            f"input {spec.name!r} has free dimensions {free} besides the batch; give it fixed ones"
        )
    if re.search(r"[,:'*\s]", spec.name):
        raise UsageError(f"input name {spec.name!r} does not fit trtexec's --shapes; rename it in the model")
    return f"{spec.name}:{'x'.join(map(str, (batch, *spec.shape[1:])))}"


def find_trtexec() -> Path:
    """The binary, on ``PATH`` or where NVIDIA's packages put it.

    Raises:
        UnsupportedError: there is none.
    """
    found = shutil.which("trtexec") or shutil.which("trtexec", path=os.pathsep.join(_PLACES))
    if found is None:
        raise UnsupportedError(
            f"trtexec is neither on PATH nor in {' or '.join(_PLACES)}; it comes with TensorRT's packages (on a Jetson: "
            "sudo apt install libnvinfer-bin). edgefold bench --trtexec print shows the command line to run elsewhere"
        )
    return Path(found)


def trtexec_major(binary: Path) -> int:
    """TensorRT's major version, from what `binary` prints first.

    Raises:
        UnsupportedError: it prints no version.
        EngineError: it cannot be run.
    """
    version = _version(_output([str(binary), "--help"], _VERSION_TIMEOUT_S)[1])
    if version is None:
        raise UnsupportedError(f"{binary} says no TensorRT version; is it trtexec?")
    return int(version.split(".")[0])


def run_trtexec(command: Sequence[str], timeout_s: float) -> TrtexecSummary:
    """Run a command line of `command_line` and read its summary.

    Raises:
        EngineError: it cannot be run, fails, takes longer than `timeout_s`, or prints no summary; its last words are
            in the message.
    """
    code, output = _output(command, timeout_s)
    if code != 0:
        raise EngineError(
            f"trtexec failed with exit code {code}: {_last_words(output)}; ran: {shlex.join(command)}"
        )
    return parse_summary(output)


def parse_summary(text: str) -> TrtexecSummary:
    """The figures in what trtexec printed.

    Raises:
        EngineError: the summary, or a line of it, is missing or is no number.
    """
    lines = [_STAMP.sub("", line.strip()) for line in text.splitlines()]
    start = next((i for i, line in enumerate(lines) if "=== Performance summary ===" in line), None)
    if start is None:
        raise EngineError(f"trtexec printed no performance summary; it ended with: {_last_words(text)}")
    body: dict[str, str] = {}
    warnings: list[str] = []
    for line in lines[start + 1 :]:
        if line.startswith("[W] "):
            words = line.removeprefix("[W] ").strip()
            if words.startswith("* ") or not warnings:
                warnings.append(words.removeprefix("* "))
            else:
                warnings[-1] += f" {words}"
        elif ": " in line:
            label, _, figures = line.removeprefix("[I] ").partition(": ")
            body.setdefault(label, figures)
    try:
        queries = float(body["Throughput"].removesuffix(" qps"))
        latency, compute, h2d, d2h, enqueue = (
            _percentiles(body[label])
            for label in ("Latency", "GPU Compute Time", "H2D Latency", "D2H Latency", "Enqueue Time")
        )
    except KeyError as error:
        raise EngineError(f"trtexec's summary has no {error.args[0]!r} line") from None
    except ValueError as error:
        raise EngineError(f"trtexec's summary cannot be read: {error}") from error
    return TrtexecSummary(_version(text), queries, latency, compute, h2d, d2h, enqueue, tuple(warnings))


def _percentiles(figures: str) -> Percentiles:
    """``min = 1.3 ms, …, percentile(99%) = 1.5 ms``; the percentages vary with the version and the switches."""
    named: dict[str, float] = {}
    shares: dict[float, float] = {}
    for label, share, value in _TIME.findall(figures):
        if share:
            shares[float(share)] = float(value)
        else:
            named[label] = float(value)
    missing = [label for label in ("min", "max", "mean", "median") if label not in named]
    if missing:
        raise ValueError(f"{figures!r} has no {', '.join(missing)}")
    return Percentiles(
        named["min"], named["max"], named["mean"], named["median"], MappingProxyType(shares)
    )  # fmt: skip


def _version(text: str) -> str | None:
    """``[TensorRT v101602]`` is 10.16.2, ``v8502`` of TensorRT 8 is 8.5.2; some builds write the dots."""
    match = _BANNER.search(text)
    if match is None:
        return None
    written = match[1]
    if "." in written:
        return ".".join(written.split(".")[:3])
    major, minor, patch = (written[:-3], written[-3], written[-2:]) if len(written) < 5 else (
        written[:-4], written[-4:-2], written[-2:],
    )  # fmt: skip
    return f"{int(major)}.{int(minor)}.{int(patch)}" if major else None


def _output(command: Sequence[str], timeout_s: float) -> tuple[int, str]:
    """Exit code, and standard output and error as one."""
    try:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise EngineError(
            f"trtexec did not end within {timeout_s:g} s and was stopped; ran: {shlex.join(command)}"
        ) from error
    except OSError as error:
        raise EngineError(f"{command[0]} cannot be run: {error.strerror or error}") from error
    return done.returncode, done.stdout


def _last_words(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "[E]" in line]
    return " / ".join((errors or lines)[-_LAST_LINES:]) or "nothing was printed"
