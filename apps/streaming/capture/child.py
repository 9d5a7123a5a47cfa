"""The capture process: opens one source, and writes its frames into shared memory until told to stop.

It has one thread, which is in `Source.read` most of the time and may never come back from it; ending
it is the supervisor's business. It stops by itself at the end of its socket, and dies with the thread
that started it (PR_SET_PDEATHSIG), however that one died.

The task is read from an anonymous file, not from the command line, where everybody could see the
credentials in it. There are no engines here: OpenCV and NumPy are all it imports.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import select
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apps.streaming.capture.fingerprint import fingerprint
from apps.streaming.capture.messages import (
    Alive,
    Dropped,
    Ended,
    Failed,
    FrameReady,
    Labels,
    Message,
    Opened,
    RingReady,
    decode_slot,
    encode,
)
from apps.streaming.capture.pacing import Pacer, pace_fps
from apps.streaming.capture.ring import RingWriter
from apps.streaming.frames import as_image, defect, picture_hw
from apps.streaming.queues import DropPolicy
from apps.streaming.sources import Delivered, ModelClasses, Source, SourceUri
from pipeline.errors import EdgefoldError, SourceLostError

__all__ = ["CaptureTask", "main"]

_PR_SET_PDEATHSIG = 1
_LABELS_A_MESSAGE = 200
_REPORT_S = 0.2
_NO_IMAGE_PAUSE_S = 0.01
_MESSAGE_CHARACTERS = 2000


@dataclass(frozen=True, slots=True)
class CaptureTask:
    """All that a capture process needs to know; pickled, so `opener` is a function of a module."""

    opener: Callable[[SourceUri, ModelClasses, float | None], Source]
    uri: SourceUri
    classes: ModelClasses
    fps: float | None
    policy: DropPolicy
    n_slots: int
    skip: int
    """Frames to pass over: what a recording had delivered before its capture was started again."""


class _Stop(Exception):
    """The supervisor wants no more frames, or is gone."""


class _Link:
    """The socket: messages out, free slots in."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._readable = select.poll()
        self._readable.register(connection, select.POLLIN)
        self.on_free: Callable[[int, int], None] = lambda generation, slot: None

    def send(self, message: Message, fd: int | None = None) -> None:
        """Raises `_Stop` where nobody listens any more."""
        try:
            if fd is None:
                self._socket.send(encode(message), socket.MSG_NOSIGNAL)
            else:
                socket.send_fds(self._socket, [encode(message)], [fd])
        except (BrokenPipeError, ConnectionResetError) as error:
            raise _Stop from error

    def wait(self, seconds: float | None) -> bool:
        """Takes what came; waits up to `seconds` for it (``None``: without limit). Whether any came."""
        came = False
        while self._readable.poll(0 if came else None if seconds is None else 1e3 * seconds):
            try:
                datagram = self._socket.recv(64)
            except ConnectionResetError as error:
                raise _Stop from error
            if not datagram:
                raise _Stop
            self.on_free(*decode_slot(datagram))
            came = True
        return came

    def pause(self, seconds: float) -> None:
        """Waits for `seconds`, taking what comes meanwhile."""
        until_s = time.monotonic() + seconds
        while (left_s := until_s - time.monotonic()) > 0:
            self.wait(left_s)


class _Capture:
    """Reads one open source to its end."""

    def __init__(self, source: Source, task: CaptureTask, link: _Link) -> None:
        self._source = source
        self._task = task
        self._link = link
        self._pacer = Pacer(pace_fps(source, task.policy, task.fps), time.monotonic())
        self._ring: RingWriter | None = None
        self._generation = 0
        self._shape: tuple[int, ...] = ()
        self._spare: NDArray[np.uint8] | None = None
        self._dropped: Counter[str] = Counter()
        self._reported_s = 0.0
        link.on_free = self._slot_is_free

    def run(self) -> None:
        while True:
            self._link.wait(0.0)
            slot = self._free_slot()
            started_s = time.monotonic()
            delivered = self._source.read(self._target(slot))
            if delivered is None:
                self._report_drops()
                return
            self._deliver(delivered, slot, time.monotonic() - started_s)

    def _deliver(self, delivered: Delivered, slot: int | None, capture_s: float) -> None:
        reason = defect(delivered.pixels)
        if reason is not None:
            self._give_back(slot)
            self._drop(reason)
            if self._source.live:
                self._link.pause(_NO_IMAGE_PAUSE_S)  # a camera that fails at once would spin
            return
        self._link.pause(self._pacer.delay_s(time.monotonic()))
        timestamp_ns = time.monotonic_ns()
        image, pixel_format = as_image(delivered.pixels, self._source.color, delivered.yuv)
        if self._ring is None or image.nbytes > self._ring.slot_bytes:
            slot = self._new_ring(image.nbytes)
        if slot is None:
            self._spare = image
            self._drop("no free buffer")
            return
        assert self._ring is not None
        self._shape = image.shape
        view = self._ring.view(slot, image.shape)
        if image.ctypes.data != view.ctypes.data:
            np.copyto(view, image)
        self._report_drops()
        height, width = picture_hw(image, pixel_format)
        self._link.send(
            FrameReady(
                generation=self._generation,
                slot=slot,
                height=height,
                width=width,
                pixel_format=pixel_format,
                yuv=delivered.yuv,
                label=delivered.label,
                timestamp_ns=timestamp_ns,
                capture_s=capture_s,
                fingerprint=fingerprint(view[:height]) if self._source.live else 0,
            )
        )

    def _target(self, slot: int | None) -> NDArray[np.uint8] | None:
        """Where the next frame is decoded to, if it is like the last one."""
        if self._ring is None:
            return None
        return self._spare if slot is None else self._ring.view(slot, self._shape)

    def _free_slot(self) -> int | None:
        """A slot. Under ``every`` it is waited for; under ``newest`` there may be none, and the camera
        is read all the same, for what is not read now would be old when it is."""
        if self._ring is None:
            return None
        while (slot := self._ring.acquire()) is None and self._task.policy == "every":
            self._report_drops()
            self._link.wait(None)
        return slot

    def _new_ring(self, slot_bytes: int) -> int | None:
        # The old one is unmapped here; there it lasts as long as frames in it do.
        self._ring = RingWriter(self._task.n_slots, slot_bytes)
        self._generation += 1
        self._spare = None
        try:
            self._link.send(RingReady(self._generation, self._task.n_slots, slot_bytes), self._ring.fd)
        finally:
            os.close(self._ring.fd)
        return self._ring.acquire()

    def _slot_is_free(self, generation: int, slot: int) -> None:
        if self._ring is not None and generation == self._generation:
            self._ring.release(slot)

    def _give_back(self, slot: int | None) -> None:
        if slot is not None:
            self._slot_is_free(self._generation, slot)

    def _drop(self, reason: str) -> None:
        self._dropped[reason] += 1
        if time.monotonic() - self._reported_s >= _REPORT_S:
            self._report_drops()

    def _report_drops(self) -> None:
        for reason, count in self._dropped.items():
            self._link.send(Dropped(reason, count))
        self._dropped.clear()
        self._reported_s = time.monotonic()


def _skip(source: Source, count: int, link: _Link) -> None:
    """Passes over what was delivered before."""
    said_s = time.monotonic()
    for _ in range(count):
        if source.read() is None:
            return
        link.wait(0.0)
        if time.monotonic() - said_s >= _REPORT_S:
            said_s = time.monotonic()
            link.send(Alive())


def _capture(task: CaptureTask, link: _Link) -> None:
    source = task.opener(task.uri, task.classes, task.fps)
    n_notes = 0
    try:
        if source.labels != task.classes.labels:
            for start in range(0, len(source.labels), _LABELS_A_MESSAGE):
                link.send(Labels(tuple(source.labels[start : start + _LABELS_A_MESSAGE])))
        n_notes = len(source.notes)
        link.send(Opened(source.fps, tuple(source.notes)))
        _skip(source, task.skip, link)
        _Capture(source, task, link).run()
    finally:
        source.close()
    link.send(Ended(tuple(source.notes[n_notes:])))


def _failure(error: Exception, uri: SourceUri) -> Failed:
    retry = error.retry if isinstance(error, SourceLostError) else None
    # Of its own errors the class matters; anything else is a fault of this program or of a library.
    kind = type(error).__name__ if isinstance(error, EdgefoldError) else EdgefoldError.__name__
    text = str(error) if isinstance(error, EdgefoldError) else f"{type(error).__name__}: {error}"
    return Failed(kind, uri.redact(text)[:_MESSAGE_CHARACTERS], retry)


def main(arguments: list[str]) -> None:
    """Args: descriptor of the socket, descriptor of the task, the parent's process id."""
    link_fd, task_fd, parent = map(int, arguments)
    libc: Any = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        return  # it died before it could have been noticed
    with os.fdopen(task_fd, "rb") as file:
        task: CaptureTask = pickle.load(file)
    with socket.socket(fileno=link_fd) as connection:
        connection.set_inheritable(False)
        link = _Link(connection)
        try:
            _capture(task, link)
        except _Stop:
            return
        except Exception as error:
            try:
                link.send(_failure(error, task.uri))
            except _Stop:
                return


if __name__ == "__main__":
    main(sys.argv[1:])
