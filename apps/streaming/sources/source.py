"""What a source is to whoever reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.artifacts import YuvCoding

__all__ = ["DEFAULT_FPS", "Delivered", "ModelClasses", "Source"]

DEFAULT_FPS = 30.0


@dataclass(frozen=True, slots=True)
class Delivered:
    """What a source handed over: unchecked pixels, and the true class where it is known."""

    pixels: Any
    label: int | None = None
    yuv: YuvCoding | None = None
    """`pixels` are ``I420`` planes, and this their coding; else they have channels in the source's `color`."""


@dataclass(frozen=True, slots=True)
class ModelClasses:
    """The classes of the engine: how many scores it gives, and what they are called."""

    labels: tuple[str, ...]
    """As many as `count`; or none, where the model came without names."""
    count: int

    def named(self, source_names: Sequence[str] | None, notes: list[str]) -> tuple[str, ...]:
        """The labels; without them the source's class names where they are as many, else numbers."""
        if self.labels:
            return self.labels
        if source_names is not None and len(source_names) == self.count:
            return tuple(source_names)
        notes.append("the bundle names no classes, so they are numbered; give --labels to edgefold build")
        return tuple(str(index) for index in range(self.count))


class Source(Protocol):
    """One open source, read by one thread."""

    source_id: str
    """Without credentials."""
    color: Literal["RGB", "BGR"]
    """The order in which three channels come."""
    live: bool
    """Whether frames pass whether or not they are read; live sources default to ``newest``."""
    self_paced: bool
    """Whether `read` itself waits for the next frame (a camera); the others deliver at once."""
    fps: float
    """Nominal rate; a recording plays at it."""
    labels: tuple[str, ...]
    """The engine's classes by name, see `ModelClasses.named`."""
    notes: list[str]
    """What the user should know about how the source was read."""

    def read(self, into: NDArray[np.uint8] | None = None) -> Delivered | None:
        """The next frame, or ``None`` at the end. May block as long as the device does.

        Args:
            into: contiguous, writable; where the frame has its shape, the frame is written there and
                `Delivered.pixels` is this very array. Otherwise its contents are undefined and
                `Delivered.pixels` is another array.

        Raises:
            SourceLostError: a live source ended, or delivers no more; close it and open it anew.
        """
        ...

    def close(self) -> None:
        """Releases the device or file. Called once, after the last `read` has returned."""
        ...
