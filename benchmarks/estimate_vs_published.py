"""What `edgefold estimate` says beside what others published for the same network and device.

    python benchmarks/estimate_vs_published.py

Exports the networks with seeded random weights (speed depends on shapes, not values), folds them, predicts their
kernels, estimates each figure of benchmarks/published.py and writes benchmarks/results/estimate_vs_published.json
and the table in docs/estimate.md. Nothing is timed here: it can run beside other work.
"""

from __future__ import annotations

import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import onnx_ir as ir
from harness import machine_stamp, write_results
from published import PUBLISHED, Published

from engines.tensorrt.estimate import MAX_RATIO, estimate
from pipeline.targets import find_target

DOCS = Path(__file__).parent.parent / "docs" / "estimate.md"
BEGIN, END = "<!-- published: begin -->\n", "<!-- published: end -->\n"
_SPECS = {
    "inception_v4": "inception_v4",
    "mobilenet_v2": "torchvision:mobilenet_v2",
    "resnet101": "torchvision:resnet101",
    "resnet50": "torchvision:resnet50",
}


def main() -> None:
    graphs = {network: _graph(spec) for network, spec in _SPECS.items()}
    rows = [_compare(figure, graphs[figure.network]) for figure in PUBLISHED]
    for row in rows:
        print(row["target"], row["network"], row["inside"], f"{row['ratio']:.2f}", file=sys.stderr)
    machine = machine_stamp()
    results = {"machine": machine, "max_ratio": MAX_RATIO, "figures": rows}
    write_results("estimate_vs_published", results)
    DOCS.write_text(with_table(DOCS.read_text(encoding="utf-8"), rows), encoding="utf-8")
    outside = [row for row in rows if not row["inside"]]
    if outside:
        sys.exit(f"{len(outside)} of {len(rows)} published figures lie outside the range")


def _graph(spec: str) -> ir.Model:
    """The folded graph, without preprocessing, as the published engines were given it."""
    from pipeline.compile import export_resolved
    from pipeline.models.resolve import resolve_model
    from pipeline.onnx_files import load_model
    from pipeline.passes import DEFAULT_PASSES, run_passes

    print("exporting", spec, file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        exported = export_resolved(resolve_model(spec, weights="random:0"), Path(folder) / "model.onnx")
        model, _ = run_passes(load_model(exported.path), DEFAULT_PASSES)
    return model


def _compare(figure: Published, model: ir.Model) -> dict[str, Any]:
    """The estimate of one figure, in the figure's own unit."""
    target = find_target(figure.target)
    if figure.latency_ms is not None:
        result = estimate(model, target, precision="int8", batch=figure.gpu_batch or 1)
        published, low, high, unit = figure.latency_ms, result.low_ms, result.high_ms, "ms"
    else:
        assert figure.images_per_s is not None
        low = high = 0.0
        if figure.gpu_batch is not None:
            low, high = estimate(model, target, precision="int8", batch=figure.gpu_batch).images_per_s
        if figure.dla_batch is not None:
            one = estimate(model, target, precision="int8", batch=figure.dla_batch, engine="dla")
            low, high = (rate + target.dla_cores * dla for rate, dla in zip((low, high), one.images_per_s, strict=True))  # fmt: skip
        published, unit = figure.images_per_s, "images/s"
    return {
        "target": figure.target,
        "network": figure.network,
        "gpu_batch": figure.gpu_batch,
        "dla_batch": figure.dla_batch,
        "unit": unit,
        "published": published,
        "low": low,
        "high": high,
        "ratio": high / low,
        "position": math.log(published / low) / math.log(high / low),
        "inside": low <= published <= high and high <= MAX_RATIO * low,
        "what": figure.what,
        "source": figure.source,
    }


def with_table(page: str, rows: list[dict[str, Any]]) -> str:
    """`page` with the table between its markers made from `rows`."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    lines = [
        "| device | network | batch | published | estimate | where | what |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        batches = [
            f"{name} {row[key]}" for name, key in (("GPU", "gpu_batch"), ("DLA", "dla_batch")) if row[key]
        ]
        figures = [_rounded(row[key]) for key in ("published", "low", "high")]
        lines.append(
            f"| {row['target']} | {row['network']} | {', '.join(batches)} | {figures[0]} {row['unit']} | "
            f"{figures[1]} to {figures[2]} | {row['position']:.2f} | [{row['what']}]({row['source']}) |"
        )
    return before + BEGIN + "\n".join(lines) + "\n" + END + after


def _rounded(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    main()
