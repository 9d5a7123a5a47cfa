"""``edgefold bench --trtexec``: NVIDIA's own tool on the same model, so that the numbers can be compared."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import UsageError

if TYPE_CHECKING:
    from engines.tensorrt.trtexec import TrtexecSummary

__all__ = ["time_with_trtexec"]

_BUILD_S = 3600.0
"""An hour to build on a small Jetson; a hung process is stopped after that."""
_START_S = 300.0


def time_with_trtexec(path: Path, *, batch: int, seconds: float, run: bool, as_json: bool) -> None:
    """Print the command lines for `path` without and with copies, or run both and show what they measured.

    Args:
        path: a bundle for a TensorRT target, an ``.onnx`` file, or a built ``.plan`` (or ``.engine``).
        batch: images a request.
        seconds: how long each run measures.
        run: whether to run them.
        as_json: JSON on standard output instead of a table.

    Raises:
        UsageError: `path` is nothing that TensorRT can run.
        UnsupportedError: `run`, and trtexec is not here or of an unknown version.
        EngineError: a run failed.
        IntegrityError: the bundle is damaged.
    """
    from engines.tensorrt.trtexec import command_line, find_trtexec, run_trtexec, trtexec_major

    given = _given(path)
    if not run:
        lines = {
            major: [
                shlex.join(command_line(major=major, batch=batch, seconds=seconds, transfers=copies, **given))
                for copies in (False, True)
            ]
            for major in (10, 11)
        }
        _print_lines(lines, as_json)
        return
    binary = find_trtexec()
    major = trtexec_major(binary)
    results: list[tuple[bool, list[str], TrtexecSummary]] = []
    for copies in (False, True):
        command = command_line(
            major=major, batch=batch, seconds=seconds, transfers=copies, binary=str(binary), **given
        )
        limit_s = seconds + (_BUILD_S if given["onnx"] is not None else _START_S)
        results.append((copies, command, run_trtexec(command, limit_s)))
    _print_results(path, batch, results, as_json)


def _given(path: Path) -> dict[str, Any]:
    """The model or plan, and the inputs whose batch has to be set."""
    from pipeline.bundle import open_bundle
    from pipeline.compile import QUANTIZED_NAME
    from pipeline.onnx_files import interface, load_model

    if path.suffix == ".onnx":
        inputs, _ = interface(load_model(path))
        return {"onnx": path, "plan": None, "inputs": inputs}
    if path.suffix in (".plan", ".engine"):
        if not path.is_file():
            raise UsageError(f"there is no file {path}")
        return {"onnx": None, "plan": path, "inputs": ()}
    bundle = open_bundle(path)
    manifest = bundle.manifest
    if manifest.target == "cpu":
        raise UsageError(
            f"bundle {path} is for the CPU, and TensorRT does not take its int8 graph; give trtexec a bundle built "
            "with --target for a GPU, or an .onnx file"
        )
    engine = next((name for name in manifest.files if name.endswith((".plan", ".engine"))), None)
    if engine is not None:
        return {"onnx": None, "plan": bundle.file(engine), "inputs": manifest.inputs}
    return {"onnx": bundle.file(QUANTIZED_NAME), "plan": None, "inputs": manifest.inputs}


def _print_lines(lines: dict[int, list[str]], as_json: bool) -> None:
    from apps.console import print_json

    if as_json:
        tree = [
            {"tensorrt": major, "without_copies": without, "with_copies": copies}
            for major, (without, copies) in lines.items()
        ]
        print_json(json.dumps(tree, indent=2))
        return
    # To standard output: the lines are to be copied, or piped to the device.
    print_json(
        "\n".join(
            f"# TensorRT {major}, {what} copies\n{line}"
            for major, pair in lines.items()
            for what, line in zip(("without", "with"), pair, strict=True)
        )
    )


def _print_results(
    path: Path, batch: int, results: list[tuple[bool, list[str], TrtexecSummary]], as_json: bool
) -> None:
    from rich.markup import escape
    from rich.table import Table

    from apps.console import console, print_json

    if as_json:
        tree = [
            {"copies": copies, "command": command, "batch": batch, **_tree(summary)}
            for copies, command, summary in results
        ]
        print_json(json.dumps(tree, indent=2))
        return
    version = results[0][2].version or "of unknown version"
    table = Table(title=escape(f"{path.name}: trtexec {version}, batch {batch}"), title_justify="left")
    table.add_column("copies")
    for heading in ("median ms", "p99 ms", "GPU median ms", "images/s"):
        table.add_column(heading, justify="right")
    for copies, _, summary in results:
        p99 = summary.latency.percentiles_ms.get(99.0)
        table.add_row(
            "with" if copies else "without",
            f"{summary.latency.median_ms:.3f}",
            "" if p99 is None else f"{p99:.3f}",
            f"{summary.gpu_compute.median_ms:.3f}",
            f"{summary.queries_per_s * batch:,.0f}",
        )
    console.print(table)
    for warning in dict.fromkeys(warning for _, _, summary in results for warning in summary.warnings):
        console.print(f"[yellow]trtexec:[/] {escape(warning)}")
    for _, command, _ in results:
        console.print(escape(shlex.join(command)), soft_wrap=True)


def _tree(summary: TrtexecSummary) -> dict[str, Any]:
    """JSON-compatible values; percentages become words."""
    tree: dict[str, Any] = {}
    for name in ("version", "queries_per_s", "warnings"):
        tree[name] = getattr(summary, name)
    for name in ("latency", "gpu_compute", "h2d", "d2h", "enqueue"):
        times = getattr(summary, name)
        shares = {f"p{share:g}_ms": value for share, value in times.percentiles_ms.items()}
        plain = {key: getattr(times, key) for key in ("min_ms", "max_ms", "mean_ms", "median_ms")}
        tree[name] = {**plain, **shares}
    return tree
