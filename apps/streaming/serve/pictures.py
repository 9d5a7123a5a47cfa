"""The newest picture of every source, encoded once however many watch it.

The runtime's side (`wanted`, `publish`) costs a lock and an assignment. Encoding happens in the server's
executor, when a client is ready for a picture: a client that is slow skips pictures, and nobody's picture
is older than the last one published when its turn came.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from apps.streaming import opencv

__all__ = ["JpegPicture", "LatestPictures", "Watch", "jpeg_encoder"]

_LOG = logging.getLogger(__name__)

_FRESH_S = 1.0
"""A picture that nobody was sent for so long is not shown to a new watcher as if it were live."""
_JPEG_QUALITY = 80
_MAX_SIDE = 1280
"""Larger pictures are scaled down: a card is 500 pixels wide, and eight 4K streams are 100 MB a second."""

Encoder = Callable[[NDArray[np.uint8]], bytes]


def jpeg_encoder() -> Encoder:
    """uint8 HWC BGR to a JPEG whose longer side is at most 1280 pixels.

    Raises:
        UnsupportedError: OpenCV is missing.
    """
    cv2 = opencv.load("the video of the page")

    def encode(picture: NDArray[np.uint8]) -> bytes:
        height, width = picture.shape[:2]
        scale = _MAX_SIDE / max(height, width)
        if scale < 1.0:
            size = (max(1, round(width * scale)), max(1, round(height * scale)))
            picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
        encoded, data = cv2.imencode(".jpg", picture, (cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY))
        if not encoded:
            raise ValueError(f"OpenCV could not encode a picture of shape {picture.shape} as JPEG")
        return bytes(data)

    return encode


@dataclass(frozen=True, slots=True)
class JpegPicture:
    """A picture as it is sent; `sequence` rises with every picture of its source."""

    source_id: str
    sequence: int
    jpeg: bytes


@dataclass(slots=True)
class _Slot:
    source_id: str
    # Guarded by the hub's lock.
    due_s: float = 0.0
    picture: NDArray[np.uint8] | None = None
    published_s: float = float("-inf")
    sequence: int = 0
    n_watches: int = 0
    # Of the event loop's thread alone.
    watches: set[Watch] = field(default_factory=set)
    encoded: JpegPicture | None = None
    encoding: asyncio.Task[None] | None = None


class LatestPictures:
    """The `PictureHub` of the page.

    Args:
        video_fps: pictures a second and source, at most; those that come sooner are not taken.
        loop: the server's.
        executor: where pictures are encoded.
        encode: picture to JPEG.
    """

    def __init__(
        self, video_fps: float, loop: asyncio.AbstractEventLoop, executor: Executor, encode: Encoder
    ) -> None:
        self._interval_s = 1.0 / video_fps
        self._loop = loop
        self._executor = executor
        self._encode = encode
        self._lock = threading.Lock()
        self._slots: dict[str, _Slot] = {}
        self.n_accepted = 0
        """Pictures taken from the runtime."""
        self.n_encoded = 0
        """Pictures that became a JPEG."""

    # --- the runtime's threads --------------------------------------------------------------------

    def wanted(self, source_id: str) -> bool:
        """See `PictureHub.wanted`."""
        slot = self._slots.get(source_id)
        return slot is not None and slot.n_watches > 0 and time.monotonic() >= slot.due_s

    def publish(self, source_id: str, picture: NDArray[np.uint8]) -> None:
        """See `PictureHub.publish`; a picture that is not `wanted` is not taken."""
        now_s = time.monotonic()
        with self._lock:
            slot = self._slots.get(source_id)
            if slot is None or slot.n_watches == 0 or now_s < slot.due_s:
                return
            # By schedule, not by the time since the last: a camera of 30 FPS jitters, and every second
            # picture of it would come a moment too early for 15 a second.
            on_time = now_s - slot.due_s < self._interval_s
            slot.due_s = (slot.due_s if on_time else now_s) + self._interval_s
            slot.picture, slot.published_s = picture, now_s
            slot.sequence += 1
            self.n_accepted += 1
        try:
            self._loop.call_soon_threadsafe(self._announce, slot)
        except RuntimeError:  # the loop is closed: the server is going, the runtime not yet
            return

    # --- the event loop's thread ------------------------------------------------------------------

    def watch(self, source_ids: Sequence[str]) -> Watch:
        """Watches sources, known or not, until the context is left."""
        return Watch(self, [self._slots.setdefault(name, _Slot(name)) for name in source_ids])

    def _announce(self, slot: _Slot) -> None:
        for watch in slot.watches:
            watch.changed.set()

    def enter(self, watch: Watch, slot: _Slot) -> int:
        """Adds a watch; returns the sequence number up to which it has nothing to see."""
        slot.watches.add(watch)
        with self._lock:
            slot.n_watches += 1
            fresh = slot.picture is not None and time.monotonic() - slot.published_s < _FRESH_S
            return slot.sequence - 1 if fresh else slot.sequence

    def leave(self, watch: Watch, slot: _Slot) -> None:
        """Removes a watch, and the pictures after the last."""
        slot.watches.discard(watch)
        with self._lock:
            slot.n_watches -= 1
            if slot.n_watches == 0:
                slot.picture = slot.encoded = None

    async def newest(self, slot: _Slot) -> JpegPicture | None:
        """The newest picture, encoded by whoever asks first; ``None`` if it cannot be."""
        if slot.encoded is None or slot.encoded.sequence != slot.sequence:
            if slot.encoding is None:
                slot.encoding = self._loop.create_task(self._encode_newest(slot))
            # Shielded: a client that leaves does not take the picture away from the others.
            await asyncio.shield(slot.encoding)
        return slot.encoded

    async def _encode_newest(self, slot: _Slot) -> None:
        try:
            with self._lock:
                picture, sequence = slot.picture, slot.sequence
            if picture is None:
                return
            jpeg = await self._loop.run_in_executor(self._executor, self._encode, picture)
            slot.encoded = JpegPicture(slot.source_id, sequence, jpeg)
            self.n_encoded += 1
        except Exception as error:  # one picture less, of many; whatever a codec raises
            slot.encoded = None
            _LOG.warning("a picture of %s was not sent: %s", slot.source_id, error)
        finally:
            slot.encoding = None


class Watch:
    """Pictures of some sources for one client, in turn: none waits while another is sent twice."""

    def __init__(self, hub: LatestPictures, slots: list[_Slot]) -> None:
        self._hub = hub
        self._slots = slots
        self._seen: dict[str, int] = {}
        self.changed = asyncio.Event()
        """Set when one of the sources has a new picture."""

    def __enter__(self) -> Watch:
        self._seen = {slot.source_id: self._hub.enter(self, slot) for slot in self._slots}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for slot in self._slots:
            self._hub.leave(self, slot)

    async def next(self, timeout_s: float) -> JpegPicture | None:
        """The newest picture that this client has not seen; ``None`` where none came in time."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            self.changed.clear()
            for slot in self._slots:
                if slot.sequence > self._seen[slot.source_id]:
                    picture = await self._hub.newest(slot)
                    self._seen[slot.source_id] = picture.sequence if picture else slot.sequence
                    self._slots.append(self._slots.pop(self._slots.index(slot)))
                    if picture is not None:
                        return picture
                    break
            else:
                try:
                    await asyncio.wait_for(self.changed.wait(), max(0.0, deadline_s - time.monotonic()))
                except asyncio.TimeoutError:
                    return None
