"""``edgefold bench``: latency and throughput of a bundle's models, each in a process of its own."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.errors import UnsupportedError, UsageError

if TYPE_CHECKING:
    from pipeline.artifacts import EngineOptions

__all__ = ["BenchResult", "Ratio", "bench_command", "run_bench"]


class _Engine(str, Enum):
    openvino = "openvino"
    onnxruntime = "onnxruntime"
    all = "all"


class _Precision(str, Enum):
    int8 = "int8"
    fp32 = "fp32"
    both = "both"


class _Mode(str, Enum):
    latency = "latency"
    throughput = "throughput"


class _Trtexec(str, Enum):
    print = "print"
    run = "run"


@dataclass(frozen=True, slots=True)
class BenchResult:
    """One candidate: medians over the rounds of what each process measured.

    ``round_scores`` are what ratios are made of: p50 latency in ms in latency mode, images a second
    in throughput mode.
    """

    engine: str
    precision: str
    p50_ms: float
    p95_ms: float
    p99_ms: float
    images_per_s: float
    n_streams: int
    version: str
    round_scores: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times faster int8 is than fp32 on one engine: median and extremes of paired rounds."""

    engine: str
    median: float
    low: float
    high: float


def bench_command(
    bundle: Annotated[
        Path,
        typer.Argument(help="The bundle that edgefold build wrote, or an .onnx file.", show_default=False),
    ],
    engine: Annotated[_Engine, typer.Option(help="What runs it.")] = _Engine.openvino,
    precision: Annotated[
        _Precision, typer.Option(help="Which of the bundle's models; an .onnx file is run as it is.")
    ] = _Precision.both,
    batch: Annotated[int, typer.Option(min=1, help="Images a request.")] = 1,
    mode: Annotated[
        _Mode,
        typer.Option(help="latency: one request after another; throughput: as many as the engine takes."),
    ] = _Mode.latency,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="Threads of the engine; by default its own choice.", show_default=False),
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long each process measures.")] = 3.0,
    rounds: Annotated[int, typer.Option(min=1, help="How many processes a candidate, in turns.")] = 3,
    trtexec: Annotated[
        _Trtexec | None,
        typer.Option(
            help="Instead, print or run the lines that time it with NVIDIA's trtexec, with copies and without.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON to standard output.")] = False,
) -> None:
    """Measure latency and throughput, int8 against fp32, each engine in a process of its own, in turns."""
    from apps.cache import cache_dir
    from apps.console import print_json
    from apps.power_mode import read_power_mode
    from pipeline.artifacts import EngineOptions

    if trtexec is not None:
        from apps.trtexec import time_with_trtexec

        time_with_trtexec(bundle, batch=batch, seconds=seconds, run=trtexec is _Trtexec.run, as_json=as_json)
        return
    options = EngineOptions(mode.value, threads, batch, cache_dir("engines"))
    results, ratios = run_bench(bundle, engine.value, precision.value, options, seconds, rounds)
    power_mode = read_power_mode()
    if as_json:
        tree = {
            "model": str(bundle),
            "power_mode": power_mode,
            "mode": mode.value,
            "batch": batch,
            "threads": threads,
            "seconds": seconds,
            "rounds": rounds,
            "results": [asdict(result) for result in results],
            "int8_speedup": [asdict(ratio) for ratio in ratios],
        }
        print_json(json.dumps(tree, indent=2))
    else:
        _print(bundle, options, results, ratios, power_mode)


def run_bench(
    path: Path, engine: str, precision: str, options: EngineOptions, seconds: float, rounds: int
) -> tuple[list[BenchResult], list[Ratio]]:
    """Measure every candidate `rounds` times.

    Args:
        path: a bundle, or one ONNX file.
        engine: a backend's name, or ``all``: every one that can be imported here.
        precision: ``int8``, ``fp32`` or ``both``; for an ONNX file it does not matter.
        options: the `EngineOptions` every candidate is loaded with.
        seconds: how long each process measures.
        rounds: how many processes a candidate.

    Raises:
        UsageError: the bundle has no model of that precision, or `path` is neither.
        UnsupportedError: the engine cannot be imported here.
        EngineError: a measurement failed.
        IntegrityError: the bundle is damaged.
    """
    from apps.console import progress_display
    from engines.measure import run_alternating, worker_command

    models = _models(path, precision)
    names = _usable_engines(engine)
    commands = {
        (name, kind): worker_command(file, sha256, name, options, seconds)
        for name in names
        for kind, (file, sha256) in models.items()
    }
    total = len(commands) * rounds
    with progress_display() as progress:
        done = 0

        def advance(*_: object) -> None:
            nonlocal done
            done += 1
            progress("measuring", done, total)

        progress("measuring", 0, total)
        keyed = {f"{name} {kind}": command for (name, kind), command in commands.items()}
        measured = run_alternating(keyed, rounds, advance)
    score = "p50_ms" if options.mode == "latency" else "images_per_s"
    results = [_result(name, kind, measured[f"{name} {kind}"], score) for name, kind in commands]
    return results, _ratios(results, lower_is_better=options.mode == "latency")


def _models(path: Path, precision: str) -> dict[str, tuple[Path, str]]:
    """File and SHA-256 by precision; an ONNX file is ``onnx``."""
    from pipeline.bundle import open_bundle
    from pipeline.compile import FOLDED_NAME, QUANTIZED_NAME

    if path.suffix == ".onnx":
        try:
            return {"onnx": (path, hashlib.sha256(path.read_bytes()).hexdigest())}
        except OSError as error:
            raise UsageError(f"{path} cannot be read: {error.strerror or error}") from error
    opened = open_bundle(path)
    files = {"int8": QUANTIZED_NAME, "fp32": FOLDED_NAME}
    present = {kind: name for kind, name in files.items() if name in opened.manifest.files}
    wanted = (
        present if precision == "both" else {precision: present[precision]} if precision in present else {}
    )
    if not wanted:
        raise UsageError(f"bundle {path} has no {precision} model; it has: {', '.join(present) or 'none'}")
    return {kind: (opened.file(name), opened.sha256(name)) for kind, name in wanted.items()}


def _usable_engines(engine: str) -> list[str]:
    from apps.console import console
    from engines import CPU_BACKENDS, get_backend

    if engine != "all":
        get_backend(engine)
        return [engine]
    usable = []
    for name in CPU_BACKENDS:
        try:
            get_backend(name)
        except UnsupportedError as error:
            console.print(f"skipped: {error}", markup=False, soft_wrap=True)
        else:
            usable.append(name)
    if not usable:
        raise UnsupportedError("no engine can run here; see edgefold doctor")
    return usable


def _result(engine: str, precision: str, rounds: list[dict[str, Any]], score: str) -> BenchResult:
    return BenchResult(
        engine=engine,
        precision=precision,
        p50_ms=median(run["p50_ms"] for run in rounds),
        p95_ms=median(run["p95_ms"] for run in rounds),
        p99_ms=median(run["p99_ms"] for run in rounds),
        images_per_s=median(run["images_per_s"] for run in rounds),
        n_streams=rounds[0]["n_streams"],
        version=rounds[0]["fingerprint"]["version"],
        round_scores=tuple(run[score] for run in rounds),
    )


def _ratios(results: list[BenchResult], *, lower_is_better: bool) -> list[Ratio]:
    by_key = {(result.engine, result.precision): result.round_scores for result in results}
    ratios = []
    for engine in dict.fromkeys(result.engine for result in results):
        int8, fp32 = by_key.get((engine, "int8")), by_key.get((engine, "fp32"))
        if int8 is None or fp32 is None:
            continue
        paired = [f / i if lower_is_better else i / f for i, f in zip(int8, fp32, strict=True)]
        ratios.append(Ratio(engine, median(paired), min(paired), max(paired)))
    return ratios


def _print(
    path: Path,
    options: EngineOptions,
    results: list[BenchResult],
    ratios: list[Ratio],
    power_mode: str | None,
) -> None:
    from rich.markup import escape
    from rich.table import Table

    from apps.console import console

    threads = options.threads or "the engine's choice"
    table = Table(
        title=escape(f"{path.name}: {options.mode}, batch {options.batch}, threads: {threads}")
        + escape("" if power_mode is None else f", power mode: {power_mode}"),
        title_justify="left",
    )
    table.add_column("engine")
    table.add_column("precision")
    for column in ("p50 ms", "p95 ms", "p99 ms", "images/s"):
        table.add_column(column, justify="right")
    for result in results:
        times = (f"{value:.2f}" for value in (result.p50_ms, result.p95_ms, result.p99_ms))
        table.add_row(result.engine, result.precision, *times, f"{result.images_per_s:.1f}")
    console.print(table)
    for ratio in ratios:
        console.print(
            f"{ratio.engine}: int8 is {ratio.median:.2f} times as fast as fp32 "
            f"(rounds: {ratio.low:.2f} to {ratio.high:.2f})"
        )
