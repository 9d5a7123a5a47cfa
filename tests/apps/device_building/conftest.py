"""Bundles that take seconds to build: once for all workers of a run, under a file lock."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from device_bundles import built
from filelock import FileLock
from tinted import FACTORY, write_tinted_images

from pipeline.bundle import Bundle, open_bundle


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of this run see, with a network and its pictures."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "device-bundles"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            (folder / "model.py").write_text(FACTORY)
            write_tinted_images(folder / "images")
    return folder


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for a file of tests to build in, with a network, its pictures and a cache of its own."""
    folder = tmp_path_factory.mktemp("device")
    (folder / "model.py").write_text(FACTORY)
    write_tinted_images(folder / "images")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEFOLD_CACHE", str(folder / "cache"))
        yield folder


def once(shared: Path, name: str, **changes: object) -> Bundle:
    """The bundle, built by whoever comes first."""
    with FileLock(shared / f"{name}.lock"), pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEFOLD_CACHE", str(shared / "cache"))
        return open_bundle(shared / name) if (shared / name).exists() else built(shared, name, **changes)


@pytest.fixture(scope="session")
def for_jetson(shared: Path) -> Bundle:
    return once(shared, "jetson", target="jetson-orin-nx", jetpack="6.2", max_drop_points=5.0)


@pytest.fixture(scope="session")
def for_l4(shared: Path) -> Bundle:
    pytest.importorskip("tensorrt_rtx")
    return once(shared, "l4", target="l4")
