"""A small model, small images, and a cache of its own for every build."""

from __future__ import annotations

from pathlib import Path

import pytest
from tinted import FACTORY, write_tinted_images


@pytest.fixture
def model_py(tmp_path: Path) -> str:
    path = tmp_path / "model.py"
    path.write_text(FACTORY)
    return f"{path}:classifier"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_tinted_images(tmp_path / "images")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEFOLD_CACHE", str(tmp_path / "cache"))
