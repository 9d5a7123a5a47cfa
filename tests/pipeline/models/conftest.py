"""What tests of the networks share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from lite_weights import lite_state
from safetensors.torch import save_file


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Small networks are no faster on several, and tests run side by side."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def lite_file(tmp_path: Path) -> str:
    path = tmp_path / "lite.safetensors"
    save_file(lite_state(), path)
    return str(path)
