"""Bundles for devices that are not here, built from a tiny network."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from apps.building import build
from apps.publishing import BuildRequest
from pipeline.bundle import Bundle


def quiet(what: str, done: int, total: int | None) -> None:
    """A progress callback that draws nothing."""


def built(workplace: Path, out: str, **changes: Any) -> Bundle:
    settings = {
        "model": f"{workplace / 'model.py'}:classifier",
        "out": workplace / out,
        "calib": str(workplace / "images"),
        "eval_data": str(workplace / "images"),
        "input_size": 32,
        **changes,
    }
    return build(BuildRequest(**settings), quiet).bundle


def copy_of(bundle: Bundle, folder: Path) -> Path:
    return Path(shutil.copytree(bundle.path, folder / "bundle"))
