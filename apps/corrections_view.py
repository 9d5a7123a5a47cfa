"""The corrections of a build, for a person: what each cost and won, and why others were left out."""

from __future__ import annotations

from rich.console import Console

from pipeline.manifest import Manifest

__all__ = ["print_corrections"]


def print_corrections(manifest: Manifest, console: Console) -> None:
    """One line for what was made, one for each that was not.

    Prints nothing for a bundle that was built without corrections.
    """
    checks = next((stage.checks for stage in manifest.stages if stage.stage == "correct"), None)
    if checks is None:
        return
    spent = ", ".join(f"{names} {seconds:.1f} s" for names, seconds in checks["seconds_of"].items())
    console.print(
        f"corrections: {spent or 'none'}, made from {checks['n_correction_images']} images", markup=False
    )
    if checks["logits_db"] is not None:
        before, after = (_db(value) for value in checks["logits_db"])
        console.print(f"  logits: from {before} to {after}, on images apart", markup=False)
    for gain in checks["gains"]:
        console.print(
            f"  {gain['correction']}: the median of {gain['n_layers']} layers from {_db(gain['median_before_db'])} to "
            f"{_db(gain['median_after_db'])} at its output, {gain['n_undone']} undone",
            markup=False,
        )
    for name, reason in checks["left_out"]:
        console.print(f"  {name} left out: {reason}", style="dim", markup=False)


def _db(value: float | None) -> str:
    return "exact" if value is None else f"{value:.1f} dB"
