"""What the readers of a video with an end share: the part that is wanted, looping, and what is said of a damaged one."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray

from apps.streaming.sources.source import Delivered
from apps.streaming.uris import SourceUri
from pipeline.errors import DataError

__all__ = ["Recording"]

_HALF_MS = 0.5  # time stamps are rounded to the container's time base


class Recording(ABC):
    """Every frame of a video, or of the part that ``t=`` names; again with ``loop``.

    Raises:
        DataError: `read`: ``t=`` begins behind the end.
    """

    live = False
    self_paced = False

    source_id: str
    notes: list[str]
    _uri: SourceUri
    _promised: int
    """Frames that the container says it has; 0 where it does not say."""
    _in_pass = 0

    @abstractmethod
    def _begin(self) -> None:
        """Opens it, at the beginning of the part; closes what is open. To be called again to loop, which works for
        every container, where seeking backwards does not."""

    @abstractmethod
    def _grab(self) -> bool:
        """Moves to the next frame; whether there is one."""

    @abstractmethod
    def _at_ms(self) -> float:
        """When the frame that was grabbed is shown, from the beginning of the video."""

    @abstractmethod
    def _deliver(self, into: NDArray[np.uint8] | None) -> Delivered:
        """The frame that was grabbed."""

    def read(self, into: NDArray[np.uint8] | None = None) -> Delivered | None:
        """The next frame, or `None` at the end; see `Source.read`."""
        if not self._grab_wanted():
            if self._ends_here():
                return None
            self._begin()
            self._in_pass = 0
            if not self._grab_wanted():
                return None
        self._in_pass += 1
        return self._deliver(into)

    @property
    def _whole(self) -> bool:
        return not self._uri.options.start_s and self._uri.options.end_s is None

    def _grab_wanted(self) -> bool:
        """Moves to the next frame of the part that is wanted."""
        options = self._uri.options
        while self._grab():
            if self._whole:
                return True
            at_ms = self._at_ms()
            if options.end_s is not None and at_ms >= 1000 * options.end_s - _HALF_MS:
                return False
            if at_ms >= 1000 * options.start_s - _HALF_MS:
                return True
        return False

    def _ends_here(self) -> bool:
        """Whether the end of the file is the end of the source; says what was wrong with it."""
        options = self._uri.options
        if options.start_s and not self._in_pass:
            raise DataError(
                f"{self.source_id} has no frames at {options.start_s:g} s: it is shorter than that"
            )
        # Containers may miscount by a frame or two; a file that was cut off misses many.
        if self._whole and self._in_pass < self._promised - max(2, self._promised // 100):
            note = (
                f"the video ended after {self._in_pass} of {self._promised} frames; it is damaged or cut off"
            )
            if note not in self.notes:
                self.notes.append(note)
        return not options.loop or not self._in_pass
