"""The HTML report: one file that needs nothing else, to read on a screen, on a phone or on paper."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apps.report import wording
from apps.report.plots import (
    accuracy_plot,
    accuracy_plot_text,
    attribution_plot,
    attribution_plot_text,
    class_plot,
    class_plot_text,
    confusion_plot,
    confusion_plot_text,
    drop_plot,
    drop_plot_text,
    range_plot,
    reliability_plot,
    reliability_plot_text,
    sensitivity_plot,
    sensitivity_plot_text,
)
from pipeline.artifacts import CalibrationTable
from pipeline.errors import EdgefoldError
from pipeline.validation_agreement import AgreementResult
from pipeline.validation_result import ClassChange, Flip, ValidationResult
from pipeline.whole_files import whole_file

if TYPE_CHECKING:
    from apps.attributing import Attributed
    from engines.tensorrt.audit import AuditReport
    from pipeline.manifest import Manifest

__all__ = ["LatencyRow", "render_report"]

_MAX_PLOTTED_CLASSES = 16
_MAX_CLASS_ROWS = 200
_MAX_PLOTTED_CONFUSIONS = 12
_WIDEST_RANGES = 8
_MOST_SENSITIVE = 24


@dataclass(frozen=True, slots=True)
class LatencyRow:
    """One measured engine."""

    engine: str
    precision: str
    batch: int
    p50_ms: float
    p95_ms: float
    p99_ms: float
    images_per_s: float


def render_report(
    path: Path,
    *,
    validation: ValidationResult | None,
    agreement: AgreementResult | None = None,
    title: str | None = None,
    max_drop_points: float | None = None,
    min_agreement_percent: float | None = None,
    manifest: Manifest | None = None,
    calibration: CalibrationTable | None = None,
    audit: AuditReport | None = None,
    attributed: Attributed | None = None,
    latency: Sequence[LatencyRow] = (),
    commands: Sequence[str] = (),
) -> None:
    """Write the report; what is not given has no section.

    Args:
        path: the file; replaced in one step, or untouched.
        validation: what was measured, ``None`` where the engine was not validated.
        agreement: what was measured instead on images without labels.
        title: by default the bundle's name.
        max_drop_points: the accuracy budget, in points of top-1.
        min_agreement_percent: the share of images that must keep their answer.
        manifest: of the bundle: digests, versions, stages, and what folding did.
        calibration: the ranges.
        audit: of the graph or the engine for a device.
        attributed: the layers that the loss comes from.
        latency: measured engines, best compared side by side.
        commands: what was typed.

    Raises:
        UnsupportedError: matplotlib is not installed.
        EdgefoldError: the file cannot be written.
    """
    # Only who writes a report pays for the template engine.
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("apps", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        images=wording.images,
        percent=wording.percent,
        points=wording.points,
        short=wording.short,
        sqnr=wording.sqnr,
        p_value=wording.p_value,
        protocol=wording.protocol,
    )
    measured = validation or agreement
    html = environment.get_template("report.html.j2").render(
        title=title or (manifest.name if manifest else "Validation"),
        v=validation,
        a=agreement,
        verdict=_verdict(validation, agreement, max_drop_points, min_agreement_percent),
        manifest=manifest,
        calibration=calibration,
        audit=audit,
        latency=latency,
        commands=commands,
        thumbnails=_thumbnails(measured.flips if measured else ()),
        **_validation_parts(validation, max_drop_points),
        **_calibration_parts(calibration),
        **_fold_parts(manifest),
        **_search_parts(manifest),
        **_attribution_parts(attributed),
    )
    _write(path, html.encode())


def _verdict(
    validation: ValidationResult | None,
    agreement: AgreementResult | None,
    max_drop_points: float | None,
    min_agreement_percent: float | None,
) -> wording.Verdict | None:
    if validation is not None:
        return wording.verdict(validation, max_drop_points)
    return None if agreement is None else wording.agreement_verdict(agreement, min_agreement_percent)


def _thumbnails(flips: Sequence[Flip]) -> list[str]:
    return [base64.b64encode(flip.thumbnail_jpeg or b"").decode() for flip in flips]


def _validation_parts(v: ValidationResult | None, max_drop_points: float | None) -> dict[str, Any]:
    if v is None:
        return {}
    # With one step only, the total is that step.
    drops = [*v.drops, v.total] if len(v.drops) > 1 else [v.total]
    plotted = _most_changed(v.classes)
    first, last = v.stages[0], v.stages[-1]
    confusions = v.confusion[:_MAX_PLOTTED_CONFUSIONS]
    rows = [*((member.name, member.after) for member in v.members), (last.name, last)]
    return {
        "reliability_svg": reliability_plot(first, last),
        "reliability_text": reliability_plot_text(first, last),
        "confusion_svg": confusion_plot(confusions) if confusions else None,
        "confusion_text": confusion_plot_text(confusions),
        "member_svg": accuracy_plot(rows) if v.members else None,
        "member_text": accuracy_plot_text(rows),
        "drop_svg": drop_plot(drops, max_drop_points),
        "drop_text": drop_plot_text(drops),
        "class_svg": class_plot(plotted) if plotted else None,
        "class_text": class_plot_text(plotted),
        "n_plotted": len(plotted),
        "class_rows": sorted(v.classes, key=lambda c: c.after_accuracy - c.before_accuracy)[:_MAX_CLASS_ROWS],
        "n_changed_wrong": v.n_flips - v.total.lost - v.total.gained,
    }


def _calibration_parts(table: CalibrationTable | None) -> dict[str, Any]:
    if table is None:
        return {}
    widest = sorted(table.ranges.items(), key=lambda item: item[1].low - item[1].high)[:_WIDEST_RANGES]
    return {"range_svg": range_plot(table.ranges) if table.ranges else None, "widest_ranges": widest}


def _most_changed(classes: Sequence[ClassChange]) -> list[ClassChange]:
    """Few classes: all, in their order. Many: those that changed most, the losses first."""
    if len(classes) <= _MAX_PLOTTED_CLASSES:
        return list(classes)
    changed = [c for c in classes if c.before_correct != c.after_correct]
    changed.sort(key=lambda c: -abs(c.after_accuracy - c.before_accuracy))
    return sorted(changed[:_MAX_PLOTTED_CLASSES], key=lambda c: c.after_accuracy - c.before_accuracy)


def _fold_parts(manifest: Manifest | None) -> dict[str, Any]:
    """What the build's ``fold`` stage recorded: op counts before and after, and its passes."""
    stages = manifest.stages if manifest else ()
    checks = next((stage.checks for stage in stages if stage.stage == "fold"), None)
    if checks is None:
        return {"fold": None, "ops": []}
    before, after = checks["before"]["op_counts"], checks["after"]["op_counts"]
    rows = [(op, before.get(op, 0), after.get(op, 0)) for op in {*before, *after}]
    rows.sort(key=lambda row: (row[1] == row[2], -max(row[1:]), row[0]))  # what changed first
    return {"fold": checks, "ops": rows}


def _search_parts(manifest: Manifest | None) -> dict[str, Any]:
    """What the build's ``search`` stage recorded: the plan, and what each layer costs."""
    stages = manifest.stages if manifest else ()
    checks = next((stage.checks for stage in stages if stage.stage == "search"), None)
    if checks is None:
        return {"search": None, "sensitivity_svg": None}
    seen = [entry for entry in checks["sensitivity"] if entry["logits_sqnr_db"] is not None][:_MOST_SENSITIVE]
    kept = {entry["layer"] for entry in checks["kept_in_float"]}
    return {
        "search": checks,
        "sensitivity_svg": sensitivity_plot(seen, kept) if seen else None,
        "sensitivity_text": sensitivity_plot_text(seen),
        "n_most_sensitive": len(seen),
    }


def _attribution_parts(attributed: Attributed | None) -> dict[str, Any]:
    if attributed is None:
        return {"attributed": None}
    plotted = attributed.found.layers[:_MOST_SENSITIVE]
    return {
        "attributed": attributed,
        "attribution_svg": attribution_plot(plotted),
        "attribution_text": attribution_plot_text(plotted),
        "n_attributed": len(plotted),
    }


def _write(path: Path, data: bytes) -> None:
    try:
        with whole_file(path, durable=True) as file:
            file.write(data)
    except OSError as error:
        raise EdgefoldError(
            f"cannot write the report {str(path)!r}: {error.strerror or error}; give another --report"
        ) from error
