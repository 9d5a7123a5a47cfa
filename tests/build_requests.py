"""What a test asks `edgefold build` for."""

from __future__ import annotations

from pathlib import Path

from apps.publishing import BuildRequest


def quiet(what: str, done: int, total: int | None) -> None:
    """A progress callback that draws nothing."""


def request(model_py: str, images: Path, out: Path, **changes: object) -> BuildRequest:
    settings: dict[str, object] = {
        "model": model_py,
        "out": out,
        "calib": str(images),
        "eval_data": str(images),
        "input_size": 32,
        **changes,
    }
    return BuildRequest(**settings)  # type: ignore[arg-type]
