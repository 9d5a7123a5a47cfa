"""Fixtures of the engine tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_engine_models import MAKERS, TinyModel


@pytest.fixture
def make_tiny(tmp_path: Path) -> Callable[..., TinyModel]:
    """``make_tiny("fp32" | "int8", batch="batch")``."""
    return lambda kind, batch="batch": MAKERS[kind](tmp_path / f"{kind}-{batch}.onnx", batch)


@pytest.fixture(params=["fp32", "int8"])
def tiny(request: pytest.FixtureRequest, make_tiny: Callable[..., TinyModel]) -> TinyModel:
    """Both tiny models, with a free batch."""
    return make_tiny(request.param)
