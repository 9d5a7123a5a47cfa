"""Films that nobody looks at: resized where they are read, so that no whole picture is carried.

Such a frame fits one geometry and one order of channels, so a bundle that takes other pixels cannot be
swapped in while it runs.
"""

from __future__ import annotations

from collections.abc import Sequence

from apps.streaming.config import StreamConfig
from apps.streaming.feeding import HostFeeder
from apps.streaming.loading import LoadedEngine
from apps.streaming.sinks import window_obstacle
from apps.streaming.sources import NetworkPixels, SourceUri
from pipeline.errors import UsageError

__all__ = ["pixels_to_read", "require_same_pixels"]


def pixels_to_read(
    config: StreamConfig, uris: Sequence[SourceUri], engine: LoadedEngine
) -> NetworkPixels | None:
    """What films may be resized to where they are read.

    ``None`` where there is no film, where a picture is recorded, drawn or served, or where a GPU resizes.
    """
    looks = config.serve is not None or any(source.record is not None for source in config.sources)
    if looks or not any(uri.kind == "video" for uri in uris) or not isinstance(engine.feeder, HostFeeder):
        return None
    if not config.headless and window_obstacle() is None:
        return None
    return _taken_by(engine)


def require_same_pixels(engine: LoadedEngine, pixels: NetworkPixels | None) -> None:
    """Checks an engine against the frames that are on their way.

    Raises:
        UsageError: it takes others than `pixels`.
    """
    if pixels is None or _taken_by(engine) == pixels:
        return
    raise UsageError(
        f"{engine.bundle.path} takes other pixels ({_shown(_taken_by(engine))}) than the film is read in "
        f"({_shown(pixels)}): without a page, a window or a recording, films are resized where they are read. End the "
        "stream and start it with this bundle, or run it with --serve"
    )


def _taken_by(engine: LoadedEngine) -> NetworkPixels:
    manifest = engine.bundle.manifest
    return NetworkPixels(manifest.preprocess, manifest.input_color)


def _shown(pixels: NetworkPixels) -> str:
    spec = pixels.spec
    height, width = spec.input_hw
    return f"{width}×{height} {pixels.color}, resize {spec.resize} {spec.interpolation}, crop {spec.crop_fraction:g}"
